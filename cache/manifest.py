"""The manifest: what a cache was made from, stored in the attributes of the Zarr group under ``logitcask``.

Stage 2 compares it with the run and refuses every difference. It does not depend on when, where or by whom the cache
was made, so equal inputs give equal bytes; what labelled a shard (``MadeBy``) is kept with the shard.
"""

import datetime
import hashlib
import json
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from logitcask.cache.errors import CacheFormatError, shown

FORMAT_VERSION = 5
EXACT_VERSION = 6  # of caches of exact labels; those of sparse labels are written in FORMAT_VERSION
READABLE_FORMATS = (4, FORMAT_VERSION, EXACT_VERSION)
# recorded, but not part of what a cache is: a run may resume it whatever these are
REPORTED = ("format_version", "teacher.id", "teacher.revision", "teacher.versions", "tokenizer.files")
# fitted to the data, or chosen when a cache was begun: a run that resumes it takes those of the cache
FITTED = ("teacher_head.", *(f"label.exact.{name}" for name in ("step", "columns", "trellis", "tail_bias")))

ATTRIBUTE = "logitcask"
MAX_SHARD_ENTRIES = 1 << 26  # label entries per shard
STEP_KINDS = 5  # of steps of exact labels, by half octaves above the least; the last has all larger ones
MAX_HEAD = 1 << 32  # weights of a teacher's head: those of the largest known one are half of that
MAX_SHARD_BYTES = 832 << 20  # of a shard while it is read, so that reading or verifying one takes less than 1 GiB

Biases = Annotated[list[Annotated[float, Field(ge=-64, le=64)]], Field(min_length=1, max_length=64)]
Count = Annotated[int, Field(ge=0, lt=2**53)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
NO_CONTROLS = r"^[^\x00-\x1f\x7f-\x9f\u2028\u2029]*$"
Name = Annotated[str, Field(max_length=1024, pattern=NO_CONTROLS)]
MetadataValue = Annotated[str, Field(min_length=1, max_length=100, pattern=NO_CONTROLS)]
FileName = Annotated[str, Field(max_length=128, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]  # a name, never a path


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    absent: ClassVar[frozenset[str]] = frozenset()  # fields that are left out while None: not every format has them

    @model_serializer(mode="wrap")
    def _leave_out(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {name: value for name, value in handler(self).items() if value is not None or name not in self.absent}


class TeacherIdentity(_Part):
    """The model that produced the labels."""

    absent = frozenset({"versions"})

    id: Name = Field(description="hub id, or the last component of a local path")
    revision: Name
    weights: Digest = Field(description="SHA-256 over names, shapes, dtypes and a sample of every parameter")
    dtype: Name
    engine: Name
    versions: Annotated[dict[Name, Name], Field(max_length=64)] | None = Field(
        default=None, description="of format 4; later formats record them with each shard"
    )


class MadeBy(_Part):
    """What labelled a shard. Shards of one cache may differ in it: it is reported, never compared."""

    engine: Name
    device: Name
    versions: Annotated[dict[Name, Name], Field(max_length=64)]


class TokenizerIdentity(_Part):
    """The tokenizer, identified by what it does: its vocabulary and its encodings of fixed probe texts."""

    fingerprint: Digest
    chat_template: Digest | None
    files: dict[FileName, Digest] = Field(description="digests of the files in the cache, by name", max_length=8)


def _day(text: str) -> str:
    return datetime.date.fromisoformat(text).isoformat()


class Metadata(_Part):
    """What the records say of themselves; a shard holds a code per example and column, 0: no value, i: the i-th."""

    values: dict[Literal["category", "language"], Annotated[list[MetadataValue], Field(min_length=1, max_length=1000)]]
    fingerprint: Digest = Field(description="SHA-256 of the codes, before shuffling")


class DataIdentity(_Part):
    """The tokenized examples, before shuffling."""

    absent = frozenset({"date", "metadata", "chat_template_kwargs"})

    fingerprint: Digest
    examples: Count
    tokens: Count
    positions: Count
    truncated: Count
    dropped: Count
    max_seq_length: Count
    longest: Count = Field(description="tokens in the longest example")
    prompt_loss: bool
    date: Annotated[str, AfterValidator(_day)] | None = Field(
        default=None, description="the day that the chat template wrote into the examples, if it writes the date"
    )
    chat_template_kwargs: Annotated[str, Field(max_length=2**16, pattern=NO_CONTROLS)] | None = Field(
        default=None, description="values that were given to the chat template's variables, as JSON"
    )
    metadata: Metadata | None = Field(
        default=None, description="columns of the records that are kept, if there are any"
    )


class ExactCode(_Part):
    """How the hidden state of an exact label is coded."""

    absent = frozenset({"trellis", "tail_bias"})

    bits: Annotated[int, Field(ge=1, le=12)] = Field(description="as asked for; each halves the error")
    step: Annotated[float, Field(gt=0, le=1e3, allow_inf_nan=False)] = Field(description="of a position of tail only")
    width: Annotated[int, Field(ge=1, le=2**14)] = Field(description="of the states that the teacher's head reads")
    columns: Annotated[list[Annotated[int, Field(ge=0, le=2**14)]], Field(min_length=4, max_length=4)] = Field(
        description="coefficients that are kept of them: with 255, 15, 6 and 3 values"
    )
    trellis: Literal[4] | None = Field(default=None, description="states of the trellis that codes are read along")
    tail_bias: Annotated[list[Biases], Field(min_length=STEP_KINDS, max_length=STEP_KINDS)] | None = Field(
        default=None, description="of log p outside the head, in nats, by half octaves of steps, at each temperature"
    )

    @property
    def kept(self) -> int:
        """How many coefficients are kept."""
        return sum(self.columns)


class LabelSettings(_Part):
    """How labels are made from the teacher's logits."""

    absent = frozenset({"unknown", "exact"})

    vocab_size: Annotated[int, Field(ge=1, le=2**31)]
    head_size: Annotated[int, Field(ge=0, le=2**16)]
    tail_draws: Annotated[int, Field(ge=0, le=2**16)]
    temperatures: Annotated[list[Annotated[float, Field(gt=0, le=1e4)]], Field(min_length=1, max_length=64)]
    seed: Annotated[int, Field(ge=0, lt=2**63)]
    fidelity_positions: Annotated[int, Field(ge=0, le=2**31)] = Field(
        default=0, description="positions the fidelity certificate was measured on, over all shards; 0: no certificate"
    )
    unknown: Annotated[list[Literal["rest", "gold"]], Field(min_length=1, max_length=2)] | None = Field(
        default=None,
        description="what the source of imported labels does not give: rest: the mass outside the head, kept as none; "
        "gold: the log-probability of next tokens outside the head, kept as -inf",
    )
    exact: ExactCode | None = Field(
        default=None, description="of exact labels: how the hidden state, which gives the tail its shape, is coded"
    )

    @property
    def kind(self) -> Literal["sparse", "exact"]:
        """What a label is: a head and draws from the tail, or a head and the hidden state."""
        return "sparse" if self.exact is None else "exact"

    @property
    def entries(self) -> str:
        """What a label consists of, in words."""
        if self.exact is None:
            return f"head {self.head_size}, tail {self.tail_draws} draws"
        return f"head {self.head_size}, hidden state of width {self.exact.width} in {self.exact.bits} bits"

    def knows(self, what: Literal["rest", "gold"]) -> bool:
        """Return whether the mass outside the head, or l of every next token, is known."""
        return what not in (self.unknown or ())

    @property
    def usual_tail(self) -> str:
        """What represents the mass outside the head by default: sampled, bucket or renormalize."""
        return "sampled" if self.tail_draws else "bucket" if self.knows("rest") else "renormalize"

    def tail_fault(self, tail: str) -> tuple[str, str] | None:
        """Return why students cannot be trained with a tail, and which one they can; None if they can."""
        if tail != "sampled" and self.head_size == 0:
            return "needs a head, but the cache has head size 0", "sampled"
        if tail != "renormalize" and not self.knows("rest"):
            reason = "needs the mass outside the head, which the source of this imported cache does not give"
            return reason, "renormalize"
        if tail == "sampled" and self.tail_draws == 0 and self.head_size < self.vocab_size:
            return "needs draws, but the cache has none", "bucket"
        return None


class OtherVocabulary(_Part):
    """The teacher's own tokenizer, if labels are in another vocabulary than its own, and how texts were aligned."""

    fingerprint: Digest
    chat_template: Digest | None
    vocab_size: Annotated[int, Field(ge=1, le=2**31)]
    aligned: Count = Field(description="labelled positions whose token starts where a token of the teacher starts")
    straddling: Count = Field(description="labelled positions whose token starts inside a token of the teacher")
    unlabelled: Count = Field(description="target positions that could not be aligned, which have no label")


class HeadIdentity(_Part):
    """The teacher's head, as it is stored to decode exact labels; its arrays are in the group ``head``."""

    scale: Annotated[float, Field(ge=-1e6, le=1e6, allow_inf_nan=False)]
    softcap: Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)] | None
    bias: bool
    digest: Digest = Field(description="SHA-256 of its arrays, little-endian, one after another")


class ShardPlan(_Part):
    """Strides: shard s owns slots [s * stride, (s + 1) * stride) of each axis; slots it does not fill stay zero."""

    count: Annotated[int, Field(ge=1, le=2**20)]
    examples: Annotated[int, Field(ge=1, le=2**22)]
    tokens: Annotated[int, Field(ge=1, le=MAX_SHARD_ENTRIES)]
    positions: Annotated[int, Field(ge=1, le=MAX_SHARD_ENTRIES)]
    digest: Digest = Field(description="SHA-256 of shard_examples as little-endian int64")


class PartIdentity(_Part):
    """The shards' place in the larger cache that this one was cut from: from shard ``first`` on, out of ``of``."""

    first: Annotated[int, Field(ge=0, lt=2**20)]
    of: Annotated[int, Field(ge=1, le=2**20)]


class Manifest(_Part):
    """Everything that determines the bytes of a cache."""

    absent = frozenset({"teacher_head", "teacher_tokenizer"})

    format_version: int
    teacher: TeacherIdentity
    tokenizer: TokenizerIdentity
    data: DataIdentity
    label: LabelSettings
    shards: ShardPlan
    teacher_head: HeadIdentity | None = Field(default=None, description="of a cache of exact labels")
    teacher_tokenizer: OtherVocabulary | None = Field(
        default=None, description="of a cache in a student's vocabulary, which is that of tokenizer"
    )
    part: PartIdentity | None = Field(
        default=None, description="the shards of the larger cache it was cut from; data counts only what this one holds"
    )

    @model_validator(mode="after")
    def _exact_labels_have_a_head(self) -> Self:
        exact = (self.label.exact is not None, self.teacher_head is not None, self.format_version >= EXACT_VERSION)
        if any(exact) and not all(exact):
            raise ValueError(f"exact labels need a teacher_head and format {EXACT_VERSION}, and no others have them")
        if self.label.exact and (self.label.tail_draws or not self.label.head_size):
            raise ValueError("exact labels have a head and no draws")
        code = self.label.exact
        if code and not 1 <= code.kept <= code.width:
            raise ValueError(f"exact labels keep 1 to {code.width} coefficients, got {code.kept}")
        if code and any(len(biases) != len(self.label.temperatures) for biases in code.tail_bias or ()):
            raise ValueError("exact labels have one tail_bias per temperature")
        if code and self.label.vocab_size * code.width > MAX_HEAD:
            raise ValueError(f"a teacher's head must have at most {MAX_HEAD} weights")
        return self

    @model_validator(mode="after")
    def _shard_fits_in_memory(self) -> Self:
        entries = self.shards.positions * label_entries(self.label)
        if entries > MAX_SHARD_ENTRIES:
            raise ValueError(f"a shard must hold at most {MAX_SHARD_ENTRIES} label entries, got {entries}")
        size = shard_bytes(self.label, self.shards)
        if size > MAX_SHARD_BYTES:
            raise ValueError(f"a shard must take at most {MAX_SHARD_BYTES} bytes in memory, got {size}")
        return self


def label_entries(label: LabelSettings) -> int:
    """Return the number of entries of a label: head, tail and one per temperature."""
    return label.head_size + label.tail_draws + len(label.temperatures)


def shard_bytes(label: LabelSettings, plan: ShardPlan) -> int:
    """Return the bytes that a full shard takes in memory while it is read: its codes and what they stand for."""
    drawn = 10 if label.tail_draws < 256 else 13
    position = 10 * label.head_size + drawn * label.tail_draws + 12 * len(label.temperatures) + 10
    # in 16 bits, packed, and what does not fit
    position += 4 * (label.exact.kept + len(label.temperatures) + 1) if label.exact else 0
    return plan.positions * position + plan.tokens * 6 + plan.examples * 32


def metadata_values(manifest: Manifest) -> dict[str, list[str]]:
    """Return the values that a cache's examples have, by column; code i of a column stands for the i-th, from 1."""
    metadata = manifest.data.metadata
    return {str(name): values for name, values in metadata.values.items()} if metadata else {}


def flatten(parts: Mapping[str, Any]) -> dict[str, object]:
    """Return the values of a manifest's parts, or of a dumped manifest, by dotted name, for ``differences``."""
    flat: dict[str, object] = {}
    for name, part in parts.items():
        values = part.model_dump() if isinstance(part, BaseModel) else part
        if isinstance(values, dict):
            flat.update({f"{name}.{key}": value for key, value in flatten(values).items()})
        else:
            flat[name] = values
    return flat


def identity(parts: Mapping[str, Any]) -> dict[str, object]:
    """Return what must be equal to resume a cache, of a manifest's parts, by dotted name."""
    return {name: value for name, value in flatten(parts).items() if not name.startswith((*REPORTED, *FITTED))}


def parse_manifest(attributes: Any, where: str) -> Manifest:
    """Return the manifest in a group's attributes.

    Raises CacheFormatError if there is none, if its format is another version's, or if it violates the schema.
    """
    raw = attributes.get(ATTRIBUTE) if isinstance(attributes, dict) else None
    if not isinstance(raw, dict):
        raise CacheFormatError(f"{where}: not a logit cache: its Zarr group has no {ATTRIBUTE!r} attribute")
    version = raw.get("format_version")
    if isinstance(version, int) and version > max(READABLE_FORMATS):
        raise CacheFormatError(
            f"{where}: cache format {shown(version)} is newer than this version reads ({max(READABLE_FORMATS)}): "
            "upgrade logitcask"
        )
    try:
        manifest = Manifest.model_validate_json(json.dumps(raw))
    except ValidationError as error:
        first = error.errors()[0]
        place = shown(".".join(str(part) for part in first["loc"]))[1:-1]
        raise CacheFormatError(f"{where}: damaged manifest: {place}: {first['msg']}") from error
    if version not in READABLE_FORMATS:
        readable = ", ".join(map(str, READABLE_FORMATS))
        raise CacheFormatError(f"{where}: cache format {shown(version)} is not readable: this version reads {readable}")
    return manifest


def sha256(data: bytes) -> str:
    """Return the SHA-256 of some bytes, in hexadecimal."""
    return hashlib.sha256(data).hexdigest()
