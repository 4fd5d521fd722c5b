"""DistillKit's Parquet: bit-packed ids and compressed log-probabilities; its legacy layout; its raw top-k columns.

A row of ``compressed_logprobs`` holds the first ``exact_k`` values in ``exact_dtype``, the coefficients of
``polynomial_terms`` in ``term_dtype``, then per residual bin its scale and its bit-packed elements. What is not exact
is the polynomial over the rank plus the residual; with ``delta_encoding`` all are differences. Computed with torch in
the declared types, as DistillKit does, so that the numbers are the same to the bit.

Legend: N rows, K entries of a row, B bytes.
"""

import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from logitcask.cache.errors import LogitcaskError
from logitcask.cache.labels import FloatArray, IntArray
from logitcask.pipeline.labels_from.rows import (
    LabelledText,
    column,
    entries,
    places,
    require_numbers,
    targets_of,
    token_ids,
)
from logitcask.pipeline.settings.base import read_config
from logitcask.pipeline.text.columns import RecordError

FITTED = np.inf  # nats by which fitted rows may exceed certainty, to which they are scaled: some fits of real text do
CONFIG = "compression_config.yaml"  # written beside the Parquet files
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}
Dtype = Literal["float16", "bfloat16", "float32", "float64"]
WIDTH = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}  # bytes


class _Bin(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")
    scale_dtype: Dtype
    element_bits: int = Field(ge=1, le=64)
    num_elements: int = Field(ge=1, le=1 << 16)


class Compression(BaseModel):
    """DistillKit's ``logprob_compressor``."""

    model_config = ConfigDict(frozen=True, extra="ignore")
    d: int = Field(ge=1, le=1 << 31)
    k: int = Field(ge=1, le=1 << 16)
    exact_k: int = Field(ge=0, le=1 << 16)
    exact_dtype: Dtype = "float32"
    polynomial_terms: list[int | Literal["sqrt", "exp"]] | None = None
    term_dtype: Dtype = "float32"
    residual_bins: list[_Bin]
    delta_encoding: bool = True
    normalize_t: bool = False

    @property
    def row_bytes(self) -> int:
        """The bytes of a row of ``compressed_logprobs``."""
        bins = (WIDTH[b.scale_dtype] + -(-b.num_elements * b.element_bits // 8) for b in self.residual_bins)
        terms = len(self.polynomial_terms or ()) * WIDTH[self.term_dtype]
        return self.exact_k * WIDTH[self.exact_dtype] + terms + sum(bins)


class Legacy(BaseModel):
    """DistillKit's ``legacy_logit_compression``."""

    model_config = ConfigDict(frozen=True, extra="ignore")
    k: int = Field(ge=1, le=1 << 16)
    exact_k: int = Field(ge=0, le=1 << 16)
    polynomial_degree: int = Field(ge=0, le=64)
    vocab_size: int = Field(ge=1, le=1 << 31)
    invert_polynomial: bool = True
    with_sqrt_term: bool = False
    term_dtype: Dtype = "float32"


def load_compression(source: str, config: Path | None) -> Compression | Legacy | None:
    """Return the settings with which a source was compressed, from a file: DistillKit's own, or that of a training run.

    None if none is given and none lies beside the source. Raises LogitcaskError if the file has no such settings.
    """
    beside = next((p for p in (Path(source) / CONFIG, Path(source).parent / CONFIG) if p.is_file()), None)
    path = config or beside
    if path is None:
        return None
    settings = read_config(path)
    teacher = settings.get("teacher")
    inner = {**settings, **(teacher if isinstance(teacher, dict) else {})}
    try:
        if inner.get("legacy_logit_compression"):
            return Legacy.model_validate(inner["legacy_logit_compression"])
        return Compression.model_validate(inner.get("logprob_compressor") or settings)
    except ValidationError as error:
        first = error.errors()[0]
        raise LogitcaskError(
            f"{path}: must hold DistillKit's logprob_compressor or legacy_logit_compression: "
            f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
        ) from error


def read_distillkit(
    record: Mapping[str, Any], settings: Compression | Legacy | None, tokenizer: PreTrainedTokenizerBase
) -> Iterator[LabelledText]:
    """Yield the texts of a row, several if it is packed. Raises RecordError if its columns do not fit each other.

    A padding token that DistillKit put behind the text, to get one row more, is no target.
    """
    text = token_ids(record, "input_ids")
    ids, values = _decode(record, settings)
    wanted, mask = targets_of(record, len(text))
    at = places(len(ids), len(text), mask, "labels of input_ids")
    slack = FITTED if isinstance(settings, Compression) else LabelledText.slack
    pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
    for start, end in _segments(record, len(text)):
        inside = slice(*np.searchsorted(at, (start, end)))
        chosen = wanted[start:end].copy()
        if pad is not None and pad != eos and text[end - 1] == pad:
            chosen[-1] = False
        yield LabelledText(text[start:end], chosen, at[inside] - start, ids[inside], values[inside], slack=slack)


def _segments(record: Mapping[str, Any], length: int) -> list[tuple[int, int]]:
    """Return the texts of a packed row: ``attention_mask`` counts them from 1, and 0 is padding."""
    if record.get("attention_mask") is None:
        return [(0, length)]
    mask = token_ids(record, "attention_mask")
    if len(mask) != length:
        raise RecordError(f"attention_mask: must be one per token, {length}, got {len(mask)}")
    cuts = [0, *(np.flatnonzero(np.diff(mask)) + 1).tolist(), length]
    return [(a, b) for a, b in itertools.pairwise(cuts) if mask[a] != 0]


def _decode(record: Mapping[str, Any], settings: Compression | Legacy | None) -> tuple[IntArray, FloatArray]:
    """Return ids and values, (N, K), of whichever columns are there."""
    if record.get("top_values") is not None and record.get("token_ids") is not None:
        return entries(record["token_ids"], record["top_values"], ("token_ids", "top_values"))
    legacy = record.get("packed_indices") is not None
    if settings is None or isinstance(settings, Legacy) != legacy:
        wanted = "legacy_logit_compression" if legacy else "logprob_compressor"
        raise RecordError(f"is compressed by DistillKit's {wanted}: give these settings with --compression-config FILE")
    if isinstance(settings, Legacy):
        return _decode_legacy(record, settings)
    packed = _bytes(record, "compressed_logprobs", settings.row_bytes)
    bits = _id_bits(settings.d)
    ids = _unpack(_bytes(record, "bytepacked_indices", -(-settings.k * bits // 8)), bits, settings.k)
    values = decompress(torch.from_numpy(packed), settings).float().numpy()
    if len(ids) != len(values):
        raise RecordError(f"compressed_logprobs has {len(values)} rows, bytepacked_indices {len(ids)}")
    return ids, require_numbers(values, "compressed_logprobs")


def decompress(packed_NB: Tensor, settings: Compression) -> Tensor:
    """Return the log-probabilities of packed rows, (N, K)."""
    exact_type, term_type = DTYPES[settings.exact_dtype], DTYPES[settings.term_dtype]
    taken, place = [], 0

    def take(count: int, dtype: str) -> Tensor:
        nonlocal place
        piece = packed_NB[:, place : place + count * WIDTH[dtype]].clone()  # aligned
        place += count * WIDTH[dtype]
        return piece.view(DTYPES[dtype]).reshape(len(packed_NB), count)

    exact_NE = take(settings.exact_k, settings.exact_dtype)
    coefficients = take(len(settings.polynomial_terms or ()), settings.term_dtype)
    for each in settings.residual_bins:
        scale_N1 = take(1, each.scale_dtype)
        size = -(-each.num_elements * each.element_bits // 8)
        codes = torch.from_numpy(
            _unpack(packed_NB[:, place : place + size].numpy(), each.element_bits, each.num_elements)
        )
        place += size
        if each.element_bits == 1:
            taken.append((codes.float() * 2.0 - 1.0) * scale_N1)
        else:
            taken.append((codes - 2 ** (each.element_bits - 1)).float() * scale_N1)
    fitted = settings.k - settings.exact_k
    residual = torch.cat(taken, dim=1) if taken else torch.zeros(len(packed_NB), 0, dtype=exact_type)
    residual = torch.nn.functional.pad(residual, (0, fitted - residual.shape[1])).to(exact_type)
    if settings.polynomial_terms:
        ranks = (
            torch.linspace(0, 1, steps=fitted, dtype=term_type)
            if settings.normalize_t
            else torch.arange(fitted, dtype=term_type)
        )
        powers = [ranks**t if isinstance(t, int) else getattr(torch, t)(ranks) for t in settings.polynomial_terms]
        residual = (torch.stack(powers, dim=1) * coefficients.unsqueeze(1)).sum(2) + residual
    values = torch.cat([exact_NE, residual], dim=1)
    return torch.cumsum(values.float(), dim=1).to(exact_type) if settings.delta_encoding else values


def _decode_legacy(record: Mapping[str, Any], settings: Legacy) -> tuple[IntArray, FloatArray]:
    bits = _id_bits(settings.vocab_size)
    per_word = 64 // bits
    words = np.asarray(column(record, "packed_indices"), dtype=np.uint64)
    exact = np.asarray(column(record, "exact_values"), dtype=np.float32)
    coefficients = torch.from_numpy(np.asarray(column(record, "coeffs"), dtype=np.float32).reshape(len(words), -1))
    terms = settings.polynomial_degree + 1 + settings.with_sqrt_term if settings.exact_k < settings.k else 0
    shapes = (words.shape[1:], exact.shape[1:], coefficients.shape[1:])
    if shapes != ((-(-settings.k // per_word),), (settings.exact_k,), (terms,)) or len(exact) != len(words):
        raise RecordError(f"packed_indices, exact_values and coeffs do not fit the settings {settings!r}")
    shifts = np.arange(per_word, dtype=np.uint64) * np.uint64(bits)
    ids = (words[:, :, None] >> shifts) & np.uint64((1 << bits) - 1)
    numbers: IntArray = ids.reshape(len(words), -1)[:, : settings.k].astype(np.int64)
    ranks = torch.arange(settings.k - settings.exact_k, dtype=torch.float32) + 1
    sign = -1 if settings.invert_polynomial else 1
    powers = [ranks ** (sign * i) for i in range(settings.polynomial_degree + 1)]
    powers += [ranks.sqrt()] if settings.with_sqrt_term else []
    fit = (torch.stack(powers, dim=1) * coefficients.unsqueeze(1)).sum(2) if terms else torch.zeros(len(words), 0)
    return numbers, require_numbers(np.concatenate([exact, fit.numpy()], axis=1), "exact_values and coeffs")


def _id_bits(vocabulary: int) -> int:
    """Return the bits of an id: log2 of the vocabulary in float32, rounded up, as DistillKit computes it."""
    return int(np.ceil(np.log2(np.float32(vocabulary))))


def _bytes(record: Mapping[str, Any], name: str, width: int) -> NDArray[np.uint8]:
    """Return a column of rows of bytes, (N, B)."""
    try:
        rows = np.asarray(column(record, name), dtype=np.uint8)
    except (ValueError, OverflowError, TypeError) as error:
        raise RecordError(f"{name}: must be rows of bytes of one length") from error
    if rows.ndim != 2 or rows.shape[1] != width:
        raise RecordError(f"{name}: must be {width} bytes per row by the compression settings, got {rows.shape[1:]}")
    return rows


def _unpack(rows: NDArray[np.uint8], bits: int, count: int) -> IntArray:
    """Return ``count`` numbers of so many bits, the highest first, from each row of bytes, (N, count)."""
    flags = np.unpackbits(rows, axis=1)[:, : count * bits].reshape(len(rows), count, bits)
    numbers = np.zeros((len(rows), count), dtype=np.int64)
    for bit in range(bits):
        numbers = (numbers << 1) | flags[:, :, bit]
    return numbers
