"""The page on labels from a forward pass of one's own: its program is the example, whose labels are stage 1's."""

import runpy
import sys
from pathlib import Path

import numpy as np
import pytest

import logitcask as lc
from logitcask.cache.labels import Example
from logitcask.cache.verify import verify
from tests.support.tiny import make_cache

EXAMPLE = Path(__file__).with_name("example_forward_pass.py")
PAGE = Path(__file__).parents[2] / "docs" / "guides" / "your-own-forward-pass.md"


def test_the_pages_program_writes_stage_1s_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = EXAMPLE.read_text()
    assert f"```py\n{code[code.index('import json') :]}```" in PAGE.read_text()
    stage_1 = make_cache(tmp_path, temperatures="1,2")
    own = tmp_path / "own"
    monkeypatch.setattr(sys, "argv", ["", str(tmp_path / "teacher"), str(tmp_path / "train.jsonl"), str(own)])
    runpy.run_path(str(EXAMPLE))
    assert verify(own).problems == []

    def by_tokens(place: Path) -> dict[tuple[int, ...], Example]:
        return {tuple(example.input_ids.tolist()): example for example in lc.open(place)}

    wanted = by_tokens(stage_1)
    found = by_tokens(own)
    assert found.keys() == wanted.keys()
    for tokens, example in found.items():
        want = wanted[tokens]
        np.testing.assert_array_equal(example.target_mask, want.target_mask)
        np.testing.assert_array_equal(example.targets.head_ids[:, :4], want.targets.head_ids)
        np.testing.assert_array_equal(example.targets.head_logprobs[:, :4], want.targets.head_logprobs)
        np.testing.assert_array_equal(example.targets.gold_logprobs, want.targets.gold_logprobs)
