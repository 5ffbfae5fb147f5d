"""`forward(rewards (B,), group_ids (B,) int64, baseline, scale, eps) -> advantages (B,)`; NaN rewards are left out.

Rewards are shifted by their group's minimum before anything is summed. The differences between the members of a group
are all that a centred advantage depends on, and they are exact where the rewards are close to each other. So a large
common offset costs no digits, and a constant group is a group of zeros whose mean, deviations and spread are exactly
zero: 0.1 summed eight times is not 0.8 in floating point, and a spread of 1e-9 would turn that into an advantage.
The sums are float64 where the device has it.
"""
