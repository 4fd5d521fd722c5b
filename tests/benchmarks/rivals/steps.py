"""A step of each system: processor seconds and peak memory, each system in a process of its own.

The same student, text and shape of labels, whose values change no cost; float32, AdamW, one thread. Run by
``__main__``; alone it is what it starts.
"""

import gc
import json
import shutil
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from tests.benchmarks.rivals.stock import Sizes, part, the_teacher
from tests.benchmarks.rivals.stores import stores
from tests.benchmarks.rivals.systems import System, Text, plain, windows_of
from tests.benchmarks.student_step import STUDENT, resident

RANDOM = 4.0  # spread of the logits whose labels are timed


def store(folder: Path, systems: list[System], text: Text, sizes: Sizes) -> None:
    """Write a batch of each kind of student for each system, as its own code reads it from its own files."""
    random = np.random.default_rng(0)
    generator = torch.Generator().manual_seed(0)
    count = max((size for _, _, size, _ in sizes.students), default=1)
    ids = random.integers(0, text.vocabulary, (count, sizes.step_length))
    folder.mkdir(exist_ok=True)
    torch.save(torch.from_numpy(ids), folder / "ids.pt")
    for system in systems:
        last = folder / f"{system.name}, {sizes.students[-1][0]}.pt" if sizes.students else folder
        if system.write is None or system.read is None or last.exists():
            continue
        place = folder / system.name
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        with system.write(place) as add:
            for window in ids:
                shape = (sizes.step_length - 1, text.vocabulary)
                add(window, RANDOM * torch.randn(shape, generator=generator))
        read = system.read(place)
        for name, _, size, _ in sizes.students:
            torch.save(read(np.arange(size)), folder / f"{system.name}, {name}.pt")


def measure(folder: Path, systems: list[System], paths: dict[str, str], text: Text, sizes: Sizes) -> dict[str, Any]:
    """Return, by kind of student and system, processor seconds of steps and the peak of memory in MB."""
    results: dict[str, Any] = {}
    for kind, layers, size, repeats in sizes.students:
        results[kind] = {"positions": size * (sizes.step_length - 1)}
        for name in [system.name for system in systems]:
            asked = {
                "folder": str(folder),
                "system": name,
                "paths": paths,
                "teacher": text.source,
                "vocabulary": text.vocabulary,
                "kind": kind,
                "layers": layers,
                "windows": size,
                "repeats": repeats,
            }
            results[kind][name] = part(folder, f"{kind}, {name}", [name], partial(apart, asked))
    return results


def apart(asked: dict[str, Any]) -> dict[str, Any]:
    """Return what ``main`` prints in a process of its own."""
    command = [sys.executable, "-m", "tests.benchmarks.rivals.steps", json.dumps(asked)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    measured: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return measured


def student_of(layers: int, vocabulary: int) -> PreTrainedModel:
    """Return the 100m student with so many of its layers: none leaves loss and head, with the embeddings they share."""
    values = json.loads(STUDENT.read_text()) | {"num_hidden_layers": layers, "vocab_size": vocabulary}
    torch.manual_seed(0)
    student: PreTrainedModel = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(values.pop("model_type"), **values), dtype=torch.float32
    )
    return student.train()


def main() -> None:
    """Measure one system in this process and print it."""
    asked = json.loads(sys.argv[1])
    if asked["system"].startswith("TRL"):  # before the memory is read
        from tests.benchmarks.rivals import trl
    torch.set_num_threads(1)
    folder, name, text = Path(asked["folder"]), asked["system"], Text(asked["teacher"], asked["vocabulary"])
    systems = [plain(), *stores(asked["paths"], text)]  # whose code is loaded
    stored, ids = folder / f"{name}, {asked['kind']}.pt", torch.load(folder / "ids.pt")[: asked["windows"]]
    batch = torch.load(stored, weights_only=False) if stored.exists() else windows_of(ids.numpy())(np.arange(len(ids)))
    gc.collect()
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    if name.startswith("TRL"):
        systems += trl.load(trl.Running(the_teacher(text.source)))
    system = next(each for each in systems if each.name == name)
    student = student_of(asked["layers"], text.vocabulary)
    system.prepare(student)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-5, fused=True)
    seconds = []
    for _ in range(asked["repeats"] + 1):
        began = time.process_time()
        torch.autograd.backward(system.timed.mean(student, batch))
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.process_time() - began)
    print(json.dumps({"cpu_seconds": [round(s, 3) for s in seconds[1:]], "peak_mb": round(resident("VmHWM") - before)}))


if __name__ == "__main__":
    main()
