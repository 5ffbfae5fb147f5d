"""What a training run is: dataclasses, each default stated once. `recipe.py` reads them from YAML."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from fastrl.algorithms import ALGORITHMS, OFFLINE, TokenMasks
from fastrl.check import choice, require
from fastrl.trainer.typed import nested

# What a resumed run may do otherwise than it began: how long, how often and on what it runs, not what it computes.
# `model` may have another name, if its weights are the same.
RESUME_MAY_CHANGE = {
    "model", "steps", "run_dir", "resume", "save_every", "keep_last", "keep_every", "show_every", "eval.every",
    "device", "backend", "linear", "max_tokens_per_microbatch", "layout", "gradient_checkpointing", "threads",
    "max_failure_fraction", "reward_timeout", "adapter.save", "log_to",
}  # fmt: skip


@dataclass(frozen=True)
class TaskConfig:
    """Where prompts come from. A run on written rows takes the held-out ones alone, to be evaluated on."""

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

    prompts_per_step: int = 8
    """Prompts of a training step."""
    group_size: int = 8
    """Completions of each prompt."""
    max_new_tokens: int = 32
    """Length limit of a completion."""
    temperature: float = 1.0
    """Of sampling, and of every log-probability in training."""
    top_p: float = 1.0
    """Nucleus mass; 1 is off."""
    top_k: int = 0
    """Most probable tokens kept; 0 is off."""
    min_p: float = 0.0
    """Tokens are kept that are at least so many times as probable as the most probable one; 0 is off."""
    repetition_penalty: float = 1.0
    """Above 1 makes tokens less likely that are in the prompt or the completion; 1 is off."""
    min_new_tokens: int = 0
    """Before so many tokens no stop ends a completion."""
    stop: tuple[str, ...] = ()
    """Tokens that end a completion beside the model's own ends and that of its chat template, as the tokenizer writes
    them."""
    stop_strings: tuple[str, ...] = ()
    """Text that ends a completion: its last token is the one that completes such a string, which may be part of a token
    or span several. Every token, that one too, is trained on."""
    threshold: float = 0.5
    """Where completions are shown or labelled instead of weighed (sft, kto): the reward from which on one is good."""
    dynamic_sampling: int = 0
    """DAPO: up to this many times a step, new prompts take the place of those whose rewards are all equal; 0 is off."""

    @property
    def reshaped(self) -> dict[str, Any]:
        """The settings that are on with which tokens are drawn from something else than the softmax at the temperature,
        whose log-probabilities are trained."""
        names = ("top_p", "top_k", "min_p", "repetition_penalty", "min_new_tokens")
        return {name: value for name in names if (value := getattr(self, name)) != getattr(RolloutConfig, name)}


@dataclass(frozen=True)
class DataConfig:
    """Where rows come from that were written before; their kind follows from the algorithm."""

    source: str = "reasoning_gym:chain_sum"
    """A .jsonl file, a folder written by datasets' save_to_disk, a hub id, or reasoning_gym:TASK."""
    options: dict[str, Any] = field(default_factory=dict)
    """Passed to the source: a dataset's split and name, or a reasoning-gym task's own settings."""
    size: int = 2000
    """Questions to generate, where the source is a generator."""
    held_out: int = 200
    """Rows kept for evaluation and never trained on; no question is in both parts."""
    unpair: bool = False
    """For losses on labelled answers: the rows are pairs, and each side is an answer of its own."""
    ranked: bool = False
    """For reward models: a row has several responses and their ranking, 1 for the best; all of them are compared."""
    margin_column: str = ""
    """Of pairs: the column with how much better the chosen answer is, which its reward then should be."""
    soft_label_column: str = ""
    """Of pairs: the column with the probability that the chosen answer is the better one, such as a judge's."""
    chat: bool = True
    """Render text with the model's chat template, when it has one."""
    system: str = ""
    """System message of chat prompts."""
    template_options: dict[str, Any] = field(default_factory=dict)
    """Further arguments of the chat template, such as enable_thinking; a row's chat_template_kwargs come on top."""
    max_prompt_tokens: int = 1024
    """Rows with longer prompts are left out, counted and reported."""
    max_tokens: int = 2048
    """So are rows whose prompt and answer together are longer than this, or than the model has positions for."""


@dataclass(frozen=True)
class PolicyGradientConfig:
    """What a policy gradient does with a batch of completions beside its loss."""

    ratio_to_sampler: bool | None = None
    """Whether the ratio is to the log-probabilities that the sampler reported, which corrects for the mismatch of
    sampler and trainer as well, or to the trainer's own, computed once before the first update; null: as the
    algorithm's paper."""
    filter_zero_variance: bool = False
    """Also take groups of equal rewards out of the normaliser, as ScaleRL does; their gradient is zero either way."""
    mask_truncated_completions: bool = False
    """Leave completions that the length limit cut out of loss and normaliser."""


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW."""

    lr: float = 1e-6
    """Learning rate, after the warm-up."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the running means of the gradient and of its square."""
    eps: float = 1e-8
    """Added to the root of the latter."""
    weight_decay: float = 0.0
    """Decoupled: lr times this share of each weight is taken off at every step, norms and biases included."""
    max_grad_norm: float = 1.0
    """Euclidean norm that the whole gradient is scaled down to; 0 switches clipping off."""
    warmup_steps: int = 0
    """Optimizer steps in which the learning rate rises, linearly, from lr / warmup_steps."""
    schedule: Literal["constant", "cosine"] = "constant"
    """After the warm-up; cosine falls to 0 at the run's last optimizer step."""
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
    critic_lr: float | None = None
    """Learning rate of the critic's own weights; null is 1e-5 for a separate one, and 1e-4 for a layer on the policy's
    hidden states, which begins as zeros."""
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
    """Evaluation on what is held out, before and after training and now and then between."""

    every: int = 0
    """Steps between evaluations; 0 evaluates before and after only."""
    samples: int = 1
    """Sampled completions per held-out prompt, besides the greedy one."""
    pass_at_k: tuple[int, ...] = ()
    """Values of k, none above samples: pass@k estimates, from all sampled completions of a prompt, the probability that
    one of k has a reward of at least rollout.threshold."""


@dataclass(frozen=True)
class TrainConfig:
    """A training run."""

    model: str = "smollm2-135m-instruct"
    """A folder, a hub id, or the name of a model that ships in a Python package."""
    algorithm: Literal[tuple(ALGORITHMS)] = "grpo"
    """Selects advantages and a loss, which `loss` overrides factor by factor."""
    source: Literal["auto", "rollouts", "offline"] = "auto"
    """Where groups come from: sampled for each step from `task`, or rows of `data` that were written before. auto: what
    the algorithm is usually trained on."""
    reference: str = ""
    """The frozen model that a loss compares with; empty is the model itself, before training."""
    steps: int = 100
    """Optimizer steps; with rollouts, rollout batches."""
    seed: int = 0
    """Of sampling, of the order of prompts and rows, and of what is held out."""
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
    rows_per_step: int = 16
    """Rows of `data` in a step: pairs, labelled answers, demonstrations or groups of scored completions."""
    max_tokens_per_microbatch: int = 2048
    """Model input tokens of a micro-batch, padding included; memory grows with it, the gradient does not change."""
    layout: Literal["auto", "padded", "shared", "varlen"] = "auto"
    """How sequences share a micro-batch."""
    gradient_checkpointing: bool = False
    """Keep the inputs of the model's layers alone and compute the rest again in the backward pass: less memory, about a
    third more time."""
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
    """Low-rank adapters instead of every weight."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """AdamW, and how often it steps on a batch."""
    show_every: int = 10
    """Steps between tables of completions on the screen."""
    max_failure_fraction: float = 0.5
    """Stop when more than this share of a batch's rewards raise."""
    reward_timeout: float = 0.0
    """Seconds that a reward may take for a batch before it counts as failed; 0 waits for ever. Sync rewards then run in
    threads, where signals such as math-verify's own timeout do not work."""
    task: TaskConfig = TaskConfig()
    """Prompts to sample completions of."""
    data: DataConfig = DataConfig()
    """Rows that were written before."""
    rewards: tuple[RewardConfig, ...] = (RewardConfig(),)
    """What judges completions; their weighted sum is the reward."""
    rollout: RolloutConfig = RolloutConfig()
    """How completions are sampled."""
    loss: dict[str, Any] = field(default_factory=dict)
    """Changes of the algorithm's preset, by the names of its spec: {surrogate.high: 0.28, kl.coef: 0.001} of a
    `fastrl.PolicyLoss`, {beta: 0.3} of a `fastrl.PreferenceLoss`. The KL of a policy loss is off until it is named: it
    needs a reference in memory."""
    advantages: dict[str, Any] = field(default_factory=dict)
    """Changes of the advantages of a group-relative algorithm, by the names of `fastrl.GroupAdvantage`."""
    policy_gradient: PolicyGradientConfig = PolicyGradientConfig()
    """What else a policy gradient does with a batch."""
    masks: TokenMasks = field(default_factory=TokenMasks)
    """Which tokens learn."""
    ppo: PPOConfig = PPOConfig()
    """The critic of ppo, its advantages and the KL in its reward."""
    eval: EvalConfig = EvalConfig()
    """What is measured on what is held out, and when."""

    @property
    def quantized(self) -> bool:
        """Whether the model's layers are held in fewer bits."""
        return self.adapter.quantize != "none"

    @property
    def offline(self) -> bool:
        """Whether the groups are rows that were written before."""
        return (self.algorithm in OFFLINE) if self.source == "auto" else self.source == "offline"

    def of_policy(self) -> dict[str, Any]:
        """What a `Policy` is told beside its model."""
        return {
            "softcap": self.softcap,
            "logit_scale": self.logit_scale,
            "router_aux_loss_coef": self.router_aux_loss_coef,
            "backend": self.backend,
        }

    def __post_init__(self) -> None:
        op = "TrainConfig"
        for name in ("loss", "advantages"):
            object.__setattr__(self, name, nested(getattr(self, name), name))
        choice(op, "algorithm", self.algorithm, ALGORITHMS)
        for name in ("softcap", "logit_scale"):
            value = getattr(self, name)
            require(value is None or 0 < value < float("inf"), op, name, "a positive number, or null", value)
        coef = self.router_aux_loss_coef
        require(coef is None or 0 <= coef < float("inf"), op, "router_aux_loss_coef", "at least 0, or null", coef)
        for name in ("steps", "max_tokens_per_microbatch", "keep_last"):
            require(getattr(self, name) >= 1, op, name, "at least 1", getattr(self, name))
        for name in ("threads", "save_every", "keep_every"):
            require(getattr(self, name) >= 0, op, name, "0 or more", getattr(self, name))
        require(0 <= self.seed < 2**32, op, "seed", "a number from 0 to 2**32 - 1, as numpy's", self.seed)
        require_run_dir(op, self)
        require_optimizer(op, self.optimizer)
        require_adapter(op, self.adapter)
        require_source(op, self)

    def directory(self) -> Path:
        """`run_dir` with its placeholders filled in."""
        return Path(self.run_dir.format(algorithm=self.algorithm, seed=self.seed)).expanduser()


def require_run_dir(op: str, config: TrainConfig) -> None:
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


def require_source(op: str, config: TrainConfig) -> None:
    """Refuses numbers that make no batch, and settings of the source that the run does not have."""
    rollout, optimizer, share = config.rollout, config.optimizer, config.max_failure_fraction
    positive = {
        "rows_per_step": config.rows_per_step,
        "rollout.prompts_per_step": rollout.prompts_per_step,
        "rollout.group_size": rollout.group_size,
        "rollout.max_new_tokens": rollout.max_new_tokens,
        "optimizer.steps_per_rollout": optimizer.steps_per_rollout,
        "optimizer.epochs_per_rollout": optimizer.epochs_per_rollout,
        "eval.samples": config.eval.samples,
    }
    for name, value in positive.items():
        require(value >= 1, op, name, "at least 1", value)
    counts, expected = config.eval.pass_at_k, f"numbers from 1 to eval.samples = {config.eval.samples}"
    within = all(1 <= k <= config.eval.samples for k in counts)
    require(within, op, "eval.pass_at_k", expected, ", ".join(map(str, counts)))
    require(config.eval.every >= 0, op, "eval.every", "0 (only before and after) or more", config.eval.every)
    rounds = rollout.dynamic_sampling
    require(rounds >= 0, op, "rollout.dynamic_sampling", "0 (off) or more", rounds)
    require(rollout.temperature > 0, op, "rollout.temperature", "more than 0", rollout.temperature)
    require(len(config.rewards) > 0, op, "rewards", "at least one reward", "none")
    require(0 <= share <= 1, op, "max_failure_fraction", "a share from 0 to 1", share)
    seconds = config.reward_timeout
    require(0 <= seconds < math.inf, op, "reward_timeout", "seconds, or 0 (off)", seconds)
    unused = config.offline or config.data == DataConfig()
    expected = f"nothing, as {config.algorithm} learns from completions that it samples"
    require(unused, op, "data", expected, "a value", "Prompts are in task; or set source: offline.")
