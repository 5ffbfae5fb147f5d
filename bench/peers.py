"""What fastrl is measured against. A peer is a function from an op's tensors to a provider; imports happen inside."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F

from bench.shapes import CLIP, GROUP, KL_COEF, HeadTensors, TokenTensors, grpo_loss
from bench.timing import Outputs, Provider

Logps = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]  # hidden, weight, targets -> logps


def build(op: str, names: Sequence[str], *tensors: Any) -> tuple[dict[str, Provider], dict[str, str]]:
    """(providers, absent with the reason) of the peers of `op`; no names: all of them, "none": none."""
    providers, absent = {}, {}
    for name in [] if list(names) == ["none"] else names or PEERS[op]:
        if name not in PEERS[op]:
            absent[name] = f"no peer for {op}; there are {', '.join(PEERS[op])}"
            continue
        try:
            providers[name] = PEERS[op][name](*tensors)
        except Exception as error:  # importing a package runs its code, which may raise anything: that is shown
            absent[name] = str(error) or type(error).__name__
    return providers, absent


def plain_logps(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """All logits, then a float32 log-softmax: the four lines in every hand-written loop."""
    logits = F.linear(hidden, weight)
    return logits.float().log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)


def _torch() -> Logps:
    return plain_logps


def _compile() -> Logps:
    return torch.compile(plain_logps, dynamic=False)


def _torch_lce() -> Logps:
    """torch's own fused op, chunked as its defaults say; its result has the dtype of its inputs."""
    loss, options = F.linear_cross_entropy, torch.nn.LinearCrossEntropyOptions()
    return lambda hidden, weight, targets: -loss(hidden, weight, targets, reduction="none", options=options)


def _trl() -> Logps:
    """What `GRPOTrainer` calls, with the chunk size it passes."""
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE as CHUNK

    def logps(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, CHUNK, None, 1.0, ())[0]

    return logps


def _liger() -> Logps:
    """What Liger's GRPO loss calls for each chunk of sequences."""
    from liger_kernel.chunked_loss.fused_linear_ppo import LigerFusedLinearPPOBase

    def logps(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return LigerFusedLinearPPOBase.chunk_forward(hidden.unsqueeze(0), weight, targets.unsqueeze(0)).squeeze(0)

    return logps


def _cce() -> Logps:
    """Apple's cut cross-entropy, without its filter of small gradients: the interface of cut-cross-entropy 25.1.1.

    Its backward takes hidden states of 16 bits only, and sums gradients in their dtype. Releases after it can sum in
    float32 (`impl="cce_exact"`), which this one refuses; they take these arguments too.
    """
    from cut_cross_entropy import linear_cross_entropy

    options = {"reduction": "none", "filter_eps": None, "impl": "cce"}
    return lambda hidden, weight, targets: -linear_cross_entropy(hidden, weight, targets, **options)


def _quack() -> Logps:
    """torch's matmul and QuACK's cross-entropy kernels, the gradient in place of the logits: quack-kernels 0.6.5.

    Its chunked and fused paths reduce to a mean or a sum over tokens: no loss with advantages can be made of them.
    """
    from quack.linear_cross_entropy import linear_cross_entropy_func

    options = {"reduction": "none", "inplace_backward": True}
    return lambda hidden, weight, targets: -linear_cross_entropy_func(hidden, weight, None, targets, **options)


def _verl() -> Logps:
    """veRL's Triton kernels, which give the entropy too: verl 0.9.1.

    They take contiguous CUDA tensors and hidden sizes that 128 divides, and always form both gradients. Importing them
    imports all of veRL, with Ray and tensordict.
    """
    from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy

    return lambda hidden, weight, targets: linear_cross_entropy(hidden, weight, targets, 1.0, "none")[0]


def with_gradients(head: HeadTensors, logps: Callable[[], torch.Tensor]) -> Provider:
    """Forward, and backward to whatever `head.wants`."""

    def run() -> Outputs:
        if not head.wants:
            with torch.no_grad():
                return {"logps": logps()}
        out = logps()
        gradients = torch.autograd.grad(out, head.inputs(), head.grad_logps.to(out.dtype))
        return {"logps": out.detach()} | _named(head, gradients)

    return run


def loss_with_gradients(head: HeadTensors, loss: Callable[[], torch.Tensor]) -> Provider:
    """A scalar loss, and backward to whatever `head.wants`."""

    def run() -> Outputs:
        out = loss()
        return {"loss": out.detach()} | _named(head, torch.autograd.grad(out, head.inputs()))

    return run


def _named(head: HeadTensors, gradients: Sequence[torch.Tensor]) -> Outputs:
    return {f"grad_{name}": gradient for name, gradient in zip(head.wants, gradients, strict=True)}


def _linear_logprob(make: Callable[[], Logps]) -> Callable[[HeadTensors], Provider]:
    def peer(head: HeadTensors) -> Provider:
        logps = make()
        return with_gradients(head, lambda: logps(head.hidden, head.weight, head.targets))

    return peer


def _linear_policy_loss(make: Callable[[], Logps]) -> Callable[[HeadTensors, TokenTensors], Provider]:
    def peer(head: HeadTensors, tokens: TokenTensors) -> Provider:
        logps, shape = make(), tokens.mask.shape
        return loss_with_gradients(
            head,
            lambda: grpo_loss(logps(head.hidden, head.weight, head.targets).float().view(shape), tokens, kl=False),
        )

    return peer


def _liger_linear_policy_loss(head: HeadTensors, tokens: TokenTensors) -> Provider:
    """All sequences in one chunk: its kernel splits tokens and vocabulary in any case, and small chunks are slower."""
    from liger_kernel.chunked_loss.grpo_loss import LigerFusedLinearGRPOLoss

    sequences, length = tokens.mask.shape
    loss = LigerFusedLinearGRPOLoss(
        beta=0.0,
        compiled=False,
        use_ref_model=False,
        chunk_size=sequences,
        epsilon_low=CLIP,
        epsilon_high=CLIP,
        loss_type="grpo",
    )
    return loss_with_gradients(
        head,
        lambda: loss(
            head.hidden.view(sequences, length, -1),
            head.weight,
            head.targets.view(sequences, length),
            tokens.mask.int(),
            tokens.advantages,
            old_per_token_logps=tokens.old_logps,
        )[0],
    )


def _logprob(make: Callable[[], Callable[[torch.Tensor, torch.Tensor], torch.Tensor]]) -> Callable[..., Provider]:
    def peer(logits: torch.Tensor, targets: torch.Tensor, grad_logps: torch.Tensor) -> Provider:
        logps = make()

        def run() -> Outputs:
            out = logps(logits, targets)
            (gradient,) = torch.autograd.grad(out, logits, grad_logps.to(out.dtype))
            return {"logps": out.detach(), "grad_logits": gradient}

        return run

    return peer


def _from_logits(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return logits.float().log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)


def _trl_from_logits() -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    from trl.trainer.utils import selective_log_softmax

    return selective_log_softmax


def _quack_from_logits() -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """QuACK's cross-entropy kernels, the gradient in memory of its own as everyone's here: quack-kernels 0.6.5."""
    from quack.cross_entropy import cross_entropy

    return lambda logits, targets: -cross_entropy(logits, targets, reduction="none")


def _policy_loss(loss: Callable[..., torch.Tensor]) -> Callable[[TokenTensors], Provider]:
    def peer(tokens: TokenTensors) -> Provider:
        def run() -> Outputs:
            out = loss(tokens.logps, tokens, kl=True)
            (gradient,) = torch.autograd.grad(out, tokens.logps)
            return {"loss": out.detach(), "grad_logps": gradient}

        return run

    return peer


def _liger_policy_loss(tokens: TokenTensors) -> Provider:
    from liger_kernel.chunked_loss.grpo_loss import LigerFusedLinearGRPOFunction

    mask = tokens.mask.int()

    def loss(logps: torch.Tensor, tokens: TokenTensors, *, kl: bool) -> torch.Tensor:
        return LigerFusedLinearGRPOFunction.ppo_loss_fn(
            logps,
            mask,
            tokens.advantages,
            mask,
            tokens.ref_logps,
            tokens.old_logps,
            CLIP,
            CLIP,
            KL_COEF if kl else 0.0,
            "grpo",
        )[0]

    return _policy_loss(loss)(tokens)


def gae_loop(
    rewards: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, gamma: float, lam: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The backward loop over tokens of TRL's and many other PPO trainers, right-padded sequences."""
    rewards, values = rewards * mask, values * mask
    nothing = torch.zeros_like(values[:, 0])
    advantages = _gae_steps(rewards, values, nothing, nothing, gamma, lam) * mask
    return advantages, advantages + values


def _gae_steps(
    rewards: torch.Tensor,
    values: torch.Tensor,
    following: torch.Tensor,
    last: torch.Tensor,
    gamma: float,
    lam: float,
) -> torch.Tensor:
    """The advantages of some steps, from the value and the advantage that follow them."""
    steps = []
    for step in reversed(range(values.shape[1])):
        last = rewards[:, step] + gamma * following - values[:, step] + gamma * lam * last
        following = values[:, step]
        steps.append(last)
    return torch.stack(steps[::-1], 1)


def grpo_loss_of_rewards(tokens: TokenTensors, rewards: torch.Tensor) -> torch.Tensor:
    """GRPO's advantages, then its loss."""
    advantages = group_normalised(rewards, 1e-6)
    return grpo_loss(tokens.logps, replace(tokens, advantages=advantages), kl=True)


def _group_policy_loss(loss: Callable[..., torch.Tensor]) -> Callable[[TokenTensors, torch.Tensor], Provider]:
    def peer(tokens: TokenTensors, rewards: torch.Tensor) -> Provider:
        def run() -> Outputs:
            out = loss(tokens, rewards)
            (gradient,) = torch.autograd.grad(out, tokens.logps)
            return {"loss": out.detach(), "grad_logps": gradient}

        return run

    return peer


COMPILED_STEPS = 64  # that torch.compile unrolls at a time: compiling all at once would take hours


def _compile_gae(rewards: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, gamma: float, lam: float) -> Provider:
    steps = torch.compile(_gae_steps, dynamic=False)

    def run() -> Outputs:
        live = mask.float()
        masked_rewards, masked_values = (x.split(COMPILED_STEPS, 1) for x in (rewards * live, values * live))
        following, last, parts = torch.zeros_like(values[:, 0]), torch.zeros_like(values[:, 0]), []
        for r, v in zip(masked_rewards[::-1], masked_values[::-1], strict=True):
            parts.append(steps(r, v, following, last, gamma, lam))
            following, last = v[:, 0], parts[-1][:, 0]
        advantages = torch.cat(parts[::-1], 1) * live
        return {"advantages": advantages, "returns": advantages + values * live}

    return run


def _torch_gae(rewards: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, gamma: float, lam: float) -> Provider:
    return lambda: dict(
        zip(("advantages", "returns"), gae_loop(rewards, values, mask.float(), gamma, lam), strict=True)
    )


def group_normalised(rewards: torch.Tensor, eps: float) -> torch.Tensor:
    """GRPO's advantages as one writes them: reshape, mean, standard deviation."""
    groups = rewards.view(-1, GROUP)
    return ((groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + eps)).view(-1)


def _torch_group_advantages(rewards: torch.Tensor, eps: float) -> Provider:
    return lambda: {"advantages": group_normalised(rewards, eps)}


LOGPS = {
    "torch": _torch,
    "compile": _compile,
    "lce": _torch_lce,
    "trl": _trl,
    "liger": _liger,
    "cce": _cce,
    "quack": _quack,
    "verl": _verl,
}


def layer_steps(product: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], layers: Any) -> Provider:
    """A provider of y, dx and dW of every layer; of y alone where nothing trains."""

    def run() -> Outputs:
        out: Outputs = {}
        for index, (x, weight, dy) in enumerate(zip(layers.xs, layers.weights, layers.dys, strict=True)):
            y = product(x, weight)
            out[f"y{index}"] = y.detach()
            if layers.trains:
                out[f"dx{index}"], out[f"dW{index}"] = torch.autograd.grad(y, (x, weight), dy)
        return out

    return run


def _torch_linear(layers: Any) -> Provider:
    return layer_steps(F.linear, layers)


def _torch_linear_float32(layers: Any) -> Provider:
    """The same layers held in float32: what somebody would do whose processor has no fast bfloat16."""
    parts = (tuple(t.detach().float().requires_grad_(t.requires_grad) for t in of) for of in layers[:3])
    return layer_steps(F.linear, type(layers)(*parts, layers.trains))


PEERS: dict[str, dict[str, Callable[..., Provider]]] = {
    "linear": {"torch": _torch_linear, "torch-float32": _torch_linear_float32},
    "linear_logprob": {name: _linear_logprob(make) for name, make in LOGPS.items()},
    "linear_policy_loss": {name: _linear_policy_loss(make) for name, make in LOGPS.items()}
    | {"liger": _liger_linear_policy_loss},
    "logprob": {
        "torch": _logprob(lambda: _from_logits),
        "compile": _logprob(lambda: torch.compile(_from_logits, dynamic=False)),
        "trl": _logprob(_trl_from_logits),
        "quack": _logprob(_quack_from_logits),
    },
    "policy_loss": {
        "torch": _policy_loss(grpo_loss),
        "compile": _policy_loss(torch.compile(grpo_loss, dynamic=False)),
        "liger": _liger_policy_loss,
    },
    "group_policy_loss": {
        "torch": _group_policy_loss(grpo_loss_of_rewards),
        "compile": _group_policy_loss(torch.compile(grpo_loss_of_rewards, dynamic=False)),
    },
    "gae": {"torch": _torch_gae, "compile": _compile_gae},
    "group_advantages": {"torch": _torch_group_advantages},
}
