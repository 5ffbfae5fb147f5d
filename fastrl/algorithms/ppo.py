"""PPO: a reward at every token, a critic and GAE, a clipped policy loss and a clipped value loss."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from fastrl.advantages import discounted_returns, kl_in_reward, vapo_gae, whiten
from fastrl.algorithms.base import Learner
from fastrl.algorithms.offline import Answers, accumulate_nll
from fastrl.algorithms.policy_gradient import Part, PolicyGradient, policy_gradient_loss
from fastrl.check import require
from fastrl.data.pack import Counts, trained
from fastrl.data.sampler import PromptSampler
from fastrl.losses.metrics import Metrics
from fastrl.losses.token_masks import positive_nll_weights
from fastrl.losses.value import value_loss
from fastrl.model.policy import Policy
from fastrl.model.scalar import Critic, SharedCritic
from fastrl.ops.gae import gae
from fastrl.progress import Progress, Watch, unseen
from fastrl.types import Batch, Group, LossOutput, MicroBatch


@dataclass
class KLController:
    """The weight of the KL in the reward: fixed, or adapted so that the KL per sequence approaches a target.

    coef <- coef (1 + clip(KL / target - 1, -0.2, 0.2) sequences / horizon): arXiv:1909.08593 section 2.2, in the form
    of its reference code.
    """

    coef: float
    target: float | None = None  # nats per sequence; None keeps the coefficient fixed
    horizon: int = 10_000

    def __post_init__(self) -> None:
        require(self.coef >= 0.0, "KLController", "coef", "at least 0", self.coef)
        require(self.target is None or self.target > 0.0, "KLController", "target", "above 0, or None", self.target)
        require(self.horizon >= 1, "KLController", "horizon", "at least 1", self.horizon)

    def update(self, kl: float, sequences: int) -> None:
        """Adapts to a rollout of `sequences` with a mean KL of `kl` nats per sequence."""
        if self.target is not None:
            error = min(max(kl / self.target - 1.0, -0.2), 0.2)
            self.coef *= 1.0 + error * sequences / self.horizon


@dataclass(frozen=True)
class Pretraining:
    """The pretraining term of PPO-ptx: coef times the mean of -log pi(x_t | x_<t) over the tokens of some rows.

    It is gamma E_{x ~ D_pretrain}[log pi(x)] of arXiv:2203.02155 equation 2, with the mean over tokens in place of the
    sum, as in the policy loss; the temperature is 1 whatever that of the rollouts.
    """

    rows: PromptSampler[Group]  # demonstrations, or whole texts
    number: int  # rows per optimizer step
    coef: float

    def next(self, learner: Learner) -> Answers:
        """The next optimizer step's rows, packed."""
        return Answers.of(learner, self.rows.next(self.number))


@dataclass(frozen=True)
class ActorCritic(PolicyGradient):
    """PPO, arXiv:1707.06347, as used in RLHF, arXiv:2203.02155.

    r_t = -kl_coef (old_logps_t - ref_logps_t) + [t is the last token] score, or by_turn + [t ends turn k] r_k
    R = gae(r, V_old, lam), A = gae(r, V_old, lam_policy), and A whitened over the valid tokens of the rollout
    loss = policy loss(A) + value_coef 0.5 max((V - R)^2, (clip(V, V_old - value_clip, V_old + value_clip) - R)^2)

    `spec` averages over tokens, as the value loss does. Without `lam_policy` both lambdas are `lam`. VAPO,
    arXiv:2504.05118, has lam = 1; length_alpha = 0.05, which sets lam_policy by the length of each completion
    (`fastrl.advantages.vapo_gae`); and positive_nll = 0.1, the weight of the negative log-likelihood of completions
    that score above 0, averaged over their tokens in the optimizer step.

    Without a critic this is REINFORCE++, arXiv:2501.03262: values are 0 and lam is 1, so advantages are whitened
    rewards-to-go, and there is no value loss.

    With `ptx` this is PPO-ptx: each optimizer step of the policy adds the gradient of `Pretraining`.
    """

    kl: KLController
    gamma: float = 1.0
    lam: float = 0.95
    value_coef: float = 0.1
    value_clip: float | None = 0.2
    whiten: bool = True
    lam_policy: float | None = None
    length_alpha: float | None = None
    positive_nll: float = 0.0
    critic: bool = True
    by_turn: bool = False  # the rewards of a conversation's turns at their ends, not all at its end
    ptx: Pretraining | None = None

    def __post_init__(self) -> None:
        ok = self.spec.aggregate == "token_mean"
        require(ok, "ActorCritic", "spec.aggregate", "'token_mean', as the value loss", repr(self.spec.aggregate))
        require(self.spec.kl is None, "ActorCritic", "spec.kl", "None: PPO's KL is in the reward", self.spec.kl)
        for name in ("gamma", "lam", "lam_policy"):
            value = getattr(self, name)
            require(value is None or 0.0 <= value <= 1.0, "ActorCritic", name, "a number from 0 to 1", value)
        alpha, alone = self.length_alpha, self.length_alpha is None or self.lam_policy is None
        require(alpha is None or alpha > 0.0, "ActorCritic", "length_alpha", "above 0, or None", alpha)
        require(alone, "ActorCritic", "lam_policy", "None with length_alpha, which sets it by length", self.lam_policy)
        require(self.positive_nll >= 0.0, "ActorCritic", "positive_nll", "at least 0", self.positive_nll)
        self.masks.require_fits(self.spec)
        off = self.masks.off_policy
        require(
            off is None, "ActorCritic", "masks.off_policy", "null: it reads an advantage of the whole completion", off
        )
        require(self.value_coef > 0.0, "ActorCritic", "value_coef", "above 0", self.value_coef)
        require(self.value_clip is None or self.value_clip > 0, "ActorCritic", "value_clip", "above 0", self.value_clip)

    @property
    def needs_ref(self) -> bool:
        """True when the reward reads the reference's log-probabilities."""
        return self.kl.coef > 0.0

    @property
    def needs_critic(self) -> bool:
        """True except for REINFORCE++."""
        return self.critic

    @property
    def needs_old(self) -> bool:
        """Always: the KL in the reward uses the weights that sampled."""
        return True

    def updates(self, learner: Learner, batch: Batch, watch: Watch) -> Iterator[Part]:
        """As `Algorithm`. Rows of `ptx` are drawn step by step, so a step that is undone draws the same rows again."""
        for part in super().updates(learner, batch, watch):
            draws = self.ptx is not None and not part.only_critic
            yield part._replace(ptx=self.ptx.next(learner)) if draws else part

    def accumulate(
        self, learner: Learner, part: Part, progress: Progress = unseen
    ) -> tuple[torch.Tensor, list[Metrics]]:
        """As `Algorithm`; logs the mean of -log pi over the pretraining rows' tokens as loss/ptx."""
        loss, metrics = super().accumulate(learner, part, progress)
        if part.ptx is None:
            return loss, metrics
        added, _ = accumulate_nll(learner.policy, part.ptx, coef=self.ptx.coef)
        # A share of the rows adds its sum and its tokens; the mean is over those of all processes.
        tokens = torch.tensor(float(sum(len(batch.targets) for batch in part.ptx.batches)), device=learner.device)
        return loss + added, [*metrics, {"loss/ptx": (added / self.ptx.coef * part.ptx.tokens, tokens)}]

    def advantages(self, groups: Sequence[Group]) -> None:
        """Does nothing: advantages are per token and need the critic (`estimate`)."""

    def contributing(self, groups: Sequence[Group]) -> list[Group]:
        """The groups with a scored sample. Groups of equal rewards count too: other groups' rewards differ."""
        return [group for group in groups if trained(group)]

    def normalizer(self, counts: Counts) -> float:
        """The divisor of both losses: the tokens of the optimizer step."""
        return float(counts.tokens)

    @torch.no_grad()
    def estimate(self, parts: Sequence[Part]) -> tuple[list[Part], dict[str, float]]:
        """Fills in token `advantages` and `returns` from `scores`, `old_logps`, `ref_logps` and `values`.

        Whitening uses mean and deviation over all tokens of the rollout, however they are packed. Returns (parts,
        numbers to log).
        """
        batches = [self._estimate(batch) for part in parts for batch in part.batches]
        sequences = sum(len(batch.scores) for batch in batches)
        numbers = {"objective/kl": 0.0, "objective/kl_coef": self.kl.coef}
        if not batches:
            return list(parts), numbers
        if self.needs_ref:
            total = sum((batch.old_logps - batch.ref_logps).double().sum() for batch in batches)
            numbers["objective/kl"] = float(total) / sequences
        if self.whiten:
            flat = whiten(torch.cat([batch.advantages for batch in batches]), torch.cat([b.mask for b in batches]))
            pieces = flat.split([len(batch.mask) for batch in batches])
            batches = [replace(batch, advantages=piece) for batch, piece in zip(batches, pieces, strict=True)]
        rest = iter(batches)
        filled = [part._replace(batches=[next(rest) for _ in part.batches]) for part in parts]
        if self.positive_nll:
            filled = [part._replace(batches=self._imitating(part.batches)) for part in filled]
        return filled, numbers

    def observe(self, parts: Sequence[Part], numbers: Mapping[str, float]) -> None:
        """Adapts the KL coefficient, which stays the same within a batch."""
        sequences = sum(len(batch.scores) for part in parts for batch in part.batches)
        if sequences and self.needs_ref:
            self.kl.update(numbers["objective/kl"], sequences)

    def state_dict(self) -> dict[str, Any]:
        """The KL coefficient, and the position in the pretraining rows."""
        return {"kl_coef": self.kl.coef} | ({"ptx": self.ptx.rows.state_dict()} if self.ptx else {})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` returned.

        Raises:
            ValueError: the pretraining rows are others.
        """
        self.kl.coef = state["kl_coef"]
        if self.ptx:
            self.ptx.rows.load_state_dict(state["ptx"])

    def _imitating(self, batches: Sequence[MicroBatch]) -> list[MicroBatch]:
        """The micro-batches of one optimizer step with VAPO's NLL weights for completions that scored above 0."""
        right = [batch.scores > 0 for batch in batches]
        pairs = list(zip(batches, right, strict=True))
        total = sum(int(batch.cu_seqlens.diff()[chosen].sum()) for batch, chosen in pairs)
        weights = [
            positive_nll_weights(
                batch.mask, chosen, coef=self.positive_nll, normalizer=total, cu_seqlens=batch.cu_seqlens
            )
            for batch, chosen in pairs
        ]
        return [replace(batch, nll_weights=weight) for batch, weight in zip(batches, weights, strict=True)]

    def _estimate(self, batch: MicroBatch) -> MicroBatch:
        ref = batch.old_logps if batch.ref_logps is None else batch.ref_logps
        last, earlier = _by_turn(batch) if self.by_turn else (batch.scores, 0.0)
        rewards = kl_in_reward(last, batch.old_logps, ref, batch.mask, self.kl.coef, batch.cu_seqlens) + earlier
        options: dict[str, Any] = {"gamma": self.gamma, "cu_seqlens": batch.cu_seqlens}
        if not self.critic:
            return replace(batch, advantages=discounted_returns(rewards, batch.mask, **options))
        inputs = (rewards, batch.values, batch.mask)
        if self.length_alpha is not None:
            advantages, returns = vapo_gae(*inputs, alpha=self.length_alpha, lam_value=self.lam, **options)
        else:
            advantages, returns = gae(*inputs, lam=self.lam, **options)
            if self.lam_policy is not None:
                advantages, _ = gae(*inputs, lam=self.lam_policy, **options)
        return replace(batch, advantages=advantages, returns=returns)

    def losses(
        self,
        policy: Policy | None,
        critic: Critic | None,
        batch: MicroBatch,
        normalizer: float,
        *,
        temperature: float,
        entropy: bool,
    ) -> Iterator[LossOutput]:
        """One micro-batch's shares of the step's loss. Backpropagate each before asking for the next.

        A separate critic comes after the policy, when the policy's activations have been freed. A critic that shares
        the backbone comes with the policy, from the same hidden states. Without a policy there is only the loss of a
        separate critic.
        """
        options: dict[str, Any] = {
            "temperature": temperature,
            "entropy": entropy,
            "ratio_to_sampler": self.ratio_to_sampler,
            "terms": self.terms,
        }
        if isinstance(critic, SharedCritic):
            hidden = policy.hidden(batch)
            out = policy_gradient_loss(policy, batch, self.spec, normalizer, hidden=hidden, **options)
            value = self._value_loss(critic.of(hidden), batch, normalizer)
            yield LossOutput(out.loss + value.loss, out.metrics | value.metrics)
        else:
            if policy is not None:
                yield policy_gradient_loss(policy, batch, self.spec, normalizer, **options)
            if critic is not None:
                yield self._value_loss(critic.values(batch), batch, normalizer)

    def _value_loss(self, values: torch.Tensor, batch: MicroBatch, normalizer: float) -> LossOutput:
        out = value_loss(
            values, batch.values, batch.returns, mask=batch.mask, clip=self.value_clip, normalizer=normalizer
        )
        total = out.loss.detach() * normalizer, batch.mask.sum().to(out.loss.dtype)
        return LossOutput(self.value_coef * out.loss, out.metrics | {"value/loss": total})


def _by_turn(batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """(S,) rewards of the last turns, and (N,) those of the turns before, at the last token of each."""
    last, earlier = torch.empty_like(batch.scores), torch.zeros_like(batch.old_logps)
    for number, (start, sample) in enumerate(zip(batch.cu_seqlens.tolist(), batch.samples, strict=False)):
        last[number] = sample.turn_rewards[-1]
        for end, reward in zip(sample.turn_ends[:-1], sample.turn_rewards[:-1], strict=True):
            earlier[start + end - 1] = reward
    return last, earlier
