"""The settings of a training run, as dataclasses; each default is stated once. `recipe.py` reads them from YAML."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from fastrl.algorithms import ALGORITHMS, OFFLINE, TokenMasks
from fastrl.check import choice, require
from fastrl.data.curriculum import ERRORS
from fastrl.typed import nested

# Settings that a resumed run may change: how long, how often and on what it runs, but not what it computes.
# `model` may have a new name if the weights are the same.
RESUME_MAY_CHANGE = {
    "model", "steps", "run_dir", "resume", "save_every", "keep_last", "keep_every", "show_every", "eval.every",
    "device", "backend", "linear", "max_tokens_per_microbatch", "layout", "gradient_checkpointing", "threads",
    "rollout.max_num_seqs", "max_failure_fraction", "reward_timeout", "adapter.save", "log_to", "ahead.threads",
    "environment.timeout",
}  # fmt: skip


@dataclass(frozen=True)
class TaskConfig:
    """Where prompts come from. A run on rows of `data` uses only the held-out prompts, for evaluation."""

    source: str = "reasoning_gym:chain_sum"
    """reasoning_gym:TASK, reasoning_gym:mixture of several at several levels, a .jsonl, .json, .csv or .parquet file, a
    folder of such files or from save_to_disk, or a hub id."""
    options: dict[str, Any] = field(default_factory=dict)
    """Passed to the source: the settings of a reasoning-gym task, a mixture's tasks, each with a list of levels, or a
    dataset's split and name."""
    size: int = 2000
    """Number of prompts to generate, for reasoning_gym sources."""
    held_out: int = 100
    """Number of prompts held out for evaluation and never trained on."""
    chat: bool = True
    """Render prompts with the model's chat template, if it has one."""
    system: str = ""
    """System message of chat prompts."""
    template_options: dict[str, Any] = field(default_factory=dict)
    """Extra arguments for the chat template, such as enable_thinking; a row's chat_template_kwargs override them."""
    suffix: str = ""
    """Text appended to every question."""
    examples: tuple[dict[str, Any], ...] = ()
    """Chat messages put before every question, after the system message: a conversation that shows what is wanted."""
    max_prompt_tokens: int = 1024
    """Longer prompts are dropped; the run reports how many."""


@dataclass(frozen=True)
class RewardConfig:
    """One reward."""

    name: str = "reasoning_gym"
    """A built-in reward, or package.module:function."""
    weight: float = 1.0
    """Weight in the sum of rewards."""
    options: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of a built-in reward."""


@dataclass(frozen=True)
class RolloutConfig:
    """How completions are sampled."""

    prompts_per_step: int = 8
    """Prompts per training step."""
    group_size: int = 8
    """Completions per prompt."""
    max_new_tokens: int = 32
    """Maximum completion length, in tokens."""
    max_num_seqs: int = 0
    """Completions decoded at the same time; the others wait. Bounds the memory of the key/value cache, in evaluations
    too; 0 is all."""
    temperature: float = 1.0
    """Temperature of sampling and of every log-probability in training."""
    top_p: float = 1.0
    """Nucleus sampling: probability mass to keep; 1 is off."""
    top_k: int = 0
    """Sample from only the k most probable tokens; 0 is off."""
    min_p: float = 0.0
    """Drop tokens less probable than min_p times the most probable one; 0 is off."""
    replay_support: bool = False
    """Train on the policy that was sampled from: log-probabilities, entropy and reference over the tokens that top_p,
    top_k and min_p left, which the sampler records for each token drawn. For policy-gradient algorithms on rollouts."""
    repetition_penalty: float = 1.0
    """Above 1, tokens already in the prompt or the completion become less likely; 1 is off."""
    min_new_tokens: int = 0
    """Minimum completion length: stops are ignored until then."""
    stop: tuple[str, ...] = ()
    """Extra stop tokens, as the tokenizer writes them, on top of the model's and the chat template's."""
    stop_strings: tuple[str, ...] = ()
    """Stop strings: a completion ends with the token that completes one. A string may be part of a token or span
    several. Every token is trained on, the last one too."""
    threshold: float = 0.5
    """Reward from which a completion counts as good: in algorithms that select or label (sft, kto), in pass@k, and in
    curricula."""
    dynamic_sampling: int = 0
    """DAPO: up to this many times a step, replace prompts whose rewards are all equal by new ones; 0 is off."""

    @property
    def reshaped(self) -> dict[str, Any]:
        """The active settings that make the sampler draw from something other than the softmax at the temperature,
        which is what training computes log-probabilities of. `replay_support` covers the truncation."""
        cut = () if self.replay_support else ("top_p", "top_k", "min_p")
        names = (*cut, "repetition_penalty", "min_new_tokens")
        return {name: value for name in names if (value := getattr(self, name)) != getattr(RolloutConfig, name)}


@dataclass(frozen=True)
class EnvironmentConfig:
    """Conversations of several turns with an environment, such as one that runs tools."""

    name: str = ""
    """calculator, reasoning_gym, verifiers, package.module:factory or path/to/file.py:factory; empty is none:
    completions of one turn."""
    options: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of the factory."""
    max_turns: int = 4
    """Turns of the policy after which a conversation is cut."""
    turn_tokens: int = 0
    """Maximum length of one turn, in tokens; 0 is rollout.max_new_tokens, which bounds the whole conversation, the
    environment's tokens included."""
    credit: Literal["completion", "turn"] = "completion"
    """Who gets the reward: completion gives the whole of it to every token; turn gives each turn of the policy what the
    environment gave from then on, compared with the same turn of the prompt's other completions. With PPO the rewards
    are then at the ends of their turns."""
    discount: float = 1.0
    """With credit by turn: the factor by which a reward counts less for each turn that it comes later. PPO has
    ppo.gamma, per token."""
    timeout: float = 10.0
    """Seconds that an environment may take to answer a turn before the conversation counts as failed; 0 is no limit."""


@dataclass(frozen=True)
class InterruptionConfig:
    """Forced length interruption, as in ScaleRL: a completion that thinks for too long is told to answer."""

    after: tuple[int, int] = (0, 0)
    """The budget of a completion is drawn from this range, in tokens; ScaleRL takes 10,000 to 12,000. At its end the
    text is appended, which is not trained on, and rollout.max_new_tokens less the longest budget and the text are left
    for the answer. 0, 0 is off."""
    text: str = "Okay, time is up. Let me stop thinking and formulate a final answer now. </think>"
    """What is appended, as the tokenizer reads it; the default is ScaleRL's."""
    unless: str = "</think>"
    """A completion that has this text by then goes on without being told; empty tells all of them."""


@dataclass(frozen=True)
class CurriculumConfig:
    """Which prompts are drawn, given how earlier ones went: `fastrl.data.curriculum`."""

    kind: Literal[
        "epochs",
        "domain_randomisation",
        "waker_m",
        "waker_r",
        "learnability",
        "difficulty_pools",
        "easy_to_hard",
    ] = "epochs"
    """epochs passes over all prompts in random order. The others draw a bucket first: domain_randomisation each with
    the same probability, waker_m by its error, waker_r by how fast its error falls, learnability by p (1 - p) of its
    pass rate, difficulty_pools by its last mean reward, easy_to_hard by its number, up to one that rises over the
    run."""
    by: tuple[str, ...] = ()
    """Columns whose values name a prompt's bucket, such as task and level; none of them: each prompt is its own. The
    buckets of evaluation too, where eval.by names none."""
    error: Literal[tuple(ERRORS)] = "pass_variance"
    """WAKER's error of a group: pass_variance is p (1 - p) of its pass rate, disagreement the standard deviation
    between the rewards of a completion, two or more on one scale, advantage the mean of |r - mean(r)|."""
    temperature: float | None = None
    """WAKER's temperature; null is the paper's, 1 for waker_m and 0.5 for waker_r."""
    random_share: float = 0.2
    """Probability with which waker and learnability draw any bucket."""
    interval: int = 10
    """K: running means of waker and learnability weigh a new group 1 / K; waker_r compares errors every K groups."""
    power: float = 1.0
    """Exponent of learnability's p (1 - p); 0.5 is the standard deviation."""
    pool_thresholds: tuple[float, ...] = (0.25, 0.75, 1.0)
    """Highest mean reward of each difficulty pool, ascending."""
    pool_weights: tuple[float, ...] = (0.2, 1.0, 0.2)
    """Weight of a bucket in each difficulty pool; a bucket not seen yet has 1."""
    leave_out: float | None = None
    """No-positive-resampling, with any kind: a prompt is left out for good once its pass rate over all its completions
    is at least this, 0.9 in ScaleRL; null is off. A completion passes from rollout.threshold on."""


@dataclass(frozen=True)
class AheadConfig:
    """Sampling ahead of training in a second process: PipelineRL, arXiv:2509.19128."""

    max_staleness: int = 8
    """k: the most steps that the weights behind a token may be older than those that train on it; 0 samples and trains
    in turn. ScaleRL uses 8."""
    threads: int = 0
    """CPU threads of the sampling process; 0 takes half of them, and leaves the others to training."""


@dataclass(frozen=True)
class RoundsConfig:
    """Rounds of sampling, judging, choosing and training, for source: rounds."""

    prompts: int = 64
    """Prompts per round, sampled rollout.prompts_per_step at a time with rollout.group_size completions each."""
    thresholds: tuple[float, ...] = (0.0,)
    """For sft: a round's improves, each on the completions that score more than its threshold; they must rise."""
    quantiles: bool = False
    """thresholds are quantiles of the round's scores, which must be reached: 0.9 takes the best tenth."""
    most_per_prompt: int = 0
    """For sft: at most this many completions of a prompt, the best first; 0 takes all. ReST-EM takes 10."""
    steps: int = 0
    """Training steps per improve; 0 makes `epochs` passes over the chosen rows."""
    epochs: int = 1
    """Passes over the chosen rows of an improve, if steps is 0."""
    restart: bool = False
    """For sft: train from the first weights in every round, as ReST-EM does, instead of the last round's."""


@dataclass(frozen=True)
class DataConfig:
    """Where pre-written rows come from; the algorithm determines their kind."""

    source: str = "reasoning_gym:chain_sum"
    """A .jsonl, .json, .csv or .parquet file, a folder of such files or from save_to_disk, a hub id, or
    reasoning_gym:TASK."""
    options: dict[str, Any] = field(default_factory=dict)
    """Passed to the source: a dataset's split and name, or the settings of a reasoning-gym task."""
    size: int = 2000
    """Number of questions to generate, for reasoning_gym sources."""
    held_out: int = 200
    """Number of rows held out for evaluation and never trained on; no question is in both sets."""
    unpair: bool = False
    """For losses on labelled answers: rows are pairs; split each into a good and a bad answer."""
    ranked: bool = False
    """For reward models: each row has several responses and their ranks, 1 for the best; every pair is compared."""
    margin_column: str = ""
    """For pairs: column with the margin by which the chosen answer should score higher."""
    soft_label_column: str = ""
    """For pairs: column with the probability that the chosen answer is better, such as a judge's."""
    chat: bool = True
    """Render text with the model's chat template, if it has one."""
    system: str = ""
    """System message of chat prompts."""
    template_options: dict[str, Any] = field(default_factory=dict)
    """Extra arguments for the chat template, such as enable_thinking; a row's chat_template_kwargs override them."""
    max_prompt_tokens: int = 1024
    """Rows with longer prompts are dropped; the run reports how many."""
    max_tokens: int = 2048
    """Rows whose prompt and answer together exceed this, or the model's positions, are dropped and reported too."""


@dataclass(frozen=True)
class PolicyGradientConfig:
    """How policy gradients treat a batch of completions, besides their loss."""

    ratio_to_sampler: bool | None = None
    """True: take the ratio to the sampler's log-probabilities, which also corrects the mismatch between sampler and
    trainer. False: take it to the trainer's, computed once before the first update. null: as in the algorithm's
    paper."""
    filter_zero_variance: bool = False
    """Also leave groups of equal rewards out of the normaliser, as ScaleRL does; their gradient is zero either way."""
    mask_truncated_completions: bool = False
    """Leave completions that hit the length limit out of the loss and its normaliser."""


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW."""

    lr: float = 1e-6
    """Learning rate after warm-up."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of the running means of the gradient and of its square."""
    eps: float = 1e-8
    """Added to the root of the mean squared gradient."""
    weight_decay: float = 0.0
    """Decoupled weight decay: each step subtracts lr times this share of every weight, norms and biases included."""
    max_grad_norm: float = 1.0
    """Gradients with a larger Euclidean norm are scaled down to it; 0 turns clipping off."""
    warmup_steps: int = 0
    """Optimizer steps over which the learning rate rises linearly from lr / warmup_steps."""
    schedule: Literal["constant", "cosine"] = "constant"
    """Learning rate after warm-up; cosine falls to 0 at the run's last optimizer step."""
    steps_per_rollout: int = 1
    """Optimizer steps per batch of completions, each on its own share of it; the steps after the first are
    off-policy."""
    epochs_per_rollout: int = 1
    """Passes over each batch of completions."""


@dataclass(frozen=True)
class AdapterConfig:
    """Train low-rank adapters (LoRA) instead of every weight."""

    rank: int = 0
    """Rank of the adapters; 0 trains every weight."""
    alpha: float = 32.0
    """Adapters are scaled by alpha / rank."""
    targets: tuple[str, ...] = ("all-linear",)
    """Names of the adapted modules, such as q_proj or lm_head; all-linear is every linear layer but the head."""
    save: Literal["adapter", "merged"] = "adapter"
    """What the run saves: only the adapter, or the whole model with the adapter merged in."""
    quantize: Literal["none", "nf4"] = "none"
    """nf4 stores the frozen linear layers, all but the head, in 4 bits (QLoRA). Needs bitsandbytes."""


@dataclass(frozen=True)
class PPOConfig:
    """PPO's settings besides the policy loss."""

    critic: Literal["separate", "shared", "none"] = "separate"
    """separate is its own model, shared a linear layer on the policy's hidden states, none is REINFORCE++."""
    critic_model: str = ""
    """Initial weights of a separate critic, such as a trained reward model; empty is the policy's model."""
    critic_lr: float | None = None
    """Learning rate of the critic; null is 1e-5 for separate and 1e-4 for shared, whose layer starts at zero."""
    critic_warmup: int = 0
    """Train only the separate critic for this many steps first: VAPO's value pre-training."""
    gamma: float = 1.0
    """Discount per token."""
    lam: float = 0.95
    """GAE's lambda: 1 is the return minus the value, 0 the one-step error."""
    lam_policy: float | None = None
    """Lambda of the policy's advantages; null uses lam, which always sets the critic's returns."""
    length_alpha: float | None = None
    """VAPO: set lam_policy of each completion to 1 - 1 / (length_alpha tokens). VAPO uses 0.05, with lam 1."""
    positive_nll: float = 0.0
    """VAPO: weight of the negative log-likelihood of completions that score above 0. VAPO uses 0.1."""
    value_coef: float = 0.1
    """Weight of the value loss."""
    value_clip: float | None = 0.2
    """How far a value may move from the rollout's, in units of the return; null is off."""
    whiten: bool = True
    """Shift and scale the advantages of a rollout to mean 0 and standard deviation 1."""
    kl_coef: float = 0.05
    """Weight of the KL to the reference in each token's reward; at 0 no reference model is loaded."""
    kl_target: float | None = None
    """KL per sequence, in nats, that kl_coef adapts toward; null keeps kl_coef fixed."""
    kl_horizon: int = 10000
    """Number of sequences over which kl_coef adapts."""
    ptx_coef: float = 0.0
    """PPO-ptx: weight of the mean negative log-likelihood of rows of `data` (demonstrations or plain text), of which
    each optimizer step takes `rows_per_step`; InstructGPT uses 27.8."""


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation on the held-out set, before, during and after training."""

    every: int = 0
    """Steps between evaluations; 0 evaluates only before and after training."""
    samples: int = 1
    """Sampled completions per held-out prompt, besides the greedy one."""
    pass_at_k: tuple[int, ...] = ()
    """Values of k, at most samples. pass@k is the probability that at least one of k completions reaches
    rollout.threshold, estimated from all sampled completions."""
    by: tuple[str, ...] = ()
    """Columns whose values name a prompt's bucket: also reports each bucket's mean reward, their mean, and their
    CVaR_0.1, the mean of the worst tenth of the buckets. About equally many prompts are held out of each. Empty takes
    curriculum.by."""


@dataclass(frozen=True)
class TrainConfig:
    """A training run."""

    model: str = "smollm2-135m-instruct"
    """A folder, a hub id, or the name of a model that ships in a Python package."""
    algorithm: Literal[tuple(ALGORITHMS)] = "grpo"
    """Sets the advantages and the loss; `loss` overrides its factors one by one."""
    source: Literal["auto", "rollouts", "ahead", "offline", "rounds"] = "auto"
    """Where groups come from: rollouts samples them from `task` at each step, ahead does so in a second process while
    training goes on, offline reads pre-written rows of `data`, rounds samples many at once, keeps them on disk and
    trains on the chosen ones for several steps. auto: the usual source of the algorithm."""
    reference: str = ""
    """The frozen reference model; empty is the model itself before training."""
    steps: int = 100
    """Optimizer steps; with rollouts, rollout batches."""
    seed: int = 0
    """Seeds sampling, the order of prompts and rows, and the held-out split."""
    run_dir: str = "runs/{algorithm}"
    """Folder for everything the run writes; if it exists, -2, -3, ... is appended."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Dtype of weights and activations; the optimizer is always float32. auto: bfloat16 on GPUs that support it, and on
    CPUs where a short benchmark shows it is faster."""
    linear: Literal["auto", "native", "torch"] = "auto"
    """CPU implementation of linear layers. auto: the faster one for each shape, by a short benchmark that resumed runs
    do not repeat. With native or torch, two runs give the same bits."""
    device: str = "auto"
    """cpu, cuda, ...; auto takes a GPU if there is one."""
    backend: str = "auto"
    """Backend of the fused ops; see `fastrl doctor`."""
    softcap: float | None = None
    """Soft cap on the logits, such as Gemma's final_logit_softcapping; null reads it from the model's configuration."""
    logit_scale: float | None = None
    """Scale of the logits, such as Cohere's; null reads it from the model's configuration."""
    router_aux_loss_coef: float | None = None
    """Weight of the load-balancing loss of a mixture of experts; null takes the model's own, 0 turns it off."""
    rows_per_step: int = 16
    """Rows per step, of `data` or of a round: pairs, labelled answers, demonstrations or groups of scored
    completions."""
    max_tokens_per_microbatch: int = 2048
    """Model input tokens per micro-batch, padding included. Affects memory, not the gradient."""
    layout: Literal["auto", "padded", "shared", "varlen"] = "auto"
    """How sequences share a micro-batch."""
    gradient_checkpointing: bool = False
    """Keep only each layer's inputs and recompute the rest in the backward pass: less memory, about a third more
    time."""
    threads: int = 0
    """CPU threads; 0 keeps torch's choice."""
    save_every: int = 0
    """Steps between checkpoints; 0 writes one only when a signal such as Ctrl-C or an error stops the run."""
    keep_last: int = 2
    """Number of newest checkpoints to keep; more than one, in case the newest is damaged."""
    keep_every: int = 0
    """Also keep the checkpoint of every such step forever; 0 keeps none."""
    resume: str = ""
    """Run directory or checkpoint to resume from; latest is the run under run_dir that saved last."""
    log_to: tuple[Literal["tensorboard", "trackio", "wandb"], ...] = ()
    """Trackers that also get the metrics; metrics.jsonl is always written."""
    adapter: AdapterConfig = AdapterConfig()
    """Low-rank adapters instead of every weight."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """AdamW, and how often it steps on a batch."""
    show_every: int = 10
    """Steps between tables of completions on the screen."""
    max_failure_fraction: float = 0.5
    """Stop if more than this share of a batch's reward calls fail."""
    reward_timeout: float = 0.0
    """Seconds a reward may take per batch before it counts as failed; 0 is no limit. With a limit, sync rewards run in
    threads, where signals such as math-verify's own timeout do not work."""
    task: TaskConfig = TaskConfig()
    """Prompts to sample completions for."""
    data: DataConfig = DataConfig()
    """Pre-written rows."""
    rewards: tuple[RewardConfig, ...] = (RewardConfig(),)
    """Reward functions; their weighted sum is the reward."""
    rollout: RolloutConfig = RolloutConfig()
    """How completions are sampled."""
    ahead: AheadConfig = AheadConfig()
    """How far `source: ahead` samples ahead."""
    rounds: RoundsConfig = RoundsConfig()
    """Rounds of sampling, judging, choosing and training."""
    loss: dict[str, Any] = field(default_factory=dict)
    """Changes to the algorithm's preset, by the names in its spec: {surrogate.high: 0.28, kl.coef: 0.001} for a
    `fastrl.PolicyLoss`, {beta: 0.3} for a `fastrl.PreferenceLoss`. The KL of a policy loss is off unless named here,
    because it needs a reference model in memory."""
    advantages: dict[str, Any] = field(default_factory=dict)
    """Changes to the advantages of a group-relative algorithm, by the names in `fastrl.GroupAdvantage`."""
    policy_gradient: PolicyGradientConfig = PolicyGradientConfig()
    """How policy gradients treat a batch, besides their loss."""
    masks: TokenMasks = field(default_factory=TokenMasks)
    """Which tokens are trained on."""
    ppo: PPOConfig = PPOConfig()
    """PPO's critic, its advantages and the KL in its reward."""
    eval: EvalConfig = EvalConfig()
    """What is measured on the held-out set, and when."""
    environment: EnvironmentConfig = EnvironmentConfig()
    """What answers the policy in conversations of several turns, in training and in evaluation."""
    interruption: InterruptionConfig = InterruptionConfig()
    """When completions that are too long are told to answer, in training and in evaluation."""
    curriculum: CurriculumConfig = CurriculumConfig()
    """Which prompts of `task` are drawn."""

    @property
    def quantized(self) -> bool:
        """Whether the model's layers are quantized."""
        return self.adapter.quantize != "none"

    @property
    def offline(self) -> bool:
        """Whether the groups are pre-written rows."""
        return (self.algorithm in OFFLINE) if self.source == "auto" else self.source == "offline"

    def about_data(self) -> dict[str, str]:
        """Where groups come from, what is held out and what makes a step, in words."""
        rollout, read = self.rollout, self.data if self.offline else self.task
        sampled = f"{rollout.prompts_per_step} prompts x {rollout.group_size} completions"
        return {
            "source": read.source,
            "held_out": f"{read.held_out} {'rows' if self.offline else 'prompts'}",
            "step": f"{self.rows_per_step} rows" if self.offline or self.source == "rounds" else sampled,
        }

    def of_policy(self) -> dict[str, Any]:
        """Arguments of a `Policy` besides its model."""
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
        require_curriculum(op, self)
        require_rounds(op, self)
        require_environment(op, self)
        require_interruption(op, self)

    def directory(self) -> Path:
        """`run_dir` with its placeholders filled in."""
        return Path(self.run_dir.format(algorithm=self.algorithm, seed=self.seed)).expanduser()


def require_environment(op: str, config: TrainConfig) -> None:
    """Refuses settings of an environment that there is not, and limits that leave no conversation."""
    turns, new = config.environment, config.rollout.max_new_tokens
    if not turns.name:
        require(turns == EnvironmentConfig(), op, "environment", "a name with its other settings", "none")
        return
    require(
        not config.offline or config.task != TaskConfig(), op, "environment.name", "none for written rows", turns.name
    )
    require(turns.max_turns >= 1, op, "environment.max_turns", "at least 1", turns.max_turns)
    within, expected = 0 <= turns.turn_tokens <= new, f"0 to rollout.max_new_tokens = {new}"
    require(within, op, "environment.turn_tokens", expected, turns.turn_tokens)
    require(0 <= turns.timeout < math.inf, op, "environment.timeout", "seconds, or 0 (no limit)", turns.timeout)
    require(0 <= turns.discount <= 1, op, "environment.discount", "a number from 0 to 1", turns.discount)
    if turns.credit == "completion":
        require(turns.discount == 1, op, "environment.discount", "1 without credit: turn", turns.discount)
        return
    named = any(reward.name == "environment" for reward in config.rewards)
    require(
        named, op, "environment.credit", "completion without the reward `environment`, which has the turns'", "turn"
    )
    rounds, do = config.rollout.dynamic_sampling, "Groups of equal sums may differ in their turns."
    require(rounds == 0, op, "rollout.dynamic_sampling", "0 with environment.credit: turn", rounds, do)


def require_interruption(op: str, config: TrainConfig) -> None:
    """Refuses settings of an interruption that never happens, and budgets that make none."""
    asked, (low, high) = config.interruption, config.interruption.after
    if (low, high) == (0, 0):
        off = asked == InterruptionConfig()
        require(off, op, "interruption.after", "two numbers of tokens with its other settings", "0, 0 (off)")
        return
    require(1 <= low <= high, op, "interruption.after", "two numbers from 1, the larger one last", f"{low}, {high}")
    sampled = not config.offline or config.task != TaskConfig()
    require(sampled, op, "interruption", "none for written rows", "a value")
    do = "An environment's turns have environment.turn_tokens."
    require(not config.environment.name, op, "interruption", "none with an environment", "a value", do)


def require_run_dir(op: str, config: TrainConfig) -> None:
    """Refuses a `run_dir` whose placeholders cannot be filled in, or that names no folder."""
    do = "Double a brace that is part of the name."
    try:
        named = bool(config.directory().name)
    except (LookupError, ValueError, AttributeError):
        named = False
    expected = "a folder's name, in which {algorithm} and {seed} may stand"
    require(named, op, "run_dir", expected, repr(config.run_dir), do if "{" in config.run_dir else "")


def require_optimizer(op: str, optimizer: OptimizerConfig) -> None:
    """Refuses rates that make no sense for AdamW."""
    for name in ("lr", "eps", "weight_decay", "max_grad_norm"):
        value = getattr(optimizer, name)
        require(0 <= value < math.inf, op, f"optimizer.{name}", "0 or more, and finite", value)
    betas = all(0 <= beta < 1 for beta in optimizer.betas)
    require(betas, op, "optimizer.betas", "two numbers from 0 to below 1", optimizer.betas)
    require(optimizer.warmup_steps >= 0, op, "optimizer.warmup_steps", "0 or more", optimizer.warmup_steps)


def require_adapter(op: str, adapter: AdapterConfig) -> None:
    """Refuses impossible adapter settings."""
    require(adapter.rank >= 0, op, "adapter.rank", "0 or more", adapter.rank)
    require(len(adapter.targets) > 0, op, "adapter.targets", "at least one name", "none")
    if adapter.quantize != "none":
        require(adapter.rank > 0, op, "adapter.quantize", "none without an adapter, rank 0", adapter.quantize)
        do = "Merging would round the sum to 4 bits; training kept the adapter apart."
        require(adapter.save == "adapter", op, "adapter.save", "adapter with adapter.quantize", adapter.save, do)


def require_curriculum(op: str, config: TrainConfig) -> None:
    """Refuses settings with which a curriculum would draw nothing, or something other than it says."""
    asked, one = config.curriculum, "curriculum"
    fresh = not config.offline or asked == CurriculumConfig()
    require(fresh, op, one, f"its defaults, as {config.algorithm} reads written rows in epochs", asked.kind)
    warm = asked.temperature is None or 0 < asked.temperature < math.inf
    require(warm, op, f"{one}.temperature", "more than 0, or null", asked.temperature)
    require(0 <= asked.random_share <= 1, op, f"{one}.random_share", "a share from 0 to 1", asked.random_share)
    require(asked.interval >= 1, op, f"{one}.interval", "1 or more", asked.interval)
    require(0 < asked.power < math.inf, op, f"{one}.power", "more than 0", asked.power)
    share = asked.leave_out
    require(share is None or 0 < share <= 1, op, f"{one}.leave_out", "a share above 0, or null", share)
    thresholds, weights = asked.pool_thresholds, asked.pool_weights
    ascending = bool(thresholds) and all(a < b for a, b in pairwise(thresholds))
    require(ascending, op, f"{one}.pool_thresholds", "ascending numbers", thresholds)
    paired = len(weights) == len(thresholds) and all(0 <= weight < math.inf for weight in weights) and any(weights)
    expected = f"{len(thresholds)} numbers from 0, one per threshold, not all 0"
    require(paired, op, f"{one}.pool_weights", expected, weights)
    several = asked.error != "disagreement" or asked.kind not in ("waker_m", "waker_r") or len(config.rewards) > 1
    do = "One reward disagrees with nobody: name an ensemble in rewards, or take another error."
    require(several, op, f"{one}.error", "pass_variance or advantage with one reward", asked.error, do)
    ordered = asked.kind != "easy_to_hard" or len(asked.by) == 1
    require(ordered, op, f"{one}.by", "one column of numbers for easy_to_hard", ", ".join(asked.by) or "none")


def require_source(op: str, config: TrainConfig) -> None:
    """Refuses numbers that make no batch, and settings of a source that the run does not use."""
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
    ahead, unused = config.ahead, config.source == "ahead" or config.ahead == AheadConfig()
    require(unused, op, "ahead", "its defaults without source: ahead", "a value")
    for name in ("max_staleness", "threads"):
        require(getattr(ahead, name) >= 0, op, f"ahead.{name}", "0 or more", getattr(ahead, name))
    require(config.eval.every >= 0, op, "eval.every", "0 (only before and after) or more", config.eval.every)
    rounds = rollout.dynamic_sampling
    require(rounds >= 0, op, "rollout.dynamic_sampling", "0 (off) or more", rounds)
    require(rollout.max_num_seqs >= 0, op, "rollout.max_num_seqs", "0 (all) or more", rollout.max_num_seqs)
    require(rollout.temperature > 0, op, "rollout.temperature", "more than 0", rollout.temperature)
    require(len(config.rewards) > 0, op, "rewards", "at least one reward", "none")
    require(0 <= share <= 1, op, "max_failure_fraction", "a share from 0 to 1", share)
    seconds = config.reward_timeout
    require(0 <= seconds < math.inf, op, "reward_timeout", "seconds, or 0 (off)", seconds)
    unused = config.offline or config.ppo.ptx_coef != 0 or config.data == DataConfig()
    expected = f"nothing, as {config.algorithm} learns from completions that it samples"
    require(unused, op, "data", expected, "a value", "Prompts are in task; or set source: offline.")


def require_rounds(op: str, config: TrainConfig) -> None:
    """Refuses rounds that the algorithm cannot learn from or that never end, and settings that would do nothing."""
    rounds, kind = config.rounds, ALGORITHMS[config.algorithm].kind
    if config.source != "rounds":
        expected = f"its defaults with source: {config.source}"
        require(rounds == RoundsConfig(), op, "rounds", expected, "a value", "Set source: rounds.")
        return
    fits = kind in ("pairs", "completions") and config.algorithm != "reward_model"
    require(fits, op, "source", f"rollouts or offline for {config.algorithm}", "rounds", "Rounds train sft and dpo.")
    for name in ("prompts", "epochs"):
        require(getattr(rounds, name) >= 1, op, f"rounds.{name}", "at least 1", getattr(rounds, name))
    for name in ("most_per_prompt", "steps"):
        require(getattr(rounds, name) >= 0, op, f"rounds.{name}", "0 or more", getattr(rounds, name))
    of_sft = {"thresholds", "quantiles", "most_per_prompt", "restart"} if kind == "pairs" else set()
    set_ = [name for name in sorted(of_sft) if getattr(rounds, name) != getattr(RoundsConfig, name)]
    expected = f"left out for {config.algorithm}, which takes the best and the worst of each group"
    require(not set_, op, f"rounds.{', rounds.'.join(set_)}", expected, "a value")
    rising = all(low < high for low, high in zip(rounds.thresholds, rounds.thresholds[1:], strict=False))
    rising = rising and len(rounds.thresholds) > 0 and all(map(math.isfinite, rounds.thresholds))
    require(rising, op, "rounds.thresholds", "one finite number or more, each above the last", rounds.thresholds)
    shares = not rounds.quantiles or all(0 <= share <= 1 for share in rounds.thresholds)
    require(shares, op, "rounds.thresholds", "shares from 0 to 1 with rounds.quantiles", rounds.thresholds)
    constant = not rounds.restart or config.optimizer.schedule == "constant"
    do = "A restart begins the schedule anew."
    require(constant, op, "optimizer.schedule", "constant with rounds.restart", config.optimizer.schedule, do)
    fresh, got = config.rollout.dynamic_sampling == 0, config.rollout.dynamic_sampling
    require(fresh, op, "rollout.dynamic_sampling", "0 with rounds, which choose from what was sampled", got)
    named = config.rollout.threshold == RolloutConfig.threshold or bool(config.eval.pass_at_k)
    do = "Set rounds.thresholds."
    require(named, op, "rollout.threshold", "left out with rounds", config.rollout.threshold, do)
