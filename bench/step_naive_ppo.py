"""A PPO loop in plain torch and transformers: left-padded batches, full logits in float32, GAE as a Python loop."""

from __future__ import annotations

import time
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from bench.step_child import StepRecord, child
from bench.step_naive import Loop, collect, update
from bench.workload import Workload, model_folder

KL_COEF, GAMMA, LAM, CLIP, VALUE_COEF, MINIBATCHES = 0.01, 1.0, 0.95, 0.2, 0.1, 2  # as in recipes/ppo.yaml


class PPOLoop(Loop):
    """The loop of `step_naive` with a critic, a reference, and a rollout in two mini-batches."""

    def __init__(self, workload: Workload) -> None:
        super().__init__(workload)
        folder = model_folder(workload.model)
        self.reference = AutoModelForCausalLM.from_pretrained(folder, dtype=self.model.dtype).to(workload.device).eval()
        kind = AutoModelForSequenceClassification
        self.critic = kind.from_pretrained(folder, num_labels=1, dtype=self.model.dtype).to(workload.device).eval()
        torch.nn.init.zeros_(self.critic.score.weight)
        self.critic_masters = [parameter.detach().float() for parameter in self.critic.parameters()]
        self.critic_optimizer = torch.optim.AdamW(
            self.critic_masters, lr=1e-5, betas=(0.9, 0.99), weight_decay=0.0, fused=True
        )

    def step(self, rows: list[dict[str, Any]]) -> StepRecord:
        """Rollout, rewards, scores, GAE, two updates of both models."""
        began = time.perf_counter()
        ids, attention, mask = self.generate([row["prompt"] for row in rows])
        generated = time.perf_counter()
        pairs = zip(ids[:, -mask.shape[1] :], mask, strict=True)
        texts = [self.tokenizer.decode(completion[kept], skip_special_tokens=True) for completion, kept in pairs]
        answers = [row["answer"] for row in rows for _ in range(self.workload.samples)]
        rewards = torch.tensor(self.reward(texts, answer=answers), device=ids.device)
        rewarded = time.perf_counter()
        parts = torch.arange(len(ids), device=ids.device).split(self.workload.micro_batch)
        with torch.no_grad():
            old, ref = (
                torch.cat([self.logps(model, ids[part], attention[part], mask.shape[1]) for part in parts])
                for model in (self.model, self.reference)
            )
            values = torch.cat([self.values(ids[part], attention[part], mask.shape[1]) for part in parts])
        advantages, returns = estimate(rewards, old, ref, values, mask)
        scored = time.perf_counter()
        order = torch.randperm(len(ids), device=ids.device)
        for minibatch in order.chunk(MINIBATCHES):
            tokens = mask[minibatch].sum()
            for part in minibatch.split(self.workload.micro_batch):
                self.accumulate_ppo(
                    ids[part], attention[part], mask[part], old[part], advantages[part], values[part], returns[part],
                    tokens,
                )  # fmt: skip
            update(self.model, self.masters, self.optimizer)
            update(self.critic, self.critic_masters, self.critic_optimizer)
        ended = time.perf_counter()
        return StepRecord(
            seconds=ended - began,
            stages={
                "rollout": generated - began,
                "reward": rewarded - generated,
                "score": scored - rewarded,
                "train": ended - scored,
            },
            reward=rewards.mean().item(),
            length=mask.sum(1).float().mean().item(),
            tokens=int(attention.sum()),
            equal_rewards=(rewards.view(-1, self.workload.samples).std(1) == 0).float().mean().item(),
        )

    def values(self, ids: torch.Tensor, attention: torch.Tensor, length: int) -> torch.Tensor:
        """(B, T) the critic's value before each completion token."""
        positions = (attention.cumsum(1) - 1).clamp(min=0)
        hidden = self.critic.model(ids, attention_mask=attention, position_ids=positions, use_cache=False)
        return self.critic.score(hidden.last_hidden_state[:, -length - 1 : -1]).squeeze(-1).float()

    def accumulate_ppo(
        self,
        ids: torch.Tensor,
        attention: torch.Tensor,
        mask: torch.Tensor,
        old: torch.Tensor,
        advantages: torch.Tensor,
        old_values: torch.Tensor,
        returns: torch.Tensor,
        tokens: torch.Tensor,
    ) -> None:
        """One micro-batch's gradients, added to the masters' in float32."""
        logps = self.logps(self.model, ids, attention, mask.shape[1])
        ratio = torch.exp(logps - old)
        loss = -torch.minimum(ratio * advantages, ratio.clamp(1 - CLIP, 1 + CLIP) * advantages)
        ((loss * mask).sum() / tokens).backward()
        collect(self.model, self.masters)
        values = self.values(ids, attention, mask.shape[1])
        near = values.clamp(old_values - CLIP, old_values + CLIP)
        error = torch.maximum((values - returns) ** 2, (near - returns) ** 2)
        (0.5 * VALUE_COEF * (error * mask).sum() / tokens).backward()
        collect(self.critic, self.critic_masters)


def estimate(
    rewards: torch.Tensor, old: torch.Tensor, ref: torch.Tensor, values: torch.Tensor, mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, T) whitened advantages, and returns: one token after the other from the last."""
    token_rewards = -KL_COEF * (old - ref) * mask
    last = mask.sum(1) - 1
    token_rewards[torch.arange(len(mask)), last] += rewards
    advantages, following, next_value = torch.zeros_like(old), torch.zeros(len(old)), torch.zeros(len(old))
    for t in reversed(range(mask.shape[1])):
        error = token_rewards[:, t] + GAMMA * next_value - values[:, t]
        following = torch.where(mask[:, t], error + GAMMA * LAM * following, following)
        next_value = torch.where(mask[:, t], values[:, t], next_value)
        advantages[:, t] = following * mask[:, t]
    returns = advantages + values
    valid = advantages[mask]
    return (advantages - valid.mean()) / (valid.std() + 1e-8), returns


def run(workload: Workload) -> list[StepRecord]:
    """Every step, warm-up included."""
    loop, rows, size = PPOLoop(workload), workload.rows(), workload.prompts
    return [loop.step(rows[first : first + size]) for first in range(0, workload.total_steps * size, size)]


if __name__ == "__main__":
    child(run)
