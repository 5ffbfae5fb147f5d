"""(hidden states, head, ids, advantages) -> (loss, gradients) in one pass, for losses that separate per token."""
