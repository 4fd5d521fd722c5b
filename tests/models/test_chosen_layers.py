"""Layers of a teacher chosen by their effect on the loss: against students that are built without a layer."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from logitcask.cache.errors import LogitcaskError
from logitcask.pipeline.models.load import probe_logits
from logitcask.pipeline.models.students.choose import (
    PROBE_TOKENS,
    SHORTLIST,
    Probe,
    choose_layers,
    influence,
    losses_without,
    partial_model,
)
from logitcask.pipeline.models.students.layers import keep_layers
from logitcask.pipeline.text.tokens.encoded import Encoded
from tests.models.test_layers import make


def examples(count: int = 3, vocabulary: int = 96) -> list[Encoded]:
    """Return examples of 8 tokens and more, of which the later ones are targets."""
    random = np.random.default_rng(0)
    lengths = [8 + 3 * n for n in range(count)]
    return [Encoded(random.integers(1, vocabulary, n), np.arange(n) % n >= 3) for n in lengths]


def llama(layers: int, *, identity: int | None = None) -> PreTrainedModel:
    """Return a random teacher; one of its layers may give what it gets."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "initializer_range": 0.3}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=layers, num_attention_heads=4)).eval()
    with torch.no_grad():
        for name in ("self_attn.o_proj", "mlp.down_proj") if identity is not None else ():
            model.model.layers[identity].get_submodule(name).weight.zero_()
    return model


def written_by(model: PreTrainedModel) -> list[Encoded]:
    """Return what a model writes, which any change to it makes less likely."""
    starts = torch.arange(1, 7)[:, None] * 11
    rows = model.generate(starts, do_sample=False, max_new_tokens=12, pad_token_id=0).numpy()
    return [Encoded(row, np.arange(len(row)) < len(row) - 1) for row in rows]


def own_loss(model: PreTrainedModel, among: list[Encoded]) -> float:
    """Return the mean loss of the target tokens, example by example, from the model's own logits."""
    losses = []
    for example in among:
        ids, at = torch.from_numpy(example.input_ids)[None], np.flatnonzero(example.target_mask[:-1])
        with torch.no_grad():
            log_probs = model(input_ids=ids, use_cache=False).logits[0].double().log_softmax(1)
        losses += [-float(log_probs[place, example.input_ids[place + 1]]) for place in at]
    return float(np.mean(losses))


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "mamba", "gpt_neox", "falcon"])
def test_a_layer_left_out_is_a_student_without_it(name: str) -> None:
    teacher, among = make(name), examples()
    probe, every = Probe.of(among, torch.device("cpu")), list(range(6))
    whole, loss_of_all = probe_logits(teacher), own_loss(teacher, among)
    with partial_model(teacher) as partial:
        seen, last = partial.between(probe, every)
        assert partial.loss(probe, last) == pytest.approx(loss_of_all, rel=1e-5)
        fewer = [0, 2, 4, 5]
        again = partial.between(probe, fewer)[0]
        without = [
            (every, losses_without(partial, probe, every, every, seen)),
            (fewer, losses_without(partial, probe, fewer, [4], again)),
        ]
    torch.testing.assert_close(probe_logits(teacher), whole, rtol=0.0, atol=0.0)  # it is whole again
    compared = 0
    for kept, losses in without:
        for left_out, loss in losses.items():
            try:
                student = keep_layers(teacher, ",".join(str(i) for i in kept if i != left_out))
            except LogitcaskError:  # such layers are no model of their own
                continue
            assert loss == pytest.approx(own_loss(student, among), rel=1e-4)
            compared += 1
    assert compared >= 2


def test_a_layer_that_does_nothing_goes_first() -> None:
    for place in (0, 3, 5):
        teacher = llama(6, identity=place)
        assert choose_layers(teacher, written_by(teacher), 5) == [i for i in range(6) if i != place]


def test_one_layer_is_removed_as_trying_all_of_them_would() -> None:
    teacher, among = llama(SHORTLIST), examples()
    subsets = itertools.combinations(range(SHORTLIST), SHORTLIST - 1)
    best = min(subsets, key=lambda kept: own_loss(keep_layers(teacher, ",".join(map(str, kept))), among))
    assert choose_layers(teacher, among, SHORTLIST - 1) == list(best)


def test_the_shortlist_is_of_layers_that_change_least(capsys: pytest.CaptureFixture[str]) -> None:
    teacher, among = llama(8, identity=3), examples()
    probe = Probe.of(among, torch.device("cpu"))
    with partial_model(teacher) as partial:
        changes = influence(probe, partial.between(probe, list(range(8)))[0])
    assert changes[3] == pytest.approx(0.0, abs=1e-6)
    least = sorted(changes, key=lambda i: changes[i])[:SHORTLIST]
    (removed,) = set(range(8)) - set(choose_layers(teacher, among, 7))
    assert removed in least
    first = choose_layers(teacher, among, 3)
    assert first == choose_layers(teacher, among, 3) == sorted(first)
    assert f"layers    3 of 8: {','.join(map(str, first))}: loss " in capsys.readouterr().err


def test_more_layers_than_there_are() -> None:
    with pytest.raises(LogitcaskError, match=r"auto:5: the teacher has 4 layers: keep at most as many"):
        choose_layers(llama(4), examples(), 5)
    assert choose_layers(llama(4), examples(), 4) == [0, 1, 2, 3]


def test_a_long_example_is_cut() -> None:
    long = Encoded(np.arange(5000) % 96, np.ones(5000, dtype=bool))
    probe = Probe.of([long, examples()[0]], torch.device("cpu"))
    assert probe.ids_BL.shape == (2, PROBE_TOKENS)
    assert int(probe.is_target_BL.sum()) == PROBE_TOKENS - 1 + 4
    asked = Encoded(long.input_ids, np.arange(5000) >= 4000)  # a long prompt: what is learned counts, not it
    probe = Probe.of([asked], torch.device("cpu"))
    half = PROBE_TOKENS // 2
    assert probe.is_target_BL[0].tolist() == [half <= place < PROBE_TOKENS - 1 for place in range(PROBE_TOKENS)]
    assert int(probe.ids_BL[0, 0]) == (4000 - half) % 96
