"""What a student's tokenizer makes of the teacher's tokens: its first token of each rest of each teacher's token.

The rest of a token w after k bytes is w[k:]. Tables are made once for a pair of tokenizers and kept on disk.

Legend: V tokens of the teacher, B bytes of all of them together.
"""

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from logitcask.cache.labels import IntArray
from logitcask.pipeline.text.tokenizer import end_of_turn, fingerprint
from logitcask.pipeline.vocabulary.bridge import NONE, Bridge, TokenBytes
from logitcask.pipeline.vocabulary.token_bytes import BYTE_TOKEN, token_bytes

VERSION = 2  # of the tables on disk
ENCODED_AT_ONCE = 1 << 14
ROLES = ("bos_token", "eos_token", "pad_token", "unk_token")


def make_bridge(teacher: PreTrainedTokenizerBase, student: PreTrainedTokenizerBase, folder: Path | None) -> Bridge:
    """Return the bridge between two tokenizers; its table is kept in ``folder``, if one is given and can be written.

    Raises LogitcaskError if the bytes of a tokenizer's tokens are not known.
    """
    ours, theirs = token_bytes(teacher), token_bytes(student)
    starts = np.zeros(len(ours) + 1, dtype=np.int64)
    np.cumsum([len(text or b"") for text in ours], out=starts[1:])
    key = hashlib.sha256(f"{VERSION} {fingerprint(teacher)} {fingerprint(student)}".encode()).hexdigest()
    firsts = _load(folder, key, int(starts[-1]))
    if firsts is None:
        firsts = first_tokens([(text or b"")[k:] for text in ours for k in range(len(text or b""))], student, theirs)
        _store(folder, key, firsts)
    lengths = np.diff(starts)
    whole = np.full(len(ours), NONE, dtype=np.int32)
    whole[lengths > 0] = firsts[starts[:-1][lengths > 0]]
    for index, meant in _specials(teacher, student, ours, theirs).items():
        whole[index] = meant
    return Bridge(
        ours, theirs, starts, firsts, whole, _exchange(teacher, student, ours, theirs), (_ends(teacher), _ends(student))
    )


def _ends(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    return frozenset({tokenizer.eos_token_id, end_of_turn(tokenizer)} - {None})


def _exchange(
    teacher: PreTrainedTokenizerBase, student: PreTrainedTokenizerBase, ours: TokenBytes, theirs: TokenBytes
) -> IntArray | None:
    own, other = teacher.get_vocab(), student.get_vocab()
    if own.keys() != other.keys() or not len(own) == len(ours) == len(theirs):
        return None
    ids = np.empty(len(own), dtype=np.int64)
    for token, index in own.items():
        if ours[index] != theirs[other[token]]:
            return None
        ids[other[token]] = index
    return ids


def first_tokens(texts: Sequence[bytes], tokenizer: PreTrainedTokenizerBase, known: TokenBytes) -> NDArray[np.int32]:
    """Return the first token of each text, as it continues another text, NONE if there is none.

    Bytes that are no text, or that the tokenizer changes, give the longest token that they begin with.
    """
    unique = dict.fromkeys(texts, NONE)
    ids = _by_text(tokenizer, known)
    longest = max(map(len, ids), default=0)
    sentinel = tokenizer.encode("\n", add_special_tokens=False)
    keeps = known[tokenizer.encode("a", add_special_tokens=False)[0]] == b"a"
    names = list(unique)
    for begin in range(0, len(names), ENCODED_AT_ONCE):
        some = names[begin : begin + ENCODED_AT_ONCE]
        readable = [_text(text) for text in some]
        given = readable if keeps else [f"\n{text}" for text in readable]
        for text, encoded in zip(some, tokenizer(given, add_special_tokens=False).input_ids, strict=True):
            tokens = encoded if keeps else encoded[len(sentinel) :] if encoded[: len(sentinel)] == sentinel else []
            own = known[tokens[0]] if tokens else None
            if own and text.startswith(own):
                unique[text] = tokens[0]
            else:
                cuts = (text[:size] for size in range(min(longest, len(text)), 0, -1))
                unique[text] = next((ids[cut] for cut in cuts if cut in ids), NONE)
    return np.array([unique[text] for text in texts], dtype=np.int32)


def _by_text(tokenizer: PreTrainedTokenizerBase, known: TokenBytes) -> dict[bytes, int]:
    """Return the token of each text, the first one; SentencePiece's for a byte only if no other has that text."""
    names = tokenizer.convert_ids_to_tokens(list(range(len(known))))
    single = {index for index, name in enumerate(names) if name is not None and BYTE_TOKEN.fullmatch(name)}
    in_order = sorted((text, index in single, index) for index, text in enumerate(known) if text)
    return {text: index for text, _, index in reversed(in_order)}


def _text(text: bytes) -> str:
    """Return a text, empty if the bytes are none."""
    try:
        return text.decode()
    except UnicodeDecodeError:
        return ""


def _specials(
    teacher: PreTrainedTokenizerBase, student: PreTrainedTokenizerBase, ours: TokenBytes, theirs: TokenBytes
) -> dict[int, int]:
    """Return the student's special token for the teacher's that are written alike or have the same role."""
    meant: dict[int, int] = {}
    turn, other_turn = end_of_turn(teacher), end_of_turn(student)
    for role in ROLES:
        own, other = getattr(teacher, f"{role}_id"), getattr(student, f"{role}_id")
        if own is not None and other is not None:
            meant.setdefault(own, other)
    vocabulary = student.get_vocab()
    alike = {i: vocabulary.get(str(teacher.convert_ids_to_tokens(i))) for i, text in enumerate(ours) if text is None}
    meant |= {i: other for i, other in alike.items() if other is not None and theirs[other] is None}
    if turn is not None and other_turn is not None:
        meant[turn] = other_turn
    return {index: other for index, other in meant.items() if ours[index] is None}


def table_folder() -> Path:
    """Return where tables are kept: in the user's folder for caches."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "logitcask" / "vocabularies"


def _load(folder: Path | None, key: str, size: int) -> NDArray[np.int32] | None:
    if folder is None:
        return None
    with contextlib.suppress(OSError, ValueError, EOFError):
        table: NDArray[np.int32] = np.load(folder / f"{key}.npy", allow_pickle=False)
        if table.shape == (size,) and table.dtype == np.int32:
            return table
    return None


def _store(folder: Path | None, key: str, table: NDArray[np.int32]) -> None:
    """Keep a table, whole or not at all; a folder that cannot be written is none."""
    if folder is None:
        return
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, delete=False) as file:
            np.save(file, table)
        os.replace(file.name, folder / f"{key}.npy")
