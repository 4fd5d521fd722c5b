"""Models and tokenizers that cannot be trained are refused in one line that says why, before anything is trained."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer, OpenAIGPTConfig, OpenAIGPTLMHeadModel

from logitcask.cache.errors import CacheFormatError, CacheMismatchError, LogitcaskError
from logitcask.pipeline.models.load import load_causal_lm
from logitcask.pipeline.models.recompute import require_checkpointing
from logitcask.pipeline.models.shapes import shape_of_teacher
from logitcask.pipeline.text.tokenizer import load_tokenizer, tokenizer_files, tokenizer_from_files
from tests.support.runs import metrics, train, write_config
from tests.support.tiny import RECORDS, make_cache, make_teacher, make_tokenizer, write_jsonl

Change = Callable[[Path], Any]


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher with its cache."""
    folder = tmp_path_factory.mktemp("stock")
    make_cache(folder, make_teacher(folder / "teacher"))
    return folder


def config(**changes: Any) -> Change:
    return lambda d: write_config(d / "config.json", {**json.loads((d / "config.json").read_text()), **changes})


def tensors(change: Callable[[dict[str, Tensor]], Any]) -> Change:
    def apply(folder: Path) -> None:
        held = load_file(folder / "model.safetensors")
        change(held)
        save_file(held, folder / "model.safetensors", metadata={"format": "pt"})

    return apply


def cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])


BAD_STUDENTS: dict[str, tuple[Change, str]] = {
    "no head": (tensors(lambda t: t.pop("lm_head.weight")), r"1 are missing, the first is lm_head\.weight"),
    "no layer": (tensors(lambda t: t.pop("model.layers.1.mlp.up_proj.weight")), r"missing.*layers\.1\.mlp\.up_proj"),
    "other layer": (
        tensors(lambda t: t.update({"model.layers.0.self_attn.q_norm.weight": torch.ones(8)})),
        "of another",
    ),
    "other width": (config(hidden_size=64), r"have other shapes, the first is lm_head\.weight"),
    "other vocabulary": (config(vocab_size=400), "2 have other shapes"),
    "cut weights": (cut, "SafetensorError: .*incomplete"),
    "empty weights": (lambda d: (d / "model.safetensors").write_bytes(b""), "no causal language model could be loaded"),
    "bitsandbytes": (config(quantization_config={"quant_method": "bitsandbytes"}), "quantised .'bitsandbytes'."),
    "gptq": (config(quantization_config={"quant_method": "gptq", "bits": 4}), "quantised .'gptq'.*take the model"),
    "odd quantisation": (config(quantization_config=5), "quantised .5."),
    "an adapter": (lambda d: write_config(d / "adapter_config.json", {}), "is an adapter.*merge_and_unload"),
    "unknown type": (config(model_type="perceptron"), "perceptron"),
    "heads do not divide": (config(num_attention_heads=5), "could be loaded: StrictDataclass.*not a multiple"),
    "config of a list": (lambda d: (d / "config.json").write_text("[]"), "no .* could be loaded"),
}


@pytest.mark.parametrize("name", BAD_STUDENTS)
def test_bad_students(name: str, stock: Path, tmp_path: Path) -> None:
    change, pattern = BAD_STUDENTS[name]
    folder = shutil.copytree(stock / "teacher", tmp_path / "student")
    change(folder)
    with pytest.raises(LogitcaskError, match=pattern) as caught:
        train(stock / "cache", tmp_path / "run", student_model=str(folder))
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 700
    assert not list(tmp_path.glob("run/checkpoint-*"))


def test_a_real_adapter_is_refused_and_merged_it_trains(stock: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    base = load_causal_lm(str(stock / "teacher"), dtype=torch.float32)
    tuned = peft.get_peft_model(base, peft.LoraConfig(target_modules=["q_proj"], r=2))
    tuned.save_pretrained(tmp_path / "adapter")
    with pytest.raises(LogitcaskError, match="is an adapter"):
        train(stock / "cache", tmp_path / "run", student_model=str(tmp_path / "adapter"))
    tuned.merge_and_unload().save_pretrained(tmp_path / "merged")
    train(stock / "cache", tmp_path / "run", student_model=str(tmp_path / "merged"), max_steps=1)


def test_a_student_without_a_tokenizer_gets_the_caches(
    stock: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(stock / "teacher" / name, bare / name)
    run = train(stock / "cache", tmp_path / "run", student_model=str(bare), max_steps=1)
    assert "holds no tokenizer: the cache's is used" in capfd.readouterr().err
    whole = train(stock / "cache", tmp_path / "whole", student_model=str(stock / "teacher"), max_steps=1)
    assert metrics(run)["before"]["eval_total_loss"] == metrics(whole)["before"]["eval_total_loss"]
    assert AutoTokenizer.from_pretrained(run / "final").get_vocab() == make_tokenizer().get_vocab()
    data = write_jsonl(tmp_path / "t.jsonl", RECORDS)
    with pytest.raises(LogitcaskError, match="needs a tokenizer: give --teacher-model"):
        train(None, tmp_path / "text", train_data=str(data), student_model=str(bare), distillation_type="output")


def test_a_class_that_cannot_recompute(stock: Path) -> None:
    with pytest.raises(LogitcaskError, match="OpenAIGPTLMHeadModel does not support it"):
        require_checkpointing(OpenAIGPTLMHeadModel(OpenAIGPTConfig(vocab_size=9, n_embd=8, n_layer=1, n_head=1)))
    require_checkpointing(load_causal_lm(str(stock / "teacher"), dtype=torch.float32))


def test_unknown_names_give_short_lines(tmp_path: Path) -> None:
    """A GGUF file that is not there is no hub's business; an unknown type is not answered by a list of all."""
    for load in (load_tokenizer, shape_of_teacher, lambda s: load_causal_lm(s, dtype=torch.float32)):
        with pytest.raises(LogitcaskError, match="no such GGUF file") as caught:
            load(str(tmp_path / "no.gguf"))
        assert "huggingface" not in str(caught.value)
    student = write_config(tmp_path / "s.json", {"model_type": "perceptron"})
    cache = make_cache(tmp_path, make_teacher(tmp_path / "teacher"))
    with pytest.raises(LogitcaskError, match="perceptron") as caught:
        train(cache, tmp_path / "run", student_config=student)
    assert len(str(caught.value)) < 500


CODE = """
from transformers import PythonBackend
class Letters(PythonBackend):
    def __init__(self, **kwargs):
        super().__init__(eos_token="<end>", **kwargs)
    vocab_size = 128
    def get_vocab(self): return {chr(i): i for i in range(128)} | {k: v for k, v in self._added_tokens_encoder.items()}
    def _tokenize(self, text): return [c for c in text if ord(c) < 128]
    def _convert_token_to_id(self, token): return ord(token)
    def _convert_id_to_token(self, index): return chr(index)
    def save_vocabulary(self, folder, filename_prefix=None): return ()
"""


def test_a_tokenizer_that_needs_its_own_code_is_refused_at_the_start_of_stage_1(tmp_path: Path) -> None:
    """One that runs code and is nothing but a tokenizer.json is carried; one that is its code cannot be."""
    teacher = make_teacher(tmp_path / "teacher")
    settings = json.loads((teacher / "tokenizer_config.json").read_text())
    (teacher / "own.py").write_text(
        "from transformers import PreTrainedTokenizerFast\nclass Own(PreTrainedTokenizerFast): pass\n"
    )
    write_config(teacher / "tokenizer_config.json", {**settings, "auto_map": {"AutoTokenizer": [None, "own.Own"]}})
    cache = make_cache(tmp_path, teacher, trust_remote_code=True)
    train(cache, tmp_path / "run", max_steps=1)
    (teacher / "own.py").write_text(CODE)
    (teacher / "tokenizer.json").unlink()
    write_config(teacher / "tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["own.Letters", None]}})
    with pytest.raises(LogitcaskError, match=r"its Letters cannot be stored such that .* loads the same one") as caught:
        make_cache(tmp_path, teacher, trust_remote_code=True, output=tmp_path / "other")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "other").exists()


def changed(name: str, **changes: Any) -> Callable[[dict[str, bytes]], dict[str, bytes]]:
    return lambda files: {**files, name: json.dumps({**json.loads(files[name]), **changes}).encode()}


CONTENTS = [
    b"",
    b"{",
    b"[]",
    b"null",
    b"3",
    b'"x"',
    bytes(range(256)),
    b"[" * 100_000,
    b'{"a": "\\ud83d"}',
    b"\xef\xbb\xbf{}",
]
SETTINGS: list[dict[str, Any]] = [
    {"tokenizer_class": 5}, {"tokenizer_class": "BertTokenizer"}, {"tokenizer_class": "T5Tokenizer"},
    {"tokenizer_class": "LlamaConfig"}, {"tokenizer_class": "MistralCommonBackend"}, {"auto_map": 5},
    {"auto_map": {"AutoTokenizer": ["a.B", None]}, "tokenizer_class": None}, {"eos_token": 5}, {"eos_token": ["a"]},
    {"added_tokens_decoder": 5}, {"added_tokens_decoder": {"x": {}}}, {"extra_special_tokens": {"a": 5}},
    {"model_max_length": "x"}, {"padding_side": "up"}, {"tokenizer_object": 5}, {"model_input_names": 5},
]  # fmt: skip
RULES: list[dict[str, Any]] = [
    {"model": {}}, {"model": None}, {"model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}}, {"pre_tokenizer": 5},
    {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["a b"]}}, {"added_tokens": [{"id": 5}]}, {"version": "9"},
    {"model": {"type": "Unigram", "vocab": [], "unk_id": 0}}, {"added_tokens": None}, {"padding": {"strategy": "x"}},
    {"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "b"}},
    {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False}},
    {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
    {"truncation": {"direction": "Right", "max_length": 0, "strategy": "LongestFirst", "stride": 5}},
]  # fmt: skip


def test_odd_tokenizer_files_in_a_cache() -> None:
    """Whatever they hold, one line says so; the Rust library panics at some."""
    sound = tokenizer_files(make_tokenizer(chat=True))
    files = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
    odd = [{**sound, file: content} for file in files for content in CONTENTS]
    odd += [
        {**sound, "chat_template.jinja": bytes(range(256))},
        {},
        {"tokenizer_config.json": sound["tokenizer_config.json"]},
    ]
    odd += [changed("tokenizer_config.json", **values)(sound) for values in SETTINGS]
    odd += [changed("tokenizer.json", **values)(sound) for values in RULES]
    messages = [refusal(given) for given in odd]
    assert len([message for message in messages if not message]) <= 5, "settings that a class ignores"
    assert all("\n" not in message and "/tmp" not in message and len(message) < 600 for message in messages)


def refusal(files: dict[str, bytes]) -> str:
    """Return why a cache's tokenizer is refused, nothing if it is not; other errors pass."""
    try:
        tokenizer_from_files(files)
    except CacheFormatError as error:
        return str(error)
    return ""


def test_a_caches_tokenizer_that_loads_as_another_is_refused(
    stock: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a change of transformers, or with files of another tokenizer."""
    monkeypatch.setattr(
        "logitcask.pipeline.train.sources.cache.tokenizer_from_files", lambda _: make_tokenizer(chat=True)
    )
    with pytest.raises(CacheMismatchError, match="load as another tokenizer than it was made with"):
        train(stock / "cache", tmp_path / "run")
