"""Builds the algorithm from a recipe's `algorithm`, `loss`, `advantages`, `masks` and `ppo`."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import fields, replace

from fastrl.algorithms import (
    ALGORITHMS,
    ActorCritic,
    Algorithm,
    GroupPolicyGradient,
    KLController,
    Schedule,
    TokenMasks,
)
from fastrl.algorithms.offline import Objective, objective_of
from fastrl.algorithms.policy_gradient import PolicyGradient
from fastrl.check import require
from fastrl.ops.group_advantages import GroupAdvantage
from fastrl.preference_spec import PreferenceMix
from fastrl.spec import KL, Clip, PolicyLoss, Reinforce
from fastrl.trainer.config import DataConfig, PolicyGradientConfig, PPOConfig, TrainConfig
from fastrl.typed import ConfigError, changed

OP = "TrainConfig"
MOVED = {  # keys of `loss` in older recipes
    "clip_low": "loss.surrogate.low",
    "clip_high": "loss.surrogate.high",
    "clip_dual": "loss.surrogate.dual",
    "kl_coef": "loss.kl.coef",
    "exponent": "loss.transform.exponent",
    "scale": "advantages.scale",
    "baseline": "advantages.baseline",
    "old_policy": "policy_gradient.ratio_to_sampler",
    "filter_zero_variance": "policy_gradient.filter_zero_variance",
    "mask_truncated": "policy_gradient.mask_truncated_completions",
}


def build_algorithm(config: TrainConfig) -> Algorithm:
    """The algorithm that `config.algorithm` names, with `config.loss` and its other settings applied.

    Raises:
        ValueError: the algorithm has no such factor, or cannot have that value.
    """
    gradient = ALGORITHMS[config.algorithm].kind == "rewarded"
    replays, expected = config.rollout.replay_support, "false, except for policy gradients on rollouts"
    require(not replays or (gradient and not config.offline), OP, "rollout.replay_support", expected, replays)
    auto = config.backend == "auto" or not replays
    require(auto, OP, "backend", "auto with rollout.replay_support", config.backend)
    if gradient:
        return _policy_gradient(config)
    other = {"ppo": PPOConfig(), "masks": TokenMasks(), "policy_gradient": PolicyGradientConfig(), "advantages": {}}
    for name, default in other.items():
        expected = f"its defaults, as {config.algorithm} is not a policy gradient"
        require(getattr(config, name) == default, OP, name, expected, "a value")
    objective = build_objective(config)
    _require_fits(config, objective)
    return objective


def _require_fits(config: TrainConfig, objective: Objective) -> None:
    """Refuses settings that do not apply to a loss on answers.

    Raises:
        ValueError: one is set.
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
    require(not unused, OP, "reference", f"nothing for {name}, which needs no reference", config.reference)


def _require_known(config: TrainConfig, known: Iterable[str]) -> None:
    """Refuses keys of `loss` that the algorithm's loss does not have."""
    for key, value in config.loss.items():
        if key not in known and key in MOVED:
            raise ConfigError(f"{OP}: loss.{key}: it is called {MOVED[key]!r} now.")
        expected = f"nothing for {config.algorithm}, which has {', '.join(known) or 'no factors'}"
        require(key in known, OP, f"loss.{key}", expected, value)


def _policy_gradient(config: TrainConfig) -> PolicyGradient:
    """The preset with `config.loss` and `config.advantages` applied, and for PPO `config.ppo`."""
    entry = ALGORITHMS[config.algorithm]
    spec, estimator = _policy_loss(config), entry.estimator
    if isinstance(estimator, GroupAdvantage):
        estimator = changed(estimator, config.advantages, f"{OP}: advantages")
    else:
        expected = f"nothing with {config.algorithm}, which has its own"
        require(not config.advantages, OP, "advantages", expected, config.advantages)
    if estimator is None:
        do = "Its values and the KL in its reward are computed with the policy that sampled."
        require(not config.offline, OP, "source", "rollouts for ppo", config.source, do)
        return _actor_critic(config, spec)
    own = PPOConfig()
    require(config.ppo == own, OP, "ppo", f"its defaults, as {config.algorithm} has no critic", config.ppo)
    weights = tuple(reward.weight for reward in config.rewards)
    asked = config.policy_gradient.ratio_to_sampler
    ratio = asked is None or not isinstance(spec.surrogate, Reinforce)
    expected = f"null with {config.algorithm}, whose loss has no ratio"
    require(ratio, OP, "policy_gradient.ratio_to_sampler", expected, asked)
    if config.offline:
        _require_on_policy_only(config, spec)
    algorithm = GroupPolicyGradient(
        spec,
        estimator,
        config.rollout.max_new_tokens,
        weights,
        config.environment.discount if config.environment.credit == "turn" else None,
        masks=config.masks,
        ratio_to_sampler=_ratio_to_sampler(config, spec),
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
    """Refuses one completion per prompt if completions of a prompt are compared.

    Raises:
        ValueError: nothing would be learned.
    """
    size, do = config.rollout.group_size, "With one completion there is nothing to compare and nothing to learn."
    enough, expected = alone or config.offline or size > 1, f"2 or more for {config.algorithm}"
    require(enough, OP, "rollout.group_size", expected, size, do)


def _require_on_policy_only(config: TrainConfig, spec: PolicyLoss) -> None:
    """Refuses settings that read the sampler's log-probabilities, which pre-written completions do not have.

    Raises:
        ValueError: one is set.
    """
    do = f"A file of completions has none for {config.algorithm}."
    reads = {
        "loss.correction": spec.correction is not None,
        "policy_gradient.ratio_to_sampler": _asks_sampler(config),
        "masks": config.masks.reads_sampler,
    }
    for name, asked in reads.items():
        require(not asked, OP, name, "nothing that compares with the sampler's log-probabilities", "that", do)


def _asks_sampler(config: TrainConfig) -> bool:
    asked, entry = config.policy_gradient.ratio_to_sampler, ALGORITHMS[config.algorithm]
    stale = config.source == "ahead" and not _corrects(config)
    return (entry.ratio_to_sampler or stale) if asked is None else asked


def _corrects(config: TrainConfig) -> bool:
    """Whether the recipe corrects for a sampler that differs from the old policy, apart from the ratio."""
    return config.loss.get("correction") is not None or config.masks.reads_sampler


def _require_corrects_staleness(config: TrainConfig, spec: PolicyLoss, ratio_to_sampler: bool) -> None:
    """Refuses losses that take completions of older weights for the policy's own.

    Raises:
        ValueError: nothing in the loss compares with the sampler's log-probabilities.
    """
    fresh = config.source != "ahead" or config.ahead.max_staleness == 0
    compares = spec.correction is not None or config.masks.reads_sampler
    compares |= ratio_to_sampler and not isinstance(spec.surrogate, Reinforce)
    do = "Leave policy_gradient.ratio_to_sampler out, or set loss.correction; without a ratio, use source: rollouts."
    expected = (
        f"a loss that corrects for older weights, as source: ahead samples with them: {config.algorithm} does not"
    )
    require(fresh or compares, OP, "source", expected, config.source, do)


def _ratio_to_sampler(config: TrainConfig, spec: PolicyLoss) -> bool:
    """Whether the ratio is to the sampler's log-probabilities.

    Raises:
        ValueError: the loss also corrects for the mismatch, something reads log-probabilities of a reshaped
            distribution, or KL-Cov has no effect.
    """
    rollout, ratio_to_sampler = config.rollout, _asks_sampler(config)
    expected = "nothing with policy_gradient.ratio_to_sampler: the mismatch is in the ratio"
    require(spec.correction is None or not ratio_to_sampler, OP, "loss.correction", expected, spec.correction)
    corrected = spec.correction is not None
    reads, reshaped = ratio_to_sampler or config.masks.reads_sampler or corrected, rollout.reshaped
    expected = "its default where training reads the sampler's log-probabilities: it would reshape them"
    do = "Leave loss.correction out." if corrected else "Leave masks.off_policy and masks.total_variation out."
    do = "Set policy_gradient.ratio_to_sampler to false." if ratio_to_sampler else do
    do += " Or set rollout.replay_support." if reshaped.keys() <= {"top_p", "top_k", "min_p"} else ""
    names, got = ", ".join(f"rollout.{name}" for name in reshaped), ", ".join(map(str, reshaped.values()))
    require(not (reads and reshaped), OP, names, expected, got, do)
    optimizer = config.optimizer
    updates = optimizer.steps_per_rollout * optimizer.epochs_per_rollout
    moves = config.masks.kl_cov is None or updates > 1 or ratio_to_sampler
    expected = "more than 1 optimizer step per rollout: before the first, the policy is still the old one"
    require(moves, OP, "masks.kl_cov", expected, updates)
    _require_corrects_staleness(config, spec, ratio_to_sampler)
    return ratio_to_sampler


def _actor_critic(config: TrainConfig, spec: PolicyLoss) -> ActorCritic:
    ppo = config.ppo
    whole, name = not config.policy_gradient.filter_zero_variance, "policy_gradient.filter_zero_variance"
    require(whole, OP, name, "False: a critic learns from equal rewards too", True)
    require(spec.kl is None, OP, "loss.kl", "nothing: PPO's KL is in the reward, ppo.kl_coef", spec.kl)
    finite = ppo.critic_lr is None or 0 <= ppo.critic_lr < math.inf
    require(finite, OP, "ppo.critic_lr", "0 or more, and finite, or null", ppo.critic_lr)
    own = ppo.critic != "shared" or not ppo.critic_model
    require(own, OP, "ppo.critic_model", "none for a critic that shares the policy's backbone", ppo.critic_model)
    warm = ppo.critic_warmup == 0 or (ppo.critic == "separate" and 0 < ppo.critic_warmup < config.steps)
    expected = "0, or with a separate critic fewer than steps"
    require(warm, OP, "ppo.critic_warmup", expected, ppo.critic_warmup)
    if ppo.critic == "none":
        of_critic = ("critic_model", "critic_lr", "lam", "lam_policy", "length_alpha", "value_coef", "value_clip")
        set_ = [name for name in of_critic if getattr(ppo, name) != getattr(PPOConfig, name)]
        require(not set_, OP, f"ppo.{', ppo.'.join(set_)}", "left out without a critic", "a value")
    require(0 <= ppo.ptx_coef < math.inf, OP, "ppo.ptx_coef", "0 or more, and finite", ppo.ptx_coef)
    given = ppo.ptx_coef == 0 or config.data != DataConfig()
    require(given, OP, "data", "the rows that ppo.ptx_coef weighs", "none", "Set data.source.")
    unpaired = not (config.data.unpair or config.data.ranked)
    require(unpaired, OP, "data.unpair, data.ranked", "false: ppo.ptx_coef reads demonstrations or text", True)
    controller = KLController(ppo.kl_coef, ppo.kl_target, ppo.kl_horizon)
    names = ("gamma", "lam", "lam_policy", "length_alpha", "positive_nll", "value_coef", "value_clip", "whiten")
    factors = {name: getattr(ppo, name) for name in names}
    factors |= {"critic": ppo.critic != "none", "masks": config.masks, "by_turn": config.environment.credit == "turn"}
    discount, do = config.environment.discount, "PPO has ppo.gamma."
    require(discount == 1.0, OP, "environment.discount", f"1 with {config.algorithm}", discount, do)
    factors["ratio_to_sampler"] = _ratio_to_sampler(config, spec)
    return ActorCritic(spec, controller, **factors, schedule=_schedule(config))


def _schedule(config: TrainConfig) -> Schedule:
    return Schedule(
        updates=config.optimizer.steps_per_rollout,
        epochs=config.optimizer.epochs_per_rollout,
        mask_truncated=config.policy_gradient.mask_truncated_completions,
        filter_zero_variance=config.policy_gradient.filter_zero_variance,
        critic_warmup=config.ppo.critic_warmup,
    )


def _policy_loss(config: TrainConfig) -> PolicyLoss:
    """The preset with `config.loss` applied, and without a KL unless `config.loss` names it."""
    entry, changes = ALGORITHMS[config.algorithm], config.loss
    spec, where = entry.without_kl(), f"{OP}: loss"
    _require_known(config, [one.name for one in fields(spec) if one.init])
    if changes.get("kl") is not None:
        spec = replace(spec, kl=entry.spec.kl or KL("k3", 0.04))
    spec = changed(spec, changes, where)
    low = getattr(spec.surrogate, "low", 0.0) if isinstance(spec.surrogate, Clip) else 0.0
    require(low <= 1.0, OP, "loss.surrogate.low", "at most 1: a ratio is never below 0", low)
    return spec


def build_objective(config: TrainConfig) -> Objective:
    """The algorithm's preset with `config.loss` applied.

    In a mix, a change applies to every term that has the field; `weights` are in the preset's order.

    Raises:
        ValueError: the algorithm has no such factor, or cannot have that value.
    """
    preset, changes, where = ALGORITHMS[config.algorithm].spec, dict(config.loss), f"{OP}: loss"
    mix = isinstance(preset, PreferenceMix)
    weights, terms = zip(*preset.terms, strict=True) if mix else ((), (preset,))
    own = [[one.name for one in fields(term) if one.name != "threshold"] for term in terms]
    _require_known(config, [*dict.fromkeys(name for names in own for name in names), *(["weights"] if mix else [])])
    weights = changes.pop("weights", weights)
    listed = not mix or (isinstance(weights, list | tuple) and len(weights) == len(terms))
    require(listed, OP, "loss.weights", f"a list of {len(terms)} weights", weights)
    terms = [
        changed(term, {name: changes[name] for name in names if name in changes}, where)
        for term, names in zip(terms, own, strict=True)
    ]
    spec = PreferenceMix(tuple(zip(weights, terms, strict=True))) if mix else terms[0]
    return objective_of(spec, threshold=config.rollout.threshold)
