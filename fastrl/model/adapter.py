"""Low-rank adapters, arXiv:2106.09685: y = W x + (alpha / rank) B A x with W frozen. peft makes them."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fastrl.check import require
from fastrl.model.head import is_adapted
from fastrl.model.policy import Policy
from fastrl.types import MicroBatch

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

ALL_LINEAR = "all-linear"


def add_adapter(
    model: PreTrainedModel, *, rank: int, alpha: float, targets: Sequence[str] = (ALL_LINEAR,)
) -> PeftModel:
    """Freezes `model` and adds adapters to its layers, in place; only the adapters train, in the model's dtype.

    The layers may be in 4 bits (`load_model`): they stay frozen, and gradients pass through them to the adapters.

    Args:
        rank: rank of A (rank, in) and B (out, rank). B starts at zero, so the model is unchanged until it trains.
        targets: names of modules, such as q_proj or lm_head; or all-linear, which is every linear layer but the head.

    Returns:
        peft's view of the model, which saves only the adapter and can switch it off.

    Raises:
        ValueError: no module has such a name, or the model already has an adapter.
        ModuleNotFoundError: peft is not installed.
    """
    from peft import LoraConfig, get_peft_model

    # peft would replace the trained adapter by the new one.
    bare = not getattr(model, "peft_config", None)
    do = "Start from the folder of the adapter, to train it further, or from a model saved with adapter.save=merged."
    require(bare, "add_adapter", "model", "a model without an adapter", f"{type(model).__name__} with one", do)
    known = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    unknown = [target for target in targets if target != ALL_LINEAR and target not in known]
    require(not unknown, "add_adapter", "targets", f"names of {type(model).__name__}'s modules", ", ".join(unknown))
    whole = ALL_LINEAR if ALL_LINEAR in targets else list(targets)
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=whole, task_type="CAUSAL_LM")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*tie_word_embeddings")  # `merged` unties what needs it
        # peft would keep 16-bit adapters in float32; the optimizer's masters are float32 in any case.
        adapted = get_peft_model(model, config, autocast_adapter_dtype=False)
    return _in_dtype_of(model, adapted)


def _in_dtype_of(model: PreTrainedModel, adapted: PeftModel) -> PeftModel:
    for param in model.parameters():
        if param.requires_grad:  # adapters of 4-bit layers are float32 otherwise
            param.data = param.data.to(model.dtype)
    return adapted


def base_of(name: str) -> str:
    """The base model of the adapter in a folder; empty if the folder has no adapter."""
    path = Path(name) / "adapter_config.json"
    return json.loads(path.read_text(encoding="utf-8"))["base_model_name_or_path"] if path.is_file() else ""


def load_adapter(model: PreTrainedModel, folder: str, *, rank: int, alpha: float, targets: Sequence[str]) -> PeftModel:
    """Loads a trained adapter into its base model, in place, to train it further.

    Args:
        rank, alpha, targets: the recipe's settings, which must match the adapter's; targets of all-linear match any.

    Raises:
        ValueError: they do not match.
    """
    from peft import PeftConfig, PeftModel

    config = PeftConfig.from_pretrained(folder)
    has: dict[str, Any] = {"rank": getattr(config, "r", None), "alpha": float(getattr(config, "lora_alpha", 0.0))}
    asked: dict[str, Any] = {"rank": rank, "alpha": alpha}
    if ALL_LINEAR not in targets:
        named = {name.rpartition(".")[2] for name in config.target_modules}
        has["targets"], asked["targets"] = sorted(named), sorted(targets)
    for name, value in has.items():
        same = asked[name] == value
        require(same, "load_adapter", f"adapter.{name}", f"{value}, as in the adapter in {folder!r}", asked[name])
    adapted = PeftModel.from_pretrained(model, folder, is_trainable=True, autocast_adapter_dtype=False)
    return _in_dtype_of(model, adapted)


def merged(adapted: PeftModel) -> PreTrainedModel:
    """A plain copy of the model with the adapter merged into the weights.

    If the head shares its weight with the embeddings and has an adapter, the two are untied.
    """
    adapted = copy.deepcopy(adapted)
    model = adapted.get_base_model()
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    if is_adapted(head) and head.base_layer.weight is embeddings.weight:
        head.base_layer.weight = torch.nn.Parameter(embeddings.weight.detach().clone(), requires_grad=False)
        model.config.get_text_config().tie_word_embeddings = False
        model.config.tie_word_embeddings = False
    return adapted.merge_and_unload()


class WithoutAdapter:
    """A reference model that needs no memory: the policy's model with its adapter switched off."""

    def __init__(self, policy: Policy, adapted: PeftModel) -> None:
        self.policy, self.adapted = policy, adapted

    def score(self, batch: MicroBatch, *, temperature: float) -> torch.Tensor:
        """As `Policy.score`."""
        with self.adapted.disable_adapter():
            return self.policy.score(batch, temperature=temperature)
