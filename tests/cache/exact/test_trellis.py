"""The trellis of exact labels' codes, and the search along it, against slow forms of both."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from logitcask.cache.exact.code import LEVELS, Codes, largest_codes, pack, unpack
from logitcask.cache.exact.head import decode
from logitcask.cache.exact.trellis import CHAIN, codes_of, values_of
from logitcask.cache.labels import ExactTargets
from logitcask.cache.layout import decode_targets, encode_targets
from logitcask.pipeline.teachers.exact import viterbi
from logitcask.pipeline.teachers.exact.coder import HiddenCoder
from tests.support.exact import ON_A_TRELLIS, TRELLIS, random_head
from tests.support.tiny import sound_shards

NEXT = ((0, 2), (2, 0), (1, 3), (3, 1))  # states of H.266, by parity; 2 and 3 are read on the odd ruler


def slow_values(codes: list[int]) -> list[int]:
    """Return what a row of codes stands for, by the table of states of H.266."""
    state, values = 0, []
    for place, code in enumerate(codes):
        state = 0 if place % CHAIN == 0 else state
        values.append(2 * code - (state >= 2) * int(np.sign(code)))
        state = NEXT[state][code % 2]
    return values


@given(st.integers(1, 200), st.integers(0, 2**32))
def test_values_are_those_of_the_state_machine_and_give_the_codes_back(count: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(-9, 10, (3, count)).astype(np.int16)
    values = values_of(codes)
    assert values.tolist() == [slow_values(row) for row in codes.tolist()]
    assert values.dtype == np.int16
    np.testing.assert_array_equal(codes_of(values), codes)


@pytest.mark.parametrize("spread", [0.3, 1.5, 4.0])
def test_the_search_finds_the_nearest_of_all(spread: float) -> None:
    rows = torch.from_numpy(np.random.default_rng(0).normal(0.0, spread, (12, 5)).astype(np.float32))
    all_codes: Codes = np.array(list(itertools.product(range(-5, 6), repeat=5)), np.int16)
    least = ((values_of(all_codes)[None] - rows.numpy()[:, None]) ** 2).sum(2).min(1)
    found = viterbi.nearest(rows)
    np.testing.assert_allclose(((found - rows) ** 2).sum(1), least, rtol=1e-5)


def test_what_is_found_is_on_the_trellis_whatever_is_sought_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = 20 * torch.randn(50, 2 * CHAIN + 7, generator=torch.Generator().manual_seed(0))
    found = viterbi.nearest(rows)
    values = found.to(torch.int16).numpy()
    np.testing.assert_array_equal(values_of(codes_of(values)), values)
    monkeypatch.setattr(viterbi, "AT_ONCE", 300)
    assert torch.equal(viterbi.nearest(rows), found)


def test_a_tenth_of_a_bit_is_saved_at_no_more_error() -> None:
    """Normal values of a deviation of 4 steps without a trellis: entropy of codes, and mean square error, of both."""
    plain = 4 * torch.randn(4000, CHAIN, generator=torch.Generator().manual_seed(0))
    step = 0.57
    found = viterbi.nearest(plain / step)
    error, usual = (float((values - plain).square().mean()) for values in (step * found, plain.round()))
    assert error < usual
    assert entropy(plain.round().numpy()) - entropy(codes_of(found.to(torch.int16).numpy())) > 0.1


def entropy(codes: Codes) -> float:
    _, counts = np.unique(codes, return_counts=True)
    shares = counts / counts.sum()
    return float(-(shares * np.log2(shares)).sum())


def test_a_value_beyond_its_column_moves_no_other() -> None:
    """A code that were cut when it is packed could change the ruler of those after it."""
    targets, head = sound_shards(ON_A_TRELLIS, [3], 40.0)[0].targets, random_head()
    coder = HiddenCoder(head, ON_A_TRELLIS, torch.device("cpu"))
    hidden = np.random.default_rng(0).normal(0.0, 1.0, (len(targets), head.basis.shape[1])).astype(np.float32)
    for column in range(TRELLIS.kept):
        far = torch.from_numpy(hidden + 2e3 * head.forward[:, column])
        labels = coder.encode(far, targets)
        read = decode_targets(encode_targets(labels, ON_A_TRELLIS), ON_A_TRELLIS)
        assert isinstance(read, ExactTargets)
        np.testing.assert_array_equal(read.codes, labels.codes)
        others = np.delete((decode(read, head) - hidden) @ head.forward, column, axis=1)
        assert np.abs(others).max() < 4 * read.steps.max()


def test_the_largest_codes_are_kept() -> None:
    for count in range(4):
        columns = [0] * count + [3] + [0] * (3 - count)
        most = largest_codes(columns)
        assert most.tolist() == [127 * LEVELS[count]] * 3
        codes = np.stack([most, -most]).astype(np.int16)
        np.testing.assert_array_equal(unpack(*pack(codes, columns), columns), codes)
