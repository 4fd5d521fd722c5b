"""Our targets beside those of TRL's training templates (``assistant_only_loss``): every difference with its reason.

``python -m tests.text.chats.trl_masks`` rewrites the expected differences, so that a change shows as a diff.
"""

from collections.abc import Callable
from pathlib import Path

from transformers.utils.chat_template_utils import render_jinja_template

from logitcask.pipeline.text.chats.forms import forms
from logitcask.pipeline.text.columns import shape_record
from tests.text.chats.real_templates import (
    ORIGINAL,
    SHAPES,
    TEMPLATES,
    Outcome,
    outcome,
    tokenizer_with,
    tools_of,
    written,
)

EXPECTED = Path(__file__).with_suffix(".txt")
TRAINED = [name for name in ORIGINAL if f"{name}_training" in TEMPLATES]
PROMPTED = {  # what TRL labels although the model does not write it: the template gives it before the answer
    "deepseek_r1_distill": ("<｜Assistant｜><think>\n", "<｜Assistant｜>", "<｜tool▁outputs▁end｜>"),
    "deepseekv3": ("<｜Assistant｜><think>\n", "<｜Assistant｜>", "<｜tool▁outputs▁end｜>"),
    "gptoss": ("<|start|>assistant",),
    "muse_glimmer": ("<|start|>assistant",),
    "qwen2_5": ("\n",),
    "qwen3_5_nothink": ("<think>\n\n</think>\n\n", "<think>\n"),
    **dict.fromkeys(("qwen3_5_think", "qwen3_6", "qwen3_8"), ("<think>\n",)),
    **{name: ("<think>\n", "<think>") for name in ORIGINAL if name.startswith("nemotron_3")},
}


def _without_prompt(name: str, text: str) -> str:
    given = next((part for part in PROMPTED.get(name, ()) if text.startswith(part)), "")
    return text[len(given) :]


CHANGES: dict[str, Callable[[str, str], str]] = {  # of TRL's text, by the reason, to ours
    "labels white space after the end of a turn": lambda name, text: text.rstrip(),
    "labels the end of the text after the end of the turn": lambda name, text: (
        text.removesuffix("</s>").rstrip() if name.startswith("phi3") else text
    ),
    "labels what the generation prompt gives": _without_prompt,
    "ends a turn with the token that begins the next": lambda name, text: (
        text.removesuffix("<|user|>").removesuffix("<|observation|>") if name == "glm4moe" else text
    ),
    "ends earlier answers as later prompts show them, not as the model does": lambda name, text: (
        text.removesuffix("<|end|>") + "<|return|>" if name == "gptoss" and text.endswith("<|end|>") else text
    ),
}
OTHERWISE: dict[str, Callable[[list[str], list[str]], bool]] = {  # (TRL's texts, ours)
    "does not label the token that ends a call": lambda theirs, ours: "<|tool_response>" in ours[0],
    "lets an assistant begin": lambda theirs, ours: theirs[1:] == ours,
    "prints a list of parts as it is": lambda theirs, ours: any("text'" in text or 'text"' in text for text in theirs),
    "drops the reasoning of an earlier turn, or of every turn": lambda theirs, ours: any(
        word in b and word not in a for a, b in zip(theirs, ours, strict=True) for word in ("it is easy", "I call.")
    ),
    "writes reasoning after empty reasoning": lambda theirs, ours: any(
        text.count("</think>") > 1 for text in theirs
    ),
    "writes empty reasoning into every turn": lambda theirs, ours: (
        [text.removeprefix("<think>\n\n</think>\n\n") for text in theirs]
        == [text.removeprefix("<think>\n\n</think>\n\n") for text in ours]
    ),
    "labels the first token of a text, which nothing predicts": lambda theirs, ours: (
        theirs[0].endswith(ours[0]) and theirs[1:] == ours[1:]
    ),
}  # fmt: skip


def theirs(name: str, shape: str) -> list[str] | None:
    """Return the texts that a training template marks, None if it takes no form of the chat."""
    messages = shape_record({"messages": SHAPES[shape]}, {}).messages
    best: tuple[int, list[str]] | None = None
    for form in (form for group in forms(messages) for form in group):
        try:
            texts, places = render_jinja_template(
                [form], tools=tools_of(shape), chat_template=TEMPLATES[f"{name}_training"],
                return_assistant_tokens_mask=True, bos_token="<s>", eos_token="</s>",
            )  # fmt: skip
        except Exception:  # a template is a program of its own and raises what it likes
            continue
        blocks: list[tuple[int, int]] = []
        for begin, end in places[0]:  # those that touch are one
            joined = blocks and blocks[-1][1] == begin
            blocks[-1 if joined else len(blocks) :] = [(blocks[-1][0] if joined else begin, end)]
        labelled = [text for text in (str(texts[0])[begin:end] for begin, end in blocks) if text.strip()]
        wanted = [text for message in SHAPES[shape] for text in written(message)]
        score = sum(text in str(texts[0]) for text in wanted) + ("plus" in "".join(labelled))
        if best is None or score > best[0]:
            best = score, labelled
    return best and best[1]


def differences(name: str, outcomes: dict[str, Outcome]) -> list[str]:
    """Return the lines of a template: which shapes TRL labels otherwise than the outcomes, by reason."""
    found: dict[str, list[str]] = {}
    for shape, made in outcomes.items():
        marked = theirs(name, shape)
        for reason in reasons(name, marked, [text for _, text in made.targets], made.refused):
            found.setdefault(reason, []).append(shape)
        if made.how == "each":
            found.setdefault("puts all turns into one text, which is no prompt at inference", []).append(shape)
    labelled = [shape for shape, made in outcomes.items() if not made.refused]
    return [
        f"{name}\t{reason}\t{'all' if shapes == labelled else ', '.join(shapes)}" for reason, shapes in found.items()
    ]


def reasons(name: str, marked: list[str] | None, ours: list[str], refused: str) -> list[str]:
    """Return the reasons for which TRL's texts differ from ours."""
    if marked is None or refused:
        assert (marked is None) <= bool(refused), f"{name}: TRL refuses what is labelled here"
        return [] if marked is None else [f"labels it, though {refused}"]
    given = []
    for reason, change in CHANGES.items():
        changed = [change(name, text) for text in marked]
        given += [reason] if changed != marked else []
        marked = changed
    if marked != ours:
        other = next((reason for reason, holds in OTHERWISE.items() if holds(marked, ours)), None)
        assert other, f"{name}: no reason for {marked} where we label {ours}"
        given.append(other)
    return given


def expected(name: str) -> list[str]:
    """Return the expected differences of a template."""
    return [line for line in EXPECTED.read_text().splitlines() if line.startswith(f"{name}\t")]


if __name__ == "__main__":
    with EXPECTED.open("w") as file:
        for name in TRAINED:
            tokenizer = tokenizer_with(name)
            for line in differences(name, {shape: outcome(tokenizer, shape) for shape in SHAPES}):
                file.write(f"{line}\n")
