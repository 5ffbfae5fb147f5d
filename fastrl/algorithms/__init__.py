"""An algorithm turns rewards into advantages, and micro-batches into losses; the trainer's loop does the rest."""

from __future__ import annotations

from fastrl import advantages
from fastrl.algorithms.group_policy_gradient import GroupPolicyGradient
from fastrl.algorithms.ppo import ActorCritic, KLController
from fastrl.losses import presets

__all__ = ["ALGORITHMS", "ActorCritic", "Algorithm", "GroupPolicyGradient", "KLController"]

Algorithm = GroupPolicyGradient | ActorCritic

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
