"""Chats of every shape by the templates of real models: as expected, and by rules that hold for all of them."""

from collections import Counter
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from tests.text.chats import trl_masks
from tests.text.chats.real_templates import (
    OLDER,
    ORIGINAL,
    SHAPES,
    TEMPLATES,
    Outcome,
    expected,
    outcome,
    prompts_at_inference,
    tokenizer_with,
    written,
)

pytestmark = pytest.mark.skipif(OLDER, reason="the outcomes are those of the templates of TRL 1.16")

GUIDE = Path(__file__).parents[3] / "docs" / "guides" / "chats.md"
DROPS, REFUSES = "the chat template drops ", "the chat template refuses it: "


@pytest.mark.parametrize("name", ORIGINAL)
def test_chats_of_every_shape_are_labelled_or_refused_for_the_templates_own_reason(name: str) -> None:
    """TRL's masks are compared here too: encoding takes the time."""
    tokenizer, lines = tokenizer_with(name), expected()
    outcomes = {shape: outcome(tokenizer, shape) for shape in SHAPES}
    for shape, made in outcomes.items():
        assert made.line() == lines[name, shape], shape
        if not made.refused:
            require_the_models_own_text(tokenizer, shape, made)
        elif not made.refused.startswith(DROPS):
            assert made.refused.startswith(REFUSES), shape
            assert made.refused.removeprefix(REFUSES).rstrip(".") in TEMPLATES[name], shape
    if name in trl_masks.TRAINED:
        assert trl_masks.differences(name, outcomes) == trl_masks.expected(name)


def require_the_models_own_text(tokenizer: PreTrainedTokenizerFast, shape: str, made: Outcome) -> None:
    """Each answer is a target up to its end of turn, after what the model sees at inference; nothing else is one."""
    messages, said = SHAPES[shape], "".join(made.notices)
    answers = [(place, message) for place, message in enumerate(messages) if message["role"] == "assistant"]
    answers = answers[1:] if "does not let an assistant begin" in said else answers
    for (place, message), (before, target) in zip(answers, made.targets, strict=True):
        assert all(text in target for text in written(message, said)), shape
        assert "None" not in target, shape
        others = [text for other in messages if other["role"] != "assistant" for text in written(other)]
        assert not any(text in target for text in others), shape
        seen = [text for other in messages[:place] if other["role"] != "assistant" for text in written(other)]
        assert all(text in before for text in seen), shape
        assert "'text'" not in before, shape
        last = tokenizer.encode(target, add_special_tokens=False)[-1]
        assert last in tokenizer.added_tokens_decoder or "no end of turn" in said, shape
        prompts = prompts_at_inference(tokenizer, shape, place) if place else [before]
        rests = [prompt.removeprefix(before) for prompt in prompts if prompt.startswith(before)]
        assert any(not rest.strip() or repr(rest) in said for rest in rests), shape


def test_the_guide_has_every_difference_from_trls_masks() -> None:
    table = GUIDE.read_text().split("| TRL … |")[1].splitlines()[2:]
    listed = {cells[0].removeprefix("| "): int(cells[1]) for cells in (row.split(" | ") for row in table)}
    counts = Counter(line.split("\t")[1] for line in trl_masks.EXPECTED.read_text().splitlines())
    assert listed == dict(counts)
    assert f"TRL has training templates for {len(trl_masks.TRAINED)} of them" in GUIDE.read_text()
    assert f"{len(SHAPES)} shapes of chats with each of the {len(ORIGINAL)} templates" in GUIDE.read_text()
