"""A reward model's score of an answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fastrl import check
from fastrl.rewards.extract import completion_text

if TYPE_CHECKING:
    from fastrl.types import Group

DTYPES = ("auto", "bfloat16", "float32")


class ModelReward:
    """The score of a model trained with `algorithm: reward_model`, or of another sequence classifier with one label.

    Prompt and completion are rendered and tokenised with the reward model's own chat template and tokenizer, as in its
    training, so its vocabulary may differ from the policy's. A completion that hit the length limit is scored as if it
    ended there.

    Args:
        path: a folder or hub id.
        label: the name under which the reward is logged; each model in a recipe needs its own.
        max_tokens_per_microbatch: input tokens per forward pass.
    """

    def __init__(
        self,
        path: str,
        *,
        label: str = "model",
        dtype: str = "auto",
        device: str = "auto",
        max_tokens_per_microbatch: int = 4096,
    ) -> None:
        # Imported here, so that other rewards neither wait for nor need these packages.
        import torch

        from fastrl.model.attention import prepare_attention, slow_bfloat16
        from fastrl.model.scalar import ScalarModel, load_scalar_model

        check.choice("model", "dtype", dtype, DTYPES)
        self.__name__ = label
        self.max_tokens_per_microbatch = max_tokens_per_microbatch
        place = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        if dtype == "auto":  # forward only: if attention is slow in bfloat16, so are the layers
            dtype = "float32" if torch.device(place).type == "cpu" and slow_bfloat16() else "bfloat16"
        model, self.tokenizer = load_scalar_model(path, getattr(torch, dtype))
        self.model = ScalarModel(model.to(place).requires_grad_(False))
        do = "Train one with algorithm: reward_model."
        trained = bool(self.model.head.weight.any())
        check.require(trained, "model", "path", "a reward model", f"{path}, whose scalar head is all zeros", do)
        self.layout = prepare_attention(model, "padded", dtype=getattr(torch, dtype))

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **_: Any) -> list[float]:
        """One score per completion."""
        from fastrl.data.preferences import answered

        texts = map(completion_text, completions)
        return self.scores(
            [answered(prompt, text, self.tokenizer) for prompt, text in zip(prompts, texts, strict=True)]
        )

    def scores(self, groups: Sequence[Group]) -> list[float]:
        """One score per group, of its only answer, tokenised with this model's tokenizer."""
        import torch

        from fastrl.data.pack import pack
        from fastrl.data.preferences import with_end

        groups = with_end(groups, self.tokenizer.pad_token_id)
        longest = max(len(group.prompt.token_ids) + len(group.samples[0].token_ids) for group in groups)
        scores = [0.0] * len(groups)
        limit, device = max(self.max_tokens_per_microbatch, longest), self.model.head.weight.device
        for batch in pack(groups, layout=self.layout, max_tokens=limit, device=device):
            with torch.no_grad():
                found = self.model.scores(batch).tolist()
            for place, score in zip(batch.group_ids.tolist(), found, strict=True):
                scores[place] = score
        return scores
