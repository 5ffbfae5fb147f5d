"""fastrl: fused log-probabilities and policy losses for reinforcement learning of language models.

Names are imported when first used, so `import fastrl` costs nothing and needs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

# Public name -> the module that defines it.
_EXPORTS = {
    "linear_logprob": "fastrl.ops.linear_logprob",
    "logprob": "fastrl.ops.logprob",
    "linear_token_loss": "fastrl.ops.linear_token_loss",
    "support_sets": "fastrl.ops.support",
    "group_advantages": "fastrl.ops.group_advantages",
    "gae": "fastrl.ops.gae",
    "FusedLMHead": "fastrl.model.fused_lm_head",
    "accelerate_cpu": "fastrl.model.accelerate",
    "logps": "fastrl.model.logps",
    "split_head": "fastrl.model.head",
    "policy_loss": "fastrl.losses.policy",
    "linear_policy_loss": "fastrl.losses.linear_policy",
    "preference_loss": "fastrl.losses.preference",
    "unpaired_preference_loss": "fastrl.losses.unpaired",
    "mismatched_kl": "fastrl.losses.unpaired",
    "reward_model_loss": "fastrl.losses.reward_model",
    "value_loss": "fastrl.losses.value",
    "group_policy_loss": "fastrl.losses.group_policy",
    "PolicyLoss": "fastrl.spec",
    "GroupAdvantage": "fastrl.ops.group_advantages",
    "Clip": "fastrl.spec",
    "Cispo": "fastrl.spec",
    "Sapo": "fastrl.spec",
    "Reinforce": "fastrl.spec",
    "Dppo": "fastrl.spec",
    "Gmpo": "fastrl.spec",
    "Vespo": "fastrl.spec",
    "KL": "fastrl.spec",
    "Correction": "fastrl.spec",
    "PreferenceLoss": "fastrl.preference_spec",
    "PreferenceMix": "fastrl.preference_spec",
    "UnpairedPreferenceLoss": "fastrl.preference_spec",
    "Sft": "fastrl.preference_spec",
    "Power": "fastrl.preference_spec",
    "JensenShannon": "fastrl.preference_spec",
    "LogOdds": "fastrl.preference_spec",
    "Trainer": "fastrl.trainer.trainer",
    "LogprobOutput": "fastrl.types",
    "LogprobDetails": "fastrl.types",
    "LossOutput": "fastrl.types",
}
_MODULES = {
    "presets": "fastrl.losses.presets",
    "token_masks": "fastrl.losses.token_masks",
    "advantages": "fastrl.advantages",
}

__all__ = [*_EXPORTS, *_MODULES]

if TYPE_CHECKING:
    from fastrl import advantages as advantages
    from fastrl.losses import presets as presets
    from fastrl.losses import token_masks as token_masks
    from fastrl.losses.group_policy import group_policy_loss as group_policy_loss
    from fastrl.losses.linear_policy import linear_policy_loss as linear_policy_loss
    from fastrl.losses.policy import policy_loss as policy_loss
    from fastrl.losses.preference import preference_loss as preference_loss
    from fastrl.losses.reward_model import reward_model_loss as reward_model_loss
    from fastrl.losses.unpaired import mismatched_kl as mismatched_kl
    from fastrl.losses.unpaired import unpaired_preference_loss as unpaired_preference_loss
    from fastrl.losses.value import value_loss as value_loss
    from fastrl.model.accelerate import accelerate_cpu as accelerate_cpu
    from fastrl.model.fused_lm_head import FusedLMHead as FusedLMHead
    from fastrl.model.head import split_head as split_head
    from fastrl.model.logps import logps as logps
    from fastrl.ops.gae import gae as gae
    from fastrl.ops.group_advantages import GroupAdvantage as GroupAdvantage
    from fastrl.ops.group_advantages import group_advantages as group_advantages
    from fastrl.ops.linear_logprob import linear_logprob as linear_logprob
    from fastrl.ops.linear_token_loss import linear_token_loss as linear_token_loss
    from fastrl.ops.logprob import logprob as logprob
    from fastrl.ops.support import support_sets as support_sets
    from fastrl.preference_spec import JensenShannon as JensenShannon
    from fastrl.preference_spec import LogOdds as LogOdds
    from fastrl.preference_spec import Power as Power
    from fastrl.preference_spec import PreferenceLoss as PreferenceLoss
    from fastrl.preference_spec import PreferenceMix as PreferenceMix
    from fastrl.preference_spec import Sft as Sft
    from fastrl.preference_spec import UnpairedPreferenceLoss as UnpairedPreferenceLoss
    from fastrl.spec import KL as KL
    from fastrl.spec import Cispo as Cispo
    from fastrl.spec import Clip as Clip
    from fastrl.spec import Correction as Correction
    from fastrl.spec import Dppo as Dppo
    from fastrl.spec import Gmpo as Gmpo
    from fastrl.spec import PolicyLoss as PolicyLoss
    from fastrl.spec import Reinforce as Reinforce
    from fastrl.spec import Sapo as Sapo
    from fastrl.spec import Vespo as Vespo
    from fastrl.trainer.trainer import Trainer as Trainer
    from fastrl.types import LogprobDetails as LogprobDetails
    from fastrl.types import LogprobOutput as LogprobOutput
    from fastrl.types import LossOutput as LossOutput


def __getattr__(name: str) -> object:
    if name in _MODULES:
        return import_module(_MODULES[name])
    if name in _EXPORTS:
        return getattr(import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'fastrl' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
