"""The models beside the policy, their adapters and optimizers, and whether they fit together."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fastrl.check import require, sentence
from fastrl.model.adapter import add_adapter, load_adapter
from fastrl.model.attention import prepare_attention
from fastrl.model.checkpointing import checkpoint_activations
from fastrl.model.load import embedding_rows, load_model
from fastrl.model.policy import Policy
from fastrl.model.race import DTYPES
from fastrl.model.scalar import Critic, ScalarModel, SharedCritic, load_scalar_model
from fastrl.trainer.config import AdapterConfig, TrainConfig
from fastrl.trainer.learner import Learner
from fastrl.trainer.optimizer import CRITIC, POLICY, MasterOptimizer
from fastrl.trainer.precision import Speed

if TYPE_CHECKING:
    from peft import PeftModel

SEPARATE_CRITIC_LR, SHARED_CRITIC_LR = 1e-5, 1e-4  # for a whole model; for a layer that starts at zero


def frozen(
    config: TrainConfig,
    name: str,
    learner: Learner,
    speed: Speed,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Policy:
    """A reference model on the policy's device, quantized as the policy is. Given `tokenizer`, its vocabulary must
    match."""
    dtype, policy = DTYPES[config.dtype], learner.policy
    model, other = load_model(name, dtype, quantize=config.adapter.quantize, device=learner.device)
    if tokenizer is not None:
        same = other.get_vocab() == tokenizer.get_vocab()
        got = f"{name!r}, whose {len(other.get_vocab())} tokens differ"
        do = "Its log-probabilities would belong to different tokens."
        op = type(config).__name__
        require(same, op, "reference", f"a model with the vocabulary of {config.model!r}", got, do)
        require_same_rows(op, "reference", model, policy.model, len(tokenizer))
    speed.up(model, config)
    prepare_attention(model.to(learner.device).requires_grad_(False), config.layout, dtype=dtype)
    return Policy(model, vocab_size=policy.head.vocab_size, **config.of_policy())


def load_critic(config: TrainConfig, policy: Policy, tokenizer: PreTrainedTokenizerBase, layout: str) -> Critic:
    """The configured critic, on the policy's device and ready for the same micro-batches.

    Raises:
        ValueError: it has another tokenizer, or does not support the attention that the layout needs.
    """
    if config.ppo.critic == "shared":
        return SharedCritic(policy)
    name = config.ppo.critic_model or config.model
    model, its_tokenizer = load_scalar_model(name, DTYPES[config.dtype])
    same = its_tokenizer.get_vocab() == tokenizer.get_vocab()
    got = f"{name!r}, which has a different tokenizer"
    require(same, "TrainConfig", "ppo.critic_model", "a model with the policy's tokenizer", got)
    require_same_rows("TrainConfig", "ppo.critic_model", model, policy.model, len(tokenizer))
    prepare_attention(model.to(policy.model.device), layout, dtype=DTYPES[config.dtype])
    if config.gradient_checkpointing:
        checkpoint_activations(model)
    return ScalarModel(model, router_aux_loss_coef=config.router_aux_loss_coef)


def with_adapter(model: PreTrainedModel, config: AdapterConfig) -> PeftModel | None:
    """Adds the configured adapters to the model; returns None if there are none and every weight trains."""
    if not config.rank:
        return None
    return add_adapter(model, rank=config.rank, alpha=config.alpha, targets=config.targets)


def trained_adapter(model: PreTrainedModel, config: TrainConfig) -> PeftModel:
    """Loads the adapter in folder `config.model` into `model`, its base model.

    Raises:
        ValueError: the recipe trains every weight, or its adapter settings differ.
    """
    adapter, do = config.adapter, "Or name a model saved with adapter.save=merged, to train every weight."
    expected = f"the rank of the adapter in {config.model!r}, to train it further"
    require(adapter.rank > 0, "TrainConfig", "adapter.rank", expected, adapter.rank, do)
    return load_adapter(model, config.model, rank=adapter.rank, alpha=adapter.alpha, targets=adapter.targets)


def make_optimizers(config: TrainConfig, learner: Learner) -> dict[str, MasterOptimizer]:
    """The optimizer of the policy, and of the critic if there is one."""
    each, critic, lr = config.optimizer.steps_per_rollout * config.optimizer.epochs_per_rollout, None, 0.0
    if isinstance(learner.critic, ScalarModel):
        critic, lr = learner.critic.model, SEPARATE_CRITIC_LR
    elif isinstance(learner.critic, SharedCritic):
        critic, lr = learner.critic.head, SHARED_CRITIC_LR
    updates, without_policy = config.steps * each, config.ppo.critic_warmup * each
    policy = MasterOptimizer(learner.policy.model.parameters(), config.optimizer, updates - without_policy)
    if critic is None:
        return {POLICY: policy}
    rates = replace(config.optimizer, lr=lr if config.ppo.critic_lr is None else config.ppo.critic_lr)
    return {POLICY: policy, CRITIC: MasterOptimizer(critic.parameters(), rates, updates)}


def restarting(learner: Learner) -> Callable[[Learner], None]:
    """A function that puts the policy back to the weights it has now, of which this keeps a copy, with a new optimizer.

    The step count starts at 0 again, as AdamW's correction of its first steps needs.
    """
    first = torch.cat(
        [weight.detach().flatten() for weight in learner.policy.model.parameters() if weight.requires_grad]
    )

    def restart(learner: Learner) -> None:
        optimizer = learner.optimizers[POLICY]
        tensors = {name: torch.zeros_like(buffer) for name, buffer in optimizer.tensors().items()}
        optimizer.load_tensors(tensors | {"weights": first}, steps=0)

    return restart


def positions(*models: PreTrainedModel) -> float:
    """The longest sequence that all models have positions for; infinite if none has a limit."""
    limits = [getattr(model.config.get_text_config(), "max_position_embeddings", None) for model in models]
    return min(filter(None, limits), default=math.inf)


def require_known_tokens(model: PreTrainedModel, name: str, sequences: Iterable[Sequence[int]]) -> None:
    """Refuses token ids outside a model's embeddings, which another model's tokenizer may produce.

    Raises:
        ValueError: there are some.
    """
    rows, highest = embedding_rows(model), max(map(max, filter(None, sequences)), default=0)
    got = f"{highest} from the tokenizer"
    require(highest < rows, "prepare", "model", f"token ids below {rows}, the embeddings of {name!r}", got)


def require_same_rows(op: str, argument: str, model: PreTrainedModel, policy: PreTrainedModel, tokens: int) -> None:
    """Refuses a second model that lacks embeddings for tokens of the policy.

    Embedding rows past the tokenizer's are padding, whose number differs between models of one family.

    Raises:
        ValueError: embeddings are missing.
    """
    rows, its_rows = embedding_rows(model), embedding_rows(policy)
    needed = min(its_rows, tokens)
    require(rows >= needed, op, argument, f"embeddings of the policy's {needed} tokens", f"a model with {rows}")


def pick_device(name: str) -> torch.device:
    """The device of that name; "auto" is a GPU if there is one.

    Raises:
        ValueError: torch knows no such device, or has none here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # AssertionError: torch without CUDA
        got = f"{name!r}: {str(error).splitlines()[0]}"
        raise ValueError(sentence("pick_device", "device", "auto, cpu or another that torch has here", got)) from error
    return device
