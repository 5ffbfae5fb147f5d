"""axolotl: a plug-in that gives its trainers fastrl's head, listed under `plugins:`.

Read in the source of axolotl 0.19.0. Supervised runs go through `fastrl.integrations.hf`, preference and GRPO runs
through `fastrl.integrations.trl`; axolotl's own settings, trainers and losses stay.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel, ConfigDict

from fastrl import check
from fastrl.integrations.handle import Handle, check_version

OP = "fastrl.integrations.axolotl"
check_version("axolotl", "0.19", "0.20")

# Settings that replace the same loss or head, or read the logits.
FIGHTS = (
    "cut_cross_entropy",
    "liger_cross_entropy",
    "liger_fused_linear_cross_entropy",
    "chunked_cross_entropy",
    "flash_attn_cross_entropy",
    "unsloth_cross_entropy_loss",
    "dpo_use_liger_kernel",
    "trl.use_liger_loss",
    "use_eaft",
    "kd_trainer",
)
# Settings under which axolotl's GRPO computes log-probabilities by itself, and models without a head over tokens.
NOT_COVERED = ("trl.async_prefetch", "trl.use_data_producer", "reward_model", "process_reward_model")
SPLIT = ("tensor_parallel_size", "context_parallel_size")  # as a number above 1
RL = ("dpo", "ipo", "kto", "grpo", "gdpo")  # whose trainers are TRL's with the fused head


class Options(BaseModel):
    """The settings under `fastrl:`, arguments of `hf.accelerate`, or in a run with `rl:` of `trl.accelerate`.

    None leaves an argument at its default there.
    """

    model_config = ConfigDict(extra="forbid")

    logits: Literal["eval", "never"] | None = None
    memory: int | None = None
    backend: str | None = None
    loss: bool | None = None
    cpu: bool | None = None


SUPERVISED, OF_RL = ("logits", "memory", "backend", "cpu"), ("loss", "cpu")


class FastRLArgs(BaseModel):
    """What the plug-in adds to axolotl's configuration."""

    fastrl: Options | None = None


class FastRLPlugin(BasePlugin):
    """Supervised runs make no logits in training; DPO, KTO and GRPO runs get fastrl's log-probabilities.

    Raises:
        ValueError: a setting replaces the same loss, or is not covered; or as `hf.accelerate` and `trl.accelerate`.
        ImportError: a run with `rl:` has a TRL whose trainers do not share one log-probability.
    """

    def __init__(self) -> None:
        super().__init__()
        self.handles: list[Handle] = []

    def get_input_args(self) -> str:
        """Where axolotl finds the plug-in's settings."""
        return f"{__name__}.FastRLArgs"

    def register(self, cfg: Mapping[str, Any]) -> None:
        """Refuses a configuration as soon as it is read."""
        refuse(cfg)

    def post_model_load(self, cfg: Mapping[str, Any], model: Any) -> None:
        """Accelerates the model of a supervised run."""
        refuse(cfg)  # again: by now the other plug-ins have added their defaults
        if not cfg.get("rl"):
            from fastrl.integrations import hf

            self.handles.append(hf.accelerate(model, **options_of(cfg)))

    def post_trainer_create(self, cfg: Mapping[str, Any], trainer: Any) -> None:
        """Accelerates TRL in a run with `rl:`, if the trainer goes through what TRL's trainers share."""
        if cfg.get("rl"):
            from fastrl.integrations import trl

            self.handles.append(trl.accelerate(trainer, **options_of(cfg)))

    def post_train(self, cfg: Mapping[str, Any], model: Any) -> None:
        """Gives the model and TRL their own objects back."""
        while self.handles:
            self.handles.pop().undo()


def options_of(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that `fastrl:` sets.

    Raises:
        ValueError: one of them does not exist, or not for this kind of run.
    """
    chosen = Options(**(cfg.get("fastrl") or {})).model_dump(exclude_none=True)
    kind, allowed = ("with", OF_RL) if cfg.get("rl") else ("without", SUPERVISED)
    for name in chosen:
        check.require(name in allowed, OP, f"fastrl.{name}", f"one of {', '.join(allowed)}, {kind} rl", name)
    return chosen


def refuse(cfg: Mapping[str, Any]) -> None:
    """Refuses a configuration that would fight the plug-in, or that it does not cover; names the setting.

    Raises:
        ValueError: it is one.
    """
    for name in FIGHTS:
        value = _setting(cfg, name)
        check.require(not value, OP, name, "off", value, "It replaces the same loss, or reads the logits.")
    off = cfg.get("cut_cross_entropy") is False
    others = [name for name in cfg.get("plugins") or () if "cut_cross_entropy" in name and not off]
    do = "Remove it: both replace the loss."
    check.require(not others, OP, "plugins", "no cut_cross_entropy", ", ".join(others), do)
    for name in NOT_COVERED:
        value = _setting(cfg, name)
        check.require(not value, OP, name, "off", value, "The plug-in does not cover it.")
    for name in SPLIT:
        value = cfg.get(name) or 1
        check.require(value == 1, OP, name, "1", value, "The plug-in does not cover a split vocabulary or sequence.")
    rl = cfg.get("rl")
    if rl:
        kind = getattr(rl, "value", rl)
        do = "Its trainer makes logits: leave the plug-in out."
        check.require(kind in RL, OP, "rl", f"one of {', '.join(RL)}", repr(kind), do)
    options_of(cfg)


def _setting(cfg: Mapping[str, Any], name: str) -> Any:
    """The value of a dotted setting; None if there is none."""
    value: Any = cfg
    for key in name.split("."):
        value = value.get(key) if isinstance(value, Mapping) else getattr(value, key, None)
    return value
