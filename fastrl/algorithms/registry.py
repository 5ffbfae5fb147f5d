"""The table of algorithms that a recipe's `algorithm` selects from; `fastrl recipes` and docs/algorithms.md show it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from fastrl import advantages
from fastrl.algorithms.base import Kind
from fastrl.algorithms.group_policy_gradient import Estimator
from fastrl.algorithms.offline import Objective, RewardModelling, SupervisedTuning, objective_of
from fastrl.losses import presets
from fastrl.ops.group_advantages import GroupAdvantage
from fastrl.preference_spec import PreferenceLoss, PreferenceMix, UnpairedPreferenceLoss
from fastrl.spec import PolicyLoss

ROWS: dict[Kind, str] = {
    "rewarded": "completions and their rewards",
    "pairs": "pairs of a chosen and a rejected answer",
    "labelled": "answers labelled good or bad",
    "completions": "demonstrations",
}


@dataclass(frozen=True)
class Entry:
    """A named algorithm: its loss, its paper, a one-line description, and its group-relative advantages, if any."""

    spec: PolicyLoss | PreferenceLoss | PreferenceMix | UnpairedPreferenceLoss | Objective
    paper: str
    line: str
    estimator: GroupAdvantage | Estimator | None = None
    ratio_to_sampler: bool = False
    """Whether the paper takes the ratio to the sampler's log-probabilities. The others take it to the trainer's own,
    under the same weights."""

    @property
    def kind(self) -> Kind:
        """The kind of groups it learns from."""
        return "rewarded" if isinstance(self.spec, PolicyLoss) else objective_of(self.spec).kind

    @property
    def needs(self) -> tuple[str, ...]:
        """What it needs besides the policy, in words.

        The KL of a policy loss does not count: it is off unless a recipe sets `loss.kl.coef`.
        """
        if isinstance(self.spec, PolicyLoss):
            found = {
                "critic": self.estimator is None,
                "reference": self.estimator is None,
                "greedy completions": getattr(self.estimator, "greedy", False),
                "sampling log-probabilities": self.ratio_to_sampler,
            }
        else:
            objective = objective_of(self.spec)
            found = {"reference": objective.needs_ref, "a scalar head": isinstance(objective, RewardModelling)}
        return tuple(name for name, needed in found.items() if needed)

    def without_kl(self) -> PolicyLoss:
        """The policy loss without its KL, the default. A reference model doubles the memory of the weights, and most
        recipes today train without one (TRL's default is beta = 0)."""
        return replace(self.spec, kl=None)


_GRPO, _DR_GRPO, _RLOO = advantages.GRPO, advantages.DR_GRPO, advantages.RLOO

ALGORITHMS: dict[str, Entry] = {
    # Policy gradients, with advantages relative to the group.
    "grpo": Entry(presets.GRPO, "arXiv:2402.03300", "PPO's clip, rewards normalised within each group", _GRPO),
    "dr_grpo": Entry(presets.DR_GRPO, "arXiv:2503.20783", "GRPO without its length and scale biases", _DR_GRPO),
    "dapo": Entry(presets.DAPO, "arXiv:2503.14476", "GRPO averaged over tokens, with a higher upper clip", _GRPO),
    "gspo": Entry(presets.GSPO, "arXiv:2507.18071", "GRPO with one ratio per sequence", _GRPO),
    "cispo": Entry(
        presets.CISPO, "arXiv:2506.13585", "truncated importance weights; every token keeps a gradient", _GRPO
    ),
    "scale_rl": Entry(
        presets.SCALE_RL,
        "arXiv:2510.13786",
        "CISPO on the sampler's ratio, prompt mean, batch scale",
        advantages.SCALE_RL,
        ratio_to_sampler=True,
    ),
    "sapo": Entry(presets.SAPO, "arXiv:2511.20347", "a soft gate on the ratio instead of a clip", _GRPO),
    "rloo": Entry(presets.RLOO, "arXiv:2402.14740", "REINFORCE with the other samples as baseline", _RLOO),
    "gspo_token": Entry(presets.GSPO_TOKEN, "arXiv:2507.18071", "GSPO with a gradient per token", _GRPO),
    "gmpo": Entry(presets.GMPO, "arXiv:2507.20673", "a geometric mean of clipped token ratios", _GRPO),
    "luspo": Entry(presets.LUSPO, "arXiv:2602.05261", "GSPO without its length bias", _GRPO),
    "vespo": Entry(
        presets.VESPO, "arXiv:2602.10693", "a smooth weight on the sequence ratio", _GRPO, ratio_to_sampler=True
    ),
    "dppo": Entry(
        presets.DPPO, "arXiv:2602.04879", "a trust region in probability, not in ratio", _GRPO, ratio_to_sampler=True
    ),
    "intellect2": Entry(presets.INTELLECT2, "arXiv:2505.07291", "GRPO clipped on both sides", _GRPO),
    "gdpo": Entry(
        presets.GRPO,
        "arXiv:2601.05242",
        "GRPO with each reward normalised separately",
        Estimator(advantages.gdpo, each_reward=True),
    ),
    "reinforce_pp_baseline": Entry(
        presets.REINFORCE_PP,
        "arXiv:2501.03262",
        "rewards minus their group's mean, scaled over the batch",
        Estimator(advantages.reinforce_pp_baseline, lengths=True),
    ),
    # These papers derive their advantages for the plain gradient of the whole completion's log-probability.
    "opo": Entry(
        presets.RLOO,
        "arXiv:2505.23585",
        "REINFORCE with a length-weighted baseline",
        Estimator(advantages.opo, lengths=True),
    ),
    "max_rl": Entry(
        presets.RLOO,
        "arXiv:2602.02710",
        "rewards divided by their group's mean, less one",
        Estimator(advantages.max_rl),
    ),
    "remax": Entry(
        presets.RLOO,
        "arXiv:2310.10505",
        "REINFORCE with the greedy completion's reward as baseline",
        Estimator(advantages.remax, greedy=True),
    ),
    "pass_at_k": Entry(
        presets.PPO, "arXiv:2503.19595", "only the best of each group gets credit", Estimator(advantages.pass_at_k)
    ),
    "ppo": Entry(presets.PPO, "arXiv:1707.06347", "a critic, GAE and a KL in the reward; see `ppo`"),
    # Preference losses.
    "dpo": Entry(presets.DPO, "arXiv:2305.18290", "log-ratios to a reference as rewards"),
    "cdpo": Entry(presets.CDPO, "https://ericmitchell.ai/cdpo.pdf", "DPO with labels that may be wrong"),
    "robust_dpo": Entry(presets.ROBUST_DPO, "arXiv:2403.00409", "cDPO, made unbiased"),
    "dpo_norm": Entry(presets.DPO_NORM, "arXiv:2411.15124", "DPO per token, as in Tulu 3"),
    "slic": Entry(presets.SLIC, "arXiv:2305.10425", "a hinge on DPO's margin"),
    "ipo": Entry(presets.IPO, "arXiv:2310.12036", "a squared loss that bounds the margin"),
    "exo": Entry(presets.EXO, "arXiv:2402.00856", "the reverse KL to the labels"),
    "nca": Entry(presets.NCA, "arXiv:2402.05369", "keeps the chosen answer's probability up"),
    "bco": Entry(presets.BCO, "arXiv:2404.04656", "a classifier of chosen and rejected answers"),
    "sppo_hard": Entry(presets.SPPO_HARD, "arXiv:2405.00675", "self-play with certain wins"),
    "aot": Entry(presets.AOT, "arXiv:2406.05882", "optimal transport: compares sorted margins"),
    "aot_unpaired": Entry(presets.AOT_UNPAIRED, "arXiv:2406.05882", "optimal transport: compares sorted rewards"),
    "apo_zero": Entry(presets.APO_ZERO, "arXiv:2408.06266", "for answers better than the model's own"),
    "apo_down": Entry(presets.APO_DOWN, "arXiv:2408.06266", "for answers worse than the model's own"),
    "discopop": Entry(presets.DISCOPOP, "arXiv:2406.08414", "a loss discovered by a language model"),
    "ld_dpo": Entry(presets.LD_DPO, "arXiv:2409.06411", "DPO that discounts the longer answer's tail"),
    "wpo": Entry(presets.WPO, "arXiv:2406.11827", "DPO weighted by the pair's probability"),
    "rpo": Entry(presets.RPO, "arXiv:2404.19733", "DPO plus the chosen answer's NLL"),
    "mpo": Entry(presets.MPO, "arXiv:2411.10442", "DPO, BCO and NLL"),
    "simpo": Entry(presets.SIMPO, "arXiv:2405.14734", "log-probability per token, a margin, no reference"),
    "alphapo": Entry(presets.ALPHAPO, "arXiv:2501.03884", "SimPO with a reshaped reward"),
    "cpo": Entry(presets.CPO, "arXiv:2401.08417", "DPO without a reference, plus NLL"),
    "orpo": Entry(presets.ORPO, "arXiv:2403.07691", "NLL plus an odds ratio, no reference"),
    "kto": Entry(presets.KTO, "arXiv:2402.01306", "prospect theory on single answers"),
    "apo_zero_unpaired": Entry(presets.APO_ZERO_UNPAIRED, "arXiv:2408.06266", "APO-zero on single answers"),
    # No preset: all choices are in the data.
    "sft": Entry(SupervisedTuning(), "arXiv:2203.02155", "the NLL of demonstrations"),
    "reward_model": Entry(RewardModelling(), "arXiv:2203.02155", "a scalar head that ranks answers"),
}
OFFLINE = tuple(name for name, entry in ALGORITHMS.items() if entry.kind != "rewarded")  # pre-written rows by default
