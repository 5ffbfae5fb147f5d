"""What flows through fastrl, each field with its shape and dtype.

Sizes: `B` or `S` sequences, `T` completion tokens, `N` flattened tokens, `H` hidden, `V` vocabulary, `G` samples of a
prompt.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import torch

# What an optimizer step reports: metrics, name -> (sum, count), and numbers.
Update = tuple[dict[str, tuple["torch.Tensor", "torch.Tensor"]], dict[str, float]]
Messages = list[dict[str, Any]]  # each with role and content, and whatever else the chat template reads


class LogprobOutput(NamedTuple):
    """Log-probabilities of the given ids and, when asked for, the entropy of the whole distribution."""

    logps: torch.Tensor  # token-shaped, float32
    entropy: torch.Tensor | None  # token-shaped, float32


class LossOutput(NamedTuple):
    """A scalar loss and what to log: name -> (sum, count); the value is sum / count, and a maximum has count 1."""

    loss: torch.Tensor  # scalar, float32
    metrics: dict[str, tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class Prompt:
    """One task: what the model is asked, and what the rewards need to judge the answer."""

    index: int  # its row in the prompt source, stable across epochs
    content: str | Messages  # plain text, or chat messages that the chat template renders
    token_ids: tuple[int, ...]  # as the model sees it, chat template applied
    columns: dict[str, Any] = field(default_factory=dict)  # the source's other columns, passed to rewards by name


@dataclass
class Sample:
    """One completion of one prompt."""

    token_ids: list[int]  # completion only, the stop token included when it was sampled
    sampling_logps: list[float]  # of each token, under the sampler, temperature and truncation applied
    finished: bool  # True when a stop token was sampled, False when the length limit cut it
    text: str = ""  # decoded without special tokens
    rewards: dict[str, float | None] = field(default_factory=dict)  # by reward name; None = not applicable
    reward: float | None = None  # weighted sum; None = this sample could not be scored and is excluded
    advantage: float = 0.0
    own: list[bool] | None = None  # of each token, whether the policy wrote it; None: all. The others do not train
    versions: list[int] | None = None  # of each token, how many updates the weights had seen that wrote it
    # Of each token, where somebody was asked: a frozen reference; the policy and its critic before the first update.
    ref_logps: list[float] | None = None
    old_logps: list[float] | None = None
    values: list[float] | None = None
    extra: dict[str, Any] = field(default_factory=dict)  # what rewards log of it with `log_extra`, as JSON can hold it


@dataclass
class Group:
    """All samples of one prompt in one rollout, or the answers of one row that were written before training.

    The only thing that crosses a queue, a process, a file or a checkpoint: what a forward pass takes is derived from
    it again.
    """

    prompt: Prompt
    samples: list[Sample]
    greedy_reward: float | None = None  # of the prompt's greedy completion, where an estimator reads it
    mismatched: Sample | None = None  # an answer to another prompt, for KTO's baseline
    margin: float | None = None  # by how much the first answer of a pair is better, where the data say so
    soft_label: float | None = None  # probability that it is the better one, where the data say so


@dataclass
class Batch:
    """What a source gives for one training step, and how far training on it has come."""

    groups: list[Group]
    seed: int  # of the order in which they train
    kind: str = "rewarded"  # what the groups are; see `fastrl.algorithms.base.Kind`
    contributing: list[Group] = field(default_factory=list)  # those that the algorithm finds a gradient in
    numbers: dict[str, float] = field(default_factory=dict)  # what source and algorithm report of it
    scored: bool = False  # whether the samples hold what is read of the weights before the first update
    updates: list[Update] = field(default_factory=list)  # of the optimizer steps that are done


@dataclass(frozen=True)
class MicroBatch:
    """Some sequences laid out for one forward pass, and the token vectors of their completions.

    The model runs on `(R, L)` rows; the `N` completion tokens are packed. Token `n` is predicted by the hidden state at
    flat position `hidden_index[n]` of the `(R * L)` outputs: the one-token shift happens here and nowhere else.
    """

    input_ids: torch.Tensor  # (R, L) int64
    position_ids: torch.Tensor  # (R, L) int64
    # (R, L) bool; (R, 1, L, L) bool where sequences share a row; None where attention_cu_seqlens cuts the row
    attention_mask: torch.Tensor | None
    hidden_index: torch.Tensor  # (N,) int64
    targets: torch.Tensor  # (N,) int64
    cu_seqlens: torch.Tensor  # (S + 1,) int64, bounds of each sequence's completion tokens in N
    group_ids: torch.Tensor  # (S,) int64
    group_tokens: torch.Tensor  # (S,) int64, tokens that train in the sequence's whole group, wherever they are
    scores: torch.Tensor  # (S,) float32, the samples' rewards
    advantages: torch.Tensor  # (S,) float32, or (N,) where they come from a critic or from masks of tokens
    mask: torch.Tensor  # (N,) bool
    sampling_logps: torch.Tensor  # (N,) float32
    old_logps: torch.Tensor | None = None  # (N,) float32; None = on-policy, the ratio is exactly 1
    ref_logps: torch.Tensor | None = None  # (N,) float32
    values: torch.Tensor | None = None  # (N,) float32, of the critic before the update
    returns: torch.Tensor | None = None  # (N,) float32, what the critic should have said
    kl_cov_weights: torch.Tensor | None = None  # (N,) float32, how strongly KL-Cov holds each token to the old policy
    nll_weights: torch.Tensor | None = None  # (N,) float32, of a negative log-likelihood beside the policy loss
    attention_cu_seqlens: torch.Tensor | None = None  # (S + 1,) int32, bounds in L of sequences laid end to end, R = 1
    attention_max_seqlen: int = 0  # length of the longest of them
    token_mask: torch.Tensor | None = None  # (R, L) bool, where there is a token; the rest pads
    share: float = 1.0  # of the tokens of all micro-batches that were packed together
    samples: tuple[Sample, ...] = ()  # the sequences, as they came

    @property
    def num_tokens(self) -> int:
        """Tokens the model's forward processes, padding included."""
        return self.input_ids.numel()
