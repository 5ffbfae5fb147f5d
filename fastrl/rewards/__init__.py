"""Rewards: judging completions with functions that have TRL's signature."""

from fastrl.rewards.resolve import BUILTINS, resolve_reward
from fastrl.rewards.suite import Failure, RewardFailure, RewardFunc, RewardSuite

__all__ = ["BUILTINS", "Failure", "RewardFailure", "RewardFunc", "RewardSuite", "resolve_reward"]
