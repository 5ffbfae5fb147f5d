"""veRL: policy losses, advantage estimators and a fused head, loaded by `VERL_USE_EXTERNAL_MODULES`.

Importing this module registers the losses and the estimators under names that start with `fastrl_`; veRL's own keep
theirs. `serve_fused_kernels` replaces the head, and only if it is called. Read in the source of verl 0.9.1.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import MISSING, fields, is_dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch

from fastrl import advantages, check
from fastrl.integrations.handle import Handle, check_version
from fastrl.integrations.host_loss import weighted_policy_loss
from fastrl.losses.metrics import finish
from fastrl.losses.presets import PRESETS
from fastrl.ops.group_advantages import group_advantages
from fastrl.ops.linear_logprob import check_head, choose_save, linear_logprob, needs_grad
from fastrl.ops.vocabulary_parallel import ranks_of, shared_refusals, vocabulary_parallel_logprob
from fastrl.spec import Cispo, Clip, Dppo, Gmpo, PolicyLoss, Sapo

HOST = "fastrl.integrations.verl"
# ScaleRL differs from CISPO by its mean over prompts, and veRL's aggregation knows no prompts.
LOSSES = {f"fastrl_{name.lower()}": spec for name, spec in PRESETS.items() if name != "SCALE_RL"}
# Values of veRL's actor configuration that count as not set, if it is no dataclass that says so itself.
DEFAULTS = {
    "clip_ratio": 0.2,
    "clip_ratio_low": 0.2,
    "clip_ratio_high": 0.2,
    "clip_ratio_c": 3.0,
    "tau_pos": 1.0,
    "tau_neg": 1.05,
}

PolicyLossFunction = Callable[..., tuple[torch.Tensor, dict[str, Any]]]
Pair = tuple[torch.Tensor, torch.Tensor]


# Policy losses.


def register_loss(name: str, spec: PolicyLoss) -> None:
    """Registers a loss with veRL, for `actor.policy_loss.loss_mode`. The spec is used as it is.

    veRL has its own settings for the aggregation, the KL and entropy terms and the correction: a spec with one of the
    last three is refused, and its `aggregate` is not read.

    Raises:
        ValueError: the spec has a `kl`, an `entropy_coef` or a `correction`.
    """
    theirs = {"kl": "use_kl_loss", "entropy_coef": "entropy_coeff", "correction": "algorithm.rollout_correction"}
    for field, setting in theirs.items():
        do = f"veRL adds it: set {setting}."
        check.require(not getattr(spec, field), f"{HOST}: {name}", field, "none", getattr(spec, field), do)
    _register(name, spec, from_config=False)


def _register(name: str, spec: PolicyLoss, *, from_config: bool) -> None:
    from verl.trainer.ppo.core_algos import register_policy_loss

    register_policy_loss(name)(_loss(name, spec, from_config=from_config))


def _loss(name: str, spec: PolicyLoss, *, from_config: bool) -> PolicyLossFunction:
    """The loss under veRL's signature."""

    def policy_loss(
        old_log_prob: torch.Tensor,
        log_prob: torch.Tensor,
        advantages: torch.Tensor,
        response_mask: torch.Tensor,
        loss_agg_mode: str = "token-mean",
        config: Any = None,
        rollout_is_weights: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        check.require(config is not None, name, "config", "veRL's actor configuration", None)
        used = configured(spec, config) if from_config else spec
        mask = response_mask.bool()
        weights = aggregation_weights(mask, loss_agg_mode, config.global_batch_info)
        if rollout_is_weights is not None:
            weights = weights * rollout_is_weights.detach()
        out = weighted_policy_loss(name, log_prob, advantages, used, weights, mask=mask, old_logps=old_log_prob)
        log_ratio = (log_prob - old_log_prob).detach().float()
        return out.loss, _metrics(out.metrics, used, log_ratio, advantages, mask)

    policy_loss.__name__ = name
    return policy_loss


def aggregation_weights(mask: torch.Tensor, loss_agg_mode: str, global_batch_info: dict[str, Any]) -> torch.Tensor:
    """The weight of each token in veRL's `agg_loss`, (B, T) float32.

    `agg_loss` is linear in the tokens' losses, so its gradient is their weights: whatever it divides by, on this rank
    and over the global batch, is in them.
    """
    from verl.trainer.ppo.core_algos import agg_loss

    with torch.enable_grad():
        point = torch.zeros(mask.shape, device=mask.device, requires_grad=True)
        total = agg_loss(loss_mat=point, loss_mask=mask, loss_agg_mode=loss_agg_mode, **global_batch_info)
        (weights,) = torch.autograd.grad(total, point)
    return weights


def configured(spec: PolicyLoss, config: Any) -> PolicyLoss:
    """A preset with the bounds that veRL's actor configuration sets, and without the terms that veRL adds itself.

    | surrogate | reads                                                                              |
    |-----------|------------------------------------------------------------------------------------|
    | `Clip`    | `clip_ratio_low`, `clip_ratio_high`, `clip_ratio_c` as `dual`                      |
    | `Cispo`   | 1 - `clip_ratio_low` and 1 + `clip_ratio_high`: veRL's are distances from a ratio of 1 |
    | `Dppo`, `Gmpo` | `clip_ratio_low`, `clip_ratio_high`                                           |
    | `Sapo`    | `tau_pos`, `tau_neg`                                                               |

    A setting at veRL's default, such as a `clip_ratio_high` of 0.2, is not set: the preset's value holds. Where a bound
    is None, `clip_ratio` stands for it.
    """
    found: dict[str, float | None] = {}
    surrogate = spec.surrogate
    low, high = _set(config, "clip_ratio_low"), _set(config, "clip_ratio_high")
    if isinstance(surrogate, Cispo):
        found = {
            "ratio_min": None if low is None else max(0.0, 1.0 - low),
            "ratio_max": None if high is None else 1.0 + high,
        }
    elif isinstance(surrogate, Sapo):
        found = {"tau_pos": _set(config, "tau_pos"), "tau_neg": _set(config, "tau_neg")}
    elif isinstance(surrogate, (Clip, Dppo, Gmpo)):
        found = {"low": low, "high": high}
        if isinstance(surrogate, Clip):
            found["dual"] = _set(config, "clip_ratio_c")
    surrogate = replace(surrogate, **{name: value for name, value in found.items() if value is not None})
    return replace(spec, surrogate=surrogate, kl=None, entropy_coef=0.0, correction=None)


def _set(config: Any, name: str) -> float | None:
    """A setting that differs from veRL's default, else None."""
    value = config.get(name)
    if value is None:
        return _set(config, "clip_ratio") if name in ("clip_ratio_low", "clip_ratio_high") else None
    own = {one.name: one.default for one in fields(config)} if is_dataclass(config) else {}
    default = own.get(name, MISSING)
    return None if value == (DEFAULTS[name] if default is MISSING else default) else float(value)


def _metrics(
    metrics: dict[str, Any], spec: PolicyLoss, log_ratio: torch.Tensor, advantages: torch.Tensor, mask: torch.Tensor
) -> dict[str, float]:
    """veRL's three metrics of a policy loss: tokens clipped by a bound, by the dual bound, and the k1 estimate."""
    log_ratio = torch.where(mask, log_ratio.clamp(-20, 20), 0)
    count = mask.sum()
    rows = {"actor/ppo_kl": (-log_ratio.sum(), count)}
    none = torch.zeros_like(log_ratio).sum()
    clipped = sum((metrics[one][0] for one in ("clip_ratio/low_mean", "clip_ratio/high_mean") if one in metrics), none)
    dual = getattr(spec.surrogate, "dual", None)
    beyond = none
    if dual is not None:
        per_row = log_ratio if spec.ratio == "token" else log_ratio.sum(-1, keepdim=True) / mask.sum(-1, keepdim=True)
        beyond = (mask & (advantages < 0) & (per_row.exp() > dual)).sum()
    rows |= {"actor/pg_clipfrac": (clipped - beyond, count), "actor/pg_clipfrac_lower": (beyond, count)}
    return dict.fromkeys(rows, 0.0) | finish(rows)


# Advantage estimators.


def _groups(name: str, index: Any, device: torch.device) -> torch.Tensor:
    """The uids of the prompts as integers, (B,) int64."""
    check.require(index is not None, name, "index", "the uid of each prompt", None, "Fill the batch's 'uid'.")
    numbers: dict[Any, int] = {}
    return torch.tensor([numbers.setdefault(uid, len(numbers)) for uid in index], device=device)


def _estimator(name: str, of_scores: Callable[..., torch.Tensor]) -> Callable[..., Pair]:
    """An estimator of one number per completion under veRL's signature."""

    def compute(
        token_level_rewards: torch.Tensor, response_mask: torch.Tensor, config: Any = None, **others: Any
    ) -> Pair:
        scores, mask = token_level_rewards.detach().float().sum(-1), response_mask.bool()
        values = of_scores(name, scores, mask, config, **others)
        spread = torch.where(mask, values[:, None], 0.0)  # (B, T)
        return spread, spread

    compute.__name__ = name
    return compute


def _grpo(
    name: str, scores: torch.Tensor, mask: torch.Tensor, config: Any, index: Any = None, **_: Any
) -> torch.Tensor:
    divide = config is None or config.get("norm_adv_by_std_in_grpo", True)
    return group_advantages(scores, group_ids=_groups(name, index, scores.device), scale="group" if divide else "none")


def _of_group(estimate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def of_scores(
        name: str, scores: torch.Tensor, mask: torch.Tensor, config: Any, index: Any = None, **_: Any
    ) -> torch.Tensor:
        return estimate(scores, group_ids=_groups(name, index, scores.device))

    return of_scores


def _of_lengths(estimate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def of_scores(
        name: str, scores: torch.Tensor, mask: torch.Tensor, config: Any, index: Any = None, **_: Any
    ) -> torch.Tensor:
        return estimate(scores, mask.sum(-1), group_ids=_groups(name, index, scores.device))

    return of_scores


def reinforce_pp(token_level_rewards: torch.Tensor, response_mask: torch.Tensor, config: Any = None, **_: Any) -> Pair:
    """REINFORCE++ under veRL's signature: whitened rewards-to-go, and the rewards-to-go, (B, T) float32."""
    mask, gamma = response_mask.bool(), 1.0 if config is None else config.get("gamma", 1.0)
    returns = advantages.discounted_returns(token_level_rewards.detach().float(), mask, gamma=gamma)
    return advantages.whiten(returns, mask), returns


ESTIMATORS: dict[str, Callable[..., Pair]] = {
    name: _estimator(name, of_scores)
    for name, of_scores in {
        "fastrl_grpo": _grpo,
        "fastrl_dr_grpo": _of_group(advantages.DR_GRPO),
        "fastrl_rloo": _of_group(advantages.RLOO),
        "fastrl_scale_rl": _of_group(advantages.SCALE_RL),
        "fastrl_max_rl": _of_group(advantages.max_rl),
        "fastrl_pass_at_k": _of_group(advantages.pass_at_k),
        "fastrl_opo": _of_lengths(advantages.opo),
        "fastrl_reinforce_pp_baseline": _of_lengths(advantages.reinforce_pp_baseline),
    }.items()
} | {"fastrl_reinforce_pp": reinforce_pp}


def register() -> None:
    """Registers every loss of `LOSSES` and every estimator of `ESTIMATORS` with veRL; a second call does nothing.

    Raises:
        ImportError: veRL is not installed.
    """
    check_version("verl", "0.9.1", "0.10")
    from verl.trainer.ppo.core_algos import ADV_ESTIMATOR_REGISTRY, register_adv_est

    if all(name in ADV_ESTIMATOR_REGISTRY for name in ESTIMATORS):
        return
    for name, spec in LOSSES.items():
        _register(name, spec, from_config=True)
    for name, estimator in ESTIMATORS.items():
        register_adv_est(name)(estimator)


# The head.


class FusedLinear(torch.nn.Module):
    """veRL's `FusedLinearForPPO` on `linear_logprob`; the arguments of the constructor are veRL's and not read."""

    sum_pi_squared = False  # of the class that `serve_fused_kernels` makes

    def __init__(self, chunk_size: int = 512, impl_backend: str = "torch") -> None:
        super().__init__()

    def forward(
        self,
        hidden_states: torch.Tensor,
        vocab_weights: torch.Tensor,
        input_ids: torch.Tensor,
        temperature: float | torch.Tensor = 1.0,
    ) -> Pair:
        """Log-probability and entropy of each token, both float32 and both with a gradient.

        Args:
            hidden_states: (..., H). vocab_weights: (V, H). input_ids: (...).
            temperature: a number, one per row (B,), or one per token (...).
        """
        if isinstance(temperature, torch.Tensor):
            rows = temperature.reshape(*temperature.shape, *[1] * (input_ids.dim() - temperature.dim()))
            temperature = rows.expand(input_ids.shape)
        squares = self.sum_pi_squared and not torch.is_grad_enabled()
        asked = {"log_sum_sq_probs": True} if squares else {}
        out = linear_logprob(
            hidden_states, vocab_weights, input_ids.long(), temperature=temperature, entropy=True, **asked
        )
        if squares:
            # veRL's output has no field for it: it travels on the log-probabilities.
            out.logps.fastrl_sum_pi_squared = out.log_sum_sq_probs.exp()
        return out.logps, out.entropy


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    temperature: float | torch.Tensor = 1.0,
    reduction: str = "none",
    dist_process_group: Any = None,
) -> Pair:
    """veRL's `linear_cross_entropy`: (N,) log-probabilities and entropies of flattened tokens, float32.

    With a `dist_process_group` the vocabulary is split over its ranks, as `linear_logprob` has it with `process_group`,
    and labels are ids among all of it. The gradient of `hidden` is this rank's part where Megatron adds up the parts,
    as it does with sequence parallelism, and the sum over ranks where nothing else would.

    Raises:
        ValueError: a reduction other than "none", or ranks do not agree.
        TypeError: `dist_process_group` is no group of this rank's.
    """
    op = f"{HOST}: linear_cross_entropy"
    check.require(reduction == "none", op, "reduction", "'none'", repr(reduction))
    temperature = temperature.reshape(-1) if isinstance(temperature, torch.Tensor) else temperature
    rows, labels = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    if ranks_of(op, dist_process_group, "dist_process_group") == 1:
        out = linear_logprob(rows, weight, labels, temperature=temperature, entropy=True)
        return out.logps, out.entropy
    with shared_refusals(op, dist_process_group, hidden, weight):
        inputs = check_head(op, rows, weight, labels, None, temperature, None, 1.0, -100, shard=True)
        save = choose_save(op, inputs, "auto", entropy=True, backend="chunked", frozen=False)
    logps, entropy, _ = vocabulary_parallel_logprob(
        op, inputs, dist_process_group, vocab_size=None, entropy=True, summaries=False, support=None, save=save,
        needs=needs_grad(inputs), sum_hidden=not _is_summed(hidden),
    )  # fmt: skip
    return logps, entropy


def _is_summed(hidden: torch.Tensor) -> bool:
    """Whether the gradient of `hidden` goes, but for views, to a node of Megatron's that adds it up over ranks."""
    node = hidden.grad_fn
    while type(node).__name__ in VIEWS:
        node = node.next_functions[0][0]
    gathered = type(node).__name__ == "_GatherFromSequenceParallelRegionBackward"
    copied = type(node).__name__ == "_CopyToModelParallelRegionBackward"
    return copied or (gathered and getattr(node, "tensor_parallel_output_grad", True))


VIEWS = ("ViewBackward0", "ReshapeAliasBackward0", "UnsafeViewBackward0", "TransposeBackward0", "SqueezeBackward1")
# Modules that hold the function under their own name once they are imported.
HOLDERS = ("verl.models.mcore.model_forward_fused", "verl.models.mcore.model_forward_1f1b_overlap")


def serve_fused_kernels(*, sum_pi_squared: bool = False) -> Handle:
    """Replaces the heads behind `use_fused_kernels=True`: `FusedLinearForPPO` and `linear_cross_entropy`.

    The entropy is float32 and has a gradient, the head's gradient is added up in float32, and a temperature may differ
    by row. Call it in every worker, before a model's first forward pass. A Megatron module that is imported afterwards
    keeps the function that it found.

    Args:
        sum_pi_squared: also serve `calculate_sum_pi_squared=True` with fused kernels, on FSDP, for
            `impl_backend=torch`; veRL refuses that otherwise. It is computed only where gradients are off.

    Returns:
        A `Handle` whose `undo()` gives veRL its own objects back.
    """
    check_version("verl", "0.9.1", "0.10")
    from verl.utils.experimental import torch_functional
    from verl.utils.kernel import linear_cross_entropy as kernel

    handle = Handle(HOST)
    head = type("FusedLinear", (FusedLinear,), {"sum_pi_squared": sum_pi_squared})
    handle.replace(torch_functional, "FusedLinearForPPO", head)
    for module in (kernel, *(sys.modules[name] for name in HOLDERS if name in sys.modules)):
        handle.replace(module, "linear_cross_entropy", linear_cross_entropy)
    if sum_pi_squared:
        from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

        _serve_sum_pi_squared(handle, FSDPEngineWithLMHead)
    return handle


def _serve_sum_pi_squared(handle: Handle, engine: type) -> None:
    """Has the engine lay out sum_v p_v^2 as it lays out the log-probabilities, where it would refuse to."""
    original = engine.prepare_model_outputs

    def prepare_model_outputs(
        self: Any, output: Any, output_args: dict, micro_batch: Any, logits_processor_func: Any
    ) -> dict[str, Any]:
        from verl.utils import tensordict_utils

        def asked(key: str) -> bool:
            return bool(tensordict_utils.get_non_tensor_data(data=micro_batch, key=key, default=False))

        def laid_out(output: Any, **keys: bool) -> dict[str, Any]:
            batch = micro_batch.copy()
            tensordict_utils.assign_non_tensor(batch, calculate_sum_pi_squared=False, **keys)
            return original(self, output, output_args, batch, logits_processor_func)

        if not (asked("calculate_sum_pi_squared") and asked("use_fused_kernels")):
            return original(self, output, output_args, micro_batch, logits_processor_func)
        squares = getattr(output.log_probs, "fastrl_sum_pi_squared", None)
        do = "Use fused_kernel_options.impl_backend=torch, with gradients off."
        check.require(squares is not None, HOST, "sum_pi_squared", "a forward pass of fastrl's head", "another", do)
        model_output = laid_out(output)
        alone = SimpleNamespace(log_probs=squares)
        model_output["sum_pi_squared"] = laid_out(alone, calculate_entropy=False, distillation_use_topk=False)[
            "log_probs"
        ]
        return model_output

    handle.replace(engine, "prepare_model_outputs", prepare_model_outputs)


register()
