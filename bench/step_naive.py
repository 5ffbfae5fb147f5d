"""A GRPO loop in plain torch and transformers, as someone who knows what costs time writes it in an afternoon.

A bf16 model for the matmuls where the hardware has them, float32 master weights by hand for fused AdamW, groups of
equal rewards dropped, logits of the completion only.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from bench.step_child import StepRecord, child
from bench.workload import REWARDS, Workload, compute_dtype, model_folder


class Loop:
    """Model, masters and optimizer of one run."""

    def __init__(self, workload: Workload) -> None:
        torch.manual_seed(workload.seed)
        folder = model_folder(workload.model)
        self.workload = workload
        self.reward = REWARDS[workload.reward]
        self.tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
        self.tokenizer.pad_token = self.tokenizer.pad_token or self.tokenizer.eos_token
        dtype = compute_dtype(workload.dtype, workload.device)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(workload.device).eval()
        stops = self.model.generation_config.eos_token_id
        stops = [*(stops if isinstance(stops, list) else [stops]), self.tokenizer.eos_token_id]
        self.stops = torch.tensor(stops, device=workload.device)
        self.masters = [parameter.detach().float() for parameter in self.model.parameters()]
        self.optimizer = torch.optim.AdamW(self.masters, lr=1e-5, betas=(0.9, 0.99), weight_decay=0.0, fused=True)

    def step(self, rows: list[dict[str, Any]]) -> StepRecord:
        """Rollout, rewards, advantages, update."""
        began = time.perf_counter()
        ids, attention, mask = self.generate([row["prompt"] for row in rows])
        generated = time.perf_counter()
        pairs = zip(ids[:, -mask.shape[1] :], mask, strict=True)
        texts = [self.tokenizer.decode(completion[kept], skip_special_tokens=True) for completion, kept in pairs]
        answers = [row["answer"] for row in rows for _ in range(self.workload.samples)]
        rewards = torch.tensor(self.reward(texts, answer=answers), device=ids.device)
        rewarded = time.perf_counter()
        groups = rewards.view(-1, self.workload.samples)
        spread = groups.std(1, keepdim=True)
        advantages = ((groups - groups.mean(1, keepdim=True)) / (spread + 1e-6)).view(-1)
        contributing = (spread > 0).expand_as(groups).reshape(-1).nonzero().squeeze(1)
        if len(contributing):
            for part in contributing.split(self.workload.micro_batch):
                self.accumulate(ids[part], attention[part], mask[part], advantages[part], len(rewards))
            update(self.model, self.masters, self.optimizer)
        ended = time.perf_counter()
        times = {"rollout": generated - began, "reward": rewarded - generated, "train": ended - rewarded}
        return StepRecord(
            seconds=ended - began,
            stages=times | {"score": 0.0},
            reward=rewards.mean().item(),
            length=mask.sum(1).float().mean().item(),
            tokens=int(attention.sum()),
            equal_rewards=(spread == 0).float().mean().item(),
        )

    def generate(self, prompts: list[Any]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(B, P + T) ids and attention mask, prompts left-padded; (B, T) mask up to the first stop token."""
        chat = not isinstance(prompts[0], str)
        if chat:
            template = self.tokenizer.apply_chat_template
            prompts = [template(prompt, add_generation_prompt=True, tokenize=False) for prompt in prompts]
        repeated = [prompt for prompt in prompts for _ in range(self.workload.samples)]
        inputs = self.tokenizer(repeated, return_tensors="pt", padding=True, add_special_tokens=not chat)
        inputs = inputs.to(self.workload.device)
        with torch.no_grad():
            ids = self.model.generate(
                **inputs,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                max_new_tokens=self.workload.max_new_tokens,
                pad_token_id=self.tokenizer.pad_token_id,
            )
        stop = torch.isin(ids[:, inputs["input_ids"].shape[1] :], self.stops).int()
        mask = stop.cumsum(1) - stop == 0
        return ids, torch.cat([inputs["attention_mask"], mask.long()], 1), mask

    def accumulate(
        self,
        ids: torch.Tensor,
        attention: torch.Tensor,
        mask: torch.Tensor,
        advantages: torch.Tensor,
        sequences: int,
    ) -> None:
        """One micro-batch's gradient, added to the masters' in float32. On-policy: the ratio is 1."""
        logps = self.logps(self.model, ids, attention, mask.shape[1])
        ratio, advantages = torch.exp(logps - logps.detach()), advantages.unsqueeze(1)
        loss = -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
        (((loss * mask).sum(1) / mask.sum(1)).sum() / sequences).backward()
        collect(self.model, self.masters)

    def logps(self, model: Any, ids: torch.Tensor, attention: torch.Tensor, length: int) -> torch.Tensor:
        """(B, T) log-probabilities of the completion tokens."""
        logits = model(
            ids,
            attention_mask=attention,
            position_ids=(attention.cumsum(1) - 1).clamp(min=0),
            use_cache=False,
            logits_to_keep=length + 1,
        ).logits[:, :-1]
        return logits.float().log_softmax(-1).gather(-1, ids[:, -length:].unsqueeze(-1)).squeeze(-1)


def collect(model: torch.nn.Module, masters: list[torch.Tensor]) -> None:
    """Adds a model's gradients to its masters' in float32, and frees them."""
    for parameter, master in zip(model.parameters(), masters, strict=True):
        gradient = parameter.grad.float()
        master.grad = gradient if master.grad is None else master.grad.add_(gradient)
        parameter.grad = None


@torch.no_grad()
def update(model: torch.nn.Module, masters: list[torch.Tensor], optimizer: torch.optim.Optimizer) -> None:
    """Clips, steps, and rounds the masters into the model."""
    torch.nn.utils.clip_grad_norm_(masters, 1.0)
    optimizer.step()
    optimizer.zero_grad()
    for parameter, master in zip(model.parameters(), masters, strict=True):
        parameter.copy_(master)
    if masters[0].is_cuda:
        torch.cuda.synchronize()


def run(workload: Workload) -> list[StepRecord]:
    """Every step, warm-up included."""
    loop, rows, size = Loop(workload), workload.rows(), workload.prompts
    return [loop.step(rows[first : first + size]) for first in range(0, workload.total_steps * size, size)]


if __name__ == "__main__":
    child(run)
