"""An algorithm is two functions: advantages(groups) and loss(policy, batch, normalizer)."""

from __future__ import annotations

from fastrl import advantages
from fastrl.algorithms.group_policy_gradient import GroupPolicyGradient
from fastrl.losses import presets

__all__ = ["ALGORITHMS", "GroupPolicyGradient"]

# name -> (advantage estimator, loss): what a recipe's `algorithm` selects.
ALGORITHMS = {
    "grpo": (advantages.GRPO, presets.GRPO),
    "dr_grpo": (advantages.DR_GRPO, presets.DR_GRPO),
    "dapo": (advantages.GRPO, presets.DAPO),
    "gspo": (advantages.GRPO, presets.GSPO),
    "cispo": (advantages.GRPO, presets.CISPO),
    "scale_rl": (advantages.SCALE_RL, presets.SCALE_RL),
    "sapo": (advantages.GRPO, presets.SAPO),
    "rloo": (advantages.RLOO, presets.RLOO),
}
