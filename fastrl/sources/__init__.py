"""Where batches come from: sampled completions, pre-written answers, or rounds of sampling and choosing."""

from fastrl.sources.ahead import Ahead
from fastrl.sources.base import Source
from fastrl.sources.collect import Judge, Sampling, mean_reward
from fastrl.sources.offline import Offline
from fastrl.sources.rollouts import Rollouts, rewards_differ
from fastrl.sources.rounds import Rounds

__all__ = [
    "Ahead",
    "Judge",
    "Offline",
    "Rollouts",
    "Rounds",
    "Sampling",
    "Source",
    "mean_reward",
    "rewards_differ",
]
