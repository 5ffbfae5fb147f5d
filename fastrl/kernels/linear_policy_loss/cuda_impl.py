"""`linear_policy_loss` with torch's matmuls and CUDA kernels between them; csrc/cuda/linear_logprob.cu. The kernel that
reads a row's logits also derives the row's loss: before the next matmul it is then known which rows have a gradient."""

from __future__ import annotations

from functools import partial

import torch

from fastrl.kernels.cuda import DTYPES, address, extension, launch
from fastrl.kernels.inputs import LossTokens
from fastrl.kernels.linear_logprob import cuda_impl as linear_logprob
from fastrl.kernels.linear_logprob.chunked import Statistics
from fastrl.kernels.linear_policy_loss.chunked import forward_in_chunks
from fastrl.kernels.native import dense
from fastrl.kernels.policy_loss import cuda_impl as policy_loss
from fastrl.spec import PolicyLoss

ABSENT = 0  # an address


class Chunk(linear_logprob.Chunk):
    """As `linear_logprob.cuda_impl.Chunk`, and as `linear_policy_loss.chunked.Chunk` in one launch."""

    def read_with_loss(
        self,
        logits: torch.Tensor,
        entropy: bool,
        spec: PolicyLoss,
        tokens: LossTokens,
        rows: torch.Tensor,
        poisoned: torch.Tensor | None,
    ) -> tuple[Statistics, torch.Tensor, torch.Tensor]:
        """Statistics of hidden W^T (n, V), and d loss / d logps and d entropy (n,)."""
        known, dlogps, dentropy = self.unknown(logits, entropy), *(logits.new_empty(len(logits)) for _ in range(2))
        targets = self.targets if poisoned is None else self.targets.masked_fill(poisoned[rows], self.vocabulary)
        context = LossTokens(*map(dense, tokens))
        loss = extension(logits.device).PolicyLossCall(
            policy_loss.packed_spec(spec, logits.device),
            DTYPES[logits.dtype],
            len(rows),
            ABSENT,  # log-probabilities: the kernel has them
            *map(address, (context.advantages, context.weights)),
            ABSENT,  # the mask: true for every row of a chunk
            *map(address, (context.old_logps, context.ref_logps, context.sampling_logps)),
            *(ABSENT, ABSENT, 0),  # entropy, which the kernel has; sequences, which a separable loss does not read
            *(ABSENT, address(dlogps), address(dentropy), ABSENT),  # loss and metrics are reported over all rows
        )
        launch(
            "head_statistics_with_loss",
            logits.device,
            self._rows(targets, self.temperature),
            *map(address, known),
            address(rows),
            loss,
        )
        return known, dlogps, dentropy


forward = partial(forward_in_chunks, Chunk, policy_loss)
