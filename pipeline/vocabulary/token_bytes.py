"""The bytes that each token of a tokenizer stands for, of byte-level BPE and of SentencePiece with byte fallback."""

import json
import re
from collections.abc import Iterator
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from logitcask.cache.errors import LogitcaskError
from logitcask.pipeline.text.tokenizer import end_of_turn
from logitcask.pipeline.vocabulary.bridge import TokenBytes

BYTE_TOKEN = re.compile("<0x([0-9A-F]{2})>")
MARK = "\u2581"  # SentencePiece's blank
PROBES = (  # texts that every tokenizer that keeps texts keeps
    "x  12 == 3.14159 and y1234567",
    "def f(a, b):\n    return a + b\n\n\n\tpass  # tail  ",
    "Hello, World! It's 10:30pm; DON'T panic.",
)


def token_bytes(tokenizer: PreTrainedTokenizerBase) -> TokenBytes:
    """Return the bytes of each token by id, None for special tokens and ids without a token.

    Raises LogitcaskError if they are not known, or the tokenizer changes texts, as one does that lowercases them.
    """
    name = tokenizer.name_or_path or "the tokenizer"
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise LogitcaskError(
            f"{name}: its {type(tokenizer).__name__} does not say which bytes its tokens stand for, which labels in "
            "another vocabulary need: choose a model with a tokenizer.json"
        )
    kinds = set(_types(json.loads(backend.to_str())))
    byte_level = {character: value for value, character in bytes_to_unicode().items()} if "ByteLevel" in kinds else None
    vocabulary, added = tokenizer.get_vocab(), tokenizer.added_tokens_decoder
    found: TokenBytes = [None] * (max(vocabulary.values()) + 1)
    for token, index in vocabulary.items():
        if index in added:
            found[index] = None if added[index].special else _added(added[index].content, byte_level is None)
        else:
            found[index] = _ordinary(token, byte_level)
    for index in {*tokenizer.all_special_ids, end_of_turn(tokenizer)} - {None}:
        found[index] = None
    _require_kept(tokenizer, found, name)
    return found


def _types(value: Any) -> Iterator[str]:
    """Yield the types of a tokenizer's parts."""
    if isinstance(value, dict):
        if isinstance(kind := value.get("type"), str):
            yield kind
        value = [item for key, item in value.items() if key not in ("vocab", "merges", "added_tokens")]
    if isinstance(value, list):
        for item in value:
            yield from _types(item)


def _added(text: str, marks: bool) -> bytes:
    return (text.replace(MARK, " ") if marks else text).encode()


def _ordinary(token: str, byte_level: dict[str, int] | None) -> bytes:
    if byte_level is not None and all(character in byte_level for character in token):
        return bytes(byte_level[character] for character in token)
    if match := BYTE_TOKEN.fullmatch(token):
        return bytes([int(match[1], 16)])
    return token.replace(MARK, " ").encode(errors="replace")


def _require_kept(tokenizer: PreTrainedTokenizerBase, found: TokenBytes, name: str) -> None:
    for text in PROBES:
        kept = b"".join(found[index] or b"" for index in tokenizer.encode(text, add_special_tokens=False))
        if kept.removeprefix(b" ") != text.encode():
            raise LogitcaskError(
                f"{name}: its tokens do not give back a text ({kept[:40].decode(errors='replace')!r} instead of "
                f"{text[:40]!r}), as one that lowercases or drops blanks does: labels in another vocabulary need one "
                "that keeps texts as they are: choose a model with byte-level BPE, or SentencePiece with byte fallback"
            )
