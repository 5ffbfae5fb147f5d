"""An algorithm turns groups into optimizer steps, and micro-batches into losses; the trainer's loop does the rest."""

from __future__ import annotations

from fastrl.algorithms.base import Algorithm, Kind, Learner, Step
from fastrl.algorithms.group_policy_gradient import Estimator, GroupPolicyGradient
from fastrl.algorithms.masks import TokenMasks
from fastrl.algorithms.policy_gradient import Schedule
from fastrl.algorithms.ppo import ActorCritic, KLController
from fastrl.algorithms.registry import ALGORITHMS, OFFLINE, Entry

__all__ = [
    "ALGORITHMS",
    "OFFLINE",
    "ActorCritic",
    "Algorithm",
    "Entry",
    "Estimator",
    "GroupPolicyGradient",
    "KLController",
    "Kind",
    "Learner",
    "Schedule",
    "Step",
    "TokenMasks",
]
