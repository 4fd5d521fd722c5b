"""Distillation from a cache in transformers' Trainer: `python example_trainer.py CACHE STUDENT OUTPUT`."""

import sys

from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import logitcask as lc


class CacheTrainer(lc.DistillationMixin, Trainer):
    """A Trainer, with all it has, whose loss and batches come from a cache."""


if __name__ == "__main__":
    cache, model = lc.open(sys.argv[1]), AutoModelForCausalLM.from_pretrained(sys.argv[2])
    args = TrainingArguments(sys.argv[3], num_train_epochs=2, learning_rate=1e-3, save_steps=2, logging_steps=1)
    trainer = CacheTrainer(
        model,
        args,
        train_dataset=cache.dataset(),
        data_collator=cache.collator(temperature=1.0),
        distillation=lc.Distillation(alpha=0.1),
    )
    trainer.train()
    trainer.save_model()
