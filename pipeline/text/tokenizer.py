"""Tokenizers: loading them, identifying them by what they do, and storing them inside a cache."""

import json
import tempfile
from pathlib import Path

from tokenizers import Tokenizer, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS
from transformers.integrations.gguf.reader import read_gguf_metadata

from logitcask.cache.errors import LogitcaskError, first_line
from logitcask.cache.manifest import TokenizerIdentity, sha256

STORED_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
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
    try:
        if source.endswith(".gguf"):
            folder, name = str(Path(source).parent), Path(source).name
            tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
            _fix_gguf_pre_tokenizer(tokenizer, source)
        else:
            tokenizer = AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise LogitcaskError(f"{source}: no tokenizer could be loaded: {first_line(error)}") from error
    return tokenizer


def as_chat(tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    """Return a prompt as a user turn plus the start of the answer, by the chat template; without one, as it is.

    Encode it with ``add_special_tokens=not tokenizer.chat_template``: a template writes its own.
    """
    if not tokenizer.chat_template:
        return prompt
    turns = [{"role": "user", "content": prompt}]
    return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))


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
    """Return the files from which the tokenizer can be loaded elsewhere, by name."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        files = {name: Path(folder, name).read_bytes() for name in STORED_FILES if Path(folder, name).exists()}
    if "tokenizer.json" in files:  # canonical, so that equal tokenizers give equal bytes
        files["tokenizer.json"] = Tokenizer.from_str(files["tokenizer.json"].decode()).to_str().encode()
    return files


def tokenizer_from_files(files: dict[str, bytes]) -> PreTrainedTokenizerBase:
    """Load the tokenizer stored in a cache, running no code from it. Raises LogitcaskError if a file is unknown."""
    unknown = set(files) - set(STORED_FILES)
    if unknown:
        raise LogitcaskError(f"cache holds unknown tokenizer files {sorted(unknown)}: known are {list(STORED_FILES)}")
    with tempfile.TemporaryDirectory() as folder:
        for name, data in files.items():
            Path(folder, name).write_bytes(data)
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
