"""Where batches come from: sampled completions or pre-written answers."""

from fastrl.sources.ahead import Ahead
from fastrl.sources.base import Source
from fastrl.sources.collect import Judge, Sampling, mean_reward
from fastrl.sources.offline import Offline
from fastrl.sources.rollouts import Rollouts, rewards_differ

__all__ = ["Ahead", "Judge", "Offline", "Rollouts", "Sampling", "Source", "mean_reward", "rewards_differ"]
