"""A small cache of exact labels, made without a teacher."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from logitcask.cache.exact.code import Codes
from logitcask.cache.exact.head import TeacherHead, as_bfloat16
from logitcask.cache.exact.odds import stored_tail_mass
from logitcask.cache.exact.trellis import values_of
from logitcask.cache.labels import ExactTargets, Shard
from logitcask.cache.layout import EXACT_SCALE, position_steps
from logitcask.cache.manifest import EXACT_VERSION, STEP_KINDS, ExactCode, LabelSettings, Manifest
from logitcask.cache.writer import create_cache
from tests.support.tiny import sound_shards

WIDTH, COLUMNS = 12, [3, 2, 1, 4]
LABEL = LabelSettings(
    vocab_size=300,
    head_size=3,
    tail_draws=0,
    temperatures=[1.0, 2.0],
    seed=0,
    exact=ExactCode(bits=4, step=0.1, width=WIDTH, columns=COLUMNS),
)
BIASES = [[-0.1 * kind, 0.05 * kind] for kind in range(STEP_KINDS)]
TRELLIS = ExactCode(bits=6, step=0.1, width=WIDTH, columns=COLUMNS, trellis=4, tail_bias=BIASES)
ON_A_TRELLIS = LABEL.model_copy(update={"exact": TRELLIS})


def random_head(*, bias: bool = True, vocabulary: int = 300, width: int = WIDTH) -> TeacherHead:
    """Return a head of random numbers for ``LABEL``, or for one of another vocabulary and width."""
    random = np.random.default_rng(0)
    weights = random.normal(0.0, 1.0, (vocabulary, width)).astype(np.float32)
    forward, _ = np.linalg.qr(random.normal(0.0, 1.0, (width, sum(COLUMNS))))
    return TeacherHead(
        weight=as_bfloat16(weights),
        bias=random.normal(0.0, 1.0, vocabulary).astype(np.float32) if bias else None,
        scale=0.5,
        softcap=30.0,
        basis=np.ascontiguousarray(forward.T).astype(np.float32),
        forward=forward.astype(np.float32),
        centre=random.normal(0.0, 1.0, width).astype(np.float32),
    )


def exact_shards(sizes: list[int], label: LabelSettings = LABEL) -> list[Shard]:
    """Return shards of examples with random codes, a few of them far outside the range of their column.

    Their tails have from a twentieth of the mass to none.
    """
    random, shards = np.random.default_rng(1), []
    assert label.exact is not None
    for shard in sound_shards(label, sizes, 40.0):
        targets = shard.targets
        codes: Codes = np.rint(3 * random.standard_t(2, (len(targets), label.exact.kept))).clip(-300, 300)
        codes = values_of(codes.astype(np.int16)) if label.exact.trellis else codes.astype(np.int16)
        of_steps = position_steps(stored_tail_mass(targets.log_tail_mass, EXACT_SCALE), label)
        shards.append(replace(shard, targets=ExactTargets(**vars(targets), codes=codes, **of_steps)))
    return shards


def exact_manifest(manifest: Manifest, label: LabelSettings = LABEL) -> Manifest:
    """Return a manifest of sparse labels as that of exact ones."""
    parts: dict[str, Any] = {
        **dict(manifest), "format_version": EXACT_VERSION, "label": label, "teacher_head": random_head().identity
    }  # fmt: skip
    return Manifest.model_validate(parts)


def write_exact(
    folder: Path, manifest: Manifest, shard_examples: Any, files: dict[str, bytes], shards: list[Shard]
) -> None:
    """Write a complete cache."""
    writer = create_cache(folder, manifest, shard_examples, files, head=random_head())
    for index in writer.missing_shards():
        writer.write_shard(index, shards[index])
