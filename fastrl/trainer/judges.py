"""What judges among the rewards need before a run: the policy, where it judges itself, and their canary."""

from __future__ import annotations

from collections.abc import Sequence

from fastrl.rewards import RewardSuite
from fastrl.rewards.chat_local import LocalChat, room_of
from fastrl.rewards.judge import JudgeReward
from fastrl.sources import Sampling
from fastrl.trainer.learner import Learner
from fastrl.types import Prompt

CANARY_PROMPTS = 2  # prompts that answers without content are scored on


def begin_judges(
    rewards: RewardSuite, learner: Learner, sampling: Sampling, prompts: Sequence[Prompt], *, asks: bool
) -> list[str]:
    """Gives the policy to judges that wait for it and, if `asks`, lets every judge score answers without content.

    Returns what to warn of.

    Raises:
        ValueError: a judge is fooled and its recipe refuses that, or it does not answer.
    """
    judges = [func for func in rewards.funcs if isinstance(func, JudgeReward)]
    for judge in (judge for judge in judges if judge.waits):
        stops = sampling.params.stop_token_ids
        policy, tokenizer = learner.policy, sampling.tokenizer
        judge.bind(LocalChat(policy, sampling.engine, tokenizer, stops, learner.layout, room_of(policy)))
    asked = [prompt.content for prompt in prompts[:CANARY_PROMPTS]]
    return [message for judge in judges for message in judge.try_canary(asked)] if asks else []
