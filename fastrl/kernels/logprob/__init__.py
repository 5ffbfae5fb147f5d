"""(logits, ids) -> (log-probabilities, entropy), and back, for logits that are already in memory."""
