"""Stage 1's engines on the same sequences, in one run: vLLM bare, vLLM with our labels, its own top-64, transformers.

    python -m tests.benchmarks.engines [--teacher FOLDER_OR_ID] [--sequences 8] [--length 512] [--rounds 3]

Run it in vLLM's environment (`just setup-vllm`). The teacher is SmolLM2-135M by default, unpacked from its package.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch

from logitcask.cache.manifest import LabelSettings
from logitcask.pipeline.models.load import load_causal_lm
from logitcask.pipeline.teachers.teacher import Teacher, TokenizedExample
from logitcask.pipeline.teachers.transformers import load_teacher
from logitcask.pipeline.teachers.vllm import load_vllm_teacher
from tests.benchmarks.capture import teacher_path

STOCK_TOP = 64
Way = Callable[[], object]


def unpack(folder: Path) -> str:
    """Write SmolLM2 as a folder that vLLM can read."""
    load_causal_lm(teacher_path(), dtype=torch.float32).save_pretrained(folder)
    return str(folder)


def measure(teacher: str, sequences: int, length: int, rounds: int) -> dict[str, float]:
    """Return tokens per second of each engine, medians of interleaved rounds.

    On an accelerator transformers goes first, in a separate process: vLLM then takes most of the memory and keeps it.
    """
    how = (teacher, sequences, length)
    if torch.accelerator.is_available():
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as apart:
            plain = apart.submit(measure_transformers, *how, rounds).result()
        return {**speeds(vllm_ways(*how), sequences * length, rounds), **plain}
    return speeds({**vllm_ways(*how), **transformers_ways(*how)}, sequences * length, rounds)


def measure_transformers(teacher: str, sequences: int, length: int, rounds: int) -> dict[str, float]:
    """Return tokens per second of transformers alone."""
    return speeds(transformers_ways(teacher, sequences, length), sequences * length, rounds)


def vllm_ways(teacher: str, sequences: int, length: int) -> dict[str, Way]:
    """Return what to time with vLLM: functions of the sequences, by name."""
    ours = load_vllm_teacher(
        teacher,
        revision=None,
        dtype="auto",
        max_seq_length=length,
        tensor_parallel_size=1,
        trust_remote_code=False,
        topk=None,
        overrides={
            "max_logprobs": STOCK_TOP,
            "logprobs_mode": "raw_logprobs",
            "enable_prefix_caching": False,
            "gpu_memory_utilization": 0.85,  # vLLM does not count rows of the whole vocabulary: they need the rest
        },
    )
    batch, label = random_batch(sequences, length, ours.facts.logits_width), label_of(ours)
    return {
        "vLLM, no log-probabilities": lambda: generate(ours._llm, batch),
        "vLLM, our labels": lambda: ours.label(batch, label),
        f"vLLM, its own top {STOCK_TOP}": lambda: generate(
            ours._llm, batch, prompt_logprobs=STOCK_TOP, flat_logprobs=True
        ),
    }


def transformers_ways(teacher: str, sequences: int, length: int) -> dict[str, Way]:
    """Return a function that computes the same labels with transformers."""
    plain = load_teacher(teacher, revision=None, dtype="auto", device="auto", trust_remote_code=False)
    batch, label = random_batch(sequences, length, plain.facts.logits_width), label_of(plain)
    return {"transformers, our labels": lambda: in_batches(plain, batch, label)}


def label_of(teacher: Teacher) -> LabelSettings:
    """Return the label settings of the standard preset."""
    width = teacher.facts.logits_width
    return LabelSettings(vocab_size=width, head_size=8, tail_draws=24, temperatures=[1.0, 1.5, 2.0], seed=0)


def speeds(ways: dict[str, Way], tokens: int, rounds: int) -> dict[str, float]:
    """Return tokens per second of each function, run in turns."""
    for work in ways.values():
        work()  # warm
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, work in ways.items():
            began = time.perf_counter()
            work()
            times[name].append(time.perf_counter() - began)
    return {name: tokens / statistics.median(found) for name, found in times.items()}


def random_batch(sequences: int, length: int, vocabulary: int) -> list[TokenizedExample]:
    """Return random tokens, all of them targets except the first."""
    ids = np.random.default_rng(0).integers(0, vocabulary, (sequences, length))
    mask = np.arange(length) < length - 1
    return [TokenizedExample(row, ids[row], mask, np.zeros(length - 1, dtype=bool)) for row in range(sequences)]


def generate(llm: Any, batch: list[TokenizedExample], **options: Any) -> None:
    """Generate one token after each prompt."""
    from vllm import SamplingParams

    params = SamplingParams(max_tokens=1, temperature=0, detokenize=False, **options)
    llm.generate([{"prompt_token_ids": each.input_ids[:-1].tolist()} for each in batch], params, use_tqdm=False)


def in_batches(teacher: Teacher, batch: list[TokenizedExample], label: LabelSettings) -> None:
    """Run forward passes of eight sequences."""
    for first in range(0, len(batch), 8):
        teacher.label(batch[first : first + 8], label)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--teacher")
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    with tempfile.TemporaryDirectory() as folder:
        found = measure(given.teacher or unpack(Path(folder)), given.sequences, given.length, given.rounds)
    first = next(iter(found.values()))
    for name, speed in found.items():
        print(f"{name:28s}{speed:10,.0f} tokens/s  {speed / first:5.2f}")


if __name__ == "__main__":
    main()
