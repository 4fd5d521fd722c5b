"""Tokenizers: loading them, identifying them by what they do, and storing them inside a cache."""

import json
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS
from transformers.integrations.gguf.reader import read_gguf_metadata

from logitcask.cache.errors import CacheFormatError, CacheMismatchError, LogitcaskError, shown, shown_reason
from logitcask.cache.manifest import TokenizerIdentity, sha256

STORED_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
TOKENIZER_FILES = ("tokenizer", "vocab", "merges", "spiece", "sentencepiece", "tekken", "tiktoken", "qwen.tiktoken")
SPECIAL_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")
LOADING = {"is_local", "local_files_only", "name_or_path"}  # settings that from_pretrained leaves behind
PLAIN_GPT2 = {"gpt-2", "gpt2", "default"}
# Texts on which tokenizers of one family differ: digits, indentation, line ends, scripts, accents, byte fallback.
PROBES = (
    "x  12 == 3.14159 and y1234567",
    "def f(a, b):\n    return a + b\n\n\n\tpass  # tail  ",
    "Hello, world! It's 10:30pm; don't panic.\r\n",
    "naïve café — “quotes” … ½ ﬁ",
    "日本語のテキスト 한국어 العربية עברית हिन्दी",
    "🙂👩‍👩‍👧 \u200b\x07 \U0001f9ff",
    " leading",
    "trailing ",
    "   ",
    "\n\n",
    "<|im_start|>user\n<s></s>[INST]",
)


def load_tokenizer(
    source: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a hub id, a local folder or a GGUF file.

    Raises LogitcaskError if it cannot be loaded, or a GGUF file names an unknown pre-tokenizer.
    """
    require_no_run(source)
    if source.endswith(".gguf"):
        path = Path(source)
        if not path.is_file():
            raise LogitcaskError(f"{source}: no such GGUF file: give the path of one, or a model's folder or hub id")
        tokenizer = _auto_tokenizer(path.parent, source, gguf_file=path.name)
        _fix_gguf_pre_tokenizer(tokenizer, source)
        return tokenizer
    return _auto_tokenizer(source, source, revision=revision, trust_remote_code=trust_remote_code)


def require_no_run(source: str) -> None:
    """Raise LogitcaskError if a folder is that of a run, where its student in ``final`` or a checkpoint is meant."""
    model = student_of(source)
    if model is not None:
        raise LogitcaskError(f"{source}: is the folder of a run, not a model: give {model}")


def student_of(run: str) -> Path | None:
    """Return the student in a run's folder, ``final`` or its latest checkpoint; None if it is not such a folder."""
    folder = Path(run)
    if not folder.is_dir() or _holds_model(folder):
        return None
    numbered = [(int(name[11:]), name) for name in os.listdir(folder) if re.fullmatch("checkpoint-[0-9]+", name)]
    names = ["final", *(name for _, name in sorted(numbered, reverse=True))]
    return next((folder / name for name in names if _holds_model(folder / name)), None)


def _holds_model(folder: Path) -> bool:
    """Return whether a folder holds a model or an adapter."""
    return any((folder / name).is_file() for name in ("config.json", "adapter_config.json"))


def has_tokenizer(source: str) -> bool:
    """Return whether a model brings a tokenizer; only the folder of a model is known not to."""
    folder = Path(source)
    return not (folder / "config.json").is_file() or any(f.name.startswith(TOKENIZER_FILES) for f in folder.iterdir())


def _auto_tokenizer(folder: str | Path, source: str, **options: Any) -> PreTrainedTokenizerBase:
    """Load a tokenizer and use it once. Raises LogitcaskError for whatever its files hold."""
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, **options)
        encodings(tokenizer)
        tokenizer_size(tokenizer)
        [getattr(tokenizer, f"{name}_id") for name in SPECIAL_TOKENS]
        template: Any = tokenizer.chat_template
        texts = template.values() if isinstance(template, dict) else [template or ""]
        if not all(isinstance(text, str) for text in texts):
            raise ValueError(f"chat_template must be text, got {shown(template)}")
    except (MemoryError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # the Rust library raises Exception, and panics, which are no Exception
        remedy = "check the name, or give a local folder or .gguf file"
        raise LogitcaskError(f"{source}: no tokenizer could be loaded: {shown_reason(error)}: {remedy}") from error
    return tokenizer


def as_chat(tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    """Return a prompt as a user turn plus the start of the answer, by the chat template; without one, as it is.

    Encode it with ``add_special_tokens=not tokenizer.chat_template``: a template writes its own. Raises LogitcaskError
    if the template fails.
    """
    if not tokenizer.chat_template:
        return prompt
    turns = [{"role": "user", "content": prompt}]
    try:
        return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
    except Exception as error:  # a template is a program, and may raise anything
        reason = shown_reason(error)
        raise LogitcaskError(f"the chat template rejects a prompt: {reason}: correct the template") from error


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the special token that the chat template writes after an answer, None if there is none."""
    if not tokenizer.chat_template:
        return None
    answer = "Yes, eleven."
    turns = [{"role": "user", "content": "Are there any?"}, {"role": "assistant", "content": answer}]
    try:
        text = str(tokenizer.apply_chat_template(turns, tokenize=False))
    except Exception:  # a template is a program of its own, and may want other turns than these
        return None
    after = tokenizer.encode(text.rpartition(answer)[2].lstrip(), add_special_tokens=False)
    return after[0] if after and after[0] in tokenizer.added_tokens_decoder else None


def _fix_gguf_pre_tokenizer(tokenizer: PreTrainedTokenizerBase, path: str) -> None:
    """Give a byte-level tokenizer read from GGUF the pre-tokenizer that the file names.

    The reader in transformers silently ignores names it does not know. SmolLM2's splits off single digits first;
    without that, blanks before digits are merged wrongly, which no round trip reveals.
    """
    fields, _ = read_gguf_metadata(path)
    if fields.get("tokenizer.ggml.model") != "gpt2":
        return
    rule = fields.get("tokenizer.ggml.pre", "default")
    if rule == "smollm":
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True),
            ]
        )
    elif rule not in PLAIN_GPT2 and rule not in GGUF_PRE_TOKENIZER_SPLITS:
        raise LogitcaskError(
            f"{path}: tokenizer.ggml.pre is {rule!r}, an unknown pre-tokenizer; "
            "its tokens would be silently wrong: use the model's Hugging Face folder instead of the GGUF file"
        )


def tokenizer_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the largest token id plus one."""
    return max(int(token) for token in tokenizer.get_vocab().values()) + 1


def encodings(tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Return the token ids of the probe texts."""
    return [tokenizer.encode(text, add_special_tokens=False) for text in PROBES]


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the SHA-256 of the vocabulary and the encodings of the probe texts.

    Tokenizers with vocabularies of equal size may differ, and two wrappers of one tokenizer must not.
    """
    vocabulary = sorted(tokenizer.get_vocab().items())
    return sha256(json.dumps([vocabulary, encodings(tokenizer)], ensure_ascii=True).encode())


def identify(tokenizer: PreTrainedTokenizerBase, files: dict[str, bytes]) -> TokenizerIdentity:
    """Return the manifest's entry for a tokenizer."""
    template = tokenizer.chat_template
    return TokenizerIdentity(
        fingerprint=fingerprint(tokenizer),
        chat_template=sha256(json.dumps(template).encode()) if template else None,
        files={name: sha256(data) for name, data in files.items()},
    )


def tokenizer_files(tokenizer: PreTrainedTokenizerBase) -> dict[str, bytes]:
    """Return the files from which the tokenizer can be loaded elsewhere, by name.

    Raises LogitcaskError if it needs more than them, such as code of its own.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer.save_pretrained(folder)
        for file in folder.iterdir():
            if file.name not in STORED_FILES:
                file.unlink()
        whole = folder / "tokenizer.json"
        if whole.exists():  # canonical, so that equal tokenizers give equal bytes
            whole.write_bytes(Tokenizer.from_str(whole.read_text(encoding="utf-8")).to_str().encode())
        make_loadable(tokenizer, folder)
        _forget_how_it_was_loaded(folder / "tokenizer_config.json")
        return {file: (folder / file).read_bytes() for file in STORED_FILES if (folder / file).exists()}


def _forget_how_it_was_loaded(file: Path) -> None:
    """Remove from a tokenizer's settings what depends on where and how it was loaded."""
    settings = json.loads(file.read_text(encoding="utf-8"))
    kept = {name: value for name, value in settings.items() if name not in LOADING}
    file.write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def tokenizer_from_files(files: dict[str, bytes]) -> PreTrainedTokenizerBase:
    """Load the tokenizer stored in a cache, running no code from it.

    Raises LogitcaskError if a file is unknown, or no tokenizer can be loaded from what they hold.
    """
    unknown = set(files) - set(STORED_FILES)
    if unknown:
        raise LogitcaskError(f"cache holds unknown tokenizer files {sorted(unknown)}: known are {list(STORED_FILES)}")
    with tempfile.TemporaryDirectory() as folder:
        for name, data in files.items():
            Path(folder, name).write_bytes(data)
        try:
            return _load_without_code(Path(folder))
        except LogitcaskError as error:
            reason = str(error).replace(folder, "tokenizer")
            raise CacheFormatError(
                f"the cache's tokenizer files cannot be used: {reason}: make the cache anew from the teacher"
            ) from error


def make_loadable(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Rewrite a saved tokenizer's settings, if they need it, such that plain AutoTokenizer loads the same tokenizer.

    ``folder`` may hold a model's config.json, too: by its model_type AutoTokenizer may choose another class than the
    one saved, which splits texts in its own way. Raises LogitcaskError if no form loads as the same tokenizer.
    """
    file, reason = folder / "tokenizer_config.json", ""
    if not file.exists():
        file.write_text("{}\n", encoding="utf-8")
    saved = file.read_text(encoding="utf-8")
    for number, form in enumerate(_forms(json.loads(saved))):
        if number:
            file.write_text(json.dumps(form, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
        try:
            different = tokenizer_differences(tokenizer, _load_without_code(folder))
        except LogitcaskError as error:
            different = [str(error)]
        if not different:
            return
        reason = reason or "; ".join(different)
    file.write_text(saved, encoding="utf-8")
    raise LogitcaskError(
        f"{tokenizer.name_or_path or 'the tokenizer'}: its {type(tokenizer).__name__} cannot be stored such that "
        f"transformers, without code of the tokenizer's own, loads the same one: {reason}: use a model whose "
        "tokenizer.json is all that its tokenizer needs"
    )


def _forms(saved: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the settings of a tokenizer as they are, then in forms that name no class of its own.

    AutoTokenizer insists on the class of some model types (qwen2, qwen3_5_moe). Such a class builds its rules itself;
    with ``trust_remote_code`` among its settings it takes tokenizer.json as it is, and no code is run for it. It adds
    special tokens of its own unless these are set.
    """
    yield saved
    plain = {key: value for key, value in saved.items() if key != "auto_map"}
    yield {**plain, "tokenizer_class": "TokenizersBackend"}
    unset = dict.fromkeys(SPECIAL_TOKENS)
    yield {**unset, **plain, "tokenizer_class": "TokenizersBackend", "trust_remote_code": True}


def tokenizer_differences(tokenizer: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> list[str]:
    """Return in what two tokenizers differ for a student, one line each."""
    differences = []
    if tokenizer.get_vocab() != other.get_vocab():
        differences.append(f"another vocabulary, of {len(other.get_vocab())} instead of {len(tokenizer.get_vocab())}")
    pairs = zip(encodings(tokenizer), encodings(other), strict=True)
    otherwise = sum(own != others for own, others in pairs)
    if otherwise:
        differences.append(f"it splits {otherwise} of {len(PROBES)} texts otherwise")
    if tokenizer.encode(PROBES[0]) != other.encode(PROBES[0]):
        differences.append("other special tokens around a text")
    for name in SPECIAL_TOKENS:
        own, others = getattr(tokenizer, f"{name}_id"), getattr(other, f"{name}_id")
        if own != others and name != "unk_token":
            differences.append(f"{name}_id is {others} instead of {own}")
    if tokenizer.chat_template != other.chat_template:
        differences.append("another chat template")
    return differences


def _load_without_code(folder: Path) -> PreTrainedTokenizerBase:
    return _auto_tokenizer(folder, str(folder), trust_remote_code=False, local_files_only=True)


def require_tokenizer(source: str, wanted: str, cache: str, **loading: Any) -> None:
    """Raise CacheMismatchError if a model's own tokenizer is not the one that the cache was made with."""
    own = fingerprint(load_tokenizer(source, **loading))
    if own != wanted:
        raise CacheMismatchError(
            f"{cache}: was made with another tokenizer than {source}'s: fingerprints {wanted[:12]} and {own[:12]}; "
            "make a cache with a teacher that has the same tokenizer, or with --student-tokenizer"
        )
