"""Named algorithms as points in the space of `PolicyLoss`: change one with `dataclasses.replace`.

A preset is the loss alone. What the paper asks of the caller (advantages, normaliser, filters) is said beside it;
advantages are those of `fastrl.group_advantages` or `fastrl.gae`.
"""

from __future__ import annotations

from fastrl.spec import KL, Cispo, Clip, PolicyLoss, Reinforce, Sapo

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
RLOO = PolicyLoss(surrogate=Reinforce(), aggregate="seq_mean_token_sum")

# REINFORCE++, arXiv:2501.03262: PPO's clip without a critic. Left to the caller: advantages normalised over the whole
# batch, with the per-token k1 penalty in the reward.
REINFORCE_PP = PolicyLoss(surrogate=Clip(low=0.2, high=0.2), aggregate="token_mean")

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
}
