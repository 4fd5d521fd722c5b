"""The arrays of a cache: names, axes, widths, dtypes, codecs, and the encoding of labels.

Every array has one leading axis (example, token, position or shard). Shard s owns the slots
[s * stride, (s + 1) * stride) of it, which are exactly one Zarr shard, hence one object. Log-probabilities are stored
as unsigned codes: l = -code * scale.

Legend: N target positions, K head tokens, M tail draws, J temperatures. Log-probabilities are in nats.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError
from zarr.codecs import BloscCodec, TransposeCodec

from logitcask.cache.errors import CacheFormatError
from logitcask.cache.exact.code import pack, packed_width, step_kinds, step_sizes, unpack
from logitcask.cache.exact.odds import beyond, log_tail_of, odds_codes, odds_of
from logitcask.cache.exact.trellis import codes_of, values_of
from logitcask.cache.fidelity import row_width
from logitcask.cache.labels import ExactTargets, FloatArray, SparseTargets
from logitcask.cache.manifest import LabelSettings, MadeBy, Manifest, ShardPlan, label_entries

Axis = Literal["example", "token", "position", "shard"]
CHUNK = {"shard": 1, "example": 4096, "token": 65536, "position": 16384}
HEAD_SCALE = 2.0**-3  # nats per code; tests/benchmarks/sizes.py measures the bytes and the error of each scale
ODDS_SCALE = 2.0**-3  # of log-odds, so that the masses of head and tail always sum to 1
EXACT_SCALE = 2.0**-6  # of both in exact labels, whose other errors are smaller
GOLD_SCALE = 2.0**-3  # used only for the perplexity of the text
PARTITION_SCALE = 2.0**-8
TAIL_UNIT, TAIL_STEPS = 2.0, 4.0  # a drawn token d nats below the head has code 4 log(1 + d / 2): coarser the lower
ABSENT = 65535  # the code of minus infinity
DECODED_AT_ONCE = 1 << 22  # label entries, so that what decoding needs beside its result stays small
MADE_BY_WIDTH = 512  # bytes of a shard's record of what labelled it
MADE_BY_TEXT = 48  # characters kept of each of its values, so that they fit
KEPT = ("head_ids", "tail_ids", "tail_counts")  # labels that keep their stored types
ARRAYS = (  # the names of all arrays that ``shard_specs`` may return
    *("token_count", "position_count", "input_ids", "target_mask", "head_ids", "head_logprobs", "tail_ids"),
    *("tail_logprobs", "tail_counts", "log_tail_odds", "log_partition", "gold_logprobs", "fidelity", "made_by"),
    *("category", "language", "hidden_codes", "hidden_quotients", "projection"),
)


@dataclass(frozen=True)
class ArraySpec:
    """One array of ``width`` entries per slot (0: one scalar per slot)."""

    name: str
    axis: Axis
    dtype: str
    width: int
    meaning: str


def id_dtype(vocab_size: int) -> str:
    """Return the smallest unsigned type that holds every token id."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


def shard_specs(manifest: Manifest) -> list[ArraySpec]:
    """Return all arrays written shard by shard, in the order of their digests in a commit record."""
    made_by = ArraySpec("made_by", "shard", "uint8", MADE_BY_WIDTH, "what labelled the shard: JSON, padded with zeros")
    metadata = [
        ArraySpec(name, "example", "uint16", 0, f"{name} of the example: 0 none, i the i-th value in the manifest")
        for name in (manifest.data.metadata.values if manifest.data.metadata else ())
    ]
    projection = ArraySpec(
        "projection",
        "shard",
        "float64",
        3,
        "bytes of labelled tokens, nats of them by label, by projection alone",
    )
    translated = [projection] if manifest.teacher_tokenizer else []
    return [*array_specs(manifest.label), *([made_by] if manifest.format_version >= 5 else []), *metadata, *translated]


def array_specs(label: LabelSettings) -> list[ArraySpec]:
    """Return the arrays of examples, labels and the certificate, in the order of ``shard_specs``."""
    ids, k, m, j = id_dtype(label.vocab_size), label.head_size, label.tail_draws, len(label.temperatures)
    count = "uint8" if m < 256 else "uint32"
    exact = label.exact is not None
    head_scale, odds_scale = _scales(exact)
    specs = [
        ArraySpec("token_count", "example", "uint32", 0, "tokens of the example"),
        ArraySpec("position_count", "example", "uint32", 0, "target positions of the example"),
        ArraySpec("input_ids", "token", ids, 0, "token ids"),
        ArraySpec("target_mask", "token", "uint8", 0, "1 where the distribution of the next token is stored"),
        ArraySpec("head_ids", "position", ids, k, "the K most probable tokens, most probable first"),
        ArraySpec(
            "head_logprobs", "position", "uint16", k, f"-l / {head_scale} of the head, each less the one before it"
        ),
        ArraySpec("tail_ids", "position", ids, m, "distinct drawn tokens, ascending, each less the one before it"),
        ArraySpec(
            "tail_logprobs",
            "position",
            "uint8",
            m,
            f"{TAIL_STEPS} log(1 + d / {TAIL_UNIT}) of the drawn, d = l of the last of the head, or 0, - l",
        ),
        ArraySpec("tail_counts", "position", count, m, "times drawn; 0 is padding"),
        ArraySpec(
            "log_tail_odds",
            "position",
            "int16",
            j,
            f"log(mass outside the head / mass of the head) / {odds_scale} at each temperature, "
            "each less the one before it",
        ),
        ArraySpec("log_partition", "position", "int32", j, f"A(t) / {PARTITION_SCALE}; kept where there is no head"),
        ArraySpec("gold_logprobs", "position", "uint16", 0, f"-l / {GOLD_SCALE}, of the token that came next"),
        *_hidden_specs(label),
        ArraySpec("fidelity", "shard", "float32", row_width(j, exact=exact), "sums of the fidelity certificate"),
    ]
    absent = [*(("head_", "log_tail_odds") if k == 0 else ("log_partition",))]
    absent += ["tail_"] * (m == 0) + ["fidelity"] * (label.fidelity_positions == 0)
    return [spec for spec in specs if not spec.name.startswith(tuple(absent))]


def _scales(exact: bool) -> tuple[float, float]:
    """Return nats per code of the head's log-probabilities, and of the log-odds."""
    return (EXACT_SCALE, EXACT_SCALE) if exact else (HEAD_SCALE, ODDS_SCALE)


def _hidden_specs(label: LabelSettings) -> list[ArraySpec]:
    """Return the arrays of exact labels."""
    if label.exact is None:
        return []
    columns = label.exact.columns
    meaning = "coefficients of the hidden state, in steps, packed: see cache/exact/code.py"
    beyond = "quotients of coefficients outside the range of their column"
    return [
        ArraySpec("hidden_codes", "position", "uint8", packed_width(columns), meaning),
        ArraySpec("hidden_quotients", "position", "int8", sum(columns), beyond),
    ]


def encode_made_by(made_by: MadeBy | None) -> NDArray[np.uint8]:
    """Return a shard's record of what labelled it, (MADE_BY_WIDTH,); all zeros if that is not known."""
    row = np.zeros(MADE_BY_WIDTH, dtype=np.uint8)
    if made_by is not None:
        versions = {name: _short(version) for name, version in sorted(made_by.versions.items())}
        record = {"device": _short(made_by.device), "engine": _short(made_by.engine), "versions": versions}
        data = json.dumps(record, separators=(",", ":")).encode()
        assert len(data) <= MADE_BY_WIDTH, "a record has few versions"
        row[: len(data)] = np.frombuffer(data, dtype=np.uint8)
    return row


def _short(text: str) -> str:
    return text[:MADE_BY_TEXT].encode("ascii", "replace").decode()


def decode_made_by(row: NDArray[Any]) -> MadeBy | None:
    """Invert ``encode_made_by``. Raises CacheFormatError if the record is not one."""
    data = row.astype(np.uint8).tobytes().rstrip(b"\0")
    try:
        return MadeBy.model_validate_json(data) if data else None
    except ValidationError as error:
        reason = error.errors()[0]["msg"]
        raise CacheFormatError(f"made_by: must be a record of what labelled the shard: {reason}") from error


def strides(plan: ShardPlan) -> dict[Axis, int]:
    """Return the slots per shard of each axis."""
    return {"example": plan.examples, "token": plan.tokens, "position": plan.positions, "shard": 1}


def zarr_layout(spec: ArraySpec, plan: ShardPlan) -> dict[str, Any]:
    """Return the arguments of ``create_array``: one Zarr shard per shard of the plan, with chunks inside."""
    stride = strides(plan)[spec.axis]
    chunk = min(CHUNK[spec.axis], stride)
    columns = (spec.width,) if spec.width else ()
    return {
        "shape": (plan.count * stride, *columns),
        "shards": (stride, *columns),
        "chunks": (chunk, *columns),
        "dtype": spec.dtype,
        "dimension_names": (spec.axis, "entry")[: 1 + len(columns)],
        **_codecs(spec),
        "attributes": {"meaning": spec.meaning},
    }


def _codecs(spec: ArraySpec) -> dict[str, Any]:
    """Return codecs that zarr-python, tensorstore and zarrs all support: transposed, bytes shuffled, zstd.

    Head ids compress better as rows, since the same few likely tokens keep occurring together.
    """
    if spec.name == "head_ids":
        return {"filters": [], "compressors": BloscCodec(cname="zstd", clevel=9, shuffle="noshuffle")}
    columns = [TransposeCodec(order=(1, 0))] if spec.width else []
    return {"filters": columns, "compressors": BloscCodec(cname="zstd", clevel=9, shuffle="shuffle")}


def stride_for(axis: Axis, longest: int) -> int:
    """Return the stride of an axis whose fullest shard holds ``longest`` slots, rounded up to whole chunks."""
    chunk = CHUNK[axis]
    return max(1, longest if longest <= chunk else -(-longest // chunk) * chunk)


def _codes(logprobs: NDArray[Any], scale: float) -> NDArray[np.uint16]:
    """Encode log-probabilities, <= 0 up to rounding; -inf becomes ABSENT."""
    with np.errstate(invalid="ignore", over="ignore"):
        codes = np.rint(np.clip(-logprobs.astype(np.float64) / scale, 0, ABSENT - 1))
    return np.where(np.isneginf(logprobs), ABSENT, codes).astype(np.uint16)


def _values(codes: NDArray[Any], scale: float) -> NDArray[np.float32]:
    values: NDArray[np.float32] = codes.astype(np.float32) * np.float32(-scale)
    return np.where(codes == ABSENT, np.float32(-np.inf), values)


def _last(head_logprobs: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return l of the last head token, (N, 1), which no drawn token exceeds; 0 where there is no head."""
    if head_logprobs.shape[1] == 0:
        return np.zeros((len(head_logprobs), 1), dtype=np.float32)
    return np.where(np.isneginf(head_logprobs[:, -1:]), np.float32(0.0), head_logprobs[:, -1:])


def encode_targets(targets: SparseTargets, label: LabelSettings | None = None) -> dict[str, NDArray[Any]]:
    """Encode labels as the integer arrays of the cache, by array name; exact ones need the settings."""
    padding = targets.tail_counts == 0
    head_scale, odds_scale = _scales(isinstance(targets, ExactTargets))
    head = _codes(targets.head_logprobs, head_scale)
    below = np.maximum(_last(_values(head, head_scale)) - targets.tail_logprobs, 0.0).astype(np.float64)
    drawn = np.maximum.accumulate(np.where(padding, 0, targets.tail_ids), axis=1)
    return {
        "head_ids": targets.head_ids,
        "head_logprobs": np.diff(head, axis=1, prepend=np.uint16(0)),
        "tail_ids": np.diff(drawn, axis=1, prepend=0),
        "tail_logprobs": np.where(padding, 0, np.rint(TAIL_STEPS * np.log1p(below / TAIL_UNIT))),
        "tail_counts": targets.tail_counts,
        "log_tail_odds": np.diff(odds_codes(targets.log_tail_mass, odds_scale), axis=1, prepend=np.int16(0)),
        "log_partition": np.rint(targets.log_partition.astype(np.float64) / PARTITION_SCALE),
        "gold_logprobs": _codes(targets.gold_logprobs, GOLD_SCALE),
        **_packed(targets, label),
    }


def _packed(targets: SparseTargets, label: LabelSettings | None) -> dict[str, NDArray[Any]]:
    """Return the arrays of the hidden states, if there are any."""
    if not isinstance(targets, ExactTargets):
        return {}
    assert label is not None, "exact labels need their settings"
    assert label.exact is not None, "exact labels need their code"
    codes = codes_of(targets.codes) if label.exact.trellis else targets.codes
    codes, quotients = pack(codes, label.exact.columns)
    return {"hidden_codes": codes, "hidden_quotients": quotients}


def decode_targets(arrays: dict[str, NDArray[Any]], label: LabelSettings) -> SparseTargets:
    """Invert ``encode_targets``, up to the declared quantisation; ids and counts keep their stored types.

    Of many positions the arrays are taken over: ``tail_ids`` is decoded in place.
    """
    n, step = (
        len(arrays["gold_logprobs"]),
        max(1, DECODED_AT_ONCE // (label_entries(label) + (label.exact.kept if label.exact else 0))),
    )
    if n <= step:
        return _decode(arrays, label)
    whole: dict[str, NDArray[Any]] = {name: arrays[name] for name in KEPT if name in arrays}
    kind: type[SparseTargets] = SparseTargets
    for first in range(0, n, step):
        rows = slice(first, first + step)
        part = _decode({name: values[rows] for name, values in arrays.items()}, label)
        kind = type(part)
        for name in kind.names():
            values = getattr(part, name)
            if name not in whole:
                whole[name] = np.empty((n, *values.shape[1:]), values.dtype, order="F")
            if name not in KEPT or name == "tail_ids":
                whole[name][rows] = values
    return kind(**whole)


def _decode(arrays: dict[str, NDArray[Any]], label: LabelSettings) -> SparseTargets:
    none = np.zeros((len(arrays["gold_logprobs"]), 0), dtype=np.uint8)
    counts = arrays.get("tail_counts", none)
    head_scale, odds_scale = _scales(label.exact is not None)
    head = _values(_sums(arrays.get("head_logprobs", none)), head_scale)
    tail_ids = _sums(arrays.get("tail_ids", none))
    drawn = arrays.get("tail_logprobs", none).astype(np.float32)
    drawn /= np.float32(TAIL_STEPS)
    np.exp(drawn, out=drawn)
    drawn *= np.float32(-TAIL_UNIT)
    drawn += _last(head) + np.float32(TAIL_UNIT)
    tail_ids *= counts > 0
    drawn *= counts > 0
    if label.head_size:
        log_partition, log_tail_mass = _masses(head, arrays["log_tail_odds"], label.temperatures, odds_scale)
    else:
        log_partition = arrays["log_partition"].astype(np.float32) * np.float32(PARTITION_SCALE)
        log_tail_mass = np.zeros_like(log_partition)
    sparse = SparseTargets(
        head_ids=arrays.get("head_ids", none),
        head_logprobs=head,
        tail_ids=tail_ids,
        tail_logprobs=drawn,
        tail_counts=counts,
        log_partition=log_partition,
        log_tail_mass=log_tail_mass,
        gold_logprobs=_values(arrays["gold_logprobs"], GOLD_SCALE),
    )
    if label.exact is None:
        return sparse
    codes = unpack(arrays["hidden_codes"], arrays["hidden_quotients"], label.exact.columns)
    codes = values_of(codes) if label.exact.trellis else codes
    return ExactTargets(**vars(sparse), codes=codes, **position_steps(log_tail_mass, label))


def position_steps(log_tail_mass: FloatArray, label: LabelSettings) -> dict[str, Any]:
    """Return the steps (N,) of exact labels, and the bias of their tails that goes with them, (N, J)."""
    assert label.exact is not None
    steps = step_sizes(log_tail_mass, label.exact.step)
    if label.exact.tail_bias is None:
        return {"steps": steps, "tail_bias": np.zeros_like(log_tail_mass)}
    table = np.array(label.exact.tail_bias, dtype=np.float32)
    return {"steps": steps, "tail_bias": table[step_kinds(steps, label.exact.step)]}


def _sums(differences: NDArray[Any]) -> NDArray[Any]:
    """Return running sums along the rows, (N, columns), in the same type. Columns are contiguous, so go by column."""
    sums = np.array(differences.T, order="C")
    for column in range(1, len(sums)):
        sums[column] += sums[column - 1]
    return sums.T


def _masses(
    head: NDArray[np.float32], codes: NDArray[Any], temperatures: Sequence[float], scale: float
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return log-partitions and log tail masses, (N, J) each.

    A(t) = log sum over the head of exp(l / t) - log(1 - m_t), where m_t is the tail's mass.
    """
    odds = odds_of(_sums(codes), scale)
    best, below = head[:, :1], head - head[:, :1]
    log_partition = np.maximum(odds, 0) + beyond(odds)
    for j, t in enumerate(temperatures):
        log_partition[:, j] += best[:, 0] / np.float32(t) + np.log(np.exp(below / np.float32(t)).sum(1))
    return log_partition, log_tail_of(odds)
