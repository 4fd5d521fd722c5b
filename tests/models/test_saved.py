"""What is saved is what was trained: final/ loads as the same model and the same tokenizer, and is checked to."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast

from logitcask.cache.errors import LogitcaskError
from logitcask.pipeline.models.load import load_causal_lm, probe_logits, require_saved
from logitcask.pipeline.models.students.student import set_special_tokens
from logitcask.pipeline.text.tokenizer import (
    end_of_turn,
    fingerprint,
    make_loadable,
    tokenizer_differences,
    tokenizer_files,
    tokenizer_from_files,
)
from tests.support.runs import STUDENT, metrics, train, write_config
from tests.support.tiny import make_cache, make_teacher, make_tokenizer

LLAMA_3 = (
    "{{ bos_token }}{% for m in messages %}<|start|>{{ m['role'] }}\n\n{{ m['content'] }}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n\n{% endif %}"
)


def metaspace() -> PreTrainedTokenizerFast:
    """Return a tokenizer of Llama 2's kind: blanks become a sign, BOS comes first."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdefghijklmnopqrstuvwxyz"]
    made = Tokenizer(
        models.BPE({p: i for i, p in enumerate(pieces)}, [], byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    )
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def unigram() -> PreTrainedTokenizerFast:
    pieces = [("<unk>", 0.0), ("▁", -2.0), *((c, -3.0) for c in "abcdefghijklmnopqrstuvwxyz0123456789"), ("▁the", -2.5)]
    made = Tokenizer(models.Unigram(pieces, unk_id=0))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>")


def wordpiece() -> PreTrainedTokenizerFast:
    pieces = ["[UNK]", "[PAD]", *"abcdefghijklmnopqrstuvwxyz", *(f"##{c}" for c in "abcdefghijklmnopqrstuvwxyz")]
    made = Tokenizer(models.WordPiece({p: i for i, p in enumerate(pieces)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]", pad_token="[PAD]")


TOKENIZERS = {
    "byte-level": make_tokenizer,
    "chat": lambda: make_tokenizer(chat=True),
    "metaspace": metaspace,
    "unigram": unigram,
    "wordpiece": wordpiece,
}
MODEL_TYPES = [
    *(
        "qwen2",
        "qwen3_5_text",
        "qwen3_5_moe_text",
        "qwen3",
        "llama",
        "gpt2",
        "mistral",
        "mixtral",
        "gemma3_text",
        "phi3",
    ),
    *("opt", "gpt_neox", "smollm3", "jamba", "mamba", "bloom", "cohere", "deepseek_v3", "gpt_oss", "olmo2"),
]


@pytest.mark.parametrize("name", TOKENIZERS)
def test_every_tokenizer_loads_beside_every_model(name: str, tmp_path: Path) -> None:
    """AutoTokenizer looks at the model's type; what a cache holds and what final/ holds load as what was there."""
    original = TOKENIZERS[name]()
    carried = tokenizer_from_files(tokenizer_files(original))
    assert not tokenizer_differences(original, carried)
    for model_type in MODEL_TYPES:
        folder = tmp_path / model_type
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
        carried.save_pretrained(folder)
        make_loadable(carried, folder)
        plain = AutoTokenizer.from_pretrained(folder)
        assert fingerprint(plain) == fingerprint(original), model_type
        assert plain.encode("a b") == original.encode("a b")
        assert (plain.eos_token_id, plain.pad_token_id) == (original.eos_token_id, original.pad_token_id)
        assert tokenizer_files(plain)["tokenizer.json"] == tokenizer_files(original)["tokenizer.json"]


def test_a_qwen2_student_on_another_familys_cache(tmp_path: Path) -> None:
    """Its final/ and its checkpoints hold the cache's tokenizer, which transformers would replace by Qwen2's."""
    cache = make_cache(tmp_path, make_teacher(tmp_path / "teacher"))
    run = train(
        cache, tmp_path / "run", student_config=write_config(tmp_path / "q.json", {**STUDENT, "model_type": "qwen2"})
    )
    teacher = AutoTokenizer.from_pretrained(tmp_path / "teacher")
    for folder in (run / "final", run / "checkpoint-3"):
        assert fingerprint(AutoTokenizer.from_pretrained(folder)) == fingerprint(teacher)
    again = train(cache, tmp_path / "again", student_model=str(run / "final"), max_steps=1)
    assert metrics(again)["before"]["eval_total_loss"] == pytest.approx(
        metrics(run)["after"]["eval_total_loss"], rel=1e-5
    )


def test_a_saved_student_that_differs_is_reported(tmp_path: Path) -> None:
    """Another setting of the config, another weight, a missing weight: each is named, none passes."""
    folder = make_teacher(tmp_path / "m")
    model = load_causal_lm(str(folder), dtype=torch.float32)
    logits = probe_logits(model)
    require_saved(folder, logits, model, exact=True)
    other = shutil.copytree(folder, tmp_path / "config")
    config = json.loads((other / "config.json").read_text())
    write_config(other / "config.json", {**config, "rope_parameters": {"rope_theta": 500.0, "rope_type": "default"}})
    for exact in (True, False):
        with pytest.raises(LogitcaskError, match="another student than the one in memory: its logits differ by up to"):
            require_saved(other, logits, model, exact=exact)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] += 1e-3
    with pytest.raises(LogitcaskError, match=r"1 weights are not those in memory.*layers\.1\.mlp\.up_proj"):
        require_saved(folder, logits, model, exact=True)
    with pytest.raises(LogitcaskError, match="logits differ"):
        require_saved(folder, logits + 1.0, None, exact=True)


def with_template(template: str) -> PreTrainedTokenizerFast:
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|start|>", "<|eot|>"], "bos_token": "<|start|>"})
    tokenizer.chat_template = template
    return tokenizer


def test_the_templates_end_of_turn() -> None:
    assert end_of_turn(make_tokenizer()) is None
    chat = make_tokenizer(chat=True)
    assert end_of_turn(chat) == chat.eos_token_id
    llama = with_template(LLAMA_3)
    assert end_of_turn(llama) == llama.convert_tokens_to_ids("<|eot|>") != llama.eos_token_id
    assert end_of_turn(with_template("{% for m in messages %}{{ m['content'] }}\n{% endfor %}")) is None
    assert end_of_turn(with_template("{{ raise_exception('no') }}")) is None


@pytest.mark.parametrize(
    ("known", "new", "expected"),
    [
        ([0, 2], False, ["eos", 2, "eot"]),  # 0 is the tokenizer's
        ([5, 9], False, ["eos", 5, 9, "eot"]),
        (2, False, ["eos", "eot"]),  # the class's default, an ordinary token of this tokenizer
        ("eot", False, ["eos", "eot"]),
        ([0, 2], True, ["eos", "eot"]),
        (None, False, ["eos", "eot"]),
    ],
)
def test_the_tokens_at_which_answers_end(known: Any, new: bool, expected: list[Any]) -> None:
    tokenizer = with_template(LLAMA_3)
    ids = {"eos": tokenizer.eos_token_id, "eot": tokenizer.convert_tokens_to_ids("<|eot|>")}
    config = LlamaConfig(**{k: v for k, v in STUDENT.items() if k != "model_type"}, vocab_size=302)
    student = AutoModelForCausalLM.from_config(config)
    student.generation_config.eos_token_id = ids.get(known, known) if isinstance(known, str) else known
    set_special_tokens(student, tokenizer, new=new)
    assert student.generation_config.eos_token_id == [ids.get(token, token) for token in expected]
    assert student.config.eos_token_id == tokenizer.eos_token_id
    assert student.generation_config.bos_token_id == tokenizer.bos_token_id
    plain = make_tokenizer()
    set_special_tokens(student, plain, new=True)
    assert student.generation_config.eos_token_id == plain.eos_token_id


def test_a_pretrained_students_list_stands_in_final(tmp_path: Path) -> None:
    teacher = make_teacher(tmp_path / "teacher", chat=True)
    eos = AutoTokenizer.from_pretrained(teacher).eos_token_id
    cache = make_cache(tmp_path, teacher)
    student = shutil.copytree(teacher, tmp_path / "student")
    write_config(student / "generation_config.json", {"eos_token_id": [0, 5], "temperature": 0.5, "do_sample": True})
    run = train(cache, tmp_path / "run", student_model=str(student), max_steps=1)
    saved = json.loads((run / "final" / "generation_config.json").read_text())
    assert sorted(saved["eos_token_id"]) == sorted({0, 5, eos})
    assert saved["temperature"] == 0.5
