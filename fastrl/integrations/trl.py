"""fastrl in TRL's trainers: `accelerate(trainer)`.

TRL computes every log-probability in one function of (hidden, head, ids), which its trainers reach through
`add_fused_lm_head`: GRPO, RLOO, DPO, KTO, SFT, AsyncGRPO. That function is replaced here; TRL's loss formulas stay.

| trainer | log-probabilities | `loss=True` |
|---|---|---|
| GRPO | yes | what `policy_spec` covers |
| RLOO | yes | only its completions without advantage are skipped: its ratio is of whole completions |
| DPO, KTO, SFT, AsyncGRPO | yes | no |
| Reward | no: it has no LM head | no |
| those of `trl.experimental` that read whole logits | no, refused by name | no |
"""

from __future__ import annotations

import importlib
from functools import partial
from types import MethodType, ModuleType
from typing import Any

import torch
from torch.distributed.tensor import DTensor, Partial

from fastrl import check
from fastrl.integrations.handle import Handle, check_version
from fastrl.integrations.trl_specs import normalizer, policy_spec, preference_spec
from fastrl.losses.linear_policy import linear_policy_loss
from fastrl.model.accelerate import accelerate_cpu
from fastrl.ops.linear_logprob import linear_logprob

HOST = "fastrl.integrations.trl"
TESTED = ("1.15", "1.17")
__all__ = ["FusedLogprob", "accelerate", "normalizer", "policy_spec", "preference_spec"]
EXTRAS = ("log_sum_sq_probs", "mean_logits", "is_top1")


def accelerate(trainer: Any = None, *, loss: bool = False, cpu: bool = False) -> Handle:
    """Has TRL compute log-probabilities with `fastrl.linear_logprob`.

    The results are TRL's own to rounding: log-probabilities, entropies, what its metrics read, and all gradients. Only
    tokens with a label go through the head, and only those with a gradient come back through it, also on CPUs.

    The function is one for the whole process, so every trainer in it is accelerated until `undo()`. A second call
    changes nothing. Call it before a trainer is made whose constructor computes log-probabilities
    (`precompute_ref_log_probs` of DPO), so that both sides of its ratios come from one function.

    Args:
        trainer: a trainer, or a model of one; refused if it does not go through that function. None checks nothing.
        loss: for a `GRPOTrainer`, form the policy loss's gradient while the logits are at hand: 3 matmuls instead of 4
            where logits are not stored, and none after the first for tokens without advantage. The loss that is
            returned and all metrics are still computed by TRL; its gradient is fastrl's. In a single process,
            completions without advantage go through the model without a gradient; for an `RLOOTrainer` that is all.
        cpu: also run the model's linear layers on fastrl's CPU products, by `fastrl.accelerate_cpu`.

    Returns:
        A handle; `undo()`, or leaving its block, gives TRL its own objects back.

    Raises:
        ImportError: TRL is not installed, or has no such function (it has since 1.15).
        ValueError: the trainer stores whole logits, or `loss=True` and an option of it is not covered; by name.
    """
    check_version("trl", *TESTED)
    utils = _utils()
    model = trainer if isinstance(trainer, torch.nn.Module) else getattr(trainer, "model", None)
    _require_fused(trainer, model)
    if loss or cpu:
        _require(trainer is not None, "trainer", "a trainer, for loss=True or cpu=True", None, "Pass the trainer.")
    pieces = cpu and any(hasattr(parameter, "ds_id") for parameter in model.parameters())
    _require(not pieces, "cpu", "False with DeepSpeed's ZeRO-3, whose layers are in pieces", cpu)
    one_pass = _one_pass(trainer) if loss else None  # refuses
    handle = Handle(HOST)
    if utils._ChunkedLogProbFunction is not FusedLogprob:
        handle.replace(utils, "_ChunkedLogProbFunction", FusedLogprob)
        if hasattr(utils, "_use_triton"):  # it decides whether tokens without a label are left out; 1.15 always does
            handle.replace(utils, "_use_triton", _always)
        handle.replace(utils, "DTensor", _Nothing)  # what it would gather by itself
    if one_pass is not None and not isinstance(vars(trainer).get("_compute_loss"), _Skipping):
        handle.replace(trainer, "_compute_loss", one_pass(trainer))
    if cpu:
        handle.on_undo(accelerate_cpu(model).undo)
    return handle


class FusedLogprob:
    """`trl.kernels.ChunkedLogProbFunction` on fastrl: the same arguments and the same five results."""

    one_pass: _OnePass | None = None  # the loss that is being computed, if any

    @classmethod
    def apply(
        cls,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = ("entropy", *EXTRAS),
    ) -> tuple[torch.Tensor | None, ...]:
        """(logps, entropy, log_sum_sq_probs, mean_logits, is_top1), (N,) each, float32; None where not asked for.

        hidden (N, H), weight (V, H), bias (V,) or None, targets (N,) without ignored ones. The weight and the bias may
        be DTensors; they are gathered. `chunk_size` is not read.
        """
        weight, bias = (None if x is None else _whole(x) for x in (weight, bias))
        if not torch.is_autocast_enabled(hidden.device.type):
            weight, bias = weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype)
        options: dict[str, Any] = {
            "bias": bias,
            "temperature": temperature,
            "softcap": final_logit_softcapping,
            "logit_scale": logit_scale,
        }
        if cls.one_pass is not None:
            return cls.one_pass.logps(hidden, weight, targets, options)
        asked: dict[str, Any] = {name: name in outputs for name in ("entropy", *EXTRAS)}
        out = linear_logprob(hidden, weight, targets, **options, **asked)
        return tuple(getattr(out, name, None) for name in ("logps", "entropy", *EXTRAS))


class _Skipping:
    """A trainer's `_compute_loss`, with completions without an advantage going through the model without a gradient.

    They go through it for the metrics. Several processes take the same steps through their models' collectives, so
    there nothing is divided.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer, self.host = trainer, trainer._compute_loss
        self.inputs: dict[str, Any] = {}

    def __call__(self, model: torch.nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
        self.inputs = inputs
        trains = self._with_gradient()
        call = self._all if trains is None else partial(self._in_two, trains)
        try:
            return self.host(partial(call, model), inputs)
        finally:
            self.inputs = {}

    def _with_gradient(self) -> torch.Tensor | None:
        """(B,) bool: completions that can have a gradient; None if all go together."""
        inputs, trainer = self.inputs, self.trainer
        advantages = inputs["advantages"]  # (B,) or (B, T)
        rows = (advantages.reshape(len(advantages), -1) != 0).any(-1)
        together = trainer.accelerator.num_processes > 1 or trainer.aux_loss_enabled or not torch.is_grad_enabled()
        if together or rows.all():
            return None
        rows[0] |= ~rows.any()  # a loss needs a graph
        return rows

    def _all(self, model: torch.nn.Module, **batch: Any) -> Any:
        self._before(None)
        return model(**batch)

    def _before(self, rows: torch.Tensor | None) -> None:
        """Called before a model's call with a gradient; rows (B,) bool: the completions in it, or None: all."""

    def _in_two(self, trains: torch.Tensor, model: torch.nn.Module, **batch: Any) -> Any:
        """What the model gives for the whole batch, from a call with gradients and one without."""
        known = ("input_ids", "attention_mask", "labels")
        if set(batch) - {*known, "fused_lm_head"}:
            return self._all(model, **batch)  # images and the like do not lie row by row
        parts = [{name: batch[name][rows] for name in known} for rows in (trains, ~trains)]
        with torch.no_grad():
            silent = model(**parts[1], fused_lm_head=True)
        self._before(trains)
        out = model(**parts[0], fused_lm_head=True)
        for name in ("log_probs", "entropy", "label_mask"):
            own, other = getattr(out, name), getattr(silent, name)
            joined = own.new_zeros(len(trains), *own.shape[1:])
            joined = joined.masked_scatter(trains.unsqueeze(-1), own).masked_scatter(~trains.unsqueeze(-1), other)
            setattr(out, name, joined)
        return out


class _OnePass(_Skipping):
    """`GRPOTrainer._compute_loss` with the gradient formed in the forward pass of the head.

    TRL's own method runs, on log-probabilities that are constants to it: the loss's value and the metrics are its own.
    Beside them stands fastrl's loss, whose gradient takes the place of the one that they would have had.
    """

    def __init__(self, trainer: Any) -> None:
        super().__init__(trainer)
        self.rows: torch.Tensor | None = None  # (B,) bool: the completions of the model's next call; None: all
        self.loss: torch.Tensor | None = None

    def __call__(self, model: torch.nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
        self.loss = None
        try:
            value = super().__call__(model, inputs)
        finally:
            FusedLogprob.one_pass = None
        ours, self.loss = self.loss, None
        check.require(ours is not None, HOST, "model", "one that calls TRL's fused head", type(model).__name__)
        return value + (ours - ours.detach())

    def _with_gradient(self) -> torch.Tensor | None:
        return super()._with_gradient() if policy_spec(self.trainer).kl is None else None

    def _before(self, rows: torch.Tensor | None) -> None:
        self.rows, FusedLogprob.one_pass = rows, self

    def logps(
        self, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, options: dict[str, Any]
    ) -> tuple[torch.Tensor | None, ...]:
        """What TRL's function returns, without a gradient of their own; computes the loss on the way."""
        inputs, trainer, FusedLogprob.one_pass = self.inputs, self.trainer, None
        completion = inputs["completion_mask"].bool()  # (B, T); the N tokens here are those of `rows`, row by row
        mask = completion & inputs["tool_mask"].bool() if "tool_mask" in inputs else completion
        labelled = completion if self.rows is None else completion & self.rows.unsqueeze(-1)
        got = f"{len(targets)} labelled tokens where the completions have {int(labelled.sum())}"
        check.require(len(targets) == labelled.sum(), HOST, "model", "a head that sees the completions", got)
        advantages = inputs["advantages"].unsqueeze(-1) if inputs["advantages"].dim() == 1 else inputs["advantages"]
        if trainer.use_vllm and trainer.vllm_importance_sampling_correction:
            advantages = advantages * inputs["importance_sampling_ratio"]  # every surrogate is linear in |A|
        advantages = advantages.expand(completion.shape)
        given = {name: inputs.get(f"{name[:-6]}_per_token_logps") for name in ("old_logps", "ref_logps")}
        lengths = labelled.sum(-1)
        out = linear_policy_loss(
            hidden,
            weight,
            targets,
            advantages[labelled].float(),
            policy_spec(trainer),
            mask=mask[labelled],
            cu_seqlens=torch.cat((lengths.new_zeros(1), lengths.cumsum(0))),
            normalizer=normalizer(trainer, inputs, mask),
            entropy=True,
            **{name: None if x is None else x[labelled].float() for name, x in given.items()},
            **options,
        )
        self.loss = out.loss
        # Where the loss does not look, TRL must not find a ratio that overflows: 0 times infinity is not 0.
        elsewhere = out.logps if given["old_logps"] is None else given["old_logps"][labelled].float()
        logps = torch.where(mask[labelled], out.logps, elsewhere)
        return _Constant.apply(logps, out.loss), out.entropy, None, None, None


class _Constant(torch.autograd.Function):
    """Log-probabilities that take no gradient, yet hang on the graph of the loss, where DDP looks for what was used."""

    @staticmethod
    def forward(ctx: Any, logps: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:
        return logps.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[None, torch.Tensor]:
        return None, grad.new_zeros(())


def _one_pass(trainer: Any) -> type[_Skipping]:
    """What takes the place of the trainer's loss; refuses trainers and options that are not covered."""
    rloo = importlib.import_module("trl").RLOOTrainer
    if not isinstance(trainer, rloo):
        policy_spec(trainer)
        return _OnePass
    own = type(trainer)._compute_loss is not rloo._compute_loss
    do = "Leave it to TRL: accelerate without loss=True."
    _require(not own, "trainer", "an RLOOTrainer with TRL's loss", "one with its own _compute_loss", do)
    return _Skipping


def _whole(weight: torch.Tensor) -> torch.Tensor:
    """A head, gathered where it is in shards; then its gradient is the mean of all processes', as FSDP takes it.

    TRL's own call of `full_tensor` says nothing of the gradient, so each shard would get that of one process' tokens.
    Of a head that DeepSpeed's ZeRO-3 has partitioned, TRL gathers the values only until this forward is done: a copy
    serves the backward pass.
    """
    if hasattr(weight, "ds_id"):
        return weight.clone()
    if not isinstance(weight, DTensor):
        return weight
    return weight.full_tensor(grad_placements=[Partial("avg")] * weight.device_mesh.ndim)


class _Nothing:
    """No tensor is one, so that TRL hands over a head as it is."""


def _always(device: torch.device) -> bool:
    return True


def _utils() -> ModuleType:
    utils = importlib.import_module("trl.trainer.utils")
    if not all(hasattr(utils, name) for name in ("_ChunkedLogProbFunction", "add_fused_lm_head", "DTensor")):
        got = f"trl {importlib.import_module('trl').__version__} without its fused LM head"
        raise ImportError(check.sentence(HOST, "trl", f"{TESTED[0]} or newer", got, "Upgrade TRL."))
    return utils


def _require_fused(trainer: Any, model: Any) -> None:
    """Refuses a trainer whose model was not given TRL's fused head."""
    if trainer is None:
        return
    fused = isinstance(model, torch.nn.Module) and any(map(_is_fused, model.modules()))
    do = "It reads whole logits, or has no LM head: there is no log-probability here to replace."
    expected = "a trainer on TRL's fused LM head, or its model"
    _require(fused, "trainer", expected, type(trainer).__name__, do)


def _is_fused(module: torch.nn.Module) -> bool:
    """Whether TRL's `add_fused_lm_head` gave this module its forward, below whatever has been wrapped around it."""
    forward = vars(module).get("forward")
    while forward is not None:
        function = forward.__func__ if isinstance(forward, MethodType) else forward
        if "_ChunkedLogProbFunction" in getattr(getattr(function, "__code__", None), "co_names", ()):
            return True
        forward = getattr(function, "__wrapped__", None)
    return False


def _require(condition: bool, argument: str, expected: str, got: object, do: str = "") -> None:
    check.require(condition, f"{HOST}.accelerate", argument, expected, got, do)
