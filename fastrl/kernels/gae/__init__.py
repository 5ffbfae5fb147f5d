"""`forward(rewards, values, mask, cu_seqlens, gamma, lam) -> (advantages, returns)`, all (N,) but cu_seqlens (S + 1,).

One layout: sequence s is `[cu_seqlens[s], cu_seqlens[s + 1])`, and what lies behind the last one is padding. `mask` is
bool, `cu_seqlens` int64. What `rewards` and `values` hold where the mask is False is documented in `fastrl.ops.gae`.
"""
