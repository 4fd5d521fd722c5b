"""A loop of one's own over two mixed caches: the README shows it."""

import sys

import torch
from transformers import AutoModelForCausalLM

import logitcask as lc

caches = [lc.open(path) for path in sys.argv[2:]]  # a folder, a .zip file, s3://, gs://, ssh:// or hf://
caches[0].check(sys.argv[1])  # raises with the difference if the student's tokenizer is another
mixed = lc.mix(caches, weights=[0.7, 0.3])  # shares of the target positions
student = AutoModelForCausalLM.from_pretrained(sys.argv[1])
optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
for batch in lc.loader(mixed, batch_size=8, temperature=1.0, seed=0):
    loss = lc.kd_loss(student, batch, alpha=0.1)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"{loss.item():.3f}")
