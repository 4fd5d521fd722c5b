"""A non-finite loss of the held-out examples stops the run and names the first such example."""

from pathlib import Path

import pytest
import torch

from logitcask.cache.errors import LogitcaskError
from logitcask.cache.reader import CacheReader
from logitcask.pipeline.batches.examples import CacheExamples
from logitcask.pipeline.batches.order import held_out
from tests.support.runs import STUDENT, train, write_config
from tests.support.tiny import make_cache
from tests.train.callbacks.test_nonfinite import damaged_at


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_cache(tmp_path_factory.mktemp("stock"))


def test_the_first_non_finite_held_out_example_is_named(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The student is damaged only for tokens that occur in a few held-out examples."""
    kept = held_out(24, 0.3, 0).tolist()
    reader = CacheReader(cache)
    tokens = [set(reader.example(i).input_ids.tolist()) for i in kept]
    bad = [n for n in range(2, len(kept)) if tokens[n] - set().union(*tokens[:n], *tokens[n + 1 :])]
    alone = [next(iter(tokens[n] - set().union(*tokens[:n], *tokens[n + 1 :]))) for n in bad]
    assert len(bad) > 1

    def damage_after(model: torch.nn.Module, where: str) -> None:
        with torch.no_grad():
            model.get_parameter("model.embed_tokens.weight")[alone] = torch.nan

    monkeypatch.setattr("logitcask.pipeline.train.student.require_finite", damage_after)
    with pytest.raises(LogitcaskError) as refused:
        train(cache, tmp_path / "run", batch_size=2, eval_fraction=0.3, student_config=untied(tmp_path))
    assert str(refused.value).startswith(
        f"step 0: non-finite loss (nan) of the held-out examples, first at example {kept[bad[0]]} of the cache or "
        "data; likely cause: --learning-rate"
    )


def untied(folder: Path) -> Path:
    return write_config(folder / "untied.json", {**STUDENT, "tie_word_embeddings": False})


def test_a_non_finite_held_out_label_is_named(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = int(held_out(24, 0.1, 0)[1])
    monkeypatch.setattr(CacheExamples, "__getitem__", damaged_at(bad))
    with pytest.raises(LogitcaskError) as refused:
        train(cache, tmp_path / "run", batch_size=8, max_steps=3)
    assert (
        f"(nan) of the held-out examples, first at example {bad} of the cache or data; "
        f"likely cause: the label of example {bad} is non-finite" in str(refused.value)
    )
