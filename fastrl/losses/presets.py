"""Named algorithms as `PolicyLoss` and `PreferenceLoss` values; change one with `dataclasses.replace`.

A preset is only the loss. The comment above it says what the paper leaves to the caller (advantages, normaliser,
filters); advantages come from `fastrl.group_advantages` or `fastrl.gae`.
"""

from __future__ import annotations

from fastrl.preference_spec import LogOdds, Power, PreferenceLoss, PreferenceMix, Sft, UnpairedPreferenceLoss
from fastrl.spec import KL, Cispo, Clip, Dppo, Gmpo, PolicyLoss, Reinforce, Sapo, Vespo

# Proximal Policy Optimization, arXiv:1707.06347 eq. 7. Left to the caller: GAE advantages, whitened; the value loss;
# the KL penalty against the reference, which RLHF puts into the reward (arXiv:2203.02155).
PPO = PolicyLoss(surrogate=Clip(low=0.2, high=0.2), aggregate="token_mean")

# Group Relative Policy Optimization, DeepSeekMath, arXiv:2402.03300 eq. 3 and 4, with its KL coefficient of 0.04. Left
# to the caller: advantages with the group's mean and standard deviation. DeepSeek-R1 (arXiv:2501.12948) takes 0.001.
GRPO = PolicyLoss(surrogate=Clip(low=0.2, high=0.2), kl=KL("k3", coef=0.04), aggregate="seq_mean_token_mean")

# GRPO done right, arXiv:2503.20783: no division by length or by the standard deviation. Left to the caller: advantages
# with scale="none", and normalizer = sequences x maximum completion length, a constant. No KL term.
DR_GRPO = PolicyLoss(surrogate=Clip(low=0.2, high=0.2), aggregate="token_sum")

# DAPO, arXiv:2503.14476 eq. 8: the upper bound raised to 0.28, no KL, every token weighs the same. The equation
# averages within a prompt, as aggregate="prompt_mean" does; released implementations average over the batch, as here
# (https://github.com/verl-project/verl/issues/2776). Left to the caller: dynamic sampling, the soft overlong penalty,
# and a normalizer that counts the whole batch.
DAPO = PolicyLoss(surrogate=Clip(low=0.2, high=0.28), aggregate="token_mean")

# Group Sequence Policy Optimization, arXiv:2507.18071 eq. 5, bounds as in its section 5.1. Their scale is that of a
# ratio of geometric means; ScaleRL needed 4e-3 and more. Left to the caller: GRPO's advantages.
GSPO = PolicyLoss(ratio="sequence", surrogate=Clip(low=3e-4, high=4e-4), aggregate="seq_mean_token_mean")

# CISPO, MiniMax-M1, arXiv:2506.13585 eq. 4: no lower bound. The paper gives no upper bound; 5.0 is ScaleRL's. Left to
# the caller: GRPO's advantages, and a normalizer that counts the whole batch.
CISPO = PolicyLoss(surrogate=Cispo(ratio_max=5.0), aggregate="token_mean")

# ScaleRL, arXiv:2510.13786 section 4. Its single ratio is trainer over *generator*: pass sampling_logps as old_logps.
# Left to the caller: advantages with scale="batch", dropping prompts of zero variance or a pass rate of 0.9, forced
# length interruption, float32 logits at the head. The bounds 4, 5 and 8 made no difference there.
SCALE_RL = PolicyLoss(surrogate=Cispo(ratio_max=5.0), aggregate="prompt_mean")

# Soft Adaptive Policy Optimization, arXiv:2511.20347, temperatures as in the paper. Left to the caller: GRPO's
# advantages.
SAPO = PolicyLoss(surrogate=Sapo(tau_pos=1.0, tau_neg=1.05), aggregate="seq_mean_token_mean")

# REINFORCE leave-one-out, arXiv:2402.14740: the log-probability of the whole completion, averaged over completions.
# Left to the caller: advantages with baseline="leave_one_out", scale="none"; the KL penalty in the reward. On-policy.
# Off-policy libraries disagree: TRL clips the whole completion's ratio, exp(sum_t log rho_t), whose gradient before the
# first update is this one; verl's is PPO, above, with these advantages.
RLOO = PolicyLoss(surrogate=Reinforce(), aggregate="seq_mean_token_sum")

# REINFORCE++, arXiv:2501.03262: PPO's clip without a critic. Left to the caller: advantages normalised over the whole
# batch, with the per-token k1 penalty in the reward.
REINFORCE_PP = PolicyLoss(surrogate=Clip(low=0.2, high=0.2), aggregate="token_mean")

# GSPO-token, arXiv:2507.18071 section 4.3: GSPO's ratio, with a gradient by each token's own log-probability. Left to
# the caller: advantages, which may differ within a sequence. verl's "gspo" is this form.
GSPO_TOKEN = PolicyLoss(ratio="sequence_token", surrogate=Clip(low=3e-4, high=4e-4), aggregate="seq_mean_token_mean")

# Geometric-Mean Policy Optimization, arXiv:2507.20673: the geometric mean of token ratios clipped in log space, at the
# paper's 0.4. Left to the caller: GRPO's advantages.
GMPO = PolicyLoss(ratio="sequence", surrogate=Gmpo(low=0.4, high=0.4), aggregate="seq_mean_token_mean")

# Length-Unbiased Sequence Policy Optimization, arXiv:2602.05261: GSPO's term times the length of its sequence, which is
# a sum over tokens instead of a mean. Bounds as TRL quotes them. Liger's luspo equals it for terms that are constant in
# a sequence; with others, or a token ratio, it counts padding.
LUSPO = PolicyLoss(ratio="sequence", surrogate=Clip(low=2e-3, high=2.5e-3), aggregate="seq_mean_token_sum")

# Variational sEquence-level Soft Policy Optimization, arXiv:2602.10693, constants and aggregation as in TRL and Liger.
# Left to the caller: GRPO's advantages; the sampler's log-probabilities as old_logps, which corrects for it too.
VESPO = PolicyLoss(ratio="sequence", surrogate=Vespo(), aggregate="token_mean")

# Divergence Proximal Policy Optimization, the Binary-TV variant, arXiv:2602.04879, with prime-rl's bounds. Left to the
# caller: the sampler's log-probabilities as old_logps; prime-rl also adds 1e-3 (log rho)^2, which is KL("k2", 2e-3)
# with the same tensor as ref_logps.
DPPO = PolicyLoss(surrogate=Dppo(low=0.2, high=0.2), aggregate="token_mean")

# INTELLECT-2, arXiv:2505.07291: GRPO with two-sided clipping at delta = 4 and a loss per token. Left to the caller:
# GRPO's advantages, and the KL and entropy terms.
INTELLECT2 = PolicyLoss(surrogate=Clip(low=0.2, high=0.2, dual=4.0), aggregate="token_mean")

PRESETS: dict[str, PolicyLoss] = {
    "PPO": PPO,
    "GRPO": GRPO,
    "DR_GRPO": DR_GRPO,
    "DAPO": DAPO,
    "GSPO": GSPO,
    "CISPO": CISPO,
    "SCALE_RL": SCALE_RL,
    "SAPO": SAPO,
    "RLOO": RLOO,
    "REINFORCE_PP": REINFORCE_PP,
    "GSPO_TOKEN": GSPO_TOKEN,
    "GMPO": GMPO,
    "LUSPO": LUSPO,
    "VESPO": VESPO,
    "DPPO": DPPO,
    "INTELLECT2": INTELLECT2,
}

# Preference losses. Supervised fine-tuning needs none of its own: it is -logps, token_mean, in
# `linear_token_loss(hidden, weight, targets, torch.neg, weights=token_weights(mask, "token_mean"))`.

# Direct Preference Optimization, arXiv:2305.18290, with its default beta.
DPO = PreferenceLoss("sigmoid", beta=0.1)

# Conservative DPO: labels wrong with probability 0.1 (https://ericmitchell.ai/cdpo.pdf). TRL's DPO ignores
# label_smoothing; its CPO and OpenRLHF have it as here.
CDPO = PreferenceLoss("sigmoid", beta=0.1, label_smoothing=0.1)

# Robust DPO, arXiv:2403.00409: cDPO's noise made unbiased. 0.1 is TRL's recommended value.
ROBUST_DPO = PreferenceLoss("sigmoid", beta=0.1, label_smoothing=0.1, debias=True)

# DPO with the rewards divided by the answers' lengths, as in Tulu 3, arXiv:2411.15124; TRL's sigmoid_norm.
DPO_NORM = PreferenceLoss("sigmoid", beta=0.1, length="mean")

# SLiC's hinge on DPO's margin, arXiv:2305.10425, as in TRL.
SLIC = PreferenceLoss("hinge", beta=0.1)

# Identity Preference Optimization, arXiv:2310.12036, beta being its tau. Libraries disagree: this one, as TRL,
# takes means over tokens, which the paper's authors confirmed to TRL; the equation as printed and OpenRLHF take sums,
# replace(IPO, length="sum").
IPO = PreferenceLoss("ipo", beta=0.1, length="mean")

# EXO on pairs, arXiv:2402.00856, with the label smoothing that TRL quotes from it.
EXO = PreferenceLoss("exo_pair", beta=0.1, label_smoothing=1e-3)

# NCA on pairs, arXiv:2402.05369.
NCA = PreferenceLoss("nca_pair", beta=0.1)

# BCO on pairs, arXiv:2404.04656, without its moving reward shift, as TRL 1.16.
BCO = PreferenceLoss("bco_pair", beta=0.1)

# SPPO with win probabilities of 1 and 0, arXiv:2405.00675.
SPPO_HARD = PreferenceLoss("sppo_hard", beta=0.1)

# Alignment via Optimal Transport, arXiv:2406.05882, paired and unpaired. The loss depends on the batch that is sorted.
AOT = PreferenceLoss("sigmoid", beta=0.1, match="aot")
AOT_UNPAIRED = PreferenceLoss("sigmoid", beta=0.1, match="aot_unpaired")

# Anchored Preference Optimization, arXiv:2408.06266: zero where the chosen answers are better than the model's own,
# down where they are worse.
APO_ZERO = PreferenceLoss("apo_zero", beta=0.1)
APO_DOWN = PreferenceLoss("apo_down", beta=0.1)

# DiscoPOP, arXiv:2406.08414, with its tau of 0.05.
DISCOPOP = PreferenceLoss("discopop", beta=0.1)

# DPO of another f-divergence, arXiv:2309.16240, is replace(DPO, transform=...): Power(-1.0) forward KL, Power(a - 1)
# TRL's alpha divergence of coefficient a, JensenShannon() itself. With them TRL's ipo and sigmoid_norm have
# length="reward_mean".

# LD-DPO, arXiv:2409.06411: tokens past the length of the pair's shorter answer count alpha, which is to be tuned;
# 0.5 is not a default.
LD_DPO = PreferenceLoss("sigmoid", beta=0.1, ld_alpha=0.5)

# Weighted Preference Optimization, arXiv:2406.11827. Left to the caller: log sum_v p_v^2 of each token.
WPO = PreferenceLoss("sigmoid", beta=0.1, weighting="wpo")

# Iterative Reasoning Preference Optimization, arXiv:2404.19733: DPO plus the chosen answer's NLL, a mean over each
# answer's tokens. TRL's sft term is a mean over the batch's tokens: Sft("token_mean").
RPO = PreferenceMix(((1.0, DPO), (1.0, Sft())))

# Mixed Preference Optimization, arXiv:2411.10442, with the weights that TRL gives for it.
MPO = PreferenceMix(((0.8, DPO), (0.2, BCO), (1.0, Sft())))

# SimPO, arXiv:2405.14734: mean log-probabilities, no reference, a target margin gamma = `margin`, not gamma / beta. The
# margin is TRL's default; the paper tunes both numbers.
SIMPO = PreferenceLoss("sigmoid", beta=2.0, reference=False, length="mean", margin=0.5)

# AlphaPO, arXiv:2501.03884: SimPO with the reward (1 - p^-alpha) / alpha. Tune alpha; 0.25 is not a default.
ALPHAPO = PreferenceLoss("sigmoid", beta=2.0, reference=False, length="mean", margin=0.5, transform=Power(-0.25))

# Contrastive Preference Optimization, arXiv:2401.08417: no reference, and the chosen answer's NLL, a sum over its
# tokens. TRL averages that term over the batch's tokens: Sft("token_mean").
CPO = PreferenceMix(((1.0, PreferenceLoss("sigmoid", beta=0.1, reference=False)), (1.0, Sft("seq_mean_token_sum"))))

# Odds Ratio Preference Optimization, arXiv:2403.07691, lambda = 0.1. Its metrics' rewards are the log-odds.
# TRL's NLL counts the prompt's tokens too, over the whole batch.
ORPO = PreferenceMix(
    (
        (1.0, Sft()),
        (0.1, PreferenceLoss("sigmoid", beta=1.0, reference=False, length="mean", transform=LogOdds())),
    )
)

# Kahneman-Tversky Optimization, arXiv:2402.01306. Left to the caller: kl, from answers to other prompts.
KTO = UnpairedPreferenceLoss(beta=0.1, baseline="kl")

# APO-zero on single answers, arXiv:2408.06266, as in TRL's KTOTrainer.
APO_ZERO_UNPAIRED = UnpairedPreferenceLoss(beta=0.1, baseline="zero")

PREFERENCE_PRESETS: dict[str, PreferenceLoss | PreferenceMix | UnpairedPreferenceLoss] = {
    "DPO": DPO,
    "CDPO": CDPO,
    "ROBUST_DPO": ROBUST_DPO,
    "DPO_NORM": DPO_NORM,
    "SLIC": SLIC,
    "IPO": IPO,
    "EXO": EXO,
    "NCA": NCA,
    "BCO": BCO,
    "SPPO_HARD": SPPO_HARD,
    "AOT": AOT,
    "AOT_UNPAIRED": AOT_UNPAIRED,
    "APO_ZERO": APO_ZERO,
    "APO_DOWN": APO_DOWN,
    "DISCOPOP": DISCOPOP,
    "LD_DPO": LD_DPO,
    "WPO": WPO,
    "RPO": RPO,
    "MPO": MPO,
    "SIMPO": SIMPO,
    "ALPHAPO": ALPHAPO,
    "CPO": CPO,
    "ORPO": ORPO,
    "KTO": KTO,
    "APO_ZERO_UNPAIRED": APO_ZERO_UNPAIRED,
}
