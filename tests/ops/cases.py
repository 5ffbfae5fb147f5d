"""Inputs of the ops that contain the LM head, and the float64 expressions that they are compared with."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

IGNORE = -100
ORDERS = 16  # of summation, in which plain torch is measured

# (rows, hidden size, vocabulary), each with its reason.
SHAPES = {
    "rows in unequal chunks": (11, 8, 37),
    "nothing but one of each": (1, 1, 1),
    "a vocabulary of one": (5, 7, 1),
    "a hidden size of one": (6, 1, 9),
    "no rows": (0, 4, 5),
    "one row": (1, 16, 65),
    "a vocabulary that no block size divides (GPT-2)": (5, 4, 50257),
    "more rows than vocabulary": (131, 3, 2),
}


@dataclass
class Inputs:
    """Arguments of an op with the head inside."""

    hidden: torch.Tensor
    weight: torch.Tensor
    targets: torch.Tensor
    bias: torch.Tensor | None = None

    def leaves(self, *requires: str, dtype: torch.dtype | None = None) -> Inputs:
        """A copy whose named tensors are leaves that take a gradient, in `dtype` if given."""

        def leaf(name: str) -> torch.Tensor | None:
            tensor = getattr(self, name)
            if tensor is None:
                return None
            return tensor.detach().clone().to(dtype or tensor.dtype).requires_grad_(name in requires)

        return replace(self, hidden=leaf("hidden"), weight=leaf("weight"), bias=leaf("bias"))

    def reordered(self, seed: int) -> Inputs:
        """The same head with its hidden dimension in another order: equal but for the rounding of each dot product.

        One order may round a logit to the right value by luck; the error of plain torch is that of several orders.
        Seed 0 leaves the order as it is.
        """
        order = torch.randperm(self.hidden.shape[1], generator=torch.Generator().manual_seed(seed))
        if seed == 0:
            return self
        return replace(self, hidden=self.hidden[:, order], weight=self.weight[:, order])

    def grads(self) -> dict[str, torch.Tensor | None]:
        """The gradients, by name; None where there is none."""
        tensors = {"hidden": self.hidden, "weight": self.weight, "bias": self.bias}
        return {name: None if t is None else t.grad for name, t in tensors.items()}


def gaussian(
    rows: int,
    size: int,
    vocabulary: int,
    *,
    bias: bool = True,
    ignored: bool = True,
    dtype: torch.dtype = torch.float64,
) -> Inputs:
    """Random inputs with logits of a few units; every fifth row ignored."""
    targets = torch.randint(vocabulary, (rows,))
    if ignored:
        targets[1::5] = IGNORE
    return Inputs(
        torch.randn(rows, size, dtype=dtype),
        torch.randn(vocabulary, size, dtype=dtype) * 2 / size**0.5,
        targets,
        torch.randn(vocabulary, dtype=dtype) if bias else None,
    )


def peaked(rows: int, size: int, vocabulary: int, dtype: torch.dtype) -> Inputs:
    """What a trained model gives: half of the head's rows are copies of hidden states, one each, of rising length.

    A copy's logit is `size` times its length: the longest takes nearly all the probability (p_target > 0.999), the
    shortest leaves the distribution broad. Every third target is random instead (many p_target < 1e-12); every seventh
    row is ignored. Needs at least half as many rows as vocabulary.
    """
    copies = vocabulary // 2
    hidden, weight = torch.randn(rows, size), torch.randn(vocabulary, size) / 4
    weight[:copies] = hidden[:copies] * torch.linspace(0.02, 1.0, copies).unsqueeze(-1)
    targets = torch.arange(rows) % copies
    targets[1::3] = torch.randint(vocabulary, targets[1::3].shape)
    targets[3::7] = IGNORE
    return Inputs(hidden.to(dtype), weight.to(dtype), targets, torch.randn(vocabulary).to(dtype))


def dense_logits(
    inputs: Inputs,
    temperature: float | torch.Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    upcast: torch.dtype | None = None,
) -> torch.Tensor:
    """cap(logit_scale (h W^T + b)) / temperature; `upcast` is where plain torch leaves the working dtype."""
    z = torch.nn.functional.linear(inputs.hidden, inputs.weight, inputs.bias)
    z = z.to(upcast or z.dtype) * logit_scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    per_row = isinstance(temperature, torch.Tensor) and temperature.dim() > 0
    return z / (temperature.to(z.dtype).unsqueeze(-1) if per_row else temperature)


def dense_logprob(
    z: torch.Tensor, targets: torch.Tensor, ignore_index: int = IGNORE
) -> tuple[torch.Tensor, torch.Tensor]:
    """(logps, entropy) of finished logits by autograd's own operations; ignored rows are 0."""
    keep = targets != ignore_index
    log_p = z.log_softmax(-1)
    logps = log_p.gather(-1, targets.masked_fill(~keep, 0).long().unsqueeze(-1)).squeeze(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    return logps.masked_fill(~keep, 0), entropy.masked_fill(~keep, 0)


def dense(
    inputs: Inputs, *, ignore_index: int = IGNORE, upcast: torch.dtype | None = None, **options: object
) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition of `linear_logprob`, differentiable by autograd."""
    return dense_logprob(dense_logits(inputs, upcast=upcast, **options), inputs.targets, ignore_index)
