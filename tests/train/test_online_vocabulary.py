"""A teacher in memory whose tokenizer is not the student's: the labels of stage 1, whole, computed at every step."""

from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import normalizers
from transformers import LlamaForCausalLM

from logitcask.cache.errors import LogitcaskError
from logitcask.pipeline.precompute.precompute import precompute
from tests.precompute.test_other_vocabulary import reversed_ids
from tests.support.runs import history, losses, train
from tests.support.tiny import RECORDS, make_teacher, make_tokenizer, precompute_settings, write_jsonl
from tests.train.test_online import STILL, WHOLE


@pytest.fixture(autouse=True)
def _tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A teacher, a student with a smaller vocabulary, and texts."""
    make_teacher(tmp_path / "teacher")
    make_teacher(tmp_path / "student", vocab_size=280, seed=5)
    write_jsonl(tmp_path / "train.jsonl", RECORDS)
    return tmp_path


def online(data: Path, name: str, **changes: object) -> Path:
    models = {"teacher_model": str(data / "teacher"), "student_model": str(data / "student")}
    return train(None, data / name, **{"train_data": str(data / "train.jsonl"), **models, **WHOLE, **changes})


@pytest.mark.parametrize("t", [1.0, 2.0])
def test_the_loss_is_that_of_a_cache_with_all_tokens_in_the_head(data: Path, t: float) -> None:
    options = {"student_tokenizer": str(data / "student"), "head_size": 280, "tail_draws": 0}
    precompute(precompute_settings(data, **options))
    how = {"distillation_type": "hybrid", "temperature": t}
    cached = train(data / "cache", data / "cached", student_model=str(data / "student"), **{**WHOLE, **STILL, **how})
    (line,), (other,) = history(cached), history(online(data, "run", **STILL, **how))
    assert other["tokens"] == line["tokens"]
    assert other["hard_loss"] == pytest.approx(line["hard_loss"], rel=1e-6)
    assert other["soft_loss"] == pytest.approx(line["soft_loss"], rel=5e-3)  # codes of 1/8 nat in the cache


def test_small_slices_give_the_same_losses_of_every_kind(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parent.parent / "library")
    for name, how in (
        ("kl", {}),
        ("reverse", {"divergence": "reverse-kl"}),
        ("own", {"loss": "example_loss:skewed_kl"}),
    ):
        whole = online(data, name, **how)
        with monkeypatch.context() as patch:
            for module in ("models.fused_loss", "train.sources.teacher"):
                patch.setattr(f"logitcask.pipeline.{module}.SLICE_LOGITS", 300 * 20)
            cut = online(data, f"{name}-cut", **how)
        assert np.isfinite(losses(whole)).all()
        assert losses(cut, "soft_loss") == pytest.approx(losses(whole, "soft_loss"), rel=1e-5)


def test_the_same_tokens_under_other_ids_give_the_same_run(data: Path) -> None:
    plain, other = data / "plain", data / "reversed"
    make_teacher(plain, seed=5)
    reversed_ids(other, make_tokenizer())
    model = LlamaForCausalLM.from_pretrained(plain)
    with torch.no_grad():
        for module in (model.get_input_embeddings(), model.get_output_embeddings()):
            size = len(make_tokenizer())
            module.weight[:size] = module.weight[:size].flip(0)
    model.save_pretrained(other)
    how = {"distillation_type": "logit", "learning_rate": 1e-3, "max_steps": 3, "save_steps": 3}
    same = online(data, "one", student_model=str(plain), **how)
    permuted = online(data, "two", student_model=str(other), **how)
    for name in ("soft_loss", "hard_loss"):
        assert losses(permuted, name) == pytest.approx(losses(same, name), rel=1e-5)


def test_a_stopped_run_resumes_and_the_teachers_texts_belong_to_it(data: Path) -> None:
    options = {"max_steps": 4, "save_steps": 2, "batch_size": 4}
    straight = online(data, "straight", **options)
    resumed = {**options, "resume_from_checkpoint": str(straight / "checkpoint-2")}
    assert losses(online(data, "more", **resumed)) == losses(straight)
    make_teacher(data / "teacher", vocab_size=290)
    with pytest.raises(LogitcaskError, match="another run: source"):
        online(data, "more", **resumed)


def test_what_cannot_be_done_is_one_line(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    online(data, "run", max_steps=1)
    assert "positions 79.4% aligned, 20.6% straddling, 0.0% unlabelled: " in capsys.readouterr().err
    write_jsonl(data / "ids.jsonl", [{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}])
    with pytest.raises(LogitcaskError, match="labels in another vocabulary need text"):
        online(data, "no", train_data=str(data / "ids.jsonl"))
    lower = make_tokenizer()
    lower.backend_tokenizer.normalizer = normalizers.Lowercase()
    lower.save_pretrained(data / "student")
    with pytest.raises(LogitcaskError, match="keeps texts as they are"):
        online(data, "no")
