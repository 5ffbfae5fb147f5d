"""Chooses a run's dtype and linear-layer implementation by timing them on this machine."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import torch

from fastrl.distributed import ALONE, World
from fastrl.model.accelerate import Choices, accelerate_cpu
from fastrl.model.load import linear_shapes
from fastrl.model.race import CLEARLY, bfloat16_ratio, from_json, to_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from fastrl.trainer.checkpoint import Checkpoint
    from fastrl.trainer.config import TrainConfig

    Config = TypeVar("Config", bound=TrainConfig)

SLOW = 1.1  # warn from this ratio on if the recipe names bfloat16


class Precision(NamedTuple):
    """A dtype, and bfloat16's time as a multiple of float32's; None if not measured."""

    dtype: str
    ratio: float | None = None

    def __str__(self) -> str:
        if self.ratio is None:
            return self.dtype
        return f"{self.dtype} (bfloat16 takes {self.ratio:.2f} times as long as float32 here)"


def resolve_dtype(config: Config, device: torch.device, resumed: Checkpoint | None = None) -> tuple[Config, Precision]:
    """The configuration with its dtype resolved, and the reason for the choice.

    GPUs take bfloat16 if they support it. CPUs take it only if a benchmark of the model's shapes, on the
    implementation that will run, takes at most CLEARLY of float32's time. A resumed run keeps its dtype.
    """
    if resumed and config.dtype == "auto":
        return replace(config, dtype=resumed.manifest["recipe"]["dtype"]), Precision(
            resumed.manifest["recipe"]["dtype"]
        )
    if device.type == "cuda":
        chosen = Precision("bfloat16" if torch.cuda.is_bf16_supported() else "float32")
    elif device.type == "cpu":
        shapes = linear_shapes(config.model)
        ratio = bfloat16_ratio(shapes, native=config.linear != "torch" and not config.quantized) if shapes else None
        chosen = Precision("bfloat16" if ratio is not None and ratio <= CLEARLY else "float32", ratio)
    else:
        chosen = Precision("float32")
    return (
        (config, chosen._replace(dtype=config.dtype))
        if config.dtype != "auto"
        else (replace(config, dtype=chosen.dtype), chosen)
    )


@dataclass
class Speed:
    """How a run computes: its dtype, and the implementation of its linear layers."""

    precision: Precision
    asked: str  # the dtype in the recipe
    choices: Choices  # saved in checkpoints, so that a resumed run computes the same bits
    world: World = ALONE
    layers: int = 0  # number of layers on fastrl's products, over all models of the run
    others: Counter[str] = field(default_factory=Counter)  # kinds of layers that stay on torch

    def up(self, model: PreTrainedModel, config: TrainConfig) -> None:
        """Applies `accelerate_cpu` as configured; of several processes, one takes the time."""
        if config.linear == "torch" or next(model.parameters()).device.type != "cpu":
            return
        if not self.world.first:
            self.choices.update(from_json(self.world.from_first(None)))
        made = accelerate_cpu(model, linear=config.linear, known=self.choices)
        if self.world.first:
            self.world.from_first(to_json(self.choices))
        self.layers += made.covered
        self.others += Counter(made.others)

    def about(self) -> dict[str, str]:
        """Lines for the start of a run and for its env.json."""
        lines = {"dtype": str(self.precision)}
        if self.layers:
            torchs = ", ".join(f"{count} {name}" for name, count in self.others.items())
            lines["linear"] = f"{self.layers} layers on fastrl's products" + (
                f"; torch's own: {torchs}" if torchs else ""
            )
        return lines

    def show(self) -> None:
        """Prints these lines and the warnings, for commands without a log."""
        for name, line in self.about().items():
            print(f"{name}: {line}")
        for message in self.warnings():
            print(f"warning: {message}")

    def warnings(self) -> list[str]:
        """A warning if the recipe asks for a slow dtype."""
        ratio = self.precision.ratio
        if self.asked != "bfloat16" or ratio is None or ratio < SLOW:
            return []
        return [f"dtype: bfloat16 takes {ratio:.1f} times as long as float32 on this machine; auto takes float32."]
