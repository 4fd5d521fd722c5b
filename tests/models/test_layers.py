"""Students of a teacher's layers: saved and loaded again by their config, they compute what the layers computed."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from logitcask.cache.errors import LogitcaskError
from logitcask.pipeline.models.students.layers import keep_layers

WIDTHS: dict[str, Any] = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "max_position_embeddings": 64}
HEADS: dict[str, Any] = {**WIDTHS, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
SIX = {**HEADS, "num_hidden_layers": 6}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16, "norm_topk_prob": True}
MLA = {"q_lora_rank": 16, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
       "num_attention_heads": 4, "num_key_value_heads": 4}  # fmt: skip
KINDS = ["sliding_attention", "sliding_attention", "full_attention"] * 2
SSM = {"mamba_d_state": 8, "mamba_d_conv": 4, "mamba_expand": 2, "mamba_dt_rank": 4, "use_mamba_kernels": False}
SSM_2 = {**SSM, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1}
LINEAR = {"linear_num_value_heads": 2, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
PLAIN = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 6}

TEACHERS: dict[str, tuple[str, dict[str, Any]]] = {  # layers of several kinds, and the config
    "llama": ("0,3,5", SIX),
    "smollm3": ("1,3", {**SIX, "no_rope_layer_interval": 2, "pad_token_id": 0}),
    "smollm3 listed": ("4,1,0", {**SIX, "no_rope_layers": [1, 0, 1, 1, 0, 1], "pad_token_id": 0}),
    "gemma3_text": ("0,2,5", {**SIX, "layer_types": KINDS, "sliding_window": 4, "query_pre_attn_scalar": 8}),
    "gemma2": ("0,2,5", {**SIX, "sliding_window": 4, "query_pre_attn_scalar": 8}),
    "qwen2": ("1,4,5", {**SIX, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 3}),
    "qwen3_moe": ("1,3,5", {**SIX, **EXPERTS, "num_experts": 4, "decoder_sparse_step": 2}),
    "qwen3_moe dense": ("1,4", {**SIX, **EXPERTS, "num_experts": 4, "mlp_only_layers": [0, 4]}),
    "jamba": ("1,2,4,5", {**SIX, **SSM, "num_experts": 2, "num_experts_per_tok": 1, "attn_layer_period": 3,
                          "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1}),
    "mamba": ("0,3,5", {**PLAIN, "state_size": 8}),
    "mamba2": ("0,3,5", {**PLAIN, "state_size": 8, "head_dim": 8, "num_heads": 8, "n_groups": 1, "chunk_size": 8}),
    "gpt2": ("0,3,5", {"vocab_size": 96, "n_embd": 32, "n_layer": 6, "n_head": 4, "n_positions": 64}),
    "gpt2 scaled": ("", {"vocab_size": 96, "n_embd": 32, "n_layer": 6, "n_head": 4, "n_positions": 64,
                         "scale_attn_by_inverse_layer_idx": True}),
    "gpt_neo": ("0,2,3", {"vocab_size": 96, "hidden_size": 32, "num_layers": 6, "num_heads": 4, "window_size": 4,
                          "attention_types": [[["global", "local"], 3]], "max_position_embeddings": 64}),
    "opt": ("0,3,5", {**SIX, "ffn_dim": 48, "word_embed_proj_dim": 32}),
    "gpt_neox": ("5,0", {**WIDTHS, "num_hidden_layers": 6, "num_attention_heads": 4}),
    "bloom": ("0,3,5", {"vocab_size": 96, "hidden_size": 32, "n_layer": 6, "n_head": 4}),
    "falcon": ("0,3,5", {**PLAIN, "num_attention_heads": 4}),
    "llama4_text": ("1,2,4", {**SIX, "num_local_experts": 4, "num_experts_per_tok": 1, "interleave_moe_layer_step": 2,
                              "intermediate_size_mlp": 48, "attention_chunk_size": 8,
                              "no_rope_layers": [1, 1, 0, 1, 1, 0]}),
    "deepseek_v3": ("1,2,5", {**WIDTHS, **MLA, **EXPERTS, "num_hidden_layers": 6, "first_k_dense_replace": 2,
                              "n_routed_experts": 4, "n_group": 1, "topk_group": 1}),
    "gpt_oss": ("0,3,5", {**SIX, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 4}),
    "cohere2": ("1,2,5", {**SIX, "layer_types": KINDS, "sliding_window": 4}),
    "lfm2": ("0,1,5", {**SIX, "layer_types": ["conv", "full_attention", "conv"] * 2,
                       "block_auto_adjust_ff_dim": False}),
    "granitemoehybrid": ("1,2", {**SIX, **SSM_2, "layer_types": ["mamba", "attention"] * 3, "num_local_experts": 2,
                                 "num_experts_per_tok": 1, "shared_intermediate_size": 16}),
    "bamba": ("0,1,4", {**SIX, **SSM_2, "attn_layer_indices": [1, 4]}),
    "qwen3_next": ("0,1,3", {**SIX, **EXPERTS, **LINEAR, "num_experts": 4, "shared_expert_intermediate_size": 16,
                             "layer_types": ["linear_attention", "full_attention"] * 3}),
}  # fmt: skip


def make(name: str) -> PreTrainedModel:
    """Return a random model in which every weight counts."""
    torch.manual_seed(0)
    model_type = name.split(maxsplit=1)[0]
    config = AutoConfig.for_model(model_type, **TEACHERS[name][1], bos_token_id=None, eos_token_id=None)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def without_the_others(model: PreTrainedModel, prefix: str, kept: list[int], ids: Tensor) -> Tensor:
    """Return the teacher's logits (1, L, V) if all layers but the kept ones pass on what they get."""
    layers: Any = model.get_submodule(prefix)

    def skip(_: Any, args: Any, named: Any, output: Any) -> Any:
        hidden = args[0] if args else named["hidden_states"]
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    hooks = [layer.register_forward_hook(skip, with_kwargs=True) for i, layer in enumerate(layers) if i not in kept]
    with torch.no_grad():
        logits: Tensor = model(input_ids=ids, use_cache=False).logits
    for hook in hooks:
        hook.remove()
    return logits


@pytest.mark.parametrize("name", [name for name, (chosen, _) in TEACHERS.items() if chosen])
def test_saved_layers_compute_what_they_did_in_the_teacher(name: str, tmp_path: Path) -> None:
    teacher, chosen = make(name), TEACHERS[name][0]
    kept = [int(part) for part in chosen.split(",")]
    ids = torch.randint(0, 96, (1, 40), generator=torch.Generator().manual_seed(1))
    prefixes = ("model.layers", "transformer.h", "gpt_neox.layers", "model.decoder.layers", "backbone.layers")
    prefix = next(p for p in prefixes if f"{p}.0" in dict(teacher.named_modules()))
    expected = without_the_others(teacher, prefix, kept, ids)
    student = keep_layers(teacher, chosen)
    student.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert len(loaded.get_submodule(prefix)) == len(kept)
    with torch.no_grad():
        ours, saved = student(input_ids=ids).logits, loaded(input_ids=ids).logits
    torch.testing.assert_close(saved, ours, rtol=0, atol=1e-5)
    if kept == sorted(kept):
        torch.testing.assert_close(saved, expected, rtol=1e-4, atol=1e-4)


def test_layers_that_depend_on_their_place_are_refused() -> None:
    """GPT-2 may divide attention by the layer's number; a dense layer after sparse ones has no DeepSeek config."""
    with pytest.raises(LogitcaskError, match=r"attn.scaling of layer 1 is 0.17\d+, and becomes 0.35"):
        keep_layers(make("gpt2 scaled"), "1,4")
    with pytest.raises(LogitcaskError, match="cannot be a model of their own"):
        keep_layers(make("deepseek_v3"), "4,1")
