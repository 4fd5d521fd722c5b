"""Labels from a forward pass of your own: `python example_forward_pass.py TEACHER DATA.jsonl CACHE`."""

import json
import random
import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import logitcask as lc

teacher, data, place = sys.argv[1:]
tokenizer, model = AutoTokenizer.from_pretrained(teacher), AutoModelForCausalLM.from_pretrained(teacher)
with open(data) as lines:
    records = [json.loads(line) for line in lines]
random.Random(0).shuffle(records)  # the order of the cache is that of the first epoch
label = lc.label_settings(len(tokenizer), head_size=8, tail_draws=24, temperatures=(1.0, 2.0))
with lc.create(place, label=label, tokenizer=tokenizer, teacher=teacher, resume=True) as writer:
    for record in records[len(writer) :]:  # a run that was killed continues
        prompt = tokenizer(record["prompt"])["input_ids"]
        ids = torch.tensor(prompt + tokenizer(record["response"])["input_ids"] + [tokenizer.eos_token_id])
        mask = torch.arange(len(ids)) >= len(prompt) - 1  # true at t if token t + 1 is a target
        mask[-1] = False
        with torch.inference_mode():
            logits = model(input_ids=ids[None]).logits[0, mask, : len(tokenizer)]
        gold = ids[1:][mask[:-1]]  # the tokens that came next
        writer.add(ids, mask, lc.sparsify(logits, gold, label, example=len(writer)))
