"""From a recipe's `algorithm`, `loss`, `masks` and `ppo` to the algorithm that trains."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from typing import Any

from fastrl.advantages import GroupAdvantage
from fastrl.algorithms import (
    ALGORITHMS,
    TO_SAMPLER,
    ActorCritic,
    Algorithm,
    GroupPolicyGradient,
    KLController,
    Schedule,
    TokenMasks,
)
from fastrl.algorithms.offline import OFFLINE, Objective, objective_of
from fastrl.algorithms.policy_gradient import PolicyGradient
from fastrl.check import require
from fastrl.losses import presets
from fastrl.preference_spec import JensenShannon, LogOdds, Power, PreferenceLoss, PreferenceMix
from fastrl.spec import KL, Clip, PolicyLoss, Reinforce
from fastrl.trainer.config import LossConfig, PPOConfig, TrainConfig

OP = "TrainConfig"
TRANSFORMS = {"power": Power, "jensen_shannon": JensenShannon, "log_odds": LogOdds}
POLICY_FACTORS = (
    "ratio", "clip_low", "clip_high", "clip_dual", "old_policy", "kl", "kl_coef", "aggregate", "entropy_coef",
    "baseline", "scale", "correction", "filter_zero_variance", "mask_truncated",
)  # fmt: skip


def build_algorithm(config: TrainConfig) -> Algorithm:
    """What `config.algorithm` names, with the overrides of `config.loss` and whatever else the algorithm reads.

    Raises:
        ValueError: the algorithm has no such factor, or cannot have that value.
    """
    if config.algorithm in ALGORITHMS or config.algorithm == "ppo":
        for name, value in _given(config.loss).items():
            expected = f"nothing for {config.algorithm}, which has {', '.join(POLICY_FACTORS)}"
            require(name in POLICY_FACTORS, OP, f"loss.{name}", expected, value)
        return _policy_gradient(config)
    for name, default in (("ppo", PPOConfig()), ("masks", TokenMasks())):
        expected = f"its defaults, as {config.algorithm} is no policy gradient"
        require(getattr(config, name) == default, OP, name, expected, "a value")
    objective = build_objective(config)
    _require_fits(config, objective)
    return objective


def _require_fits(config: TrainConfig, objective: Objective) -> None:
    """Refuses settings that have no meaning for a loss on answers.

    Raises:
        ValueError: there is one.
    """
    name, data = config.algorithm, config.data
    for field in ("steps_per_rollout", "epochs_per_rollout"):
        value, do = getattr(config.optimizer, field), "Set rows_per_step, or rollout.prompts_per_step."
        require(value == 1, OP, f"optimizer.{field}", f"1: {name} takes one optimizer step on a batch", value, do)
    _require_groups(config, alone=objective.kind != "pairs")
    whole = name != "reward_model" or config.adapter.rank == 0
    require(whole, OP, "adapter.rank", "0 for reward_model, whose head is new", config.adapter.rank)
    written = name != "reward_model" or config.offline
    require(written, OP, "source", "offline for reward_model, which samples nothing", config.source)
    plain = config.rollout.dynamic_sampling == 0 or not config.offline
    require(plain, OP, "rollout.dynamic_sampling", "0 for written rows", config.rollout.dynamic_sampling)
    labelled = objective.kind == "labelled" or not data.unpair
    require(labelled, OP, "data.unpair", f"false for {name}, whose rows are {objective.kind}", True)
    ranked = name == "reward_model" or not data.ranked
    require(ranked, OP, "data.ranked", f"false for {name}; only reward_model compares several", True)
    columns = {
        "margin_column": (data.margin_column, objective.takes_margins),
        "soft_label_column": (data.soft_label_column, objective.takes_soft_labels),
    }
    loss = "ranked rows" if data.ranked else f"{name} with this loss"
    for field, (column, taken) in columns.items():
        allowed = not column or (taken and not data.ranked)
        require(allowed, OP, f"data.{field}", f"nothing for {loss}", repr(column))
    unused = config.reference and not objective.needs_ref
    require(not unused, OP, "reference", f"nothing for {name}, which compares with none", config.reference)


def _given(loss: LossConfig) -> dict[str, Any]:
    """The factors that a recipe sets."""
    return {name: value for name, value in vars(loss).items() if value != getattr(LossConfig, name)}


def _policy_gradient(config: TrainConfig) -> PolicyGradient:
    """The preset with the overrides of `config.loss`, and of `config.ppo` for PPO.

    A preset's KL term is left out unless `loss.kl_coef` or `loss.kl` asks for it: the reference model doubles the
    memory of the weights, and most recipes of today train without it (TRL's default is beta = 0).
    """
    estimator, spec = ALGORITHMS.get(config.algorithm, (None, presets.PPO))
    loss = config.loss
    if not isinstance(estimator, GroupAdvantage):
        fixed, name = loss.baseline is None and loss.scale is None, "loss.baseline, loss.scale"
        require(fixed, OP, name, f"None with {config.algorithm}, which has its own", "a value")
    else:
        estimator = replace(
            estimator, baseline=loss.baseline or estimator.baseline, scale=loss.scale or estimator.scale
        )
    changes: dict[str, Any] = {
        name: value
        for name in ("ratio", "aggregate", "entropy_coef", "correction")
        if (value := getattr(loss, name)) is not None
    }
    clip = {"low": loss.clip_low, "high": loss.clip_high, "dual": loss.clip_dual}
    clip = {name: value for name, value in clip.items() if value is not None}
    low = loss.clip_low is None or loss.clip_low <= 1.0
    require(low, OP, "loss.clip_low", "at most 1: a ratio is never below 0", loss.clip_low)
    if clip:
        require(
            isinstance(spec.surrogate, Clip),
            OP,
            "loss.clip_low, loss.clip_high, loss.clip_dual",
            "an algorithm with a Clip surrogate",
            config.algorithm,
        )
        changes["surrogate"] = replace(spec.surrogate, **clip)
    changes["kl"] = _kl(loss, spec)
    spec = replace(spec, **changes)
    if estimator is None:
        do = "The KL in its reward and its values are of the policy that sampled."
        require(not config.offline, OP, "source", "rollouts for ppo", config.source, do)
        return _actor_critic(config, spec)
    own = PPOConfig()
    require(config.ppo == own, OP, "ppo", f"its defaults, as {config.algorithm} has no critic", config.ppo)
    weights = tuple(reward.weight for reward in config.rewards)
    ratio = loss.old_policy is None or not isinstance(spec.surrogate, Reinforce)
    expected = f"nothing with {config.algorithm}, whose loss has no ratio"
    require(ratio, OP, "loss.old_policy", expected, loss.old_policy)
    if config.offline:
        _require_on_policy_only(config, spec)
    algorithm = GroupPolicyGradient(
        spec,
        estimator,
        config.rollout.max_new_tokens,
        weights,
        masks=config.masks,
        to_sampler=_to_sampler(config),
        schedule=_schedule(config),
        sampled=not config.offline,
    )
    compares = not algorithm.needs_greedy and getattr(estimator, "baseline", "mean") != "none"
    _require_groups(config, alone=not compares)
    equal_rewards_teach = algorithm.needs_greedy and config.rollout.dynamic_sampling > 0
    expected = f"0 with {config.algorithm}, which learns from equal rewards too"
    require(not equal_rewards_teach, OP, "rollout.dynamic_sampling", expected, config.rollout.dynamic_sampling)
    return algorithm


def _require_groups(config: TrainConfig, *, alone: bool) -> None:
    """Refuses one completion a prompt where completions of a prompt are compared.

    Raises:
        ValueError: it would teach nothing.
    """
    size, do = config.rollout.group_size, "One completion is compared with no other: nothing would be learned."
    enough, expected = alone or config.offline or size > 1, f"2 or more for {config.algorithm}"
    require(enough, OP, "rollout.group_size", expected, size, do)


def _require_on_policy_only(config: TrainConfig, spec: PolicyLoss) -> None:
    """Refuses what reads the sampler's log-probabilities, which written completions do not have.

    Raises:
        ValueError: the algorithm compares with them.
    """
    do = f"A file of completions has none for {config.algorithm}."
    reads = {
        "loss.correction": spec.correction is not None,
        "loss.old_policy": (config.loss.old_policy or ("sampler" if config.algorithm in TO_SAMPLER else ""))
        == "sampler",
        "masks": config.masks.reads_sampler,
    }
    for name, asked in reads.items():
        require(not asked, OP, name, "nothing that compares with the sampler's log-probabilities", "that", do)


def _to_sampler(config: TrainConfig) -> bool:
    """Whether the ratio is to the sampler's log-probabilities.

    Raises:
        ValueError: something compares with them that must not, or with those of a truncated distribution.
    """
    loss, rollout = config.loss, config.rollout
    default = "sampler" if config.algorithm in TO_SAMPLER else "trainer"
    to_sampler = (loss.old_policy or default) == "sampler"
    op, once = OP, loss.correction is None or not to_sampler
    expected = "nothing where loss.old_policy is the sampler, whose mismatch is in the ratio"
    require(once, op, "loss.correction", expected, loss.correction)
    whole, reads = rollout.top_p == 1.0 and rollout.top_k == 0, to_sampler or config.masks.reads_sampler
    expected = "1 and 0 where the sampler's log-probabilities are compared with: they are of what was cut"
    do = "Set loss.old_policy to trainer." if to_sampler else "Leave masks.off_policy and masks.total_variation out."
    got = f"{rollout.top_p} and {rollout.top_k}"
    require(whole or not reads, op, "rollout.top_p, rollout.top_k", expected, got, do)
    optimizer = config.optimizer
    updates = optimizer.steps_per_rollout * optimizer.epochs_per_rollout
    moves = config.masks.kl_cov is None or updates > 1 or to_sampler
    expected = "more than 1 optimizer step per rollout: before the first one no token is away from the old policy"
    require(moves, op, "masks.kl_cov", expected, updates)
    return to_sampler


def _actor_critic(config: TrainConfig, spec: PolicyLoss) -> ActorCritic:
    loss, ppo = config.loss, config.ppo
    whole = not loss.filter_zero_variance
    require(whole, OP, "loss.filter_zero_variance", "False: a critic learns from equal rewards too", True)
    require(spec.kl is None, OP, "loss.kl", "none: PPO's KL is in the reward, ppo.kl_coef", loss.kl)
    finite = 0 <= ppo.critic_lr < math.inf
    require(finite, OP, "ppo.critic_lr", "0 or more, and finite", ppo.critic_lr)
    own = ppo.critic != "shared" or not ppo.critic_model
    require(own, OP, "ppo.critic_model", "none for a critic that shares the policy's trunk", ppo.critic_model)
    warm = ppo.critic_warmup == 0 or (ppo.critic == "separate" and 0 < ppo.critic_warmup < config.steps)
    expected = "0, or with a separate critic fewer than steps"
    require(warm, OP, "ppo.critic_warmup", expected, ppo.critic_warmup)
    if ppo.critic == "none":
        of_critic = ("critic_model", "critic_lr", "lam", "lam_policy", "length_alpha", "value_coef", "value_clip")
        set_ = [name for name in of_critic if getattr(ppo, name) != getattr(PPOConfig, name)]
        require(not set_, OP, f"ppo.{', ppo.'.join(set_)}", "left out without a critic", "a value")
    controller = KLController(ppo.kl_coef, ppo.kl_target, ppo.kl_horizon)
    names = ("gamma", "lam", "lam_policy", "length_alpha", "positive_nll", "value_coef", "value_clip", "whiten")
    factors = {name: getattr(ppo, name) for name in names}
    factors |= {"critic": ppo.critic != "none", "masks": config.masks, "to_sampler": _to_sampler(config)}
    return ActorCritic(spec, controller, **factors, schedule=_schedule(config))


def _schedule(config: TrainConfig) -> Schedule:
    return Schedule(
        updates=config.optimizer.steps_per_rollout,
        epochs=config.optimizer.epochs_per_rollout,
        mask_truncated=config.loss.mask_truncated,
        filter_zero_variance=config.loss.filter_zero_variance,
        critic_warmup=config.ppo.critic_warmup,
    )


def _kl(loss: LossConfig, spec: PolicyLoss) -> KL | None:
    if loss.kl == "none" or not (loss.kl or loss.kl_coef):
        return None
    default = spec.kl or KL("k3", 0.04)
    coef = default.coef if loss.kl_coef is None else loss.kl_coef
    return KL(loss.kl or default.kind, coef) if coef else None


def build_objective(config: TrainConfig) -> Objective:
    """The algorithm's preset with the overrides of `config.loss`.

    Raises:
        ValueError: the algorithm has no such factor, or cannot have that value.
    """
    preset = OFFLINE[config.algorithm]
    given = _given(config.loss)
    mix = isinstance(preset, PreferenceMix)
    terms = [term for _, term in preset.terms] if mix else [preset]
    known = {name for term in terms for name in _settable(term)} | ({"weights"} if mix else set())
    has = ", ".join(name for name in vars(config.loss) if name in known) or "no factors"
    for name, value in given.items():
        expected = f"nothing for {config.algorithm}, which has {has}"
        require(name in known, OP, f"loss.{name}", expected, value)
    terms = [_changed(term, {name: given[name] for name in _settable(term) if name in given}) for term in terms]
    if not mix:
        return objective_of(*terms, threshold=config.rollout.threshold)
    weights = given.get("weights", tuple(weight for weight, _ in preset.terms))
    require(len(weights) == len(terms), OP, "loss.weights", f"{len(terms)} weights", weights)
    mixed = PreferenceMix(tuple(zip(weights, terms, strict=True)))
    return objective_of(mixed, threshold=config.rollout.threshold)


def _settable(term: Any) -> list[str]:
    """The names in `LossConfig` of a term's factors."""
    return [f.name for f in fields(term) if f.name != "threshold"] + (
        ["exponent"] if isinstance(term, PreferenceLoss) else []
    )


def _changed(term: Any, given: dict[str, Any]) -> Any:
    """The term with these factors; of a transform a recipe gives the name and the exponent apart."""
    name, exponent = given.pop("transform", None), given.pop("exponent", None)
    if name or exponent is not None:
        kind = TRANSFORMS[name] if name else type(term.transform)
        power = kind is Power or exponent is None
        require(power, OP, "loss.exponent", f"nothing for {kind.__name__}", exponent)
        given["transform"] = kind() if exponent is None else Power(exponent)
    return replace(term, **given)
