"""From a configuration to everything a run needs, all of it checked before anything is written."""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fastrl import env
from fastrl.algorithms import ActorCritic, Algorithm
from fastrl.check import require, sentence
from fastrl.data.pack import Counts, count, pack
from fastrl.data.plan import ModelShape
from fastrl.data.prompts import load_prompts, split
from fastrl.data.sampler import PromptSampler
from fastrl.kernels.registry import resolve
from fastrl.model.adapter import WithoutAdapter, add_adapter
from fastrl.model.attention import prepare_attention
from fastrl.model.load import embedding_rows, fingerprint, load_model, stop_token_ids, vocab_size
from fastrl.model.policy import Policy
from fastrl.model.router import about_router
from fastrl.model.scalar import Critic, ScalarModel, SharedCritic, load_scalar_model
from fastrl.rewards import RewardSuite, resolve_reward
from fastrl.rollout.base import Sampler, SamplingParams
from fastrl.rollout.transformers_sampler import TransformersSampler
from fastrl.trainer.checkpoint import Checkpoint
from fastrl.trainer.config import AdapterConfig, RunConfig, TrainConfig, build_algorithm
from fastrl.trainer.optimizer import CRITIC, POLICY, MasterOptimizer
from fastrl.trainer.precision import DTYPES, Speed, from_json, resolve_dtype
from fastrl.trainer.resume import require_same_model, resumable
from fastrl.trainer.trackers import require_installed
from fastrl.types import Group, MicroBatch, Prompt

if TYPE_CHECKING:
    from typing import TypeVar

    from peft import PeftModel

    Config = TypeVar("Config", bound=RunConfig)
    Loaded = TypeVar("Loaded")


@dataclass(frozen=True)
class Run:
    """The parts of a training run."""

    config: TrainConfig
    directory: Path
    device: torch.device
    policy: Policy
    reference: Policy | WithoutAdapter | None  # frozen, with a KL term only
    adapted: PeftModel | None  # the policy's model as peft sees it
    critic: Critic | None  # of PPO
    tokenizer: PreTrainedTokenizerBase
    sampler: Sampler
    stop_token_ids: tuple[int, ...]
    prompts: PromptSampler
    held_out: list[Prompt]
    rewards: RewardSuite
    algorithm: Algorithm
    layout: str
    shape: ModelShape
    fingerprint: str  # of the model's weights before training
    resumed: Checkpoint | None  # where the run goes on from, instead of the model's own weights
    speed: Speed
    said: tuple[str, ...]  # of rows that were left out

    def sampling(self, *, seed: int) -> SamplingParams:
        """How this run samples, with one step's seed."""
        rollout = self.config.rollout
        return SamplingParams(
            max_new_tokens=rollout.max_new_tokens,
            temperature=rollout.temperature,
            top_p=rollout.top_p,
            top_k=rollout.top_k,
            stop_token_ids=self.stop_token_ids,
            seed=seed,
            vocab_size=self.policy.head.vocab_size,
        )

    def greedy(self, *, seed: int) -> SamplingParams:
        """The same, but the most probable token each time."""
        return replace(self.sampling(seed=seed), temperature=0.0, top_p=1.0, top_k=0)

    def models(self) -> dict[str, PreTrainedModel]:
        """What is trained, by the name of its folder; the head of a critic that shares the trunk is no model."""
        critic = {"critic": self.critic.model} if isinstance(self.critic, ScalarModel) else {}
        return {"model": self.adapted or self.policy.model} | critic

    @torch.no_grad()
    def score(self, batch: MicroBatch, *, old: bool, temperature: float) -> MicroBatch:
        """With what this run's algorithm reads of the weights before the update: `old_logps` when asked for,
        `ref_logps` where there is a reference, `values` where there is a critic."""
        shared = isinstance(self.critic, SharedCritic)
        hidden = self.policy.hidden(batch) if old or shared else None
        values = self.critic.of(hidden) if shared else self.critic.values(batch) if self.critic else None
        return replace(
            batch,
            old_logps=self.policy.read(hidden, batch, temperature=temperature) if old else batch.old_logps,
            ref_logps=self.reference.score(batch, temperature=temperature) if self.reference else None,
            values=values,
        )

    def state(self) -> dict[str, Any]:
        """What changes as the run goes on and is neither a weight nor a prompt, as JSON can hold it."""
        return {"kl_coef": self.algorithm.kl.coef} if isinstance(self.algorithm, ActorCritic) else {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Goes on from where `state` was taken."""
        if isinstance(self.algorithm, ActorCritic):
            self.algorithm.kl.coef = state["kl_coef"]

    def pack(self, groups: Sequence[Group]) -> list[MicroBatch]:
        """Micro-batches of the samples that train, in this run's layout and token budget."""
        return pack(
            groups,
            layout=self.layout,
            max_tokens=self.config.tokens_per_batch,
            device=self.device,
            shape=self.shape,
            mask_truncated=self.config.loss.mask_truncated,
        )

    def count(self, groups: Sequence[Group]) -> Counts:
        """What the loss over these groups is normalised by; the same samples as `pack` takes."""
        return count(groups, mask_truncated=self.config.loss.mask_truncated)


def prepare(config: TrainConfig, *, trains: bool = True) -> Run:
    """Loads and checks model, prompts and rewards.

    Args:
        trains: put the adapter into the model that the recipe trains; a model that is only judged is left as it is.

    Raises:
        ValueError: something the configuration names does not exist or does not fit together.
    """
    config, resumed, device, speed = begin(config)
    rewards = RewardSuite(
        [resolve_reward(reward.name, **reward.options) for reward in config.rewards],
        [reward.weight for reward in config.rewards],
        max_failure_fraction=config.max_failure_fraction,
    )
    algorithm = build_algorithm(config)

    model, tokenizer = load_model(config.model, DTYPES[config.dtype], quantize=config.adapter.quantize, device=device)
    began = fingerprint(model)
    if resumed:
        require_same_model(resumed, config.model, began)
    layout = prepare_attention(model, config.layout, dtype=DTYPES[config.dtype])
    if config.gradient_checkpointing:
        checkpoint_activations(model)
    adapted = with_adapter(model, config.adapter) if trains else None
    speed.up(model, config)
    tokens = vocab_size(model, tokenizer)
    policy = Policy(model, vocab_size=tokens, **config.of_policy())
    reference = None
    if algorithm.needs_ref and adapted:
        reference = WithoutAdapter(policy, adapted)
    elif algorithm.needs_ref:
        frozen, _ = load_model(config.model, DTYPES[config.dtype])
        speed.up(frozen, config)
        prepare_attention(frozen.to(device).requires_grad_(False), config.layout, dtype=DTYPES[config.dtype])
        reference = Policy(frozen, vocab_size=tokens, **config.of_policy())

    critic = load_critic(config, policy, tokenizer, layout) if algorithm.needs_critic else None
    if isinstance(critic, ScalarModel):
        speed.up(critic.model, config)

    prompts, held_out, said = load_task(config, tokenizer)
    longest = max(len(prompt.token_ids) for prompt in (*prompts, *held_out)) + config.rollout.max_new_tokens
    room = positions(model, *([critic.model] if isinstance(critic, ScalarModel) else []))
    require(
        longest <= room,
        "TrainConfig",
        "task.max_prompt_tokens, rollout.max_new_tokens",
        f"prompts and completions within the model's {room} positions",
        f"{longest} tokens",
    )
    require_known_tokens(model, config.model, (prompt.token_ids for prompt in (*prompts, *held_out)))
    require(
        config.tokens_per_batch >= longest,
        "TrainConfig",
        "tokens_per_batch",
        f"at least {longest}, the longest prompt plus rollout.max_new_tokens",
        config.tokens_per_batch,
    )
    stops = stop_token_ids(model, tokenizer, also=config.rollout.stop, **config.task.template_options)
    if trains and model.generation_config is not None:  # whoever generates with what is saved stops where we did
        model.generation_config.eos_token_id = list(stops) if len(stops) > 1 else stops[0]
    # For rewards that draw from them; last, because libraries that are imported on first use draw from them too.
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(config.seed)
    run = Run(
        config=config,
        directory=resumed.run_dir if resumed else free_directory(config.directory()),
        device=device,
        policy=policy,
        reference=reference,
        adapted=adapted,
        critic=critic,
        tokenizer=tokenizer,
        sampler=TransformersSampler(model),
        stop_token_ids=stops,
        prompts=PromptSampler(prompts, seed=config.seed),
        held_out=held_out,
        rewards=rewards,
        algorithm=algorithm,
        layout=layout,
        shape=ModelShape.of(model),
        fingerprint=began,
        resumed=resumed,
        speed=speed,
        said=(*filter(None, [about_router(model, config.router_aux_loss_coef)]), *said),
    )
    run.sampling(seed=config.seed)  # refuses here what the first rollout would refuse
    return run


def begin(config: Config) -> tuple[Config, Checkpoint | None, torch.device, Speed]:
    """What every run does first.

    Returns the configuration with its dtype resolved, the checkpoint that it goes on from, its device, and how it
    computes there.

    Raises:
        ModuleNotFoundError: a tracker is not installed.
        ValueError: there is no such checkpoint, device or backend.
    """
    require_installed(config.log_to)
    resumed = resumable(config) if config.resume else None
    if config.threads:
        torch.set_num_threads(config.threads)
    env.reuse_freed_memory()
    torch.manual_seed(config.seed)
    device = pick_device(config.device)
    resolve("linear_logprob", config.backend, device)  # refuses here what a step would refuse
    resolved, precision = resolve_dtype(config, device, resumed)
    known = from_json(resumed.json("state.json").get("linear", {})) if resumed else {}
    return resolved, resumed, device, Speed(precision, config.dtype, known)


def make_optimizers(run: Run) -> dict[str, MasterOptimizer]:
    """The policy's, which also has the head of a critic that shares its trunk; and that of a critic with its own."""
    config = run.config
    each = config.optimizer.steps_per_rollout * config.optimizer.epochs_per_rollout
    updates, without_policy = config.steps * each, config.ppo.critic_warmup * each
    params = [*run.policy.model.parameters()]
    if isinstance(run.critic, SharedCritic):
        params += run.critic.head.parameters()
    optimizers = {POLICY: MasterOptimizer(params, config.optimizer, updates - without_policy)}
    if isinstance(run.critic, ScalarModel):
        rates = replace(config.optimizer, lr=config.ppo.critic_lr)
        optimizers[CRITIC] = MasterOptimizer(run.critic.model.parameters(), rates, updates)
    return optimizers


def with_adapter(model: PreTrainedModel, config: AdapterConfig) -> PeftModel | None:
    """Puts the adapters that `config` asks for into the model; None where it asks for none, and every weight trains."""
    if not config.rank:
        return None
    return add_adapter(model, rank=config.rank, alpha=config.alpha, targets=config.targets)


def load_critic(config: TrainConfig, policy: Policy, tokenizer: PreTrainedTokenizerBase, layout: str) -> Critic:
    """The critic that `config.ppo` asks for, on the policy's device, fit for the same micro-batches.

    Raises:
        ValueError: it has another tokenizer, or cannot attend as the layout needs.
    """
    if config.ppo.critic == "shared":
        return SharedCritic(policy)
    name = config.ppo.critic_model or config.model
    model, its_tokenizer = load_scalar_model(name, DTYPES[config.dtype])
    same = its_tokenizer.get_vocab() == tokenizer.get_vocab()
    got = f"{name!r}, whose tokenizer is another"
    require(same, "TrainConfig", "ppo.critic_model", "a model with the policy's tokenizer", got)
    require_same_rows("TrainConfig", "ppo.critic_model", model, policy.model, len(tokenizer))
    prepare_attention(model.to(policy.model.device), layout, dtype=DTYPES[config.dtype])
    if config.gradient_checkpointing:
        checkpoint_activations(model)
    return ScalarModel(model, router_aux_loss_coef=config.router_aux_loss_coef)


def positions(*models: PreTrainedModel) -> float:
    """The longest sequence that each of the models has positions for; infinite where none has a limit."""
    limits = [getattr(model.config.get_text_config(), "max_position_embeddings", None) for model in models]
    return min(filter(None, limits), default=math.inf)


def require_known_tokens(model: PreTrainedModel, name: str, sequences: Iterable[Sequence[int]]) -> None:
    """Refuses token ids past a model's embeddings, as of a tokenizer that is not the model's.

    Raises:
        ValueError: there are some.
    """
    rows, highest = embedding_rows(model), max(map(max, filter(None, sequences)), default=0)
    got = f"{highest} from the tokenizer"
    require(highest < rows, "prepare", "model", f"token ids below {rows}, the embeddings of {name!r}", got)


def require_same_rows(op: str, argument: str, model: PreTrainedModel, policy: PreTrainedModel, tokens: int) -> None:
    """Refuses a second model whose embeddings end before the tokens that the policy reads and writes.

    Rows past the tokenizer's are padding, of which models of one family have unequal numbers.

    Raises:
        ValueError: they do.
    """
    rows, its_rows = embedding_rows(model), embedding_rows(policy)
    needed = min(its_rows, tokens)
    require(rows >= needed, op, argument, f"embeddings of the policy's {needed} tokens", f"a model with {rows}")


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Makes the model's layers compute their activations again in the backward pass instead of keeping them.

    In evaluation mode: transformers' own way needs training mode, in which models drop and perturb what no module shows
    (functional dropout, layer drop, router noise).

    Raises:
        ValueError: the model has no layers that transformers would checkpoint.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    got = f"{type(model).__name__}, whose layers are none that transformers checkpoints"
    require(bool(layers), "checkpoint_activations", "model", "one with such layers", got, "Leave it off.")
    for layer in layers:
        layer.__class__ = _recomputed(type(layer))


@cache
def _recomputed(kind: type[torch.nn.Module]) -> type[torch.nn.Module]:
    """A kind of layer that keeps its inputs alone."""

    def forward(self: torch.nn.Module, *args: Any, **named: Any) -> Any:
        if not torch.is_grad_enabled():
            return kind.forward(self, *args, **named)
        return checkpoint(partial(kind.forward, self, **named), *args, use_reentrant=False, preserve_rng_state=False)

    return type(kind.__name__, (kind,), {"forward": forward, "__doc__": kind.__doc__, "__module__": kind.__module__})


def load_task(
    config: TrainConfig, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[Prompt], list[Prompt], tuple[str, ...]]:
    """(training prompts, held-out prompts, what was said about rows that were left out); no question is in both."""
    task = config.task

    def load() -> tuple[list[Prompt], list[Prompt]]:
        prompts = load_prompts(
            task.source,
            tokenizer,
            size=task.size,
            seed=config.seed,
            options=task.options,
            chat=task.chat,
            system=task.system,
            suffix=task.suffix,
            template_options=task.template_options,
            max_prompt_tokens=task.max_prompt_tokens,
        )
        return split(prompts, task.held_out, config.seed)

    (train, held_out), said = with_warnings(load)
    return train, held_out, said


def with_warnings(load: Callable[[], Loaded]) -> tuple[Loaded, tuple[str, ...]]:
    """What `load` returns, and what it warned the user of, to be said once there is a log."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loaded = load()
    return loaded, tuple(str(one.message) for one in caught if issubclass(one.category, UserWarning))


def pick_device(name: str) -> torch.device:
    """The device of that name; "auto" is a GPU when there is one.

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


def free_directory(wanted: Path) -> Path:
    """`wanted`, or `wanted`-2, -3, ...: the first that does not exist, so that no run overwrites another."""
    number, directory = 1, wanted
    while directory.exists():
        number += 1
        directory = wanted.with_name(f"{wanted.name}-{number}")
    return directory
