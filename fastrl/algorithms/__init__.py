"""An algorithm turns groups into optimizer steps, and micro-batches into losses; the trainer's loop does the rest."""

from __future__ import annotations

from fastrl import advantages
from fastrl.algorithms.base import Algorithm, Kind, Learner, Step
from fastrl.algorithms.group_policy_gradient import Estimator, GroupPolicyGradient
from fastrl.algorithms.masks import TokenMasks
from fastrl.algorithms.policy_gradient import Schedule
from fastrl.algorithms.ppo import ActorCritic, KLController
from fastrl.losses import presets

__all__ = [
    "ALGORITHMS",
    "TO_SAMPLER",
    "ActorCritic",
    "Algorithm",
    "Estimator",
    "GroupPolicyGradient",
    "KLController",
    "Kind",
    "Learner",
    "Schedule",
    "Step",
    "TokenMasks",
]

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
    "gspo_token": (advantages.GRPO, presets.GSPO_TOKEN),
    "gmpo": (advantages.GRPO, presets.GMPO),
    "luspo": (advantages.GRPO, presets.LUSPO),
    "vespo": (advantages.GRPO, presets.VESPO),
    "dppo": (advantages.GRPO, presets.DPPO),
    "intellect2": (advantages.GRPO, presets.INTELLECT2),
    "gdpo": (Estimator(advantages.gdpo, each_reward=True), presets.GRPO),
    "reinforce_pp_baseline": (Estimator(advantages.reinforce_pp_baseline, lengths=True), presets.REINFORCE_PP),
    # These papers derive their advantages for the plain gradient of the whole completion's log-probability.
    "opo": (Estimator(advantages.opo, lengths=True), presets.RLOO),
    "max_rl": (Estimator(advantages.max_rl), presets.RLOO),
    "remax": (Estimator(advantages.remax, greedy=True), presets.RLOO),
    "pass_at_k": (Estimator(advantages.pass_at_k), presets.PPO),
}

# Those whose papers compare the policy with the one that sampled, in the sampler's own numbers: the ratio of the others
# is to the trainer's log-probabilities under the same weights.
TO_SAMPLER = frozenset({"scale_rl", "vespo", "dppo"})
