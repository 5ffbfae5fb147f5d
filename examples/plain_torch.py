"""GRPO in a loop of your own: fastrl has the log-probabilities, the advantages and the loss."""

import random

import torch

import fastrl
from fastrl.model.load import load_model

GROUP, PROMPTS, STEPS, UPDATES = 8, 4, 20, 2

model, tokenizer = load_model("smollm2-135m-instruct", torch.float32)
tokenizer.padding_side = "left"
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)

for step in range(STEPS):
    pairs = [(random.randint(0, 9), random.randint(0, 9)) for _ in range(PROMPTS)]
    questions = [f"{a} + {b} =" for a, b in pairs]
    prompts = tokenizer(questions, return_tensors="pt", padding=True, return_token_type_ids=False)
    ids = model.generate(**prompts, max_new_tokens=8, do_sample=True, num_return_sequences=GROUP)  # (B, L)

    width = prompts.input_ids.shape[1]
    ends = (ids[:, width:] == tokenizer.eos_token_id).long()
    own = ends.cumsum(1) - ends == 0  # up to the first end, and with it
    prompt_mask = prompts.attention_mask.bool().repeat_interleave(GROUP, 0)
    inputs = {
        "attention_mask": torch.cat([prompt_mask, own], 1),
        "labels": torch.cat([torch.zeros_like(prompt_mask), own], 1),  # bool: score these tokens
    }
    inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp_min(0)  # as generate counts

    texts = tokenizer.batch_decode(ids[:, width:], skip_special_tokens=True)
    right = [float(str(a + b) in text) for (a, b), text in zip([p for p in pairs for _ in range(GROUP)], texts)]  # noqa: B905
    advantages = fastrl.group_advantages(torch.tensor(right), group_size=GROUP)
    with torch.no_grad():
        old_logps = fastrl.logps(model, ids, **inputs).logps
    for _ in range(UPDATES):
        logps = fastrl.logps(model, ids, **inputs).logps  # (B, L), 0 where there is no label
        out = fastrl.policy_loss(logps, advantages, fastrl.presets.DAPO, mask=inputs["labels"], old_logps=old_logps)
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    print(f"step {step}: reward {sum(right) / len(right):.2f}, loss {out.loss.item():.4f}")
