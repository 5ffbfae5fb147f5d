"""Learning from compared, ranked, labelled or demonstrated answers.

An objective is an algorithm that takes one optimizer step per batch and can also measure held-out answers. Counts,
KTO's baseline and AOT's sorting are computed over the whole step, so the split into micro-batches never changes the
gradient.

Logits are never stored. A preference loss is evaluated on log-probabilities that were computed without a gradient. Its
derivatives c_t = d loss / d logps_t are then the weights of a loss sum_t c_t logps_t, which `linear_policy_loss`
differentiates chunk by chunk; the head's gradient goes straight into the float32 `main_grad`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch

from fastrl.algorithms.base import Kind, Learner
from fastrl.check import require
from fastrl.data.preferences import mismatched
from fastrl.distributed import World
from fastrl.losses.answer_rows import split_pairs
from fastrl.losses.linear_policy import linear_policy_loss
from fastrl.losses.metrics import Metrics, finish, merge
from fastrl.losses.preference import preference_loss
from fastrl.losses.reward_model import reward_model_loss
from fastrl.losses.unpaired import mismatched_kl, unpaired_preference_loss
from fastrl.model.policy import Policy
from fastrl.model.scalar import ScalarModel
from fastrl.preference_spec import PreferenceLoss, PreferenceMix, UnpairedPreferenceLoss
from fastrl.progress import Progress, Watch, tracked, unseen
from fastrl.spec import PolicyLoss, Reinforce
from fastrl.types import Batch, Group, LossOutput, MicroBatch

ARGMAX_ELEMENTS = 1 << 24  # logits in memory at a time when measuring token accuracy
SUM_OF_LOGPS = PolicyLoss(surrogate=Reinforce(), aggregate="token_sum")  # -advantage log p, summed


@dataclass(frozen=True)
class Answers:
    """The packed groups of one optimizer step, or all held-out ones, and the counts that losses are divided by."""

    batches: list[MicroBatch]
    groups: int
    tokens: int  # of the chosen answers, or of all answers if a group has only one
    mismatched: list[MicroBatch] = field(default_factory=list)  # answers to other prompts, for KTO's baseline
    margins: torch.Tensor | None = None  # (groups,) `Group.margin`, if the data have it
    soft_labels: torch.Tensor | None = None  # (groups,) `Group.soft_label`, if the data have it
    label: ClassVar[str] = ""
    only_critic: ClassVar[bool] = False

    @classmethod
    def of(cls, learner: Learner, groups: Sequence[Group]) -> Answers:
        """Packs the groups for the learner's models."""
        others = [Group(group.prompt, [group.mismatched]) for group in groups if group.mismatched]
        return cls(
            batches=learner.pack(groups, whole_groups=True),
            groups=len(groups),
            tokens=sum(len(group.samples[0].token_ids) for group in groups),
            mismatched=learner.pack(others, whole_groups=True) if others else [],
            margins=learner.tensor([group.margin for group in groups]),
            soft_labels=learner.tensor([group.soft_label for group in groups]),
        )

    def share(self, world: World) -> Answers:
        """As `Step`. Every process has all of `mismatched`, whose mean is the baseline of the whole step."""
        return replace(self, batches=world.share(self.batches))

    def of_pairs(self, group_ids: torch.Tensor) -> dict[str, torch.Tensor | None]:
        """`margins` and `soft_labels` of pairs, each (P,), given each pair's group."""
        found = {"margins": self.margins, "soft_labels": self.soft_labels}
        return {name: None if tensor is None else tensor[group_ids] for name, tensor in found.items()}


@dataclass(frozen=True)
class Objective:
    """A loss on groups of answers of one kind, and its metrics on held-out ones."""

    threshold: float = field(default=0.5, kw_only=True)  # minimum reward of a good completion
    kind: ClassVar[Kind]
    needs_critic: ClassVar[bool] = False
    needs_greedy: ClassVar[bool] = False
    needs_mismatched: ClassVar[bool] = False  # whether `Answers.mismatched` is read

    @property
    def needs_ref(self) -> bool:
        """Whether `MicroBatch.ref_logps` is read."""
        return False

    @property
    def takes_margins(self) -> bool:
        """Whether it can read `Answers.margins`."""
        return False

    @property
    def takes_soft_labels(self) -> bool:
        """Whether it can read `Answers.soft_labels`."""
        return False

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """The kinds of groups it takes as they are; rewarded groups go through `chosen` first."""
        return (self.kind,)

    def updates(self, learner: Learner, batch: Batch, watch: Watch) -> Iterator[Answers]:
        """As `Algorithm`: one step on the whole batch."""
        if batch.updates:
            return
        require(batch.kind in (*self.kinds, "rewarded"), type(self).__name__, "groups", f"{self.kind}", batch.kind)
        groups = self.chosen(batch) if batch.kind == "rewarded" else batch.groups
        if not groups:
            return
        if self.needs_mismatched and not all(group.mismatched for group in groups):
            pair_up(groups)
        with watch.stage("pack"):
            answers = Answers.of(learner, groups)
        if self.needs_ref and any(one.ref_logps is None for one in answers.batches + answers.mismatched):
            with watch.stage("score", "micro-batches") as progress:
                answers = replace(
                    answers,
                    batches=learner.score(answers.batches, progress, old=False),
                    mismatched=learner.score(answers.mismatched, progress, old=False),
                )
        batch.scored = True
        yield answers

    def chosen(self, batch: Batch) -> list[Group]:
        """Turns rewarded groups into this kind: the best and the worst completion of each group as a pair; those that
        score at least `threshold` as demonstrations; or all of them, labelled by whether they do."""
        groups = []
        for group in batch.groups:
            scored = [one for one in group.samples if one.reward is not None and one.token_ids]
            good = [one for one in scored if one.reward >= self.threshold]
            if self.kind == "pairs":
                best, worst = (choose(scored, key=lambda one: one.reward, default=None) for choose in (max, min))
                taken = [[(best, 1.0), (worst, -1.0)]] if scored and best.reward > worst.reward else []
            elif self.kind == "completions":
                taken = [[(one, 1.0)] for one in good]
            else:
                taken = [[(one, 1.0 if one.reward >= self.threshold else -1.0)] for one in scored]
            batch.contributing += [group] if taken else []
            groups += [Group(group.prompt, [replace(one, advantage=sign) for one, sign in part]) for part in taken]
        return groups

    def accumulate(
        self, learner: Learner, answers: Answers, progress: Progress = unseen
    ) -> tuple[torch.Tensor, list[Metrics]]:
        """As `Algorithm`."""
        raise NotImplementedError

    def measure(self, model: Any, answers: Answers, progress: Progress = unseen) -> dict[str, float]:
        """The model's metrics on these answers, `loss` included; computed without gradient."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing."""


def pair_up(groups: Sequence[Group]) -> None:
    """Sets `mismatched` of every group: the answer to another prompt, for KTO's baseline."""
    for group, other in zip(groups, mismatched(groups), strict=True):
        group.mismatched = replace(other.samples[0])


class Scored(NamedTuple):
    """Packed log-probabilities of some micro-batches, without gradient."""

    logps: torch.Tensor  # (N,) float32
    cu_seqlens: torch.Tensor  # (S + 1,)
    group_ids: torch.Tensor  # (S,)
    advantages: torch.Tensor  # (S,), 1 for an answer to learn and -1 for one to avoid
    ref_logps: torch.Tensor | None  # (N,)
    log_sum_sq_probs: torch.Tensor | None  # (N,), where the loss asks for it


Loss = Callable[[Scored], LossOutput]


@dataclass(frozen=True)
class PairedPreference(Objective):
    """DPO and its variants: a `PreferenceLoss`, or a mix of several, on pairs."""

    spec: PreferenceLoss | PreferenceMix
    kind: ClassVar[Kind] = "pairs"

    @property
    def needs_ref(self) -> bool:
        """As the spec."""
        return self.spec.needs_ref

    @property
    def takes_margins(self) -> bool:
        """As every pair loss of the spec."""
        return all(term.takes_margins for term in self._pair_losses)

    @property
    def takes_soft_labels(self) -> bool:
        """As every pair loss of the spec."""
        return all(term.takes_soft_labels for term in self._pair_losses)

    def accumulate(
        self, learner: Learner, answers: Answers, progress: Progress = unseen
    ) -> tuple[torch.Tensor, list[Metrics]]:
        """As `Objective`. A loss that sorts the batch (AOT) takes an extra forward pass over all of it first."""
        policy = learner.policy
        loss = partial(self._loss, answers=answers)
        if not self.sorts:
            return _accumulate(policy, tracked(answers.batches, progress), loss, self._weighs)
        number = len(answers.batches)
        first = tracked(answers.batches, progress, after=number)
        scored = [_scored(policy, _hidden(policy, batch), batch, self._weighs) for batch in first]
        out, gradient = _value_and_gradient(loss, _joined(scored))
        parts = gradient.split([len(batch.targets) for batch in answers.batches])
        for batch, part in zip(tracked(answers.batches, progress, before=number), parts, strict=True):
            _pull_back(policy, policy.hidden(batch), batch, part)
        return out.loss, [out.metrics]

    def measure(self, policy: Policy, answers: Answers, progress: Progress = unseen) -> dict[str, float]:
        """Share of pairs whose chosen answer has the higher reward (ties count half), margin and loss."""
        batches = tracked(answers.batches, progress)
        scored = _joined([_scored(policy, _hidden(policy, batch), batch, self._weighs) for batch in batches])
        arguments = self._arguments(scored)
        other = {"chosen": "rejected", "rejected": "chosen"}
        swapped = {
            name.replace(side, other[side]): tensor
            for name, tensor in arguments.items()
            for side in other
            if side in name
        }
        values = self._loss(scored, answers)
        right = finish(values.metrics)
        more = answers.of_pairs(scored.group_ids[::2])
        wrong = finish(preference_loss(**swapped, **more, **self._counts(answers), spec=self.spec).metrics)
        accuracy = (right["rewards/accuracies"] + 1 - wrong["rewards/accuracies"]) / 2
        return {"accuracy": accuracy, "margin": right["rewards/margins"], "loss": values.loss.item()}

    def _loss(self, scored: Scored, answers: Answers) -> LossOutput:
        more = answers.of_pairs(scored.group_ids[::2])
        return preference_loss(**self._arguments(scored), **more, **self._counts(answers), spec=self.spec)

    def _arguments(self, scored: Scored) -> dict[str, torch.Tensor]:
        ref_logps = scored.ref_logps if self.needs_ref else None
        return split_pairs(
            scored.cu_seqlens, logps=scored.logps, ref_logps=ref_logps, log_sum_sq_probs=scored.log_sum_sq_probs
        )

    def _counts(self, answers: Answers) -> dict[str, int]:
        return {"normalizer": answers.groups, "token_normalizer": answers.tokens}

    @property
    def _pair_losses(self) -> list[PreferenceLoss]:
        terms = self.spec.terms if isinstance(self.spec, PreferenceMix) else ((1.0, self.spec),)
        return [term for _, term in terms if isinstance(term, PreferenceLoss)]

    @property
    def sorts(self) -> bool:
        """Whether the loss compares the pairs of the whole step with each other."""
        return any(term.match != "pairs" for term in self._pair_losses)

    @property
    def _weighs(self) -> bool:
        return any(term.weighting == "wpo" for term in self._pair_losses)


@dataclass(frozen=True)
class UnpairedPreference(Objective):
    """KTO and its variants: an `UnpairedPreferenceLoss` on labelled answers."""

    spec: UnpairedPreferenceLoss
    kind: ClassVar[Kind] = "labelled"
    needs_ref: ClassVar[bool] = True

    @property
    def needs_mismatched(self) -> bool:
        """True where the baseline is a KL."""
        return self.spec.baseline == "kl"

    def accumulate(
        self, learner: Learner, answers: Answers, progress: Progress = unseen
    ) -> tuple[torch.Tensor, list[Metrics]]:
        """As `Objective`. KTO's baseline covers the whole step and takes a forward pass over `answers.mismatched`."""
        policy = learner.policy
        loss = partial(self._loss, answers=answers, kl=self._kl(policy, answers, progress))
        return _accumulate(policy, self._tracked(answers, progress), loss)

    def measure(self, policy: Policy, answers: Answers, progress: Progress = unseen) -> dict[str, float]:
        """Mean reward of desirable minus undesirable answers, and the loss."""
        kl = self._kl(policy, answers, progress)
        scored = _joined([_scored(policy, _hidden(policy, batch), batch) for batch in self._tracked(answers, progress)])
        out = self._loss(scored, answers, kl)
        values = finish(out.metrics)
        gap = values.get("rewards/chosen", float("nan")) - values.get("rewards/rejected", float("nan"))
        return {"margin": gap, "loss": out.loss.item()}

    def _loss(self, scored: Scored, answers: Answers, kl: torch.Tensor | None) -> LossOutput:
        return unpaired_preference_loss(
            scored.logps,
            scored.advantages > 0,
            self.spec,
            ref_logps=scored.ref_logps,
            cu_seqlens=scored.cu_seqlens,
            kl=kl,
            normalizer=answers.groups,
        )

    def _tracked(self, answers: Answers, progress: Progress) -> Iterator[MicroBatch]:
        """The micro-batches to learn from; progress counts on from those of `_kl`."""
        return tracked(answers.batches, progress, before=len(answers.mismatched))

    def _kl(self, policy: Policy, answers: Answers, progress: Progress) -> torch.Tensor | None:
        if self.spec.baseline != "kl":
            return None
        parts = [
            mismatched_kl(policy.score(batch, temperature=1.0), batch.ref_logps, cu_seqlens=batch.cu_seqlens)
            for batch in tracked(answers.mismatched, progress, after=len(answers.batches))
        ]
        return sum(total for total, _ in parts) / sum(count for _, count in parts)


@dataclass(frozen=True)
class SupervisedTuning(Objective):
    """SFT: the mean of -log p over the answers' tokens; prompt tokens are context only."""

    kind: ClassVar[Kind] = "completions"

    def accumulate(
        self, learner: Learner, answers: Answers, progress: Progress = unseen
    ) -> tuple[torch.Tensor, list[Metrics]]:
        """As `Objective`; one pass over the head."""
        return accumulate_nll(learner.policy, answers, progress)

    @torch.no_grad()
    def measure(self, policy: Policy, answers: Answers, progress: Progress = unseen) -> dict[str, float]:
        """Loss and greedy accuracy, both per token."""
        nats, right = 0.0, 0
        rows = max(1, ARGMAX_ELEMENTS // policy.head.weight.shape[0])
        for batch in tracked(answers.batches, progress):
            hidden = policy.hidden(batch)
            nats -= policy.read(hidden, batch).double().sum().item()
            for states, targets in zip(hidden.split(rows), batch.targets.split(rows), strict=True):
                right += (policy.head.logits(states).argmax(-1) == targets).sum().item()
        return {"loss": nats / answers.tokens, "token_accuracy": right / answers.tokens}


def accumulate_nll(
    policy: Policy, answers: Answers, progress: Progress = unseen, *, coef: float = 1.0
) -> tuple[torch.Tensor, list[Metrics]]:
    """(coef times the mean of -log p over the answers' tokens, metrics); adds its gradient to the parameters'."""
    total, metrics = 0.0, []
    for batch in tracked(answers.batches, progress):
        weights = torch.full_like(batch.sampling_logps, coef / answers.tokens)
        out = _linear_loss(policy, policy.hidden(batch), batch, weights, entropy=True)
        out.loss.backward()
        total = total + out.loss.detach()
        metrics.append({"entropy": out.metrics["entropy"]})
    return total, metrics


@dataclass(frozen=True)
class RewardModelling(Objective):
    """A scalar head that learns which answer of a pair is better: `reward_model_loss`.

    Each answer of a group is compared with those of lower advantage, so K ranked answers are K (K - 1) / 2 pairs in one
    micro-batch, each weighted by one over their number: arXiv:2203.02155. Ties form no pair.
    """

    center_coef: float = 0.0
    kind: ClassVar[Kind] = "pairs"  # or ranked
    kinds: ClassVar[tuple[Kind, ...]] = ("pairs", "ranked")
    takes_margins: ClassVar[bool] = True
    takes_soft_labels: ClassVar[bool] = True

    def __post_init__(self) -> None:
        finite = 0 <= self.center_coef < math.inf
        require(finite, "RewardModelling", "center_coef", "a finite number of at least 0", self.center_coef)

    def accumulate(
        self, learner: Learner, answers: Answers, progress: Progress = unseen
    ) -> tuple[torch.Tensor, list[Metrics]]:
        """As `Objective`; the scores are read at the target that `fastrl.data.preferences.with_end` appends."""
        total, metrics = 0.0, []
        for batch in tracked(answers.batches, progress):
            out = self._loss(learner.policy.scores(batch), batch, answers)
            out.loss.backward()
            total = total + out.loss.detach()
            metrics.append(out.metrics)
        return total, metrics

    @torch.no_grad()
    def measure(self, model: ScalarModel, answers: Answers, progress: Progress = unseen) -> dict[str, float]:
        """Share of pairs whose better answer has the higher score (ties count half), margin and loss."""
        loss, right, wrong = 0.0, [], []
        for batch in tracked(answers.batches, progress):
            scores = model.scores(batch)
            out = self._loss(scores, batch, answers)
            loss += out.loss.item()
            right.append(out.metrics)
            wrong.append(self._loss(-scores, batch, answers).metrics)
        found = finish(merge(right))
        accuracy = (found["accuracy"] + 1 - finish(merge(wrong))["accuracy"]) / 2
        return {"accuracy": accuracy, "margin": found["margin"], "loss": loss}

    def _loss(self, scores: torch.Tensor, batch: MicroBatch, answers: Answers) -> LossOutput:
        better, worse = comparisons(batch)
        group_ids = batch.group_ids[better]
        return reward_model_loss(
            scores[better],
            scores[worse],
            **answers.of_pairs(group_ids),
            center_coef=self.center_coef,
            weights=1.0 / group_ids.bincount()[group_ids],
            normalizer=answers.groups,
        )


def comparisons(batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """(P,) indices of the better and of the worse sequence of each pair with unequal advantages in a group."""
    same = batch.group_ids[:, None] == batch.group_ids
    better, worse = (same & (batch.advantages[:, None] > batch.advantages)).nonzero().unbind(1)
    return better, worse


def objective_of(
    chosen: PreferenceLoss | PreferenceMix | UnpairedPreferenceLoss | Objective, *, threshold: float = 0.5
) -> Objective:
    """The objective that trains with that loss; `threshold` is the minimum reward of a good completion."""
    if isinstance(chosen, PreferenceLoss | PreferenceMix):
        return PairedPreference(chosen, threshold=threshold)
    if isinstance(chosen, UnpairedPreferenceLoss):
        return UnpairedPreference(chosen, threshold=threshold)
    return replace(chosen, threshold=threshold)


@torch.no_grad()
def _hidden(policy: Policy, batch: MicroBatch) -> torch.Tensor:
    return policy.hidden(batch)


def _scored(policy: Policy, hidden: torch.Tensor, batch: MicroBatch, weighs: bool = False) -> Scored:
    logps = policy.read(hidden, batch)
    squares = None
    if weighs:
        # At temperature 1/2 a token's log-probability is 2 z_t - log sum_v e^{2 z_v}, and log sum_v p_v^2 is
        # log sum_v e^{2 z_v} - 2 log sum_v e^{z_v}. This gives WPO's weights without a pass over probabilities.
        squares = 2 * logps - policy.read(hidden, batch, temperature=0.5)
    return Scored(logps, batch.cu_seqlens, batch.group_ids, batch.advantages, batch.ref_logps, squares)


def _joined(parts: Sequence[Scored]) -> Scored:
    """All parts joined into one, in order."""
    lengths = torch.cat([part.cu_seqlens.diff() for part in parts])
    columns = {name: [getattr(part, name) for part in parts] for name in Scored._fields if name != "cu_seqlens"}
    joined = {name: torch.cat(column) if column[0] is not None else None for name, column in columns.items()}
    return Scored(cu_seqlens=torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]), **joined)


def _accumulate(
    policy: Policy, batches: Iterable[MicroBatch], loss: Loss, weighs: bool = False
) -> tuple[torch.Tensor, list[Metrics]]:
    """(loss, metrics) of a loss that adds up over micro-batches; adds its gradient to the parameters'."""
    total, metrics = 0.0, []
    for batch in batches:
        hidden = policy.hidden(batch)
        out, gradient = _value_and_gradient(loss, _scored(policy, hidden.detach(), batch, weighs))
        _pull_back(policy, hidden, batch, gradient)
        total = total + out.loss
        metrics.append(out.metrics)
    return total, metrics


def _value_and_gradient(loss: Loss, scored: Scored) -> tuple[LossOutput, torch.Tensor]:
    """The loss at these log-probabilities and its derivatives with respect to them, (N,)."""
    logps = scored.logps.detach().requires_grad_()
    with torch.enable_grad():
        out = loss(scored._replace(logps=logps))
    (gradient,) = torch.autograd.grad(out.loss, logps)
    return LossOutput(out.loss.detach(), out.metrics), gradient


def _pull_back(policy: Policy, hidden: torch.Tensor, batch: MicroBatch, gradient: torch.Tensor) -> None:
    """Adds the parameters' gradient, given that of the log-probabilities; rows with gradient 0 cost nothing."""
    _linear_loss(policy, hidden, batch, -gradient, entropy=False).loss.backward()


def _linear_loss(
    policy: Policy, hidden: torch.Tensor, batch: MicroBatch, weights: torch.Tensor, *, entropy: bool
) -> LossOutput:
    """-sum_t weights_t log p_t; `weights` (N,) are constants."""
    head = policy.head
    return linear_policy_loss(
        hidden,
        head.weight,
        batch.targets,
        weights,
        SUM_OF_LOGPS,
        mask=batch.mask,
        normalizer=1.0,
        cu_seqlens=batch.cu_seqlens,
        main_grad=getattr(head.weight, "main_grad", None),
        entropy=entropy,
        metrics=entropy,
        backend=policy.backend,
        **head.options,
    )
