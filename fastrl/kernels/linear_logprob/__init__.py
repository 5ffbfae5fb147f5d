"""(hidden states, head, ids) -> (log-probabilities, entropy), and back.

Every backend module has `forward` and `backward` with the signatures of `reference`. `save` says what `forward` keeps
for `backward`:

| save     | kept                                          | matmuls forward + backward |
|----------|-----------------------------------------------|----------------------------|
| `none`   | nothing: no gradient                          | 1                          |
| `stream` | nothing: logits are recomputed                | 1 + 3                      |
| `keep`   | probabilities, in the input dtype             | 1 + 2                      |
| `frozen` | d logp / d hidden (and dH / d hidden)         | 2 + 0                      |
"""
