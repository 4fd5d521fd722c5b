"""Tiny real models, tokenizers, data and caches for tests, and the slow dense reference.

Legend: N positions, V vocabulary, z logits, T temperature. The reference computes in float64.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GraniteConfig, GraniteForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from logitcask.cache.labels import Example, Shard, SparseTargets
from logitcask.cache.manifest import LabelSettings
from logitcask.pipeline.precompute.precompute import precompute
from logitcask.pipeline.settings.precompute import PrecomputeSettings
from logitcask.pipeline.teachers.sparsify import sparsify

FloatArray64 = NDArray[np.float64]

WORDS = ("apples", "bread", "coffee", "dates", "eggs", "figs", "grapes", "honey")
RECORDS: list[dict[str, object]] = [
    {
        "prompt": f"How many {word} are {2 + n}+{n}?\n",
        "response": f"There are {2 + 2 * n} {word}" + " and more" * n + ".",
    }
    for n in range(3)
    for word in WORDS
]
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tokenizer(*, vocab_size: int = 300, chat: bool = False) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer of at most ``vocab_size`` tokens, with a ChatML template if ``chat``."""
    specials = ["<|endoftext|>", *(["<|im_start|>", "<|im_end|>"] if chat else [])]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=specials,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([f"{r['prompt']}{r['response']}" for r in RECORDS], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>" if chat else "<|endoftext|>",
        chat_template=CHATML if chat else None,
    )


def make_teacher(
    folder: Path,
    *,
    vocab_size: int = 300,
    chat: bool = False,
    max_length: int = 128,
    seed: int = 0,
    width: int = 32,
    layers: int = 2,
) -> Path:
    """Save a random Llama and its tokenizer to ``folder`` and return it."""
    tokenizer = make_tokenizer(vocab_size=vocab_size, chat=chat)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=max_length,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=None,
        initializer_range=0.3,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def overflowing_teacher(folder: Path, *, in_body: bool, tokens: list[int], width: int = 32) -> Path:
    """Save a Granite that is sound in float32 and overflows in float16.

    In its body, it does at these tokens: 40,000 + 30,000 in a feature that nobody reads. In its head, at about one
    position in twenty: raw logits have a standard deviation of 18,000, and are divided by 4,000.
    """
    make_teacher(folder, width=width)  # for its tokenizer
    torch.manual_seed(0)
    sizes = LlamaConfig.from_pretrained(folder, mlp_bias=True).to_dict()
    del sizes["model_type"], sizes["architectures"]
    model = GraniteForCausalLM(GraniteConfig(**sizes, logits_scaling=1.0 if in_body else 4_000.0))
    with torch.no_grad():
        if in_body:
            model.model.embed_tokens.weight[tokens, 0] = 40_000
            for layer in model.model.layers:
                for name in ("self_attn.o_proj", "mlp.down_proj"):
                    layer.get_submodule(name).weight[0] = 0
                layer.input_layernorm.weight[0] = layer.post_attention_layernorm.weight[0] = 0
            model.model.layers[0].mlp.down_proj.bias[0] = 30_000
            model.model.norm.weight[0] = 0
        else:
            model.lm_head.weight *= 18_000 / model.lm_head.weight.norm(dim=1, keepdim=True)
    model.save_pretrained(folder)
    return folder


def write_jsonl(path: Path, records: list[dict[str, object]]) -> Path:
    """Write the records as lines of JSON and return the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def precompute_settings(folder: Path, **changes: object) -> PrecomputeSettings:
    """Return settings for stage 1: teacher ``folder/teacher``, data ``folder/train.jsonl``, output ``folder/cache``."""
    values: dict[str, object] = {
        "teacher_model": str(folder / "teacher"),
        "train_data": str(folder / "train.jsonl"),
        "output": folder / "cache",
        "head_size": 4,
        "tail_draws": 8,
        "max_seq_length": 64,
        "batch_size": 4,
        "shard_positions": 64,
        "device": "cpu",
    }
    return PrecomputeSettings.model_validate({**values, **changes})


def make_cache(folder: Path, teacher: Path | None = None, **changes: object) -> Path:
    """Make a complete cache at ``folder/cache`` (or ``output``), from ``RECORDS`` unless ``train_data`` is given."""
    if "train_data" not in changes:
        write_jsonl(folder / "train.jsonl", RECORDS)
    if teacher is None and "teacher_model" not in changes:
        teacher = make_teacher(folder / "teacher")
    settings = precompute_settings(folder, **({"teacher_model": str(teacher)} if teacher else {}), **changes)
    precompute(settings)
    return Path(settings.output)


def tiny_cache(tmp_path: Path, **changes: object) -> Path:
    """Make a cache with a new tiny teacher."""
    return make_cache(tmp_path, None, **changes)


def sound_shards(label: LabelSettings, sizes: Sequence[int], scale: float = 3.0) -> list[Shard]:
    """Return valid shards of ``sizes`` examples, labelled from random logits of standard deviation ``scale``.

    The next token is in turn one from the head, one that was drawn, and any token.
    """
    random = np.random.default_rng(0)

    def example() -> Example:
        length = int(random.integers(2, 12))
        mask = random.random(length) < 0.7
        mask[0], mask[-1] = True, False
        at = np.flatnonzero(mask)
        logits = torch.from_numpy(random.normal(0.0, scale, (len(at), label.vocab_size)).astype(np.float32))
        uniforms = torch.from_numpy(random.random((len(at), label.tail_draws)))
        gold = random.integers(0, label.vocab_size, len(at))

        def targets() -> SparseTargets:
            return sparsify(logits, torch.from_numpy(gold), uniforms, label.head_size, label.temperatures)

        first = targets()
        gold[::3] = first.head_ids[::3, 0] if label.head_size else gold[::3]
        drawn = first.tail_counts[1::3].any(1)
        gold[1::3][drawn] = first.tail_ids[1::3][drawn, 0] if label.tail_draws else gold[1::3][drawn]
        ids = random.integers(0, label.vocab_size, length)
        ids[at + 1] = gold
        return Example(ids, mask, targets())

    return [Shard.of([example() for _ in range(count)]) for count in sizes]


def dense_log_probs(z_NV: NDArray[np.floating], temperature: float = 1.0) -> FloatArray64:
    """Return log softmax(z / T) in float64, (N, V)."""
    z = z_NV.astype(np.float64) / temperature
    z -= z.max(1, keepdims=True)
    log_probs: FloatArray64 = z - np.log(np.exp(z).sum(1, keepdims=True))
    return log_probs


def dense_kd_gradient(teacher_NV: NDArray[np.floating], student_NV: NDArray[np.floating], t: float) -> FloatArray64:
    """Return the gradient of T^2 KL(p_T || q_T) with respect to the student's logits, (N, V): T (q_T - p_T)."""
    gradient: FloatArray64 = t * (np.exp(dense_log_probs(student_NV, t)) - np.exp(dense_log_probs(teacher_NV, t)))
    return gradient


def folder_bytes(folder: Path, skip: Iterable[str] = ()) -> dict[str, bytes]:
    """Return the bytes of every file below a folder, by relative name."""
    skipped = set(skip)
    files = {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}
    return {name: data for name, data in files.items() if name not in skipped}
