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
    """Log-probabilities of the given ids and, if requested, the entropy of the whole distribution."""

    logps: torch.Tensor  # token-shaped, float32
    entropy: torch.Tensor | None  # token-shaped, float32


class LogprobDetails(NamedTuple):
    """As `LogprobOutput`, and what else was requested of each token's distribution; None where not requested."""

    logps: torch.Tensor  # token-shaped, float32
    entropy: torch.Tensor | None  # token-shaped, float32
    log_sum_sq_probs: torch.Tensor | None = None  # log sum_v p_v^2, token-shaped, float32, no gradient
    mean_logits: torch.Tensor | None = None  # mean over the vocabulary, token-shaped, float32, no gradient
    is_top1: torch.Tensor | None = None  # whether greedy decoding gives the token, token-shaped, bool


class LossOutput(NamedTuple):
    """A scalar loss and metrics to log: name -> (sum, count). The value is sum / count; a maximum has count 1."""

    loss: torch.Tensor  # scalar, float32
    metrics: dict[str, tuple[torch.Tensor, torch.Tensor]]
    # Of the losses that compute them on the way, token-shaped constants; 0 outside the mask.
    logps: torch.Tensor | None = None
    entropy: torch.Tensor | None = None


@dataclass(frozen=True)
class Prompt:
    """One task: what the model is asked, and what the rewards need to score the answer."""

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
    own: list[bool] | None = None  # per token, whether the policy wrote it (None: all); others are not trained on
    versions: list[int] | None = None  # per token, the number of updates behind the weights that wrote it
    # Per token, if computed: by the frozen reference; by the policy and its critic before the first update.
    ref_logps: list[float] | None = None
    old_logps: list[float] | None = None
    values: list[float] | None = None
    extra: dict[str, Any] = field(default_factory=dict)  # what rewards pass to `log_extra`, as JSON can hold it
    support: list[list[int]] | None = None  # per token, if recorded: the ids it was drawn from; None: all of them
    # Per turn of the policy in a conversation: the number of tokens up to its end; its share of `reward`, the last
    # one's with all that no turn got; and, if credit is given by turn, what takes the place of `advantage`.
    turn_ends: list[int] | None = None
    turn_rewards: list[float] | None = None
    turn_advantages: list[float] | None = None


@dataclass
class Group:
    """All samples of one prompt in one rollout, or the answers of one pre-written row.

    Only groups cross a queue, a process, a file or a checkpoint; inputs of a forward pass are rebuilt from them.
    """

    prompt: Prompt
    samples: list[Sample]
    greedy_reward: float | None = None  # reward of the prompt's greedy completion, if an estimator reads it
    mismatched: Sample | None = None  # an answer to another prompt, for KTO's baseline
    margin: float | None = None  # by how much the first answer of a pair is better, if the data have it
    soft_label: float | None = None  # probability that the first answer is better, if the data have it


@dataclass
class Batch:
    """The data of one training step, and the progress of training on it."""

    groups: list[Group]
    seed: int  # of the training order
    kind: str = "rewarded"  # kind of groups; see `fastrl.algorithms.base.Kind`
    contributing: list[Group] = field(default_factory=list)  # groups that have a gradient
    numbers: dict[str, float] = field(default_factory=dict)  # reported by source and algorithm
    scored: bool = False  # whether the samples hold what is computed before the first update
    updates: list[Update] = field(default_factory=list)  # results of the optimizer steps done


@dataclass(frozen=True)
class MicroBatch:
    """Sequences laid out for one forward pass, and the token vectors of their completions.

    The model runs on `(R, L)` rows; the `N` completion tokens are packed. Token `n` is predicted by the hidden state at
    flat position `hidden_index[n]` of the `(R * L)` outputs: the one-token shift happens here and nowhere else.
    """

    input_ids: torch.Tensor  # (R, L) int64
    position_ids: torch.Tensor  # (R, L) int64
    # (R, L) bool; (R, 1, L, L) bool if sequences share a row; None if attention_cu_seqlens splits the row
    attention_mask: torch.Tensor | None
    hidden_index: torch.Tensor  # (N,) int64
    targets: torch.Tensor  # (N,) int64
    cu_seqlens: torch.Tensor  # (S + 1,) int64, bounds of each sequence's completion tokens in N
    group_ids: torch.Tensor  # (S,) int64
    group_tokens: torch.Tensor  # (S,) int64, trained tokens of the sequence's whole group, in any micro-batch
    scores: torch.Tensor  # (S,) float32, the samples' rewards
    advantages: torch.Tensor  # (S,) float32, or (N,) if they come from a critic, from turns or from token masks
    mask: torch.Tensor  # (N,) bool
    sampling_logps: torch.Tensor  # (N,) float32
    old_logps: torch.Tensor | None = None  # (N,) float32; None = on-policy, the ratio is exactly 1
    ref_logps: torch.Tensor | None = None  # (N,) float32
    values: torch.Tensor | None = None  # (N,) float32, the critic's values before the update
    returns: torch.Tensor | None = None  # (N,) float32, the critic's targets
    kl_cov_weights: torch.Tensor | None = None  # (N,) float32, how strongly KL-Cov holds each token to the old policy
    nll_weights: torch.Tensor | None = None  # (N,) float32, weights of an additional negative log-likelihood
    attention_cu_seqlens: torch.Tensor | None = None  # (S + 1,) int32, bounds in L of sequences laid end to end, R = 1
    attention_max_seqlen: int = 0  # length of the longest of them
    token_mask: torch.Tensor | None = None  # (R, L) bool, True for tokens, False for padding
    share: float = 1.0  # share of the tokens of all micro-batches packed together
    # (token_ids (nnz,), offsets (N + 1,)) int64: the ids that each token was drawn from; None = the whole vocabulary
    support: tuple[torch.Tensor, torch.Tensor] | None = None
    samples: tuple[Sample, ...] = ()  # the original samples

    @property
    def num_tokens(self) -> int:
        """Tokens that the model's forward pass processes, padding included."""
        return self.input_ids.numel()
