"""Which dtype a run computes in, and on which products: what this machine is quick at, found out by a race."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import torch

from fastrl.model.accelerate import Choices, accelerate_cpu
from fastrl.model.load import linear_shapes
from fastrl.model.race import CLEARLY, bfloat16_ratio

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from fastrl.trainer.checkpoint import Checkpoint
    from fastrl.trainer.config import TrainConfig

    Config = TypeVar("Config", bound=TrainConfig)

SLOW = 1.1  # from which factor on bfloat16 asked for by name is worth a warning


class Precision(NamedTuple):
    """A dtype, and what bfloat16's time is as a multiple of float32's; None where that was not measured."""

    dtype: str
    ratio: float | None = None

    def __str__(self) -> str:
        if self.ratio is None:
            return self.dtype
        return f"{self.dtype} (bfloat16 takes {self.ratio:.2f} times as long as float32 here)"


def resolve_dtype(config: Config, device: torch.device, resumed: Checkpoint | None = None) -> tuple[Config, Precision]:
    """The configuration with a dtype in the place of auto, and why that one.

    On a GPU bfloat16 where it has it. On a CPU bfloat16 only where a race at the model's own shapes, on the products
    that will run, shows that it takes at most CLEARLY of float32's time. A resumed run keeps its own.
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
    """How a run computes: its dtype, and the products of its linear layers."""

    precision: Precision
    asked: str  # the dtype of the recipe
    choices: Choices  # a checkpoint keeps them, so that a resumed run computes the same bits
    layers: int = 0  # on fastrl's products, of all models of the run
    others: Counter[str] = field(default_factory=Counter)  # kinds of layers that stay torch's

    def up(self, model: PreTrainedModel, config: TrainConfig) -> None:
        """`accelerate_cpu`, as the configuration has it."""
        if config.linear == "torch" or next(model.parameters()).device.type != "cpu":
            return
        made = accelerate_cpu(model, linear=config.linear, known=self.choices)
        self.layers += made.covered
        self.others += Counter(made.others)

    def about(self) -> dict[str, str]:
        """For the first lines of a run, and its env.json."""
        lines = {"dtype": str(self.precision)}
        if self.layers:
            torchs = ", ".join(f"{count} {name}" for name, count in self.others.items())
            lines["linear"] = f"{self.layers} layers on fastrl's products" + (
                f"; torch's own: {torchs}" if torchs else ""
            )
        return lines

    def show(self) -> None:
        """Prints both, for a command that keeps no log."""
        for name, line in self.about().items():
            print(f"{name}: {line}")
        for message in self.warnings():
            print(f"warning: {message}")

    def warnings(self) -> list[str]:
        """What to say to somebody who asked for a slow dtype."""
        ratio = self.precision.ratio
        if self.asked != "bfloat16" or ratio is None or ratio < SLOW:
            return []
        return [f"dtype: bfloat16 takes {ratio:.1f} times as long as float32 on this machine; auto takes float32."]
