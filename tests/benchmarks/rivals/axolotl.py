"""axolotl's KD plugin: its loss and its collator, from a checkout and liger-kernel, on which the loss stands.

It captures no labels: the data set brings them. Here that is Parquet with the columns its collator takes, top-64
renormalised as the loss wants it, in types half as wide as Python's. The loss compiles itself, which a CPU does, too.
"""

import copy
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from logitcask.cache.labels import IntArray
from tests.benchmarks.rivals.systems import Add, Batch, Loss, Read, System, Text, commit_of, without_init

TOP = 64
PACKAGES = ("axolotl", "axolotl.integrations", "axolotl.integrations.kd", "axolotl.utils", "axolotl.utils.collators")


def load(checkout: Path, text: Text) -> System:
    """Return axolotl as it is in a checkout. Exits if liger-kernel cannot be imported."""
    make_importable(checkout)
    top = min(TOP, text.vocabulary)

    @contextmanager
    def write(place: Path) -> Iterator[Add]:
        rows: list[dict[str, Any]] = []

        def add(ids: IntArray, logits: Tensor) -> None:
            best = logits.topk(top, dim=-1)
            inner = [[1] * top] * len(logits)
            rows.append(
                {
                    "input_ids": ids.tolist(),
                    "labels": ids.tolist(),
                    "attention_mask": [1] * len(ids),
                    "target_token_ids": [*best.indices.tolist(), list(range(top))],
                    "target_logprobs": [*best.values.log_softmax(-1).tolist(), [0.0] * top],
                    "target_mask": [*inner, [0] * top],
                }
            )

        yield add
        save(rows, place / "labels.parquet")

    def read(place: Path) -> Read:
        import datasets

        datasets.disable_progress_bars()
        stored, own = str(place / "labels.parquet"), str(place.parent / f"{place.name} as datasets has it")
        rows = datasets.Dataset.from_parquet(stored, cache_dir=own)
        tokenizer = copy.deepcopy(text.tokenizer())
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.convert_ids_to_tokens(0)  # wanted, never used here
        collate = import_module("axolotl.integrations.kd.collator").DataCollatorForKD(tokenizer)
        return lambda numbers: dict(collate([rows[int(number)] for number in numbers]))

    version = (checkout / "VERSION").read_text().strip()
    losses = (_loss("0.1 cross-entropy + 0.9 KL", 0.1, timed=True), _loss("KL alone", 0.0))
    return System("axolotl", version, commit_of(checkout), losses, write, read)


@cache
def make_importable(checkout: Path) -> None:
    """Make the modules that are needed of axolotl and liger-kernel importable, without what they do not need."""
    spec = importlib.util.find_spec("liger_kernel")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("axolotl: needs liger-kernel: pip install --no-deps --target FOLDER, PYTHONPATH=FOLDER")
    liger = Path(spec.submodule_search_locations[0])
    without_init("liger_kernel", liger)  # its __init__ wants Triton, its chunked losses do not
    without_init("liger_kernel.chunked_loss", liger / "chunked_loss")
    for name in PACKAGES:
        without_init(name, checkout / "src" / Path(*name.split(".")))


def save(rows: list[dict[str, Any]], file: Path) -> None:
    """Write rows to a Parquet file in the types of the tensors that its collator makes, half as wide."""
    from datasets import Dataset, Features, List, Value

    small, number = List(List(Value("int8"))), Value("int32")
    features = Features(
        {
            "input_ids": List(number),
            "labels": List(number),
            "attention_mask": List(Value("int8")),
            "target_token_ids": List(List(number)),
            "target_logprobs": List(List(Value("float32"))),
            "target_mask": small,
        }
    )
    Dataset.from_list(rows, features=features).to_parquet(str(file))


def _loss(name: str, hard: float, *, timed: bool = False) -> Loss:
    """Return its loss as its trainer calls it, divided by the number of target positions; each has a compilation."""
    liger = import_module("axolotl.integrations.kd.kernels.liger")
    loss = liger.LigerFusedLinearKLTopKLogprobLoss(
        hard, 1 - hard, 1.0, 0.0, compute_ce_loss=bool(hard), normalize_topk=False
    )

    def mean(student: PreTrainedModel, batch: Batch) -> Tensor:
        ids, labels = batch["input_ids"], batch["labels"]
        hidden = student.base_model(input_ids=ids, attention_mask=batch["attention_mask"]).last_hidden_state
        total: Tensor = loss(
            student.get_output_embeddings().weight,
            hidden,
            batch["target_token_ids"],
            batch["target_logprobs"],
            batch["target_mask"],
            true_labels=labels,
        )
        return total / int(torch.count_nonzero(labels[:, 1:] != -100))

    return Loss(name, mean, timed)
