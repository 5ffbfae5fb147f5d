"""`linear_policy_loss` with torch's matmuls and kernels between them."""

from __future__ import annotations

from functools import partial

from fastrl.kernels.linear_logprob.triton_impl import BUILDS, Chunk
from fastrl.kernels.linear_policy_loss.chunked import forward_in_chunks
from fastrl.kernels.policy_loss import triton_impl as policy_loss

__all__ = ["BUILDS", "forward"]

forward = partial(forward_in_chunks, Chunk, policy_loss)
