"""The loss of a reward model that learns from comparisons."""

from __future__ import annotations

import torch

from fastrl import check
from fastrl.losses.aggregate import check_normalizer
from fastrl.losses.preference_links import flip_of, margin_loss
from fastrl.preference_spec import PreferenceLoss
from fastrl.types import LossOutput

OP = "reward_model_loss"
BRADLEY_TERRY = PreferenceLoss("sigmoid", beta=1.0, reference=False)


def reward_model_loss(
    chosen_rewards: torch.Tensor,
    rejected_rewards: torch.Tensor,
    *,
    margins: torch.Tensor | None = None,
    soft_labels: torch.Tensor | None = None,
    center_coef: float = 0.0,
    weights: torch.Tensor | None = None,
    normalizer: float | torch.Tensor | None = None,
) -> LossOutput:
    """The mean over pairs of -log sigmoid(r_w - r_l - m) + c (r_w + r_l)^2: Bradley-Terry, arXiv:2203.02155.

    It equals log(1 + e^{r_l - r_w + m}), which some libraries list as another loss. m: arXiv:2307.09288. The term with
    c = `center_coef` keeps the rewards around 0, which comparisons alone do not fix: arXiv:2312.09244. `soft_labels` p,
    for example from a judge, give -p log sigmoid(d) - (1 - p) log sigmoid(-d): arXiv:2309.00267. For K ranked answers
    per prompt, pass K (K - 1) / 2 pairs with `weights` of one over that number, and the number of prompts as
    `normalizer`.

    Args:
        chosen_rewards, rejected_rewards: (P,) scores of both sides; both get a gradient, everything else is constant.
        margins: (P,) m, by how much the chosen answer is better; no margin by default.
        soft_labels: (P,) probability that the chosen answer is better; 1 by default.
        weights: (P,) factors of the pairs' losses, centre terms included.
        normalizer: divisor of the sum; None: the number of given pairs.

    Returns:
        The scalar loss, float32 (float64 for float64 `chosen_rewards`). Metrics as TRL names them, per pair:
        `accuracy` (r_w > r_l; equal rewards are wrong), `margin` (r_w - r_l), and per answer `mean_reward`.

    Raises:
        ValueError: a shape, a device or `center_coef` is wrong.
        TypeError: a dtype is wrong.
    """
    check.floating(OP, "chosen_rewards", chosen_rewards)
    check.require(chosen_rewards.dim() == 1, OP, "chosen_rewards", "shape (P,)", tuple(chosen_rewards.shape))
    others = {"rejected_rewards": rejected_rewards, "margins": margins, "soft_labels": soft_labels, "weights": weights}
    for name, tensor in others.items():
        if tensor is not None:
            check.floating(OP, name, tensor)
            check.shape(OP, name, tensor, chosen_rewards.shape, "as chosen_rewards")
            check.device(OP, name, tensor, chosen_rewards.device, "chosen_rewards")
    check_normalizer(OP, "token_mean", normalizer)
    check.require(center_coef >= 0, OP, "center_coef", "a number of at least 0", center_coef)
    dtype = torch.float64 if chosen_rewards.dtype == torch.float64 else torch.float32
    chosen, rejected = chosen_rewards.to(dtype), rejected_rewards.to(dtype)
    difference = chosen - rejected
    compared = difference if margins is None else difference - margins.detach().to(dtype)
    flip = 0.0 if soft_labels is None else flip_of(OP, soft_labels).to(dtype)
    losses = margin_loss(compared, flip, BRADLEY_TERRY) + center_coef * (chosen + rejected) ** 2
    if weights is not None:
        losses = losses * weights.detach().to(dtype)
    pairs = chosen.new_tensor(len(chosen))
    loss = losses.sum() / (pairs.clamp(min=1) if normalizer is None else normalizer)

    difference = difference.detach()
    metrics = {
        "accuracy": ((difference > 0).to(dtype).sum(), pairs),
        "margin": (difference.sum(), pairs),
        "mean_reward": ((chosen + rejected).detach().sum(), 2 * pairs),
    }
    return LossOutput(loss, metrics)
