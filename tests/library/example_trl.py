"""LoRA from a cache in TRL's SFTTrainer: `python example_trl.py CACHE STUDENT OUTPUT`."""

import sys

from peft import LoraConfig
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer

import logitcask as lc


class CacheTrainer(lc.DistillationMixin, SFTTrainer):
    """An SFTTrainer, with all it has, whose loss and batches come from a cache."""


if __name__ == "__main__":
    cache = lc.open(sys.argv[1])
    trainer = CacheTrainer(
        sys.argv[2],
        SFTConfig(sys.argv[3], learning_rate=1e-2, bf16=False, logging_steps=1),
        train_dataset=cache.dataset(),
        data_collator=cache.collator(temperature=1.0),
        distillation=lc.Distillation(alpha=0.1),
        processing_class=AutoTokenizer.from_pretrained(sys.argv[2]),
        peft_config=LoraConfig(r=8, target_modules="all-linear"),
    )
    trainer.train()
    trainer.save_model()
