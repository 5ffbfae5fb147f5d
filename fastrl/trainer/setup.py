"""Builds a run from a configuration and checks everything before anything is written."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fastrl import env
from fastrl.algorithms import ActorCritic, Algorithm
from fastrl.algorithms.offline import Objective, RewardModelling, SupervisedTuning, pair_up
from fastrl.algorithms.ppo import Pretraining
from fastrl.check import require, sentence
from fastrl.data.plan import ModelShape
from fastrl.data.preferences import split_groups, with_end
from fastrl.data.sampler import PromptSampler
from fastrl.distributed import World, join
from fastrl.kernels.registry import resolve
from fastrl.model.adapter import WithoutAdapter, base_of
from fastrl.model.attention import prepare_attention
from fastrl.model.checkpointing import checkpoint_activations
from fastrl.model.load import fingerprint, load_model, stop_token_ids, vocab_size
from fastrl.model.policy import Policy
from fastrl.model.race import DTYPES, from_json
from fastrl.model.router import about_router
from fastrl.model.scalar import ScalarModel, about_padding, load_scalar_model
from fastrl.monitor.log import Callback
from fastrl.monitor.trackers import require_installed
from fastrl.rewards import RewardFunc, RewardSuite, resolve_reward
from fastrl.rollout.base import SamplingParams
from fastrl.rollout.interruption import Interruption
from fastrl.rollout.transformers_sampler import TransformersSampler
from fastrl.rollout.turns import Environment, Turns
from fastrl.sources import Ahead, Offline, Rollouts, Rounds, Sampling, Source
from fastrl.sources.rounds import FOLDER
from fastrl.trainer import checkpoint
from fastrl.trainer.build import build_algorithm
from fastrl.trainer.checkpoint import Checkpoint, model_of
from fastrl.trainer.config import AheadConfig, InterruptionConfig, TaskConfig, TrainConfig
from fastrl.trainer.evaluate import Evaluation, OnPrompts, OnRows
from fastrl.trainer.judges import begin_judges
from fastrl.trainer.learner import Learner
from fastrl.trainer.lock import free_directory
from fastrl.trainer.loop import Outcome, Run
from fastrl.trainer.models import (
    frozen,
    load_critic,
    make_optimizers,
    pick_device,
    positions,
    require_known_tokens,
    restarting,
    trained_adapter,
    with_adapter,
)
from fastrl.trainer.precision import Speed, resolve_dtype
from fastrl.trainer.reference import AskedOnce
from fastrl.trainer.resume import require_same_model, resumable
from fastrl.trainer.rows import buckets, load_rows, load_task, require_room, sampler_of
from fastrl.trainer.turns import prepare_turns
from fastrl.types import Prompt

if TYPE_CHECKING:
    from typing import TypeVar

    Config = TypeVar("Config", bound=TrainConfig)
    Loaded = TypeVar("Loaded")


@dataclass(frozen=True)
class _Made:
    """A source and what comes with it."""

    source: Source
    evaluations: list[Evaluation]
    said: tuple[str, ...]  # warnings about dropped rows
    once: AskedOnce | None = None


def train(config: TrainConfig) -> Outcome:
    """Trains as configured and returns how the run ended. Nothing is written until models, data and rewards are ready.

    `config.resume` continues a run in its own directory, as if it had never stopped.

    Raises:
        ValueError: the configuration cannot work; the message says why.
    """
    return prepare(config).train()


def evaluate_model(config: TrainConfig, model: str = "") -> dict[str, float]:
    """Evaluates `model`, by default the recipe's, on the recipe's held-out set and prints the results; writes nothing.

    The held-out set is that of a training run with the same data, seed and size. A loss with a reference model uses
    the recipe's, by default the model that the recipe trains.

    Raises:
        ValueError: the recipe holds nothing out.
    """
    held_out, name = (config.data if config.offline else config.task).held_out, "data" if config.offline else "task"
    require(held_out > 0, "evaluate_model", f"{name}.held_out", "at least 1", held_out)
    if build_algorithm(config).needs_ref:
        config = replace(config, reference=config.reference or config.model)
    run = prepare(replace(config, resume="", model=model or config.model), trains=False)
    if run.world.first:
        run.speed.show()
        for message in run.said:
            print(message)
    if run.once:
        replace(run.once, groups=run.evaluations[0].rows).fill_in(run.learner, None)
    return run.evaluate()


@dataclass(frozen=True)
class Given:
    """Objects that replace what a recipe names; None keeps the recipe's."""

    model: tuple[PreTrainedModel, PreTrainedTokenizerBase] | None = None
    rows: Sequence[Mapping[str, Any]] | None = None  # prompts or answers
    rewards: Sequence[tuple[RewardFunc, float]] | None = None
    algorithm: Algorithm | None = None
    environment: Callable[[], Environment] | None = None
    source: Source | None = None
    callbacks: Sequence[Callback] = ()
    evaluations: Sequence[Evaluation] = ()


def prepare(config: TrainConfig, given: Given | None = None, *, trains: bool = True) -> Run:
    """Loads and checks models, data and rewards.

    Args:
        given: objects that replace what the configuration names.
        trains: add the recipe's adapter to the model; False leaves a model that is only evaluated unchanged.

    Raises:
        ValueError: something in the configuration does not exist or does not fit.
    """
    given = given or Given()
    algorithm = given.algorithm or build_algorithm(config)
    config = replace(config, model=model_of(config.model), reference=model_of(config.reference))
    judges = not config.offline or config.task != TaskConfig()
    config, resumed, device, speed = begin(config)
    offline, dtype = config.offline, DTYPES[config.dtype]
    rewards = _rewards(config, given.rewards) if judges else None
    scalar, adapted = isinstance(algorithm, RewardModelling), None
    if given.model:
        model, tokenizer = given.model
    elif scalar:
        model, tokenizer = load_scalar_model(config.model, dtype)
    else:
        base = base_of(config.model) if trains else ""  # base model, if an adapter is trained further
        options = {"quantize": config.adapter.quantize, "device": device, "tokenizer": config.model if base else ""}
        model, tokenizer = load_model(base or config.model, dtype, **options)
        adapted = trained_adapter(model, config) if base else None
    began = fingerprint(model)
    world = speed.world
    world.require_same({"model": began})
    plain, (config, turns) = config, prepare_turns(config, tokenizer, given.environment)
    if resumed:
        require_same_model(resumed, config.model, began)
    layout = prepare_attention(model.to(device), config.layout, dtype=dtype)
    if config.gradient_checkpointing:
        checkpoint_activations(model)
    if trains and adapted is None:
        adapted = with_adapter(model, config.adapter)
    speed.up(model, config)
    if scalar:
        policy = ScalarModel(model, router_aux_loss_coef=config.router_aux_loss_coef)
    else:
        policy = Policy(model, vocab_size=vocab_size(model, tokenizer), **config.of_policy())
    learner = Learner(
        policy,
        device,
        layout,
        ModelShape.of(model),
        config.max_tokens_per_microbatch,
        partial(make_optimizers, config),
        adapted=adapted,
        world=world,
        temperature=1.0 if isinstance(algorithm, Objective) else config.rollout.temperature,
    )
    on_prompts = None if rewards is None else _sampling(config, learner, tokenizer, turns)
    if offline:
        made = _offline(config, algorithm, learner, tokenizer, speed, began, given.rows)
        if on_prompts:
            _, held_out, said = _prompts(config, learner, tokenizer)
            rewards.check_prompts(held_out)
            evaluation = _on_prompts(config, held_out, on_prompts, rewards)
            made = replace(made, evaluations=[*made.evaluations, evaluation], said=(*made.said, *said))
    else:
        made = _rollouts(config, algorithm, learner, tokenizer, speed, on_prompts, rewards, given.rows)
        if config.ppo.ptx_coef and isinstance(algorithm, ActorCritic):
            algorithm, made = _with_pretraining(config, algorithm, made, learner, tokenizer)
        made = _rounds(made, config, algorithm, learner) if config.source == "rounds" else made
    if on_prompts and trains and model.generation_config is not None:
        # Generation with the saved model stops where training's sampler stopped.
        stops = on_prompts.params.stop_token_ids
        model.generation_config.eos_token_id = list(stops) if len(stops) > 1 else stops[0]
    if given.source:
        made = replace(made, source=given.source)
    elif config.source == "ahead":
        made = replace(made, source=_ahead(plain, algorithm, made.source, given))
    world.require_same({"data": made.source.state_dict()})
    if resumed:
        try:
            made.source.load_state_dict(resumed.json("state.json")["source"])  # refuses other rows before any write
        except KeyError as error:
            expected = f"a checkpoint of a run with {type(made.source).__name__}"
            raise ValueError(sentence("resume", "source", expected, f"one whose source has no {error}")) from error
    # For rewards that draw random numbers; last, because libraries draw some when they are first imported.
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(config.seed)
    about = [about_router(model, config.router_aux_loss_coef), about_padding(tokenizer) if scalar else ""]
    if rewards:
        prompts = [prompt for one in made.evaluations if isinstance(one, OnPrompts) for prompt in one.prompts]
        prompts = prompts or (made.source.prompts.prompts if isinstance(made.source, Rollouts | Rounds) else [])
        about += begin_judges(rewards, learner, on_prompts, prompts, asks=trains and not resumed)
    require_splits(config, algorithm, world)
    run = Run(
        config=plain,
        world=world,
        directory=resumed.run_dir if resumed else free_directory(config.directory()),
        learner=learner,
        algorithm=algorithm,
        source=made.source,
        tokenizer=tokenizer,
        evaluations=[*made.evaluations, *given.evaluations],
        callbacks=given.callbacks,
        fingerprint=began,
        speed=speed,
        once=made.once,
        resumed=resumed,
        said=(*filter(None, about), *made.said),
    )
    if isinstance(run.source, Rounds) and run.source.folder is None:
        run.source.folder = lambda: run.directory / FOLDER  # settled once the run has locked it
    return run


def require_alike(config: TrainConfig, world: World) -> None:
    """Refuses processes that would not train the same run.

    Raises:
        ValueError: on all of them, with the field or the version and two values.
    """
    if world.size == 1:
        return
    versions = checkpoint.about()["versions"]
    leaves = {name: repr(value) for name, value in asdict(config).items()}
    world.require_same({**versions, **leaves})


def require_splits(config: TrainConfig, algorithm: Algorithm, world: World) -> None:
    """Refuses what several processes cannot do together.

    Raises:
        ValueError: it is asked for.
    """
    if world.size == 1:
        return
    op, do = "distributed", "Run it with one process."
    require(config.source != "ahead", op, "source", "rollouts, rounds or offline with several processes", "ahead", do)
    masks = getattr(algorithm, "masks", None)
    expected = "none with several processes: their thresholds are over the tokens of all"
    require(not (masks and masks.on), op, "masks", expected, masks, do)
    sorts = getattr(algorithm, "sorts", False)
    require(not sorts, op, "algorithm", "none that sorts the whole batch, with several processes", config.algorithm, do)


def _rewards(config: TrainConfig, given: Sequence[tuple[RewardFunc, float]] | None) -> RewardSuite:
    named = ((resolve_reward(reward.name, **reward.options), reward.weight) for reward in config.rewards)
    funcs, weights = zip(*(named if given is None else given), strict=True)
    limits = {"max_failure_fraction": config.max_failure_fraction, "timeout": config.reward_timeout}
    return RewardSuite(funcs, weights, **limits)


def _sampling(
    config: TrainConfig, learner: Learner, tokenizer: PreTrainedTokenizerBase, turns: Turns | None = None
) -> Sampling:
    """How the policy samples completions."""
    model, rollout = learner.policy.model, config.rollout
    params = SamplingParams(
        max_new_tokens=rollout.max_new_tokens,
        temperature=rollout.temperature,
        top_p=rollout.top_p,
        top_k=rollout.top_k,
        min_p=rollout.min_p,
        repetition_penalty=rollout.repetition_penalty,
        min_new_tokens=rollout.min_new_tokens,
        stop_strings=rollout.stop_strings,
        stop_token_ids=stop_token_ids(model, tokenizer, also=rollout.stop, **config.task.template_options),
        seed=config.seed,
        vocab_size=learner.policy.head.vocab_size,
    )
    sampler = TransformersSampler(
        model, tokenizer, max_num_seqs=rollout.max_num_seqs, record_support=rollout.replay_support
    )
    interruption, asked = None, config.interruption
    if asked != InterruptionConfig():
        ids = tuple(tokenizer(asked.text, add_special_tokens=False)["input_ids"])
        interruption = Interruption(ids, asked.after, asked.unless)
        interruption.room(params.max_new_tokens)
        open_ended = not set(ids) & set(params.stop_token_ids)
        require(
            open_ended, "TrainConfig", "interruption.text", "words without a token that ends a completion", asked.text
        )
    return Sampling(sampler, tokenizer, params, turns, interruption, learner.world)


def _on_prompts(config: TrainConfig, held_out: Sequence[Prompt], sampling: Sampling, rewards: RewardSuite) -> OnPrompts:
    counts, threshold = config.eval.pass_at_k, config.rollout.threshold
    by = buckets(config)
    return OnPrompts(held_out, sampling, rewards, config.eval.samples, config.steps, counts, threshold, by)


def _prompts(
    config: TrainConfig,
    learner: Learner,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Mapping[str, Any]] | None = None,
) -> tuple[list[Prompt], list[Prompt], tuple[str, ...]]:
    """`load_task`, after checking that prompt and completion fit the models."""
    prompts, held_out, said = load_task(config, tokenizer, rows)
    model, critic = learner.policy.model, learner.critic
    longest = max(len(prompt.token_ids) for prompt in (*prompts, *held_out)) + config.rollout.max_new_tokens
    room = positions(model, *([critic.model] if isinstance(critic, ScalarModel) else []))
    if config.environment.name:  # a turn of the longest conversation may be as long as that of the shortest
        longest += config.environment.turn_tokens or config.rollout.max_new_tokens
    require(
        longest <= room,
        "TrainConfig",
        "task.max_prompt_tokens, rollout.max_new_tokens",
        f"prompts and completions within the model's {room} positions",
        f"{longest} tokens",
    )
    require_known_tokens(model, config.model, (prompt.token_ids for prompt in (*prompts, *held_out)))
    return prompts, held_out, said


def _rollouts(
    config: TrainConfig,
    algorithm: Algorithm,
    learner: Learner,
    tokenizer: PreTrainedTokenizerBase,
    speed: Speed,
    sampling: Sampling,
    rewards: RewardSuite,
    rows: Sequence[Mapping[str, Any]] | None,
) -> _Made:
    """Prompts, a sampler on the policy's model, and the reference and critic that the algorithm needs."""
    rollout = config.rollout
    if config.source == "rounds" and not config.reference:
        pass  # the reference is the policy at the start of each round
    elif algorithm.needs_ref and learner.adapted and not (config.reference or base_of(config.model)):
        learner.reference = WithoutAdapter(learner.policy, learner.adapted)
    elif algorithm.needs_ref:
        other = tokenizer if config.reference else None
        learner.reference = frozen(config, config.reference or config.model, learner, speed, other)
    if algorithm.needs_critic:
        learner.critic = load_critic(config, learner.policy, tokenizer, learner.layout)
    if isinstance(learner.critic, ScalarModel):
        speed.up(learner.critic.model, config)
    prompts, held_out, said = _prompts(config, learner, tokenizer, rows)
    rewards.check_prompts([*prompts, *held_out])
    longest = max(len(prompt.token_ids) for prompt in (*prompts, *held_out)) + rollout.max_new_tokens
    require(
        config.max_tokens_per_microbatch >= longest,
        "TrainConfig",
        "max_tokens_per_microbatch",
        f"at least {longest}, the longest prompt plus rollout.max_new_tokens",
        config.max_tokens_per_microbatch,
    )
    source = Rollouts(
        sampler_of(config, prompts),
        sampling,
        rewards,
        number=rollout.prompts_per_step,
        samples=rollout.group_size,
        refills=rollout.dynamic_sampling,
        greedy=algorithm.needs_greedy,
        seed=config.seed,
        total_steps=config.steps,
    )
    evaluations = [_on_prompts(config, held_out, sampling, rewards)] if held_out else []
    return _Made(source, evaluations, said)


def _ahead(config: TrainConfig, algorithm: Algorithm, inner: Source, given: Given) -> Ahead:
    """The source in a process of its own, which gets a share of the CPU's threads.

    Raises:
        ValueError: objects were given, which that process cannot have.
    """
    names = {"model": given.model, "rows": given.rows, "rewards": given.rewards, "environment": given.environment}
    objects = [name for name, one in names.items() if one is not None]
    do = "Name a folder, a file and module:function, or use source: rollouts."
    require(
        not objects, "Trainer", ", ".join(objects), "names with source: ahead, whose process loads them", "objects", do
    )
    threads = torch.get_num_threads()
    its = config.ahead.threads or max(1, threads // 2)
    if not config.threads:
        torch.set_num_threads(max(1, threads - its))
    settings = {"source": "rollouts", "ahead": AheadConfig(), "threads": its, "resume": "", "log_to": ()}
    recipe = asdict(replace(config, **settings))
    orders = {"recipe": recipe, "greedy": algorithm.needs_greedy, "path": sys.path}
    command = (sys.executable, "-m", "fastrl.trainer.generator")
    return Ahead(inner, orders, command, config.ahead.max_staleness)


def _rounds(made: _Made, config: TrainConfig, algorithm: Algorithm, learner: Learner) -> _Made:
    """Rounds in place of rollouts of the same prompts."""
    rollouts, rounds, new = made.source, config.rounds, config.rollout.max_new_tokens
    if algorithm.kind == "pairs":  # both answers are in one micro-batch
        longest = max(len(prompt.token_ids) for prompt in rollouts.prompts.prompts)
        room = 2 * (longest + new) if learner.layout == "padded" else longest + 2 * new
        limit, expected = config.max_tokens_per_microbatch, f"at least {room}, the longest prompt and two completions"
        require(limit >= room, "TrainConfig", "max_tokens_per_microbatch", expected, limit)
    source = Rounds(
        rollouts.prompts,
        rollouts.sampling,
        rollouts.rewards,
        algorithm.kind,
        number=rounds.prompts,
        at_once=config.rollout.prompts_per_step,
        samples=config.rollout.group_size,
        rows=config.rows_per_step,
        thresholds=rounds.thresholds,
        quantiles=rounds.quantiles,
        most=rounds.most_per_prompt,
        steps=rounds.steps,
        epochs=rounds.epochs,
        asks_reference=algorithm.needs_ref and learner.reference is None,
        restart=restarting(learner) if rounds.restart else None,
        seed=config.seed,
        total_steps=config.steps,
    )
    return replace(made, source=source)


def _offline(
    config: TrainConfig,
    algorithm: Algorithm,
    learner: Learner,
    tokenizer: PreTrainedTokenizerBase,
    speed: Speed,
    began: str,
    rows: Sequence[Mapping[str, Any]] | None,
) -> _Made:
    """Pre-written rows, and the reference model that scores them all before the first step."""
    policy, model = learner.policy, learner.policy.model
    reference = policy if algorithm.needs_ref else None
    if config.reference and algorithm.needs_ref:
        reference = frozen(config, config.reference, learner, speed, tokenizer)
    models = [model] + ([reference.model] if reference else [])
    groups, said = load_rows(config, algorithm.kind, tokenizer, min(config.data.max_tokens, positions(*models)), rows)
    require_known_tokens(model, config.model, (group.prompt.token_ids for group in groups))
    require_known_tokens(model, config.model, (sample.token_ids for group in groups for sample in group.samples))
    if isinstance(algorithm, RewardModelling):
        groups = with_end(groups, tokenizer.pad_token_id)
    train, held_out = split_groups(groups, config.data.held_out, config.seed)
    require_room(config, learner.layout, groups)
    objective = algorithm if isinstance(algorithm, Objective) else None
    if objective and objective.needs_mismatched:
        for part in filter(None, (train, held_out)):
            pair_up(part)
    kind = "ranked" if config.data.ranked else algorithm.kind
    source = Offline(PromptSampler(train, seed=config.seed), config.rows_per_step, kind, seed=config.seed)
    once = None
    if reference:
        began = fingerprint(reference.model) if config.reference else began
        once = AskedOnce(reference, began, config.dtype, [*source.first(config.steps), *held_out])
    return _Made(source, [OnRows(held_out, objective, kind)] if held_out and objective else [], said, once)


def _with_pretraining(
    config: TrainConfig, algorithm: ActorCritic, made: _Made, learner: Learner, tokenizer: PreTrainedTokenizerBase
) -> tuple[ActorCritic, _Made]:
    """PPO-ptx's rows, and the loss on those held out among the evaluations."""
    model = learner.policy.model
    groups, said = load_rows(config, "completions", tokenizer, min(config.data.max_tokens, positions(model)), None)
    require_known_tokens(model, config.model, (sample.token_ids for group in groups for sample in group.samples))
    require_known_tokens(model, config.model, (group.prompt.token_ids for group in groups))
    rows, held_out = split_groups(groups, config.data.held_out, config.seed)
    require_room(config, learner.layout, groups)
    ptx = Pretraining(PromptSampler(rows, seed=config.seed), config.rows_per_step, config.ppo.ptx_coef)
    on_rows = [OnRows(held_out, SupervisedTuning(), "ptx")] if held_out else []
    evaluations = [*made.evaluations, *on_rows]
    return replace(algorithm, ptx=ptx), replace(made, evaluations=evaluations, said=(*made.said, *said))


def begin(config: Config) -> tuple[Config, Checkpoint | None, torch.device, Speed]:
    """The first part of every run's setup.

    Returns the configuration with its dtype resolved, the checkpoint to resume from, the device, and how to compute
    on it.

    Raises:
        ModuleNotFoundError: a tracker is not installed.
        ValueError: there is no such checkpoint, device or backend.
    """
    require_installed(config.log_to)
    world = join()
    require_alike(config, world)
    resumed = resumable(config) if config.resume else None
    if config.threads:
        torch.set_num_threads(config.threads)
    env.reuse_freed_memory()
    torch.manual_seed(config.seed)
    device = world.device if world.size > 1 and config.device == "auto" else pick_device(config.device)
    resolve("linear_logprob", config.backend, device)  # refuses now what the first step would refuse
    resolved, precision = resolve_dtype(config, device, resumed)
    dtype = world.from_first(resolved.dtype)  # measured by each of them
    resolved, precision = replace(resolved, dtype=dtype), precision._replace(dtype=dtype)
    known = from_json(resumed.json("state.json").get("linear", {})) if resumed else {}
    return resolved, resumed, device, Speed(precision, config.dtype, known, world)
