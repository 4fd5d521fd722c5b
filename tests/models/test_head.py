"""The heads of real architectures, made tiny, in every dtype, saturated too, against dense float64.

Legend: L tokens, V vocabulary, z logits.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from logitcask.cache.errors import LogitcaskError
from logitcask.pipeline.models.head import LMHead, last_hidden_states, read_head

VOCABULARY = 96
SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "rotary_dim": 4, "d_model": 32, "n_layers": 2,
    "n_heads": 4, "ffn_dim": 64, "word_embed_proj_dim": 32, "num_local_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.2,
    "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "lru_width": 32,
    "attention_window_size": 32, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4,
    "v_head_dim": 8, "tie_word_embeddings": False, "vocab_size_per_layer_input": VOCABULARY,
}  # fmt: skip
RECURRENT_GEMMA = {"logits_soft_cap": 20.0, "block_types": ("recurrent", "attention")}
# model type, settings of its config, scale, soft-cap
HEADS: list[tuple[str, dict[str, Any], float, float | None]] = [
    ("llama", {}, 1.0, None),
    ("olmo2", {}, 1.0, None),
    ("gpt2", {}, 1.0, None),
    ("gptj", {}, 1.0, None),  # its head has a bias
    ("phi", {}, 1.0, None),  # as well
    ("opt", {}, 1.0, None),  # its forward passes by its base_model
    ("llama4_text", {}, 1.0, None),  # whose base_model is the whole model
    ("mpt", {"logit_scale": 0.5}, 1.0, None),  # which is not used
    ("cohere", {"logit_scale": 0.0625}, 0.0625, None),
    ("cohere2", {"logit_scale": 0.3}, 0.3, None),
    ("granite", {"logits_scaling": 6.0}, 1 / 6, None),
    ("granitemoe", {"logits_scaling": 6.0}, 1 / 6, None),
    ("hyperclovax", {"logits_scaling": 0.3}, 0.3, None),  # the name is Granite's, and it multiplies
    ("minicpm3", {"dim_model_base": 10, "num_key_value_heads": 4}, 10 / 32, None),  # it scales the hidden states
    ("inkling_text", {"logits_mup_width_multiplier": 24.0}, 1 / 24, None),
    ("falcon_h1", {"lm_head_multiplier": 0.0390625}, 0.0390625, None),
    ("gemma2", {"final_logit_softcapping": 30.0}, 1.0, 30.0),
    ("gemma3_text", {"final_logit_softcapping": 7.5}, 1.0, 7.5),
    ("gemma4_text", {"final_logit_softcapping": 30.0}, 1.0, 30.0),
    ("vaultgemma", {"final_logit_softcapping": 30.0}, 1.0, 30.0),
    ("nanochat", {"final_logit_softcapping": 15.0}, 1.0, 15.0),
    ("recurrent_gemma", RECURRENT_GEMMA, 1.0, 20.0),
]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
IDS = torch.arange(40)[None] * 7 % VOCABULARY


def tiny(model_type: str, **settings: Any) -> PreTrainedModel:
    known = AutoConfig.for_model(model_type)
    sizes = {name: value for name, value in SIZES.items() if hasattr(known, name)}
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(type(known)(**{**sizes, **settings})).eval()
    return model


def stretched(model: PreTrainedModel, largest: float) -> PreTrainedModel:
    """Scale a model's head, with a random bias if it has one, so that its largest raw logit is ``largest``."""
    head = model.get_output_embeddings()
    with torch.no_grad():
        if getattr(head, "bias", None) is not None:
            head.bias.normal_(0, float(head.weight.std()))
        raw = head(last_hidden_states(model, IDS))
        head.weight *= largest / raw.abs().max()
        if getattr(head, "bias", None) is not None:
            head.bias *= largest / raw.abs().max()
    return model


def raw_logits(model: PreTrainedModel) -> Tensor:
    """Return the products of the model's hidden states, in its dtype, with its head, in float64, (L, V)."""
    head = model.get_output_embeddings()
    with torch.no_grad():
        z = last_hidden_states(model, IDS)[0].double() @ head.weight.double().T
        raw: Tensor = z if getattr(head, "bias", None) is None else z + head.bias.double()
    return raw


@pytest.mark.parametrize(("model_type", "settings", "scale", "cap"), HEADS, ids=[head[0] for head in HEADS])
def test_scale_and_cap_are_exact_in_every_dtype_whatever_the_logits(
    model_type: str, settings: dict[str, Any], scale: float, cap: float | None
) -> None:
    """Raw logits from 0.3 to 7 times the cap; labels are as exact as the dtype's rounding of raw logits allows."""
    model = tiny(model_type, **settings)
    for largest in (0.3, 3.5, 7.0) if cap else (3.5,):
        stretched(model, largest * (cap or 10.0))
        read = read_head(model)
        assert read.scale == pytest.approx(scale, rel=1e-12)
        assert read.softcap == cap
        with torch.no_grad():
            own, mine = model(IDS).logits[0], read.logits(last_hidden_states(model, IDS)[0])
        torch.testing.assert_close(mine, own, rtol=1e-5, atol=1e-5 * float(own.abs().max()))
        for dtype in DTYPES:
            rounded = tiny(model_type, **settings)
            rounded.load_state_dict(model.state_dict())
            check(rounded.to(dtype), scale, cap)


def check(model: PreTrainedModel, scale: float, cap: float | None) -> None:
    read = read_head(model)
    assert read.scale == pytest.approx(scale, rel=1e-12)
    assert read.softcap == cap
    z = scale * raw_logits(model)
    with torch.no_grad():
        logits = read.logits(last_hidden_states(model, IDS)[0])
    rounding = torch.finfo(model.dtype).eps * z.abs()
    if cap is not None:
        rounding /= torch.cosh(z / cap) ** 2  # the slope of the cap
        z = cap * torch.tanh(z / cap)
    worst = (logits.double().log_softmax(1) - z.log_softmax(1)).abs().max()
    assert worst <= 2 * rounding.max() + 2e-5, (model.dtype, worst)


def changed(forward: Callable[[Tensor], Tensor]) -> PreTrainedModel:
    """Return a tiny Llama whose forward changes its logits last, as a stranger's code may."""

    class Changed(LlamaForCausalLM):
        def forward(self, *args: Any, **inputs: Any) -> Any:
            output = super().forward(*args, **inputs)
            output.logits = forward(output.logits)
            return output

    torch.manual_seed(0)
    return Changed(LlamaConfig(**{k: v for k, v in SIZES.items() if hasattr(LlamaConfig(), k)})).eval()


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (lambda z: z.clamp(-500, 500), "a raw logit of 512 becomes 500, not 385.75"),
        (lambda z: 30 * (z / 30).atan(), "a raw logit of "),
        (lambda z: z.where(torch.arange(VOCABULARY) != 5, -1e4), "becomes -10000, not"),
        (lambda z: z.bfloat16(), "a raw logit of 0.0012695 becomes 0.0012665, not 0.0012695"),
        (lambda z: z + 1.0, "a raw logit of "),
        (lambda z: z[..., :90], "it gives 90 logits and its head 96"),
    ],
)
def test_what_is_not_a_scaled_or_capped_head_is_refused(forward: Callable[[Tensor], Tensor], reason: str) -> None:
    with pytest.raises(LogitcaskError, match="Changed: not supported: its logits must be scale") as refused:
        read_head(changed(forward))
    assert reason in str(refused.value)


def test_a_scale_and_a_cap_that_no_config_has_are_measured() -> None:
    read = read_head(changed(lambda z: 7 * (z / 3.7 / 7).tanh() * 1.01))
    assert read.scale == pytest.approx(1.01 / 3.7, rel=1e-6)
    assert read.softcap == pytest.approx(7.07, rel=1e-6)


@pytest.mark.parametrize(
    ("model_type", "settings", "reason"),
    [
        ("dory", {}, "its head has parameters of its own, logit_scale"),  # all of them 1 in a new model
        ("modernbert-decoder", {}, "it changes hidden states before its head by more than a factor"),
        ("inkling_text", {"unpadded_vocab_size": 90}, "it gives 90 logits and its head 96"),
    ],
)
def test_architectures_with_other_heads_are_refused(model_type: str, settings: dict[str, Any], reason: str) -> None:
    if model_type not in CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {model_type}")
    with pytest.raises(LogitcaskError) as refused:
        read_head(tiny(model_type, **settings))
    assert reason in str(refused.value)


def test_a_factor_before_a_head_with_a_bias_is_refused() -> None:
    model = tiny("minicpm3", dim_model_base=10, num_key_value_heads=4)
    model.set_output_embeddings(nn.Linear(32, VOCABULARY))
    with pytest.raises(LogitcaskError, match=r"multiplies hidden states by 0\.3125 before a head with a bias"):
        read_head(model)


def test_another_matrix_than_the_heads_is_refused() -> None:
    """The head's own forward differs from its weight's product."""

    class Doubling(nn.Linear):
        def forward(self, hidden: Tensor) -> Tensor:
            return super().forward(hidden) * torch.linspace(0.9, 1.1, VOCABULARY)

    model = tiny("llama")
    model.set_output_embeddings(Doubling(32, VOCABULARY, bias=False))
    with pytest.raises(LogitcaskError, match=r"they differ by .* from those of its head"):
        read_head(model)


@pytest.mark.parametrize("training", [False, True])
def test_reading_a_head_leaves_the_model_as_it_was(training: bool) -> None:
    model = tiny("gemma2").train(training)
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    read_head(model)
    assert hooks == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    assert all(module.training is training for module in model.modules())


@pytest.mark.parametrize("dtype", DTYPES)
def test_capped_logits_keep_their_order_near_the_cap(dtype: torch.dtype) -> None:
    """Raw logits that the dtype can tell apart stay apart: 16 bits cannot below the cap of 30."""
    raw = torch.arange(60, 120, 2, dtype=dtype)
    logits = LMHead(raw[:, None], None, 1.0, 30.0).logits(torch.ones(1, 1, dtype=dtype))[0]
    want = 30 * torch.tanh(raw.double() / 30)
    torch.testing.assert_close(logits.double(), want, rtol=1e-6, atol=0)
    assert (logits.diff() > 0).all()


@pytest.mark.parametrize(("spoil", "dtype"), [(1e30, torch.float16), (float("nan"), torch.float32)])
def test_a_model_without_finite_logits_is_refused_with_its_dtype(spoil: float, dtype: torch.dtype) -> None:
    model = tiny("llama")
    with torch.no_grad():
        model.get_input_embeddings().weight.fill_(spoil)
    model = model.to(dtype)
    remedy = {
        torch.float16: "float16: float16 overflows above 65,504: use bfloat16 or float32",
        torch.float32: "float32: its weights are damaged",
    }[dtype]
    with pytest.raises(LogitcaskError) as refused:
        read_head(model)
    assert str(refused.value) == f"LlamaForCausalLM: no finite logits from its first 8 tokens in {remedy}"
