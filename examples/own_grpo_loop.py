"""GRPO in a loop of your own: fastrl has the log-probabilities, the advantages and the loss."""

import random

import torch

import fastrl
from fastrl.model.load import load_model

GROUP, PROMPTS = 8, 4
model, tokenizer = load_model("smollm2-135m-instruct", torch.float32)  # or any causal LM of transformers
tokenizer.padding_side = "left"
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)

for step in range(20):
    sums = [(random.randint(0, 9), random.randint(0, 9)) for _ in range(PROMPTS)]
    questions = [f"{a} + {b} =" for a, b in sums]
    prompts = tokenizer(questions, return_tensors="pt", padding=True, return_token_type_ids=False)
    ids = model.generate(**prompts, max_new_tokens=8, do_sample=True, num_return_sequences=GROUP)  # (B, L)
    width = prompts.input_ids.shape[1]
    ends = (ids[:, width:] == tokenizer.eos_token_id).long()
    own = ends.cumsum(1) - ends == 0  # up to the first end, and with it
    before = prompts.attention_mask.bool().repeat_interleave(GROUP, 0)
    mask, labels = torch.cat([before, own], 1), torch.cat([torch.zeros_like(before), own], 1)  # attend; score
    inputs = {"labels": labels, "position_ids": (mask.cumsum(1) - 1).clamp_min(0)}  # positions as generate counts

    texts = tokenizer.batch_decode(ids[:, width:], skip_special_tokens=True)
    rewards = torch.tensor([float(str(sum(sums[row // GROUP])) in text) for row, text in enumerate(texts)])
    advantages = fastrl.group_advantages(rewards, group_size=GROUP)
    with torch.no_grad():
        old_logps = fastrl.logps(model, ids, mask, **inputs).logps
    for _ in range(2):
        logps = fastrl.logps(model, ids, mask, **inputs).logps  # (B, L), 0 where there is no label
        out = fastrl.policy_loss(logps, advantages, fastrl.presets.DAPO, mask=labels, old_logps=old_logps)
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    print(f"step {step}: reward {rewards.mean():.2f}, loss {out.loss.item():.4f}")
