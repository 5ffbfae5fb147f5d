"""(hidden states, head, ids) -> (log-probabilities, entropy), and back.

Every backend module has `forward` and `backward` with the signatures of `reference`. `save` says what `forward` stores
for `backward`:

| save        | stored                                | matmuls forward + backward |
|-------------|---------------------------------------|----------------------------|
| `none`      | nothing: no gradient                  | 1                          |
| `recompute` | nothing: logits are computed again    | 1 + 3                      |
| `store`     | probabilities, in the input dtype     | 1 + 2                      |
| `frozen`    | d logp / d hidden (and dH / d hidden) | 2 + 0                      |
"""
