"""DistillKit's compressor, Parquet writer and losses, from a checkout.

Its capture runs in vLLM; here transformers gives the logits, its own compressor and writer the files, with the
configuration that its README recommends. A row's labels are decompressed where its trainer does it, in the step; here
they are read so, which spares its step that time. Its students read all L tokens and have labels for the N targets, as
everybody's here, so that the text is the same.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from logitcask.cache.labels import IntArray
from tests.benchmarks.rivals.systems import Add, Batch, Loss, Read, System, Text, commit_of

RECOMMENDED: dict[str, Any] = {
    "k": 128,
    "exact_k": 16,
    "exact_dtype": "bfloat16",
    "polynomial_terms": [0, 1, 2, 3, 4, "sqrt"],
    "term_dtype": "float32",
    "residual_bins": [],
    "delta_encoding": False,
    "error_diffusion": False,
}
BUDGET = RECOMMENDED | {"k": 50, "exact_k": 1, "polynomial_terms": [0, 1, "sqrt"]}


def load(checkout: Path, text: Text, name: str = "DistillKit", settings: dict[str, Any] | None = None) -> System:
    """Return DistillKit from a checkout, its compressor configured as recommended unless ``settings`` are given."""
    if str(checkout) not in sys.path:
        sys.path.insert(0, str(checkout))
    compression = import_module("distillkit.compression")
    chosen = dict(settings or RECOMMENDED)
    chosen["k"] = min(chosen["k"], text.vocabulary)
    config = compression.DistributionQuantizationConfig(d=text.vocabulary, **chosen)
    compressor = compression.LogprobCompressor(config=config)

    @contextmanager
    def write(place: Path) -> Iterator[Add]:
        common = import_module("distillkit.sample_common")
        schema = common.compressed_logit_schema()
        with common.StreamingParquetWriter(str(place), schema=schema, file_max_rows=256, queue_maxsize=512) as writer:

            def add(ids: IntArray, logits: Tensor) -> None:
                row = compressor.compress(torch.log_softmax(logits, dim=-1)[None])
                packed = {name: value.squeeze(0).tolist() for name, value in row.items()}
                writer.write({"input_ids": ids.tolist(), **packed})

            yield add

    def read(place: Path) -> Read:
        import datasets

        datasets.disable_progress_bars()
        files = sorted(map(str, place.glob("*.parquet")), key=lambda file: int(file.split("_")[-1].split(".")[0]))
        rows = datasets.Dataset.from_parquet(files, cache_dir=str(place.parent / f"{place.name} as datasets has it"))
        collate = import_module("distillkit.main").collate_packed_batch
        source = import_module("distillkit.signals").OfflineSignalSource(compressor, vocab_size=text.vocabulary)

        def batch(numbers: IntArray) -> Batch:
            found: Batch = collate([rows[int(number)] for number in numbers])
            return {"input_ids": found["input_ids"], "signal": source.get_signal(found)}

        return batch

    version = next(
        line.split('"')[1] for line in (checkout / "pyproject.toml").read_text().splitlines() if "version =" in line
    )
    losses = (
        _loss("0.5 cross-entropy + 0.5 KL", 0.5, "zero", timed=True),
        _loss("KL alone", 0.0, "zero"),
        _loss("KL alone, symmetric_uniform", 0.0, "symmetric_uniform"),
    )
    return System(name, version, commit_of(checkout), losses, write, read)


def _loss(name: str, hard: float, missing: str, *, timed: bool = False) -> Loss:
    """Return a weighted sum of its losses, as its trainer adds them up."""
    handling = import_module("distillkit.missing_probability").MissingProbabilityHandling(missing)
    kl = import_module("distillkit.lossfuncs").KLDLoss(temperature=1.0, missing_probability_handling=handling)

    def mean(student: PreTrainedModel, batch: Batch) -> Tensor:
        ids = batch["input_ids"]
        outputs = student(input_ids=ids, labels=ids, return_dict=True)
        mask = (ids[:, :-1] >= 0).unsqueeze(-1)
        soft: Tensor = kl(SimpleNamespace(logits=outputs.logits[:, :-1]), batch["signal"], mask=mask)
        both: Tensor = hard * outputs.loss + (1 - hard) * soft
        return both

    return Loss(name, mean, timed)
