"""A second teacher with another vocabulary, trained here on the study's code, since pip alone provides none."""

from pathlib import Path

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)
from transformers.trainer_utils import get_last_checkpoint

from tests.benchmarks.study import fidelity, ideas
from tests.benchmarks.study.corpus import code_files, windows
from tests.benchmarks.study.labelling import label_windows
from tests.benchmarks.study.labels import LARGER, STORED, TeacherFolder
from tests.benchmarks.study.students import LENGTHS, WINDOWS, Teacher, write_atomically

VOCABULARY, WIDTH, LAYERS = 8_192, 256, 6
STEPS, BATCH, RATE = 400, 8, 2e-3  # of this teacher's training, on windows of code
NAME = "code, vocabulary of 8,192"


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer on the training code."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(code_files(held_out=False), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def load(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return the teacher and its tokenizer; train them, or resume training, if they are not finished."""
    final = folder / "final"
    if not (final / "config.json").exists():
        tokenizer = make_tokenizer()
        ids = windows(code_files(held_out=False), tokenizer, STEPS * BATCH)
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=WIDTH,
            intermediate_size=3 * WIDTH,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=512,
            tie_word_embeddings=True,
        )
        how = TrainingArguments(
            output_dir=str(folder / "training"),
            max_steps=STEPS,
            per_device_train_batch_size=BATCH,
            learning_rate=RATE,
            warmup_steps=20,
            lr_scheduler_type="cosine",
            save_steps=100,
            logging_steps=50,
            report_to="none",
            use_cpu=True,
        )
        data = Dataset.from_dict({"input_ids": ids, "labels": ids})
        trainer = Trainer(LlamaForCausalLM(config), how, train_dataset=data)
        trainer.train(resume_from_checkpoint=get_last_checkpoint(how.output_dir) if folder.exists() else None)
        tokenizer.save_pretrained(final)
        trainer.save_model(str(final))
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(final, dtype=torch.float32)
    return model.eval().requires_grad_(False), AutoTokenizer.from_pretrained(final)


def prepare(folder: Path) -> Teacher:
    """Return what training needs of the teacher; gradients are compared on its held-out windows."""
    _, tokenizer = load(folder)
    ids = windows(code_files(held_out=False), tokenizer, max(LENGTHS) * WINDOWS)
    held = windows(code_files(held_out=True), tokenizer, max(fidelity.BATCHES))
    kept = TeacherFolder(folder / "train", ids, STORED | LARGER | ideas.STORED)
    where = TeacherFolder(folder / "code", held, fidelity.STORED)
    for one in (kept, where):
        one.run(str(folder / "final"))
        label_windows(one, VOCABULARY, (0, 1))
    return Teacher(VOCABULARY, kept, where)


def measure(folder: Path, cells: Path, stages: dict[str, Path], part: tuple[int, int], until: float) -> None:
    """Compute angles and sizes of every way, for a new student and the saved ones."""
    where = prepare(folder).held_out
    students = [fidelity.stage("fresh", VOCABULARY, None)]
    students += [fidelity.stage(name, VOCABULARY, path) for name, path in stages.items()]
    if part[0] == 0:
        write_atomically(cells / f"sizes_{NAME}.json", fidelity.sizes(where, VOCABULARY))
    fidelity.measure(students, NAME, where, cells, part, until)
