"""The key/value cache of a rollout: preallocated, written in place, read through views, shrunk as rows finish."""

from __future__ import annotations

import inspect
from functools import lru_cache

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

from fastrl.check import require
from fastrl.kernels import native

DECODE_ATTENTION = "fastrl_decode"
_OP = "TransformersSampler"


def passed_as(model: PreTrainedModel, cache: Cache) -> dict[str, Cache]:
    """The cache as the keyword argument that the model's forward takes."""
    return {_cache_name(type(model)): cache}


@lru_cache
def _cache_name(kind: type) -> str:
    """transformers renamed `past_key_values` to `cache`; models with custom code may keep the old name."""
    taken = inspect.signature(kind.forward).parameters
    # A forward that names neither passes it on to transformers' own, which uses the name of its output's field.
    default = "cache" if "cache" in inspect.signature(CausalLMOutputWithPast).parameters else "past_key_values"
    return next((name for name in ("cache", "past_key_values") if name in taken), default)


class RolloutLayer(CacheLayerMixin):
    """One layer's keys and values, `(rows, kv_heads, max_len, head_dim)`; all rows end at one cursor.

    A sliding-window layer returns a view of its last `window` positions, so no mask has to hide the older ones.
    """

    def __init__(self, like: CacheLayerMixin, rows: int, max_len: int, cursor: int) -> None:
        super().__init__()
        require(
            type(like) in (DynamicLayer, DynamicSlidingWindowLayer),
            _OP,
            "model",
            "full or sliding-window attention in every layer",
            type(like).__name__,
            "Use another sampler for this model.",
        )
        self.window = like.sliding_window if like.is_sliding else max_len
        # Zeros, not empty: masked positions still enter a product with weight 0, and 0 * NaN is NaN.
        self.keys, self.values = (
            states.new_zeros(rows, states.shape[1], max_len, states.shape[3]) for states in (like.keys, like.values)
        )
        self.cursor = cursor
        self.is_initialized = True

    def fill(self, like: CacheLayerMixin, rows: torch.Tensor, source: torch.Tensor, prefix: torch.Tensor) -> None:
        """Copy prompt `source[i]` of a prefilled layer to row `rows[i]`, its last token just before the cursor.

        `prefix` `(len(rows), c)`: where each row's first `c` positions of `like` belong instead, the shared prefix.
        """
        shared = prefix.shape[1]
        span = slice(self.cursor - like.keys.shape[2] + shared, self.cursor)
        for mine, states in ((self.keys, like.keys), (self.values, like.values)):
            mine[rows, :, span] = states[source, :, shared:]
            if shared:
                # All rows have the same prefix; assignment by index puts the heads after the indexed dimensions.
                mine[rows[:, None], :, prefix] = states[0, :, :shared].transpose(0, 1)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write one token at the cursor and return views of what it attends to."""
        self.keys[:, :, self.cursor] = key_states[:, :, 0]
        self.values[:, :, self.cursor] = value_states[:, :, 0]
        self.cursor += 1
        seen = slice(max(0, self.cursor - self.window), self.cursor)
        return self.keys[:, :, seen], self.values[:, :, seen]

    def keep(self, rows: torch.Tensor) -> None:
        """Keep only these rows."""
        self.keys, self.values = self.keys.index_select(0, rows), self.values.index_select(0, rows)

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing to do: the constructor allocates."""

    def get_mask_sizes(self, query: int | torch.Tensor) -> tuple[int, int]:
        """(length, offset) of what `update` returns for `query` tokens; older transformers pass their positions."""
        query_length = query if isinstance(query, int) else len(query)
        length = min(self.cursor + query_length, self.window)
        return length, self.cursor + query_length - length

    def get_seq_length(self) -> int:
        """Tokens seen, left padding included."""
        return self.cursor

    def get_max_length(self) -> int:
        """Tokens the layer can hold."""
        return self.keys.shape[2]

    get_max_cache_shape = get_max_length  # its former name


class RolloutCache(Cache):
    """A `RolloutLayer` per layer, filled from prefilled prompts."""

    def __init__(self, rows: int, max_len: int, cursor: int) -> None:
        super().__init__(layers=[])
        self._allocation = (rows, max_len, cursor)

    def fill(self, prefilled: Cache, rows: torch.Tensor, source: torch.Tensor, prefix: torch.Tensor) -> None:
        """Copy prompt `source[i]` of a prefilled cache to row `rows[i]`; see `RolloutLayer.fill`."""
        if not self.layers:
            self.layers = [RolloutLayer(layer, *self._allocation) for layer in prefilled.layers]
        for layer, like in zip(self.layers, prefilled.layers, strict=True):
            layer.fill(like, rows, source, prefix)

    def keep(self, rows: torch.Tensor) -> None:
        """Keep only these rows."""
        for layer in self.layers:
            layer.keep(rows)


def decode_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **kwargs: object,
) -> tuple[torch.Tensor, None]:
    """Attention of one query token per row, `(rows, heads, 1, head_dim)`, over `(rows, kv_heads, seen, head_dim)`.

    The query heads that share a key head become the rows of one small matrix, so keys and values are never repeated.
    `attention_mask` is additive, `(rows, 1, 1, >= seen)`; its last `seen` columns apply.
    """
    for feature in ("softcap", "s_aux", "position_bias"):
        require(kwargs.get(feature) is None, _OP, "model", f"attention without {feature}", type(module).__name__)
    rows, heads, _, head_dim = query.shape
    groups = query.reshape(rows, key.shape[1], heads // key.shape[1], head_dim)
    mask = None if attention_mask is None else attention_mask[..., -key.shape[2] :]
    attend = _native_attention if _native_takes(query, key, value) else F.scaled_dot_product_attention
    out = attend(groups, key, value, attn_mask=mask, scale=scaling)
    return out.reshape(rows, 1, heads, value.shape[3]), None


def _native_takes(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether the native kernel supports this attention; otherwise torch computes it."""
    return (
        native.refuses(query.device) is None
        and query.dtype == key.dtype != torch.float64
        and key.shape == value.shape
        and key.shape[-1] % 16 == 0
        and key.stride() == value.stride()
        and key.stride()[2:] == (key.shape[3], 1)
    )


def _native_attention(
    groups: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: torch.Tensor | None, scale: float | None
) -> torch.Tensor:
    """softmax(scale q k^T + mask) v for `groups` (rows, kv_heads, queries, head_dim), one query token per row."""
    rows, key_heads, queries, width = groups.shape
    groups, out = groups.contiguous(), torch.empty_like(groups, memory_format=torch.contiguous_format)
    mask = None if attn_mask is None else attn_mask.float().expand(rows, 1, 1, key.shape[2])
    native.extension().decode_attention(
        native.DTYPES[groups.dtype],
        *map(native.address, (groups, key, value, mask, out)),
        rows,
        key_heads * queries,
        key_heads,
        key.shape[2],
        width,
        key.stride(0),
        key.stride(1),
        0 if mask is None else mask.stride(0),
        width**-0.5 if scale is None else scale,
        torch.get_num_threads(),
    )
    return out
