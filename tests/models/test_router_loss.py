"""Mixture-of-experts students: the router loss that a plain training loop would add, in value, gradient and logs."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from logitcask.cache.errors import LogitcaskError
from logitcask.pipeline.batches.collate import Batch, Collator, TrainingExample
from logitcask.pipeline.models.losses import LossSettings, read_router_loss, require_known_loss
from logitcask.pipeline.models.recompute import keep_products_only
from logitcask.pipeline.text.tokens.encoded import Encoded
from logitcask.pipeline.train.loss import make_loss_forward
from tests.support.runs import history, metrics, train, weights, write_config
from tests.support.tiny import make_cache, make_teacher

SIZES: dict[str, Any] = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "max_position_embeddings": 128,
                         "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
                         "num_experts_per_tok": 2, "output_router_logits": True}  # fmt: skip
MIXTRAL = {**SIZES, "model_type": "mixtral", "num_local_experts": 4, "router_aux_loss_coef": 0.5}
JAMBA = {"mamba_d_state": 8, "mamba_d_conv": 4, "mamba_dt_rank": 4, "use_mamba_kernels": False, "attn_layer_period": 2,
         "attn_layer_offset": 1, "expert_layer_period": 1, "expert_layer_offset": 0}  # fmt: skip
STUDENTS: dict[str, dict[str, Any]] = {
    "mixtral": MIXTRAL,
    "qwen2_moe": {**SIZES, "num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
    "qwen3_moe": {**SIZES, "num_experts": 4, "moe_intermediate_size": 16, "decoder_sparse_step": 2},
    "olmoe": {**SIZES, "num_experts": 4},
    "gpt_oss": {**SIZES, "num_local_experts": 4},
    "granitemoe": {**SIZES, "num_local_experts": 4},
    "phimoe": {**SIZES, "num_local_experts": 4, "router_jitter_noise": 0.0, "input_jitter_noise": 0.0},
    "jamba": {**SIZES, **JAMBA, "num_experts": 4},
}
LENGTHS = (9, 4, 3)


def model_of(config: dict[str, Any], **changes: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    values = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None, **config, **changes}
    model: PreTrainedModel = AutoModelForCausalLM.from_config(AutoConfig.for_model(**values), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model.train()


def examples() -> list[TrainingExample]:
    random = torch.Generator().manual_seed(1)
    made = []
    for length in LENGTHS:
        mask = torch.ones(length, dtype=torch.bool)
        mask[-1] = False
        made.append(
            TrainingExample(Encoded(torch.randint(1, 300, (length,), generator=random).numpy(), mask.numpy()), None)
        )
    return made


def batch_of(given: list[TrainingExample], *, packed: bool) -> Batch:
    return Collator(0, (), 1.0, "sampled", packed)(given)


def gradients(model: PreTrainedModel, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", STUDENTS)
def test_the_loss_is_that_of_a_plain_loop(name: str, recompute: bool) -> None:
    """One padded batch: mean cross-entropy plus the coefficient times the model's own aux_loss, to 1e-6."""
    config = {"model_type": name, **STUDENTS[name], "router_aux_loss_coef": 0.5}
    plain, ours = model_of(config), model_of(config)
    batch = batch_of(examples(), packed=False)
    mask = batch["is_token"].long()
    outputs = plain(input_ids=batch["input_ids"], attention_mask=mask)
    logits = outputs.logits.flatten(0, 1)[batch["target_index"]]
    expected = functional.cross_entropy(logits, batch["gold"]) + 0.5 * outputs.aux_loss
    wanted = gradients(plain, expected)
    if recompute:
        keep_products_only(ours)
    make_loss_forward(ours, LossSettings(1.0, 1.0, "sampled", "forward-kl"), router=read_router_loss(ours, None))
    sums = ours(**batch)
    count = len(batch["gold"])
    torch.testing.assert_close(sums.total / count, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(sums.aux / count, outputs.aux_loss, rtol=1e-6, atol=1e-6)
    got = gradients(ours, sums.total / count)
    assert got.keys() == wanted.keys()
    assert any("gate" in key or "router" in key for key in got)
    for key, gradient in wanted.items():
        torch.testing.assert_close(got[key], gradient, rtol=1e-4, atol=1e-6)
    ours.eval()
    assert ours(**batch).aux is None


def test_packed_rows_count_their_tokens_only() -> None:
    """Rows of several examples, and one of an example and padding, weigh each token once, as those alone do."""
    model = model_of(MIXTRAL)
    router = read_router_loss(model, None)
    assert router is not None
    make_loss_forward(model, LossSettings(1.0, 1.0, "sampled", "forward-kl"), router=router)
    packed = batch_of(examples(), packed=True)
    assert 0 < packed["is_token"].sum() == sum(LENGTHS) < packed["is_token"].numel()
    assert "position_ids" in packed
    alone = batch_of(examples(), packed=False)
    torch.testing.assert_close(model(**packed).aux, model(**alone).aux)


def test_a_run_adds_and_logs_it_and_the_option_turns_it_off(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The logged total is that of the others plus the coefficient times aux_loss; two micro-batches weigh alike."""
    cache = make_cache(tmp_path, make_teacher(tmp_path / "teacher"))
    student = write_config(tmp_path / "mixtral.json", MIXTRAL)
    common: dict[str, Any] = {"student_config": student, "distillation_type": "output", "eval_fraction": 0.25}
    run = train(cache, tmp_path / "on", **common, batch_size=4)
    assert "router    its loss is added to the total, with the coefficient 0.5" in capfd.readouterr().err
    for line in history(run):
        assert line["aux_loss"] > 1.0
        assert line["total_loss"] == pytest.approx(line["hard_loss"] + 0.5 * line["aux_loss"], rel=1e-5)
    after = metrics(run)["after"]
    assert after["eval_total_loss"] == pytest.approx(after["eval_hard_loss"])
    off = train(cache, tmp_path / "off", **common, batch_size=4, router_aux_loss_coef=0.0)
    assert "aux_loss" not in history(off)[0]
    assert history(off)[0]["total_loss"] == pytest.approx(history(off)[0]["hard_loss"])
    by_config = write_config(tmp_path / "without.json", {**MIXTRAL, "output_router_logits": False})
    for name, other in (("default", {}), ("asked", {"router_aux_loss_coef": 0.5})):
        train(cache, tmp_path / name, **{**common, "student_config": by_config}, batch_size=4, **other)
    same = {
        key: bool(torch.equal(value, weights(off / "final")[key]))
        for key, value in weights(tmp_path / "default" / "final").items()
    }
    assert all(same.values())
    for key, value in weights(tmp_path / "asked" / "final").items():
        torch.testing.assert_close(value, weights(run / "final")[key], rtol=0, atol=0)


def test_micro_batches_weigh_by_their_positions(tmp_path: Path) -> None:
    """A step of two batches has the mean over positions of both terms."""
    cache = make_cache(tmp_path, make_teacher(tmp_path / "teacher"))
    student = write_config(tmp_path / "mixtral.json", MIXTRAL)
    common: dict[str, Any] = {"student_config": student, "distillation_type": "output", "eval_fraction": 0.0,
                              "learning_rate": 1e-12, "weight_decay": 0.0}  # fmt: skip
    split = history(
        train(cache, tmp_path / "split", **common, batch_size=6, gradient_accumulation_steps=2, max_steps=1)
    )
    parts = history(train(cache, tmp_path / "parts", **common, batch_size=6, max_steps=2))
    counts = torch.tensor([line["aux_loss"] for line in parts])
    assert counts.min() < split[0]["aux_loss"] < counts.max()
    assert split[0]["total_loss"] == pytest.approx(split[0]["hard_loss"] + 0.5 * split[0]["aux_loss"], rel=1e-5)


def test_what_is_not_kept_is_refused() -> None:
    dense = {**SIZES, "model_type": "llama"}
    with pytest.raises(LogitcaskError, match="LlamaForCausalLM has no router loss: leave it out"):
        read_router_loss(model_of(dense), 0.1)
    assert read_router_loss(model_of(dense), None) is None
    assert read_router_loss(model_of(MIXTRAL), 0.0) is None
    require_known_loss(model_of(dense))
    require_known_loss(model_of(MIXTRAL))
    bamba = {**SIZES, "model_type": "bamba", "attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_head": 8,
             "mamba_n_groups": 1, "mamba_d_state": 8, "mamba_expand": 2, "output_router_logits": False}  # fmt: skip
    require_known_loss(model_of(bamba))
    with pytest.raises(LogitcaskError, match=r"its own training loss is .* where the cross-entropy is"):
        require_known_loss(model_of(bamba, z_loss_coefficient=0.1))
