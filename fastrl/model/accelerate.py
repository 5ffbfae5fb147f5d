"""Runs a model's linear layers on fastrl's CPU products wherever a probe finds them no slower than torch's."""

from __future__ import annotations

import logging
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from functools import cache
from math import inf
from statistics import median
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional

from fastrl.check import choice
from fastrl.kernels import native
from fastrl.model.attention import in_float32
from fastrl.ops.derivatives import once_differentiable
from fastrl.ops.linear import main_grad, native_linear, native_lora_linear, refusal

log = logging.getLogger(__name__)

ROWS = (8, 64, 256)  # rows in the probe: decoding a few rows, many, and a micro-batch with its gradients
WIDEST = 2048  # largest layer size in the probe: part of a larger layer tells as much
ROUNDS = 5
CLEARLY = 1.05  # torch must be faster by more than noise to be chosen, so that choices are stable
HOPELESS = 4.0  # slower by this factor, one round is enough

Shape = tuple[int, int]  # outputs, width
Choices = dict[torch.dtype, dict[Shape, tuple[bool, ...]]]  # whether native serves each of ROWS


def accelerate_cpu(model: nn.Module, *, linear: str = "auto", known: Choices | None = None) -> Acceleration:
    """Makes a model's layers compute with fastrl's CPU products, in place; `undo()` on the result reverts it.

    y = x W^T + b and its gradients, as `fastrl.ops.linear`. Layers, parameters, state_dict, optimizers, hooks and names
    stay the same objects: only a layer's class changes, to one whose forward picks the faster of native and torch for
    its shape, dtype and number of rows. Adapters (peft's LoRA) and frozen layers compute only the products they need.
    On CPUs where torch's attention is slow in bfloat16, a transformers model computes it in float32. Other kinds of
    layers, other devices, and dtypes that native does not support stay on torch; the log names them once. Applying it
    twice changes nothing more.

    Args:
        model: a model on a CPU, with or without adapters.
        linear: auto measures, about 100 ms per dtype; native uses the native products for every shape, so two processes
            compute the same bits.
        known: `choices` of an earlier call; new measurements are added to it.

    Returns:
        Acceleration: what was covered, with `undo()`; also a context manager that undoes on exit.

    Raises:
        ValueError: `linear` is neither of these.
    """
    choice("accelerate_cpu", "linear", linear, ("auto", "native"))
    layers, others = [], Counter()
    for module in model.modules():
        reason = _refuses(module.weight) if type(module) is nn.Linear else None
        if reason is not None:
            others[f"Linear ({reason})"] += 1
        elif type(module) in (nn.Linear, nn.Embedding, _lora_linear()):
            layers.append(module)
        elif _multiplies(module):
            others[type(module).__name__] += 1
    choices = None if linear == "native" else {} if known is None else known
    for layer in layers if choices is not None else ():
        if isinstance(layer, nn.Linear):
            _chosen(choices, layer.weight.dtype, tuple(layer.weight.shape))
    if others:
        log.info("accelerate_cpu: torch's own: %s", ", ".join(f"{count} {name}" for name, count in others.items()))
    return Acceleration(model, layers, dict(others), choices)


class Acceleration:
    """What `accelerate_cpu` changed.

    covered: number of layers that compute natively where that is faster. others: kinds of layers that stay on torch,
    with counts. choices: measurements by dtype and shape; None if nothing was measured.
    """

    def __init__(
        self, model: nn.Module, layers: list[nn.Module], others: dict[str, int], choices: Choices | None
    ) -> None:
        self.covered = sum(not isinstance(layer, nn.Embedding) for layer in layers)
        self.others, self.choices = others, choices
        self._layers, self._attention = layers, in_float32(model)
        for layer in layers:
            layer.choices = choices
            layer.__class__ = _FASTER.get(type(layer)) or _native_lora(type(layer))

    def undo(self) -> None:
        """Restores every layer; calling it again does nothing."""
        for layer in self._layers:
            layer.__class__ = layer.former
            del layer.choices
        self._layers = []
        self._attention()

    def __enter__(self) -> Acceleration:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.undo()


class NativeLinear(nn.Linear):
    """A `torch.nn.Linear` that uses the faster of two products."""

    choices: Choices | None  # None: native for every shape
    former = nn.Linear

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """(..., in_features) to (..., out_features)."""
        if _native_serves(self, input):
            return native_linear(input, self.weight, self.bias)
        return functional.linear(input, self.weight, self.bias)


@cache
def _native_lora(former: type[nn.Module]) -> type[nn.Module]:
    """peft's LoRA layer with the products of its single plain adapter fused."""

    def forward(self: Any, x: torch.Tensor, *args: Any, **named: Any) -> torch.Tensor:
        """As peft's."""
        adapter, base = None if args or named else _one_plain_adapter(self), self.base_layer
        if adapter is None or x.dtype != base.weight.dtype or not _native_serves(base, x):
            return former.forward(self, x, *args, **named)
        down, up = self.lora_A[adapter].weight, self.lora_B[adapter].weight
        return native_lora_linear(x, base.weight, base.bias, down, up, self.scaling[adapter])

    about = {"forward": forward, "former": former, "__doc__": _native_lora.__doc__, "__module__": __name__}
    return type("NativeLoraLinear", (former,), about)


class NativeEmbedding(nn.Embedding):
    """A `torch.nn.Embedding` whose gradient touches only the rows that were read, if the weight has a `main_grad`.

    torch's gradient is a dense matrix, mostly zeros, that is made and added up for every micro-batch.
    """

    former = nn.Embedding

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """(...) ids to (..., embedding_dim)."""
        place = main_grad(self.weight)
        plain = type(input) is torch.Tensor and self.weight.device.type == "cpu" and not torch.compiler.is_compiling()
        if place is None or not plain or not torch.is_grad_enabled() or self.max_norm or self.scale_grad_by_freq:
            return super().forward(input)
        return _Embedding.apply(input, self.weight, place, self.padding_idx)


_FASTER = {nn.Linear: NativeLinear, nn.Embedding: NativeEmbedding}


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, ids: torch.Tensor, weight: torch.Tensor, place: torch.Tensor, padding: int | None
    ) -> torch.Tensor:
        ctx.save_for_backward(ids)
        ctx.place, ctx.padding = place, padding
        return functional.embedding(ids, weight)

    @staticmethod
    @once_differentiable("accelerate_cpu: the embedding")
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[None, ...]:
        (ids,) = ctx.saved_tensors
        ids, dy = ids.flatten(), dy.reshape(-1, dy.shape[-1])
        if ctx.padding is not None:
            kept = (ids != ctx.padding).nonzero().squeeze(1)
            ids, dy = ids[kept], dy[kept]
        ctx.place.index_add_(0, ids, dy.to(ctx.place.dtype))
        return None, None, None, None


class Probe(NamedTuple):
    """Seconds of a layer's products per round, natively and in torch."""

    native: list[float]
    torch: list[float]

    def prefers_native(self) -> bool:
        """Whether native is not clearly slower."""
        return median(self.native) <= CLEARLY * median(self.torch)


@cache
def choose(shape: Shape, dtype: torch.dtype) -> tuple[bool, ...]:
    """Whether native serves a layer of this shape, for each of ROWS; constant within a process."""
    return tuple(probe(shape, (dtype,), rows)[dtype].prefers_native() for rows in ROWS)


def probe(shape: Shape, dtypes: Iterable[torch.dtype], rows: int, *, rounds: int = ROUNDS) -> dict[torch.dtype, Probe]:
    """Times a layer's products, all dtypes and both ways in each round: y, and for the largest of ROWS also dx and dW.

    Calls that are slower by a factor of HOPELESS are timed only once. Without native kernels their time is infinite.
    """
    outputs, width = (min(size, WIDEST) for size in shape)
    products: dict[str, Callable[..., torch.Tensor]] = {"torch": functional.linear}
    if native.refuses(torch.device("cpu")) is None:
        products = {"native": native_linear} | products
    calls: dict[tuple[torch.dtype, str], Callable[[], object]] = {}
    with torch.device("cpu"):
        for dtype in dtypes:
            # Any values but zeros and denormals will do; linspace leaves the run's generators alone.
            x, weight, dy = (
                torch.linspace(0.5, 1.5, a * b).view(a, b).to(dtype)
                for a, b in ((rows, width), (outputs, width), (rows, outputs))
            )
            inputs = (x.requires_grad_(), weight.requires_grad_()) if rows == max(ROWS) else ()
            for name, product in products.items():
                calls[dtype, name] = _step(product, x, weight, dy, inputs)
    seconds: dict[tuple[torch.dtype, str], list[float]] = {key: [] for key in calls}
    best = inf
    for turn in range(rounds + 1):
        for key, call in calls.items():
            if turn and median(seconds[key]) > HOPELESS * best:
                continue
            began = time.perf_counter()
            call()
            took = time.perf_counter() - began
            # The first turn pages memory in and wakes threads, so it counts only if it is the only one.
            seconds[key] = [took] if turn < 2 else [*seconds[key], took]
        best = min(map(median, seconds.values()))
    return {dtype: Probe(seconds.get((dtype, "native"), [inf]), seconds[dtype, "torch"]) for dtype in dtypes}


def is_linear(module: object) -> bool:
    """Whether a module is a plain `torch.nn.Linear`, accelerated or not."""
    return type(module) in (nn.Linear, NativeLinear)


def served(layer: NativeLinear, dtype: torch.dtype, rows: int) -> bool:
    """Whether the layer computes `rows` rows of this dtype natively."""
    return layer.choices is None or _chosen(layer.choices, dtype, tuple(layer.weight.shape))[_size(rows)]


def _step(
    product: Callable[..., torch.Tensor],
    x: torch.Tensor,
    weight: torch.Tensor,
    dy: torch.Tensor,
    inputs: tuple[torch.Tensor, ...],
) -> Callable[[], object]:
    """A function that multiplies once and computes the gradients of `inputs`."""

    def call() -> object:
        with torch.autocast("cpu", enabled=False), torch.set_grad_enabled(bool(inputs)):
            y = product(x, weight, None)
            return torch.autograd.grad(y, inputs, dy) if inputs else y

    return call


def _native_serves(layer: NativeLinear, x: torch.Tensor) -> bool:
    """Whether the layer's product with these rows is native."""
    if refusal(x, layer.weight, layer.bias) is not None:
        return False
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
    return served(layer, dtype, x.numel() // x.shape[-1])


def _chosen(choices: Choices, dtype: torch.dtype, shape: Shape) -> tuple[bool, ...]:
    """The choice for a shape, measured when the dtype is first used."""
    known = choices.setdefault(dtype, {})
    if shape not in known:
        known[shape] = choose(shape, dtype)
    return known[shape]


def _size(rows: int) -> int:
    """The index in ROWS that represents this number of rows."""
    return sum(rows >= 2 * least for least in ROWS[:-1])


def _lora_linear() -> type[nn.Module] | None:
    """peft's LoRA class for linear layers; None if peft was not imported, in which case no model has one."""
    layer = sys.modules.get("peft.tuners.lora.layer")
    return None if layer is None else layer.Linear


def __getattr__(name: str) -> object:
    """The class of accelerated adapters, by the name that pickling a whole model uses."""
    if name == "NativeLoraLinear" and _lora_linear() is not None:
        return _native_lora(_lora_linear())
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _one_plain_adapter(layer: Any) -> str | None:
    """The name of a LoRA layer's only active adapter, if it is plain LoRA."""
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    if layer.disable_adapters or layer.merged or len(active) != 1:
        return None
    (name,) = active
    down, up, dropout = layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name]
    parts = (layer.base_layer, down, up)
    plain = (
        name not in layer.lora_variant
        and all(type(part) is NativeLinear and not _hooked(part) for part in parts)
        and up.bias is None
        and {down.weight.dtype, up.weight.dtype} == {layer.base_layer.weight.dtype}
        and not layer.base_layer.weight.requires_grad
        and (isinstance(dropout, nn.Identity) or not dropout.training or not getattr(dropout, "p", 1.0))
    )
    return name if plain else None


def _hooked(module: nn.Module) -> bool:
    """Whether the module has hooks, which a fused product would skip."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def _refuses(weight: torch.Tensor) -> str | None:
    """Why native does not take a layer with this weight, or None."""
    return refusal(weight[:1] if weight.dim() == 2 else weight, weight, None)


def _multiplies(module: nn.Module) -> bool:
    """Whether a module that is not a plain linear layer multiplies its own weight with its input."""
    weight = vars(module).get("_parameters", {}).get("weight")
    own = weight is not None and weight.dim() >= 2 and not isinstance(module, nn.Embedding)
    return own and not isinstance(module, NativeLinear)
