"""Advantages of completions relative to other completions of the same prompt."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from fastrl import check
from fastrl.kernels.precision import answer
from fastrl.kernels.registry import resolve

OP = "group_advantages"
BASELINES = ("mean", "leave_one_out", "none")
SCALES = ("group", "batch", "none")


@torch.library.custom_op("fastrl::group_advantages", mutates_args=())
def _group_advantages(
    rewards: torch.Tensor, group_ids: torch.Tensor, baseline: str, scale: str, eps: float, backend: str
) -> torch.Tensor:
    return resolve(OP, backend, rewards.device).forward(rewards, group_ids, baseline, scale, eps)


@_group_advantages.register_fake
def _(rewards: torch.Tensor, *options: object) -> torch.Tensor:
    return rewards.new_empty(rewards.shape, dtype=answer(rewards))


def check_estimator(op: str, baseline: str, scale: str, eps: float) -> None:
    """Refuses meaningless estimators; messages start with `op`."""
    check.choice(op, "baseline", baseline, BASELINES)
    check.choice(op, "scale", scale, SCALES)
    check.require(0 <= eps < math.inf, op, "eps", "a finite number of at least 0", eps)
    check.require(
        not (baseline == "none" and scale == "group"),
        op,
        "scale",
        "'batch' or 'none' with baseline='none'",
        "'group'",
        "Without a baseline a constant group would be divided by eps alone; use baseline='mean'.",
    )


def finite(op: str, argument: str, rewards: torch.Tensor) -> torch.Tensor:
    """The rewards without gradient. Infinite ones, which would leave their group no advantages, are refused; on a
    device, where checking would have to wait, they count as not scored."""
    good = ~rewards.detach().isinf()
    return check.values(op, argument, rewards.detach(), good, "finite numbers, or NaN where there is none")


def check_groups(
    op: str, rewards: torch.Tensor, group_ids: torch.Tensor | None, group_size: int | None
) -> torch.Tensor:
    """The group of each of (B,) rewards, (B,) int64, from either argument; messages start with `op`."""
    check.floating(op, "rewards", rewards)
    check.require(
        rewards.dim() == 1, op, "rewards", "shape (B,)", tuple(rewards.shape), "Pass one reward per completion."
    )
    given = [name for name, value in (("group_ids", group_ids), ("group_size", group_size)) if value is not None]
    check.require(
        len(given) == 1,
        op,
        "group_ids",
        "exactly one of group_ids and group_size",
        " and ".join(given) or "neither",
        "Say which rewards share a prompt, once.",
    )
    if group_ids is not None:
        integer = group_ids.dtype in (torch.int64, torch.int32)
        check.require(integer, op, "group_ids", "int64 or int32", group_ids.dtype, error=TypeError)
        check.shape(op, "group_ids", group_ids, rewards.shape, "as rewards")
        check.device(op, "group_ids", group_ids, rewards.device, "rewards")
        return group_ids.long()
    size = 0 if group_size is None else group_size
    check.require(size >= 1, op, "group_size", "a positive number", group_size)
    if rewards.shape[0] % size != 0:  # torch.compile takes a size put in a message for a constant
        check.require(
            False,
            op,
            "group_size",
            f"a divisor of the {rewards.shape[0]} rewards",
            group_size,
            "Pass group_ids for groups of unequal size.",
        )
    return torch.arange(rewards.shape[0], device=rewards.device) // size


def group_advantages(
    rewards: torch.Tensor,
    *,
    group_ids: torch.Tensor | None = None,
    group_size: int | None = None,
    baseline: str = "mean",
    scale: str = "group",
    eps: float = 1e-6,
    backend: str = "auto",
) -> torch.Tensor:
    """Each reward minus its group's baseline, divided by a spread.

    A_i = (r_i - b_i) / d_i, with, over the n scorable members of i's group:

    | `baseline`      | b_i                                      | source                       |
    |-----------------|------------------------------------------|------------------------------|
    | `mean`          | the group's mean                         | GRPO, arXiv:2402.03300 4.1.2 |
    | `leave_one_out` | the mean of the other n - 1              | RLOO, arXiv:2402.14740       |
    | `none`          | 0                                        |                              |

    | `scale` | d_i                                                       | source                      |
    |---------|-----------------------------------------------------------|-----------------------------|
    | `group` | the group's standard deviation + eps                      | GRPO                        |
    | `batch` | the standard deviation of r - b over the batch + eps      | ScaleRL, arXiv:2510.13786   |
    | `none`  | 1                                                         | Dr. GRPO, arXiv:2503.20783  |

    Standard deviations divide by n - 1. If one is zero, or of fewer than two numbers, d_i = 1. The batch is the given
    tensor: gather the rewards of all ranks first if it spans several. Constant groups count in its spread. TRL's
    scale_rewards="batch" divides by the standard deviation of the rewards: scale="none", over rewards.std() + 1e-4.

    A NaN reward marks a completion that could not be scored: its advantage is exactly 0, and it enters no baseline or
    spread. With a baseline, a group whose rewards are all equal, or with one scorable member, gets exactly 0.

    Args:
        rewards: (B,) floating point, finite or NaN.
        group_ids: (B,) int64 or int32, equal where completions share a prompt; any values, any order, any group sizes.
        group_size: instead of `group_ids`, for consecutive groups of one size.
        baseline, scale: names from the tables.
        eps: added to the standard deviation, at least 0; 1e-6 as in verl. TRL's is 1e-4, which shrinks the advantages
            of rewards that hardly differ.
        backend: as `linear_logprob`.

    Returns:
        (B,) float32, or float64 for float64 rewards. A constant: no gradient.

    Raises:
        ValueError: groups given twice, not at all or with another shape; a size that does not divide B; an unknown
            baseline or scale; a negative eps; `baseline="none"` with `scale="group"`; infinite rewards, on a CPU.
        TypeError: rewards are not floating point, or group ids no integers.
    """
    check_estimator(OP, baseline, scale, eps)
    groups = check_groups(OP, rewards, group_ids, group_size)
    return _group_advantages(finite(OP, "rewards", rewards), groups, baseline, scale, float(eps), backend)


@dataclass(frozen=True)
class GroupAdvantage:
    """An outcome-reward estimator: its baseline and its scale. See `group_advantages`."""

    baseline: str = "mean"
    scale: str = "group"
    eps: float = 1e-6

    def __post_init__(self) -> None:
        check_estimator("GroupAdvantage", self.baseline, self.scale, self.eps)

    def __call__(
        self, rewards: torch.Tensor, *, group_ids: torch.Tensor | None = None, group_size: int | None = None
    ) -> torch.Tensor:
        """The advantages of (B,) rewards."""
        return group_advantages(
            rewards,
            group_ids=group_ids,
            group_size=group_size,
            baseline=self.baseline,
            scale=self.scale,
            eps=self.eps,
        )
