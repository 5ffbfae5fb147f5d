"""What a training run is: dataclasses, each default stated once, and the strict reader of recipes."""

from __future__ import annotations

import math
import types
from dataclasses import MISSING, dataclass, field, fields, is_dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from fastrl.advantages import GroupAdvantage
from fastrl.algorithms import (
    ALGORITHMS,
    TO_SAMPLER,
    ActorCritic,
    Algorithm,
    GroupPolicyGradient,
    KLController,
    Schedule,
    TokenMasks,
)
from fastrl.check import choice, require
from fastrl.losses import presets
from fastrl.spec import KL, Clip, Correction, PolicyLoss, Ratio, Reinforce

if TYPE_CHECKING:
    from fastrl.trainer.offline_config import OfflineConfig

# What a resumed run may do otherwise than it began: how long, how often and on what it runs, not what it computes.
# `model` may have another name, if its weights are the same.
RESUME_MAY_CHANGE = {
    "model", "steps", "run_dir", "resume", "save_every", "keep_last", "keep_every", "show_every", "eval.every",
    "device", "backend", "linear", "tokens_per_batch", "layout", "gradient_checkpointing", "threads",
    "max_failure_fraction", "adapter.save", "log_to",
}  # fmt: skip


class ConfigError(ValueError):
    """A recipe or flag that cannot be run, in one sentence."""


@dataclass(frozen=True)
class TaskConfig:
    """Where prompts come from."""

    source: str = "reasoning_gym:chain_sum"
    """reasoning_gym:TASK, a .jsonl file, a folder written by datasets' save_to_disk, or a hub id."""
    options: dict[str, Any] = field(default_factory=dict)
    """Passed to the source: a reasoning-gym task's own settings, or a dataset's split and name."""
    size: int = 2000
    """Prompts to generate, where the source is a generator."""
    held_out: int = 100
    """Prompts kept for evaluation and never trained on."""
    chat: bool = True
    """Render prompts with the model's chat template, when it has one."""
    system: str = ""
    """System message of chat prompts."""
    template_options: dict[str, Any] = field(default_factory=dict)
    """Further arguments of the chat template, such as enable_thinking; a row's chat_template_kwargs come on top."""
    suffix: str = ""
    """Text appended to every question."""
    max_prompt_tokens: int = 1024
    """Longer prompts are left out, counted and reported."""


@dataclass(frozen=True)
class RewardConfig:
    """One reward."""

    name: str = "reasoning_gym"
    """A built-in reward, or package.module:function."""
    weight: float = 1.0
    """Its share in the sum."""
    options: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of a built-in reward."""


@dataclass(frozen=True)
class RolloutConfig:
    """How completions are sampled."""

    prompts: int = 8
    """Prompts per step."""
    samples: int = 8
    """Completions per prompt."""
    max_new_tokens: int = 32
    """Length limit of a completion."""
    temperature: float = 1.0
    """Of sampling, and of every log-probability in training."""
    top_p: float = 1.0
    """Nucleus mass; 1 is off."""
    top_k: int = 0
    """Most probable tokens kept; 0 is off."""
    stop: tuple[str, ...] = ()
    """Tokens that end a completion beside the model's own ends and that of its chat template, as the tokenizer writes
    them."""
    dynamic_sampling: int = 0
    """DAPO: up to this many times a step, new prompts take the place of those whose rewards are all equal; 0 is off."""


@dataclass(frozen=True)
class LossConfig:
    """Overrides of the algorithm's preset; None keeps the preset's value."""

    ratio: Ratio | None = None
    clip_low: float | None = None
    """Lower distance of a Clip surrogate from 1."""
    clip_high: float | None = None
    """Upper distance of a Clip surrogate from 1."""
    clip_dual: float | None = None
    """Dual clip: a negative advantage A costs at most -clip_dual A; 3 in verl."""
    old_policy: Literal["trainer", "sampler"] | None = None
    """Whose log-probabilities of the policy that sampled the ratio compares with: the trainer's, computed once before
    the first update, or those that the sampler reported. The latter correct for the mismatch of the two as well."""
    kl: Literal["none", "k1", "k2", "k3", "k3_ratio", "k1+", "k3+"] | None = None
    """KL estimate in the loss; needs a reference model in memory."""
    kl_coef: float | None = None
    aggregate: Literal["token_mean", "prompt_mean", "seq_mean_token_mean", "seq_mean_token_sum", "token_sum"] | None = (
        None
    )
    entropy_coef: float | None = None
    baseline: Literal["mean", "leave_one_out", "none"] | None = None
    """Advantage baseline."""
    scale: Literal["group", "batch", "none"] | None = None
    """Advantage scale."""
    correction: Correction | None = None
    """Importance weight for the mismatch between sampler and trainer."""
    filter_zero_variance: bool = False
    """Also take groups of equal rewards out of the normaliser, as ScaleRL does; their gradient is zero either way."""
    mask_truncated: bool = False
    """Leave completions that the length limit cut out of loss and normaliser."""


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW."""

    lr: float = 1e-6
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    """0 switches clipping off."""
    warmup_steps: int = 0
    schedule: Literal["constant", "cosine"] = "constant"
    steps_per_rollout: int = 1
    """Optimizer steps on each batch of completions, each on its own part of them; more than 1 makes the later ones
    off-policy."""
    epochs_per_rollout: int = 1
    """Passes over each batch of completions."""


@dataclass(frozen=True)
class AdapterConfig:
    """Low-rank adapters (LoRA) instead of training every weight."""

    rank: int = 0
    """Of the adapters; 0 trains every weight."""
    alpha: float = 32.0
    """Adapters count alpha / rank."""
    targets: tuple[str, ...] = ("all-linear",)
    """Names of modules, such as q_proj or lm_head; all-linear is every linear layer but the head."""
    save: Literal["adapter", "merged"] = "adapter"
    """What the run leaves: the adapter alone, or a whole model with the adapter in its weights."""
    quantize: Literal["none", "nf4"] = "none"
    """nf4 keeps the frozen linear layers in 4 bits, all but the head: QLoRA. Needs bitsandbytes."""


@dataclass(frozen=True)
class PPOConfig:
    """What PPO has besides a policy loss."""

    critic: Literal["separate", "shared", "none"] = "separate"
    """A model of its own, or a linear layer on the policy's hidden states; none is REINFORCE++."""
    critic_model: str = ""
    """What a separate critic starts from: the policy's own model, if empty, or a trained reward model."""
    critic_lr: float = 1e-5
    """Learning rate of a separate critic."""
    critic_warmup: int = 0
    """Steps at the start in which a separate critic alone learns: VAPO's value pre-training."""
    gamma: float = 1.0
    """Discount per token."""
    lam: float = 0.95
    """Of GAE: 1 is the return less the value, 0 the one-step error."""
    lam_policy: float | None = None
    """Of the advantages, where it is another one than that of the critic's returns, lam; null is lam."""
    length_alpha: float | None = None
    """VAPO: lam_policy is 1 - 1 / (length_alpha tokens) for each completion, with lam 1; 0.05 there."""
    positive_nll: float = 0.0
    """VAPO: weight of the negative log-likelihood of completions that scored above 0; 0.1 there."""
    value_coef: float = 0.1
    """Weight of the value loss."""
    value_clip: float | None = 0.2
    """How far a value may move from the rollout's, in units of the return; null switches it off."""
    whiten: bool = True
    """Shift and scale the advantages of a rollout to mean 0 and deviation 1."""
    kl_coef: float = 0.05
    """Of the KL to the reference in the reward of each token; 0 needs no reference model in memory."""
    kl_target: float | None = None
    """Nats a sequence that the coefficient adapts to; null keeps it."""
    kl_horizon: int = 10000
    """Sequences over which it adapts."""


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation on held-out prompts, before and after training and now and then between."""

    every: int = 0
    """Steps between evaluations; 0 evaluates before and after only."""
    samples: int = 1
    """Sampled completions per held-out prompt, besides the greedy one."""


@dataclass(frozen=True)
class RunConfig:
    """What every training run has, whatever it learns from."""

    model: str = "smollm2-135m-instruct"
    """A folder, a hub id, or the name of a model that ships in a Python package."""
    algorithm: str = ""
    steps: int = 100
    """Optimizer steps; with rollouts, rollout batches."""
    seed: int = 0
    run_dir: str = "runs/{algorithm}"
    """Everything the run writes goes here; if it exists, -2, -3, ... is appended."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Of the model's weights and activations; the optimizer's are float32 in any case. auto: bfloat16 on a GPU that has
    it, and on a CPU where a short race shows that it is quicker."""
    linear: Literal["auto", "native", "torch"] = "auto"
    """On a CPU, whose products the linear layers take. auto: the quicker for each shape, by a short race, which a
    resumed run does not repeat; native and torch give two runs the same bits."""
    device: str = "auto"
    """cpu, cuda, ...; auto takes a GPU when there is one."""
    backend: str = "auto"
    """Backend of the fused ops, see `fastrl doctor`."""
    softcap: float | None = None
    """Of the model's logits, as Gemma's final_logit_softcapping; null takes what its configuration says."""
    logit_scale: float | None = None
    """Of the model's logits, as Cohere's; null takes what its configuration says."""
    router_aux_loss_coef: float | None = None
    """Of the load-balancing loss of a mixture of experts; null takes the model's own, 0 leaves it out."""
    tokens_per_batch: int = 2048
    """Model input tokens of a micro-batch, padding included; memory grows with it, the gradient does not change."""
    layout: Literal["auto", "padded", "shared", "varlen"] = "auto"
    """How sequences share a micro-batch."""
    gradient_checkpointing: bool = False
    threads: int = 0
    """CPU threads; 0 keeps torch's choice."""
    save_every: int = 0
    """Steps between checkpoints to resume from; 0 writes one only when Ctrl-C or another signal stops the run."""
    keep_last: int = 2
    """Checkpoints that stay; the newest may be damaged."""
    keep_every: int = 0
    """Checkpoints of every so many steps stay forever; 0 keeps none."""
    resume: str = ""
    """A run directory or one of its checkpoints to go on from; latest takes the run in run_dir that saved last."""
    log_to: tuple[Literal["tensorboard", "trackio", "wandb"], ...] = ()
    """Trackers that get the metrics too; metrics.jsonl is always written."""
    adapter: AdapterConfig = AdapterConfig()
    optimizer: OptimizerConfig = OptimizerConfig()

    @property
    def quantized(self) -> bool:
        """Whether the model's layers are held in fewer bits."""
        return self.adapter.quantize != "none"

    def of_policy(self) -> dict[str, Any]:
        """What a `Policy` is told beside its model."""
        return {
            "softcap": self.softcap,
            "logit_scale": self.logit_scale,
            "router_aux_loss_coef": self.router_aux_loss_coef,
            "backend": self.backend,
        }

    def __post_init__(self) -> None:
        op = type(self).__name__
        for name in ("softcap", "logit_scale"):
            value = getattr(self, name)
            require(value is None or 0 < value < float("inf"), op, name, "a positive number, or null", value)
        coef = self.router_aux_loss_coef
        require(coef is None or 0 <= coef < float("inf"), op, "router_aux_loss_coef", "at least 0, or null", coef)
        for name in ("steps", "tokens_per_batch", "keep_last"):
            require(getattr(self, name) >= 1, op, name, "at least 1", getattr(self, name))
        for name in ("threads", "save_every", "keep_every"):
            require(getattr(self, name) >= 0, op, name, "0 or more", getattr(self, name))
        require(0 <= self.seed < 2**32, op, "seed", "a number from 0 to 2**32 - 1, as numpy's", self.seed)
        require_run_dir(op, self)
        require_optimizer(op, self.optimizer)
        require_adapter(op, self.adapter)

    def directory(self) -> Path:
        """`run_dir` with its placeholders filled in."""
        return Path(self.run_dir.format(algorithm=self.algorithm, seed=self.seed))


@dataclass(frozen=True)
class TrainConfig(RunConfig):
    """A training run on completions that it samples."""

    algorithm: Literal[(*ALGORITHMS, "ppo")] = "grpo"
    """Selects an advantage estimator and a policy loss; `loss` overrides their factors."""
    show_every: int = 10
    """Steps between tables of completions on the screen."""
    max_failure_fraction: float = 0.5
    """Stop when more than this share of a batch's rewards raise."""
    task: TaskConfig = TaskConfig()
    rewards: tuple[RewardConfig, ...] = (RewardConfig(),)
    rollout: RolloutConfig = RolloutConfig()
    loss: LossConfig = LossConfig()
    masks: TokenMasks = field(default_factory=TokenMasks)
    ppo: PPOConfig = PPOConfig()
    eval: EvalConfig = EvalConfig()

    def __post_init__(self) -> None:
        super().__post_init__()
        choice("TrainConfig", "algorithm", self.algorithm, [*ALGORITHMS, "ppo"])
        rollout, optimizer = self.rollout, self.optimizer
        positive = {
            "rollout.prompts": rollout.prompts,
            "rollout.samples": rollout.samples,
            "rollout.max_new_tokens": rollout.max_new_tokens,
            "optimizer.steps_per_rollout": optimizer.steps_per_rollout,
            "optimizer.epochs_per_rollout": optimizer.epochs_per_rollout,
            "eval.samples": self.eval.samples,
        }
        for name, value in positive.items():
            require(value >= 1, "TrainConfig", name, "at least 1", value)
        require(self.eval.every >= 0, "TrainConfig", "eval.every", "0 (only before and after) or more", self.eval.every)
        rounds = rollout.dynamic_sampling
        require(rounds >= 0, "TrainConfig", "rollout.dynamic_sampling", "0 (off) or more", rounds)
        require(rollout.temperature > 0, "TrainConfig", "rollout.temperature", "more than 0", rollout.temperature)
        require(len(self.rewards) > 0, "TrainConfig", "rewards", "at least one reward", "none")
        share = self.max_failure_fraction
        require(0 <= share <= 1, "TrainConfig", "max_failure_fraction", "a share from 0 to 1", share)
        build_algorithm(self)


def require_run_dir(op: str, config: RunConfig) -> None:
    """Refuses a `run_dir` whose placeholders cannot be filled in, or that names no folder."""
    do = "Write a brace that is part of the name twice."
    try:
        named = bool(config.directory().name)
    except (LookupError, ValueError, AttributeError):
        named = False
    expected = "a folder's name, in which {algorithm} and {seed} may stand"
    require(named, op, "run_dir", expected, repr(config.run_dir), do if "{" in config.run_dir else "")


def require_optimizer(op: str, optimizer: OptimizerConfig) -> None:
    """Refuses rates with which AdamW has no meaning."""
    for name in ("lr", "eps", "weight_decay", "max_grad_norm"):
        value = getattr(optimizer, name)
        require(0 <= value < math.inf, op, f"optimizer.{name}", "0 or more, and finite", value)
    betas = all(0 <= beta < 1 for beta in optimizer.betas)
    require(betas, op, "optimizer.betas", "two numbers from 0 to below 1", optimizer.betas)
    require(optimizer.warmup_steps >= 0, op, "optimizer.warmup_steps", "0 or more", optimizer.warmup_steps)


def require_adapter(op: str, adapter: AdapterConfig) -> None:
    """Refuses an adapter that cannot be."""
    require(adapter.rank >= 0, op, "adapter.rank", "0 or more", adapter.rank)
    require(len(adapter.targets) > 0, op, "adapter.targets", "at least one name", "none")
    if adapter.quantize != "none":
        require(adapter.rank > 0, op, "adapter.quantize", "none without an adapter, rank 0", adapter.quantize)
        do = "In 4 bits the sum of weight and adapter would be rounded; what it was trained on is the two apart."
        require(adapter.save == "adapter", op, "adapter.save", "adapter with adapter.quantize", adapter.save, do)


def build_algorithm(config: TrainConfig) -> Algorithm:
    """The algorithm's preset with the overrides of `config.loss`, and of `config.ppo` for PPO.

    A preset's KL term is left out unless `loss.kl_coef` or `loss.kl` asks for it: the reference model doubles the
    memory of the weights, and most recipes of today train without it (TRL's default is beta = 0).
    """
    estimator, spec = ALGORITHMS.get(config.algorithm, (None, presets.PPO))
    loss = config.loss
    if not isinstance(estimator, GroupAdvantage):
        fixed, name = loss.baseline is None and loss.scale is None, "loss.baseline, loss.scale"
        require(fixed, "TrainConfig", name, f"None with {config.algorithm}, which has its own", "a value")
    else:
        estimator = replace(
            estimator, baseline=loss.baseline or estimator.baseline, scale=loss.scale or estimator.scale
        )
    changes: dict[str, Any] = {
        name: value
        for name in ("ratio", "aggregate", "entropy_coef", "correction")
        if (value := getattr(loss, name)) is not None
    }
    clip = {"low": loss.clip_low, "high": loss.clip_high, "dual": loss.clip_dual}
    clip = {name: value for name, value in clip.items() if value is not None}
    if clip:
        require(
            isinstance(spec.surrogate, Clip),
            "TrainConfig",
            "loss.clip_low, loss.clip_high, loss.clip_dual",
            "an algorithm with a Clip surrogate",
            config.algorithm,
        )
        changes["surrogate"] = replace(spec.surrogate, **clip)
    changes["kl"] = _kl(loss, spec)
    spec = replace(spec, **changes)
    if estimator is None:
        return _actor_critic(config, spec)
    own = PPOConfig()
    require(config.ppo == own, "TrainConfig", "ppo", f"its defaults, as {config.algorithm} has no critic", config.ppo)
    weights = tuple(reward.weight for reward in config.rewards)
    ratio = loss.old_policy is None or not isinstance(spec.surrogate, Reinforce)
    expected = f"nothing with {config.algorithm}, whose loss has no ratio"
    require(ratio, "TrainConfig", "loss.old_policy", expected, loss.old_policy)
    algorithm = GroupPolicyGradient(
        spec,
        estimator,
        config.rollout.max_new_tokens,
        weights,
        masks=config.masks,
        to_sampler=_to_sampler(config),
        schedule=_schedule(config),
    )
    equal_rewards_teach = algorithm.needs_greedy and config.rollout.dynamic_sampling > 0
    expected = f"0 with {config.algorithm}, which learns from equal rewards too"
    require(
        not equal_rewards_teach, "TrainConfig", "rollout.dynamic_sampling", expected, config.rollout.dynamic_sampling
    )
    return algorithm


def _to_sampler(config: TrainConfig) -> bool:
    """Whether the ratio is to the sampler's log-probabilities.

    Raises:
        ValueError: something compares with them that must not, or with those of a truncated distribution.
    """
    loss, rollout = config.loss, config.rollout
    default = "sampler" if config.algorithm in TO_SAMPLER else "trainer"
    to_sampler = (loss.old_policy or default) == "sampler"
    op, once = "TrainConfig", loss.correction is None or not to_sampler
    expected = "nothing where loss.old_policy is the sampler, whose mismatch is in the ratio"
    require(once, op, "loss.correction", expected, loss.correction)
    whole, reads = rollout.top_p == 1.0 and rollout.top_k == 0, to_sampler or config.masks.reads_sampler
    expected = "1 and 0 where the sampler's log-probabilities are compared with: they are of what was cut"
    do = "Set loss.old_policy to trainer." if to_sampler else "Leave masks.off_policy and masks.total_variation out."
    got = f"{rollout.top_p} and {rollout.top_k}"
    require(whole or not reads, op, "rollout.top_p, rollout.top_k", expected, got, do)
    optimizer = config.optimizer
    updates = optimizer.steps_per_rollout * optimizer.epochs_per_rollout
    moves = config.masks.kl_cov is None or updates > 1 or to_sampler
    expected = "more than 1 optimizer step per rollout: before the first one no token is away from the old policy"
    require(moves, op, "masks.kl_cov", expected, updates)
    return to_sampler


def _actor_critic(config: TrainConfig, spec: PolicyLoss) -> ActorCritic:
    loss, ppo = config.loss, config.ppo
    whole = not loss.filter_zero_variance
    require(whole, "TrainConfig", "loss.filter_zero_variance", "False: a critic learns from equal rewards too", True)
    require(spec.kl is None, "TrainConfig", "loss.kl", "none: PPO's KL is in the reward, ppo.kl_coef", loss.kl)
    finite = 0 <= ppo.critic_lr < math.inf
    require(finite, "TrainConfig", "ppo.critic_lr", "0 or more, and finite", ppo.critic_lr)
    own = ppo.critic != "shared" or not ppo.critic_model
    require(
        own, "TrainConfig", "ppo.critic_model", "none for a critic that shares the policy's trunk", ppo.critic_model
    )
    warm = ppo.critic_warmup == 0 or (ppo.critic == "separate" and 0 < ppo.critic_warmup < config.steps)
    expected = "0, or with a separate critic fewer than steps"
    require(warm, "TrainConfig", "ppo.critic_warmup", expected, ppo.critic_warmup)
    if ppo.critic == "none":
        of_critic = ("critic_model", "critic_lr", "lam", "lam_policy", "length_alpha", "value_coef", "value_clip")
        set_ = [name for name in of_critic if getattr(ppo, name) != getattr(PPOConfig, name)]
        require(not set_, "TrainConfig", f"ppo.{', ppo.'.join(set_)}", "left out without a critic", "a value")
    controller = KLController(ppo.kl_coef, ppo.kl_target, ppo.kl_horizon)
    names = ("gamma", "lam", "lam_policy", "length_alpha", "positive_nll", "value_coef", "value_clip", "whiten")
    factors = {name: getattr(ppo, name) for name in names}
    factors |= {"critic": ppo.critic != "none", "masks": config.masks, "to_sampler": _to_sampler(config)}
    return ActorCritic(spec, controller, **factors, schedule=_schedule(config))


def _schedule(config: TrainConfig) -> Schedule:
    return Schedule(
        updates=config.optimizer.steps_per_rollout,
        epochs=config.optimizer.epochs_per_rollout,
        mask_truncated=config.loss.mask_truncated,
        filter_zero_variance=config.loss.filter_zero_variance,
        critic_warmup=config.ppo.critic_warmup,
    )


def _kl(loss: LossConfig, spec: PolicyLoss) -> KL | None:
    if loss.kl == "none" or not (loss.kl or loss.kl_coef):
        return None
    default = spec.kl or KL("k3", 0.04)
    coef = default.coef if loss.kl_coef is None else loss.kl_coef
    return KL(loss.kl or default.kind, coef) if coef else None


def load_recipe(path: str | Path) -> TrainConfig | OfflineConfig:
    """Reads a YAML recipe. Unknown keys and wrong types are errors that name the key, the nearest one, and the file.

    `algorithm` says what the other keys are: a `TrainConfig`'s or, for answers written before, an `OfflineConfig`'s.

    Raises:
        ConfigError: the file is missing, not YAML, or not a recipe.
    """
    path = Path(path)
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such recipe. `recipes/` has some to start from.") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: expected text in UTF-8, got {error}.") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    data = {} if data is None else data
    return from_dict(config_class(data, str(path)), data, str(path))


def config_class(data: Any, where: str) -> type[TrainConfig] | type[OfflineConfig]:
    """The class of which the values of a recipe are the fields."""
    from fastrl.trainer.offline_config import OFFLINE, OfflineConfig  # which is written with this module's classes

    name = data.get("algorithm") if isinstance(data, dict) else None
    if isinstance(name, str):
        try:
            choice(where, "algorithm", name, (*ALGORITHMS, "ppo", *OFFLINE))
        except ValueError as error:
            raise ConfigError(str(error)) from None
    return OfflineConfig if isinstance(name, str) and name in OFFLINE else TrainConfig


def from_dict(cls: type, data: Any, where: str) -> Any:
    """An instance of dataclass `cls` from plain YAML values; `where` is named in errors."""
    if not isinstance(data, dict):
        raise ConfigError(f"{where}: expected a mapping of settings, got {type(data).__name__}.")
    hints = get_type_hints(cls)
    values = {}
    for key, value in data.items():
        if key not in hints:
            near = get_close_matches(str(key), hints, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else f" Known: {', '.join(hints)}."
            raise ConfigError(f"{where}: {key}: unknown key.{hint}")
        values[key] = _convert(hints[key], value, f"{where}: {key}")
    missing = [f.name for f in fields(cls) if f.default is MISSING and f.default_factory is MISSING]
    for name in missing:
        if name not in values:
            raise ConfigError(f"{where}: {name}: missing.")
    try:
        return cls(**values)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from None


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin, args = get_origin(hint), get_args(hint)
    if is_dataclass(hint):
        return from_dict(hint, value, where)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        (only,) = (a for a in args if a is not type(None))
        return _convert(only, value, where)
    if origin is Literal:
        if value not in args:
            raise ConfigError(f"{where}: expected one of {', '.join(map(str, args))}, got {value!r}.")
        return value
    if origin is tuple:
        if not isinstance(value, list):
            raise ConfigError(f"{where}: expected a list, got {value!r}.")
        kinds = [args[0]] * len(value) if args[-1] is Ellipsis else args
        if len(kinds) != len(value):
            raise ConfigError(f"{where}: expected {len(kinds)} values, got {len(value)}.")
        return tuple(_convert(k, v, f"{where}[{i}]") for i, (k, v) in enumerate(zip(kinds, value, strict=True)))
    if origin is dict:
        if not isinstance(value, dict):
            raise ConfigError(f"{where}: expected a mapping, got {value!r}.")
        return dict(value)
    return _scalar(hint, value, where)


def _scalar(kind: type, value: Any, where: str) -> Any:
    if kind is float and isinstance(value, str):
        # YAML 1.1 reads 1e-5, without a dot, as text.
        try:
            return float(value)
        except ValueError:
            pass
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ConfigError(f"{where}: expected {kind.__name__}, got {value!r}.")
    return value
