"""From a configuration to everything a run on written answers needs, all of it checked before anything is written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fastrl.algorithms.offline import Answers, Objective, RewardModelling
from fastrl.check import require
from fastrl.data.pack import pack
from fastrl.data.plan import ModelShape
from fastrl.data.preferences import load_preferences, mismatched, split_groups, unpair, with_end
from fastrl.data.sampler import PromptSampler
from fastrl.model.attention import prepare_attention
from fastrl.model.load import fingerprint, load_model, vocab_size
from fastrl.model.policy import Policy
from fastrl.model.router import about_router
from fastrl.model.scalar import ScalarModel, about_padding, load_scalar_model
from fastrl.trainer.checkpoint import Checkpoint
from fastrl.trainer.offline_config import OfflineConfig, build_objective
from fastrl.trainer.precision import DTYPES, Speed
from fastrl.trainer.resume import require_same_model
from fastrl.trainer.setup import (
    begin,
    checkpoint_activations,
    free_directory,
    positions,
    require_known_tokens,
    require_same_rows,
    with_adapter,
    with_warnings,
)
from fastrl.types import Group, MicroBatch

if TYPE_CHECKING:
    from peft import PeftModel


@dataclass(frozen=True)
class OfflineRun:
    """The parts of a run on answers written before training."""

    config: OfflineConfig
    directory: Path
    device: torch.device
    policy: Policy | ScalarModel  # what is trained
    adapted: PeftModel | None  # its model as peft sees it
    reference: Policy | None  # what answers are compared with, where the loss asks for it
    reference_fingerprint: str  # of its weights
    tokenizer: PreTrainedTokenizerBase
    prompts: PromptSampler[Group]  # the order of the groups that train
    held_out: list[Group]
    partners: dict[int, Group]  # by the id of a group: its prompt with the answer to another one, for KTO
    objective: Objective
    layout: str
    shape: ModelShape
    fingerprint: str  # of the model's weights before training
    skipped: tuple[str, ...]  # what was said about rows that were left out
    resumed: Checkpoint | None  # where the run goes on from, instead of the model's own weights
    speed: Speed

    def models(self) -> dict[str, PreTrainedModel]:
        """What is trained, by the name of its folder."""
        return {"model": self.adapted or self.policy.model}

    def state(self) -> dict[str, Any]:
        """Nothing: see `Run.state`."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """See `state`."""

    def pack(self, groups: Sequence[Group]) -> list[MicroBatch]:
        """Micro-batches of whole groups, in this run's layout and token budget."""
        return pack(
            groups,
            layout=self.layout,
            max_tokens=self.config.tokens_per_batch,
            device=self.device,
            shape=self.shape,
            whole_groups=True,
        )

    def answers(self, groups: Sequence[Group]) -> Answers:
        """The groups as an objective takes them."""
        return Answers(
            batches=self.pack(groups),
            groups=len(groups),
            tokens=sum(len(group.samples[0].token_ids) for group in groups),
            mismatched=self.pack([self.partners[id(group)] for group in groups]) if self.partners else [],
            margins=self._tensor([group.margin for group in groups]),
            soft_labels=self._tensor([group.soft_label for group in groups]),
        )

    def _tensor(self, values: Sequence[float | None]) -> torch.Tensor | None:
        """What the data say of every pair; None where they say nothing."""
        return None if None in values else torch.tensor(values, dtype=torch.float32, device=self.device)

    def to_be_drawn(self) -> list[Group]:
        """The groups that the run trains on from its first step to its last, each once."""
        groups, config = self.prompts.prompts, self.config
        return PromptSampler(groups, seed=config.seed).next(min(config.steps * config.batch, len(groups)))

    def with_partners(self, groups: Sequence[Group]) -> list[Group]:
        """The groups, and behind them those that `answers` adds to them."""
        return [*groups, *(self.partners[id(group)] for group in groups if self.partners)]


def prepare(config: OfflineConfig, *, trains: bool = True) -> OfflineRun:
    """Loads and checks models and data.

    Args:
        trains: put the adapter into the model that the recipe trains; a model that is only judged is left as it is.

    Raises:
        ValueError: something the configuration names does not exist or does not fit together.
    """
    config, resumed, device, speed = begin(config)
    dtype = DTYPES[config.dtype]
    objective = build_objective(config)
    scalar = isinstance(objective, RewardModelling)
    if scalar:
        model, tokenizer = load_scalar_model(config.model, dtype)
    else:
        model, tokenizer = load_model(config.model, dtype, quantize=config.adapter.quantize, device=device)
    began = fingerprint(model)
    if resumed:
        require_same_model(resumed, config.model, began)
    layout = prepare_attention(model.to(device), config.layout, dtype=dtype)
    if config.gradient_checkpointing:
        checkpoint_activations(model)
    adapted = with_adapter(model, config.adapter) if trains else None
    speed.up(model, config)
    if scalar:
        policy = ScalarModel(model, router_aux_loss_coef=config.router_aux_loss_coef)
    else:
        policy = Policy(model, vocab_size=vocab_size(model, tokenizer), **config.of_policy())
    reference = _reference(config, policy, tokenizer, device, speed) if objective.needs_ref else None

    models = [policy.model] + ([reference.model] if reference else [])
    groups, skipped = _load(config, objective, tokenizer, min(config.data.max_tokens, positions(*models)))
    require_known_tokens(model, config.model, (group.prompt.token_ids for group in groups))
    require_known_tokens(model, config.model, (sample.token_ids for group in groups for sample in group.samples))
    if scalar:
        groups = with_end(groups, tokenizer.pad_token_id)
    train, held_out = split_groups(groups, config.data.held_out, config.seed)
    _require_room(config, layout, groups)
    partners: dict[int, Group] = {}
    if getattr(getattr(objective, "spec", None), "baseline", "") == "kl":
        for part in filter(None, (train, held_out)):
            others = (Group(other.prompt, list(map(replace, other.samples))) for other in mismatched(part))
            partners |= dict(zip(map(id, part), others, strict=True))
    prompts = PromptSampler(train, seed=config.seed)
    if resumed:
        prompts.load_state_dict(resumed.json("state.json")["prompts"])  # refuses other rows before anything is written
    return OfflineRun(
        config=config,
        directory=resumed.run_dir if resumed else free_directory(config.directory()),
        device=device,
        policy=policy,
        adapted=adapted,
        reference=reference,
        reference_fingerprint=fingerprint(reference.model) if config.reference else began,
        tokenizer=tokenizer,
        prompts=prompts,
        held_out=held_out,
        partners=partners,
        objective=objective,
        layout=layout,
        shape=ModelShape.of(model),
        fingerprint=began,
        skipped=(
            *filter(None, [about_router(model, config.router_aux_loss_coef), scalar and about_padding(tokenizer)]),
            *skipped,
        ),
        resumed=resumed,
        speed=speed,
    )


def _reference(
    config: OfflineConfig, policy: Policy, tokenizer: PreTrainedTokenizerBase, device: torch.device, speed: Speed
) -> Policy:
    """The policy itself, which is not trained yet, or another model of the same vocabulary, in 4 bits as it is."""
    if not config.reference:
        return policy
    dtype = DTYPES[config.dtype]
    model, other = load_model(config.reference, dtype, quantize=config.adapter.quantize, device=device)
    same = other.get_vocab() == tokenizer.get_vocab()
    got = f"{config.reference!r}, whose {len(other.get_vocab())} tokens are others"
    do = "Its log-probabilities would be of other tokens."
    require(same, "OfflineConfig", "reference", f"a model with the vocabulary of {config.model!r}", got, do)
    require_same_rows("OfflineConfig", "reference", model, policy.model, len(tokenizer))
    speed.up(model, config)
    prepare_attention(model.requires_grad_(False), config.layout, dtype=dtype)
    return Policy(model, vocab_size=policy.head.vocab_size, **config.of_policy())


def _load(
    config: OfflineConfig, objective: Objective, tokenizer: PreTrainedTokenizerBase, max_tokens: int
) -> tuple[list[Group], tuple[str, ...]]:
    """(groups of the objective's kind, what was said about rows that were left out)."""
    data = config.data
    groups, said = with_warnings(
        lambda: load_preferences(
            data.source,
            tokenizer,
            kind="pairs" if data.unpair else "ranked" if data.ranked else objective.kind,
            size=data.size,
            seed=config.seed,
            options=data.options,
            chat=data.chat,
            system=data.system,
            template_options=data.template_options,
            max_prompt_tokens=data.max_prompt_tokens,
            max_tokens=max_tokens,
            margin_column=data.margin_column,
            soft_label_column=data.soft_label_column,
        )
    )
    if data.unpair:
        groups = [
            Group(replace(group.prompt, index=index), group.samples) for index, group in enumerate(unpair(groups))
        ]
    return groups, said


def _require_room(config: OfflineConfig, layout: str, groups: Sequence[Group]) -> None:
    """Refuses a token budget that the longest group does not fit, which `pack` would notice only when it is drawn."""

    def tokens(group: Group) -> int:
        prompt, completions = len(group.prompt.token_ids), [len(sample.token_ids) - 1 for sample in group.samples]
        if layout == "padded":
            return len(completions) * (prompt + max(completions))
        copies = len(completions) if layout == "varlen" else 1  # of the prompt
        return copies * prompt + sum(completions)

    longest = max(map(tokens, groups))
    expected = f"at least {longest}, as the longest row has"
    enough = config.tokens_per_batch >= longest
    require(enough, "OfflineConfig", "tokens_per_batch", expected, config.tokens_per_batch, "Or lower data.max_tokens.")
