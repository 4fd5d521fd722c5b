"""A teacher in memory: exact distillation, the reference against which a cache is measured."""

from pathlib import Path

import numpy as np
import pytest

from logitcask.cache.errors import LogitcaskError
from tests.support.runs import history, losses, train
from tests.support.tiny import make_cache, make_teacher
from tests.train.test_train import dense

WHOLE = {
    "batch_size": 24,
    "eval_fraction": 0.0,
    "max_steps": 1,
    "max_seq_length": 64,
}  # one batch, so that order does not matter
STILL = {"learning_rate": 1e-12, "weight_decay": 0.0}


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("online")
    make_cache(folder, head_size=8, tail_draws=64)
    return folder


def online(stock: Path, output: Path, **changes: object) -> Path:
    options = {"train_data": str(stock / "train.jsonl"), "teacher_model": str(stock / "teacher"), **changes}
    return train(None, output, **options)


@pytest.mark.parametrize("t", [1.0, 2.0, 3.0])
@pytest.mark.parametrize("kind", ["logit", "hybrid"])
def test_the_loss_is_that_of_the_full_distributions(stock: Path, tmp_path: Path, t: float, kind: str) -> None:
    run = online(stock, tmp_path / "run", distillation_type=kind, temperature=t, **WHOLE, **STILL)
    log_p, gold = dense(stock / "teacher", stock / "cache", list(range(24)), t)
    log_q, _ = dense(run / "final", stock / "cache", list(range(24)), t)
    soft = t * t * float((log_p.exp() * (log_p - log_q)).sum(1).mean())
    log_q_1, _ = dense(run / "final", stock / "cache", list(range(24)))
    hard = -float(log_q_1.gather(1, gold[:, None]).mean())
    (line,) = history(run)
    assert line["soft_loss"] == pytest.approx(soft, rel=1e-5)
    assert line["hard_loss"] == pytest.approx(hard, rel=1e-5)
    assert line["total_loss"] == pytest.approx({"logit": soft, "hybrid": 0.9 * soft + 0.1 * hard}[kind], rel=1e-5)


@pytest.mark.parametrize("divergence", ["reverse-kl", "jsd", "tvd", "example_loss:skewed_kl"])
def test_other_divergences_are_those_of_the_full_distributions(
    stock: Path, tmp_path: Path, divergence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(__file__).parent.parent / "library")
    how = {"loss": divergence} if ":" in divergence else {"divergence": divergence}
    run = online(stock, tmp_path / "run", distillation_type="logit", temperature=2.0, **how, **WHOLE, **STILL)
    log_p, _ = dense(stock / "teacher", stock / "cache", list(range(24)), 2.0)
    log_q, _ = dense(run / "final", stock / "cache", list(range(24)), 2.0)
    p, q = log_p.exp(), log_q.exp()
    m, skewed = (p + q) / 2, 0.1 * p + 0.9 * q
    expected = {
        "reverse-kl": q * (log_q - log_p),
        "jsd": 0.5 * (p * (log_p - m.log()) + q * (log_q - m.log())),
        "tvd": 0.5 * (p - q).abs(),
        "example_loss:skewed_kl": p * (log_p - skewed.log()),
    }[divergence]
    (line,) = history(run)
    assert line["soft_loss"] == pytest.approx(4.0 * float(expected.sum(1).mean()), rel=1e-4)


def test_a_cache_of_many_draws_comes_close(stock: Path, tmp_path: Path) -> None:
    """The same batch, once with 8 + 64 entries per position from the cache, once with the teacher's full vocabulary."""
    exact = online(stock, tmp_path / "exact", distillation_type="logit", **WHOLE, learning_rate=1e-3)
    cached = train(stock / "cache", tmp_path / "cached", distillation_type="logit", **WHOLE, learning_rate=1e-3)
    np.testing.assert_allclose(losses(cached, "soft_loss"), losses(exact, "soft_loss"), rtol=0.1)
    np.testing.assert_allclose(losses(cached, "hard_loss"), losses(exact, "hard_loss"), rtol=1e-5)


def test_a_stopped_run_resumes(stock: Path, tmp_path: Path) -> None:
    teacher = make_teacher(tmp_path / "teacher")
    options = {"max_steps": 4, "save_steps": 2, "batch_size": 4, "max_seq_length": 64, "teacher_model": str(teacher)}
    straight = online(stock, tmp_path / "straight", **options)
    resumed = {**options, "resume_from_checkpoint": str(straight / "checkpoint-2"), "output_dir": tmp_path / "more"}
    again = online(stock, tmp_path / "more", student_config=tmp_path / "straight.json", **resumed)
    assert losses(again) == losses(straight)
    make_teacher(teacher, seed=9)  # other weights under the same name
    with pytest.raises(LogitcaskError, match="another run: source"):
        online(stock, tmp_path / "more", student_config=tmp_path / "straight.json", **resumed)
