"""Stage 2 with the real Trainer on tiny students: steps, resumption, and the files that a run leaves."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from logitcask.cache.reader import CacheReader
from logitcask.pipeline.batches.order import BatchSampler, held_out
from tests.support.runs import STUDENT, history, losses, metrics, train, weights, write_config
from tests.support.tiny import make_cache

LOGGED = {"total_loss", "hard_loss", "soft_loss", "learning_rate", "perplexity", "teacher_captured_mass",
          "student_head_mass", "padding"}  # fmt: skip
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}
LLAMA_LIKE = {**SIZES, "intermediate_size": 64, "num_key_value_heads": 2, "head_dim": 8}
MOE = {**LLAMA_LIKE, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
ARCHITECTURES: dict[str, dict[str, object]] = {
    "llama": {"model_type": "llama", **LLAMA_LIKE, "tie_word_embeddings": False},
    "gpt2": {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "qwen2": {"model_type": "qwen2", **LLAMA_LIKE, "max_window_layers": 2},
    "qwen3": {"model_type": "qwen3", **LLAMA_LIKE},
    "qwen3-moe": {"model_type": "qwen3_moe", **MOE},
    "gemma3": {"model_type": "gemma3_text", **LLAMA_LIKE, "final_logit_softcapping": 0.5, "sliding_window": 8},
    "opt": {"model_type": "opt", **SIZES, "ffn_dim": 64, "word_embed_proj_dim": 16},
    "gpt-neox": {"model_type": "gpt_neox", **SIZES, "intermediate_size": 64},
}


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny teacher and its cache of 24 examples; no test changes them."""
    folder = tmp_path_factory.mktemp("stock")
    make_cache(folder)
    return folder


@pytest.fixture(scope="module")
def cache(stock: Path) -> Path:
    return stock / "cache"


def dense(model: Path, cache: Path, examples: list[int], temperature: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return log q_T (N, V) of a plain model at all target positions of some examples, and the next tokens (N,)."""
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    rows, gold = [], []
    reader = CacheReader(cache)
    for index in examples:
        example = reader.example(index)
        with torch.no_grad():
            logits_LV = plain(input_ids=torch.from_numpy(example.input_ids)[None]).logits[0].double()
        at = torch.from_numpy(np.flatnonzero(example.target_mask))
        rows.append((logits_LV[at] / temperature).log_softmax(1))
        gold.append(torch.from_numpy(example.input_ids)[at + 1])
    return torch.cat(rows), torch.cat(gold)


def assert_same_weights(one: Path, other: Path, atol: float = 0.0) -> None:
    torch.testing.assert_close(weights(one / "final"), weights(other / "final"), rtol=0.0, atol=atol)


@pytest.mark.parametrize(("batch", "parts"), [(8, 4), (10, 2)])
def test_accumulation_equals_one_batch(cache: Path, tmp_path: Path, batch: int, parts: int) -> None:
    """Also if the last step of an epoch is shorter, and across epochs."""
    options = {"max_steps": 7, "eval_fraction": 0.0, "learning_rate": 1e-3}
    whole = train(cache, tmp_path / "whole", batch_size=batch, **options)
    cut = train(cache, tmp_path / "cut", batch_size=batch // parts, gradient_accumulation_steps=parts, **options)
    for name in ("total_loss", "hard_loss", "soft_loss", "grad_norm"):
        np.testing.assert_allclose(losses(cut, name), losses(whole, name), rtol=1e-4)
    assert_same_weights(whole, cut, atol=2e-5)


def test_hybrid_with_alpha_1_is_output(cache: Path, tmp_path: Path) -> None:
    hybrid = train(cache, tmp_path / "hybrid", distillation_type="hybrid", alpha=1.0)
    output = train(cache, tmp_path / "output", distillation_type="output")
    assert losses(hybrid) == losses(output)
    assert losses(output) == losses(output, "hard_loss")
    assert_same_weights(hybrid, output)


def test_the_total_is_alpha_hard_and_the_rest_soft(cache: Path, tmp_path: Path) -> None:
    run = train(cache, tmp_path / "run", alpha=0.3)
    mixed = 0.3 * np.array(losses(run, "hard_loss")) + 0.7 * np.array(losses(run, "soft_loss"))
    np.testing.assert_allclose(losses(run), mixed, rtol=1e-5)


def test_evaluation_is_the_loss_of_training_on_the_same_examples(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over batches of unequal size: a mean of means would differ."""
    nobody = np.zeros(0, dtype=np.int64)
    monkeypatch.setattr("logitcask.pipeline.train.sources.source.held_out", lambda count, *_: np.arange(count))
    monkeypatch.setattr(
        "logitcask.pipeline.train.sources.source.BatchSampler",
        lambda starts, _, *rest, **named: BatchSampler(starts, nobody, *rest, **named),
    )
    run = train(cache, tmp_path / "run", batch_size=5, gradient_accumulation_steps=5, max_steps=1)
    before = metrics(run)["before"]
    for name in ("total_loss", "hard_loss", "soft_loss", "perplexity", "teacher_captured_mass", "student_head_mass"):
        assert before[f"eval_{name}"] == pytest.approx(history(run)[0][name], rel=1e-5)


def test_a_moved_cache_gives_the_same_run(cache: Path, tmp_path: Path) -> None:
    here = train(cache, tmp_path / "here")
    shutil.copytree(cache, tmp_path / "copy")
    shutil.move(tmp_path / "copy", tmp_path / "elsewhere" / "moved")
    there = train(tmp_path / "elsewhere" / "moved", tmp_path / "there")
    assert losses(here) == losses(there)
    assert_same_weights(here, there)


@pytest.fixture(scope="module")
def straight(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 3 epochs of 3 steps each, with dropout, that keeps every checkpoint."""
    folder = tmp_path_factory.mktemp("straight")
    return train(cache, folder / "run", **long_run(folder))


def long_run(folder: Path) -> dict[str, object]:
    student = write_config(folder / "dropout.json", {**STUDENT, "attention_dropout": 0.2})
    return {"student_config": student, "batch_size": 4, "gradient_accumulation_steps": 2, "max_steps": 9,
            "save_steps": 1, "save_total_limit": 99, "eval_steps": 2}  # fmt: skip


@pytest.mark.parametrize("stop", [3, 4, 8], ids=["after an epoch", "within an epoch", "before the end"])
def test_stopped_and_resumed_equals_the_uninterrupted_run(
    straight: Path, cache: Path, tmp_path: Path, stop: int
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    shutil.copytree(straight / f"checkpoint-{stop}", run / f"checkpoint-{stop}")
    options = {**long_run(straight.parent), "resume_from_checkpoint": "latest"}
    train(cache, run, **options)
    assert_same_weights(straight, run)
    assert losses(run) == losses(straight)
    assert len(losses(run)) == 9
    assert metrics(run)["after"] == metrics(straight)["after"]


def test_a_checkpoint_without_settings_is_not_complete(straight: Path, cache: Path, tmp_path: Path) -> None:
    """After a kill while a checkpoint is written, the previous one is used."""
    run = tmp_path / "run"
    for step in (5, 6):
        shutil.copytree(straight / f"checkpoint-{step}", run / f"checkpoint-{step}")
    (run / "checkpoint-6" / "settings.json").unlink()
    (run / "checkpoint-6" / "model.safetensors").write_bytes(b"torn")
    train(cache, run, **long_run(straight.parent), resume_from_checkpoint="latest")
    assert_same_weights(straight, run)


def test_old_checkpoints_are_dropped(cache: Path, tmp_path: Path) -> None:
    run = train(cache, tmp_path / "run", save_steps=1, save_total_limit=2)
    assert {folder.name for folder in run.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-3"}


def test_the_parts_of_the_loss_are_logged(straight: Path) -> None:
    for entry in history(straight):
        assert entry.keys() >= LOGGED
        assert "loss" not in entry  # the Trainer's own mean of means
        assert entry["perplexity"] == pytest.approx(np.exp(entry["hard_loss"]), rel=1e-4)
        assert 0.0 < entry["teacher_captured_mass"] < 1.0
        assert 0.0 < entry["student_head_mass"] < 1.0


def test_the_soft_loss_pulls_the_student_towards_the_teacher(stock: Path, tmp_path: Path) -> None:
    """Measured by the dense KL of the plain models at T, which shares no code with the loss. Many draws, because a
    student that sees so few examples so often would memorize a few draws."""
    cache = make_cache(tmp_path, stock / "teacher", head_size=64, tail_draws=236)
    options = {"distillation_type": "logit", "batch_size": 12, "eval_fraction": 0.0, "temperature": 1.5}
    begun = train(cache, tmp_path / "begun", **options, max_steps=1, learning_rate=1e-9)
    done = train(cache, tmp_path / "done", **options, max_steps=40, learning_rate=1e-2)
    log_p, _ = dense(stock / "teacher", cache, list(range(24)), 1.5)
    kl = [float((log_p.exp() * (log_p - dense(run / "final", cache, list(range(24)), 1.5)[0])).sum(1).mean())
          for run in (begun, done)]  # fmt: skip
    assert kl[1] < 0.5 * kl[0]
    assert losses(done)[-1] < 0.6 * losses(done)[0]


def test_text_alone_gives_the_hard_loss_of_the_cache(stock: Path, cache: Path, tmp_path: Path) -> None:
    """One batch of all examples, so that their order does not matter; of the teacher only the tokenizer is loaded."""
    options = {"distillation_type": "output", "batch_size": 24, "eval_fraction": 0.0, "max_steps": 2}
    (stock / "tokenizer").mkdir(exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(stock / "teacher" / name, stock / "tokenizer" / name)
    text = train(None, tmp_path / "text", **options, train_data=str(stock / "train.jsonl"), max_seq_length=64,
                 teacher_model=str(stock / "tokenizer"))  # fmt: skip
    np.testing.assert_allclose(losses(text), losses(train(cache, tmp_path / "cached", **options)), rtol=1e-5)


def test_a_student_continues_from_a_folder(cache: Path, tmp_path: Path) -> None:
    first = train(cache, tmp_path / "first", learning_rate=5e-3)
    second = train(cache, tmp_path / "second", student_model=str(first / "final"))
    assert {**metrics(second)["before"], "epoch": 1.0} == metrics(first)["after"]
    assert metrics(second)["after"] != metrics(second)["before"]


@pytest.mark.parametrize(("chosen", "places"), [("1", [1]), ("1,0", [1, 0])])
def test_a_student_starts_with_layers_of_the_teacher(
    stock: Path, cache: Path, tmp_path: Path, chosen: str, places: list[int]
) -> None:
    run = train(cache, tmp_path / "run", init_from_teacher_layers=chosen, teacher_model=str(stock / "teacher"),
                max_steps=1, learning_rate=1e-12, weight_decay=0.0)  # fmt: skip
    teacher, student = weights(stock / "teacher"), weights(run / "final")
    assert json.loads((run / "final" / "config.json").read_text())["num_hidden_layers"] == len(places)
    for name, tensor in student.items():
        parts = name.split(".")
        if "layers" in parts:
            parts[2] = str(places[int(parts[2])])
        torch.testing.assert_close(tensor, teacher[".".join(parts)], rtol=0, atol=1e-9)


def test_the_whole_teacher_as_student_has_no_soft_loss(stock: Path, cache: Path, tmp_path: Path) -> None:
    run = train(cache, tmp_path / "run", init_from_teacher_layers="0,1", teacher_model=str(stock / "teacher"),
                distillation_type="logit", tail="bucket", max_steps=1)  # fmt: skip
    assert abs(metrics(run)["before"]["eval_soft_loss"]) < 5e-3


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architectures(name: str, cache: Path, tmp_path: Path) -> None:
    """The loss of the saved student, by its own forward, is the one that training reports: both apply the scales and
    soft-caps between hidden states and logits."""
    student = write_config(tmp_path / "student.json", ARCHITECTURES[name])
    run = train(cache, tmp_path / "run", student_config=student, max_steps=2, learning_rate=1e-2)
    assert np.isfinite(losses(run)).all()
    log_q, gold = dense(run / "final", cache, held_out(24, 0.1, 0).tolist())
    plain = float(-log_q.gather(1, gold[:, None]).mean())
    assert metrics(run)["after"]["eval_hard_loss"] == pytest.approx(plain, rel=1e-4)
    assert metrics(run)["after"]["eval_hard_loss"] != metrics(run)["before"]["eval_hard_loss"]


@pytest.mark.parametrize(
    ("change", "rtol"),
    [
        ({"use_mixed_precision": True}, 2e-2),
        ({"use_gradient_checkpointing": True}, 1e-5),
        ({"num_workers": 1}, 0.0),
        pytest.param({"device": "auto"}, 0.0, marks=pytest.mark.skipif(torch.accelerator.is_available(), reason="CPU")),
    ],
    ids=["bf16", "checkpointing", "a worker", "auto"],
)
def test_memory_and_speed_options_change_little_and_raise_no_warnings(
    change: dict[str, object], rtol: float, cache: Path, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    plain, changed = train(cache, tmp_path / "plain"), train(cache, tmp_path / "changed", **change)
    np.testing.assert_allclose(losses(changed), losses(plain), rtol=rtol)
    assert (losses(changed) == losses(plain)) == (rtol < 1e-2)
    assert [str(w.message) for w in recwarn if w.category in (FutureWarning, UserWarning)] == []


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({}, "KL to the teacher at T=1, nats"),
        ({"tail": "bucket", "divergence": "jsd", "temperature": 2}, "JSD (tail bucket) to the teacher at T=2, nats"),
        ({"tail": "renormalize"}, "KL (tail renormalize) to the teacher at T=1, nats"),
    ],
)
def test_the_table_names_the_divergence(
    stock: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: dict[str, object], name: str
) -> None:
    train(stock / "cache", tmp_path / "run", max_steps=1, **options)
    assert name in " ".join(capsys.readouterr().out.split())
