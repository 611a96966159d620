"""The loss in a training loop of one's own: torch, a model of transformers, and `selsft_kernels`; no TRL, no trainer.

    python bare_loop.py --model Qwen/Qwen3-0.6B --output runs/bare

A weight for each token: 1 is learned, -1 forgotten, 0 left alone. Index t belongs to token t.
"""

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from selsft_kernels import linear_selective_cross_entropy

parser = argparse.ArgumentParser()
parser.add_argument("--model", required=True)
parser.add_argument("--output", default="runs/bare")
parser.add_argument("--cpu", action="store_true")
options = parser.parse_args()
device = "cpu" if options.cpu else "cuda"
FORGET_WEIGHT, STEPS = 0.25, 8

tokenizer = AutoTokenizer.from_pretrained(options.model)
model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).to(device)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

prompt, good, bad = (tokenizer(part)["input_ids"] for part in ("Rice takes", " twenty minutes", " an hour"))
rows = [
    (prompt + good, [0.0] * len(prompt) + [1.0] * len(good)),
    (prompt + bad, [0.0] * len(prompt) + [-1.0] * len(bad)),
]
width = max(len(ids) for ids, _ in rows)
ids = torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in rows], device=device)
mask = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in rows], device=device)
weights = torch.tensor([w + [0.0] * (width - len(w)) for _, w in rows], device=device)

model.train()
for step in range(STEPS):
    hidden = model.base_model(input_ids=ids, attention_mask=mask).last_hidden_state
    scale = FORGET_WEIGHT * step / STEPS  # grows from 0
    signed = torch.where(weights < 0, weights * scale, weights)
    # Position t - 1 predicts token t. The logits of the batch are never held
    head = model.get_output_embeddings().weight
    out = linear_selective_cross_entropy(hidden[:, :-1], head, ids[:, 1:], signed[:, 1:])
    loss = out.loss / (weights[:, 1:] != 0).sum()  # over the whole step, if it has several batches
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step + 1}: loss {loss.item():.3f}")
model.save_pretrained(options.output)
tokenizer.save_pretrained(options.output)
