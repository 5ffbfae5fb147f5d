"""The frozen reference's log-probabilities of every answer: computed once, kept on disk beside the run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from fastrl.data.sampler import fingerprint
from fastrl.model.policy import Policy
from fastrl.progress import Progress, unseen
from fastrl.trainer.files import complete_or_absent
from fastrl.trainer.offline_setup import OfflineRun
from fastrl.types import Group

FOLDER, FILE = "reference", "logps.safetensors"
AT_ONCE = 256  # groups packed at a time


def fill_in(run: OfflineRun, groups: Sequence[Group], *, keep: bool = True, progress: Progress = unseen) -> None:
    """Gives every answer of the groups its `ref_logps`: from the disk, or asked now and, with `keep`, kept there.

    They are kept under the names of the reference's weights and of the answers, so that neither another model's nor
    another data set's are ever taken for them. `progress` is told of the answers, before each micro-batch.
    """
    groups = run.with_partners(groups)
    about = {"model": run.reference_fingerprint, "answers": fingerprint(groups), "dtype": run.config.dtype}
    path = run.directory / FOLDER / FILE
    kept = _read(path, about) if keep else None
    if kept is None:
        kept = torch.cat(_ask(run, groups, progress))
        if keep:
            with complete_or_absent(path.parent) as aside:
                save_file({"logps": kept}, aside / FILE, metadata=about)
    samples = [sample for group in groups for sample in group.samples]
    for sample, logps in zip(samples, kept.split([len(sample.token_ids) for sample in samples]), strict=True):
        sample.ref_logps = logps.tolist()


def _ask(run: OfflineRun, groups: Sequence[Group], progress: Progress) -> list[torch.Tensor]:
    """The reference's log-probabilities of each answer, (T,) float32, in the order of the groups."""
    found: list[torch.Tensor] = []
    answers = sum(len(group.samples) for group in groups)

    def report(done: int, _: int) -> None:
        progress(len(found) + done, answers)

    for start in range(0, len(groups), AT_ONCE):
        found += _in_order(run, run.reference, groups[start : start + AT_ONCE], report)
    return found


def _in_order(
    run: OfflineRun, reference: Policy, groups: Sequence[Group], progress: Progress
) -> Iterator[torch.Tensor]:
    """The same of groups that are packed at once."""
    found: list[list[torch.Tensor]] = [[] for _ in groups]
    for batch in run.pack(groups):
        progress(sum(map(len, found)), sum(len(group.samples) for group in groups))
        logps = reference.score(batch, temperature=1.0).cpu()
        bounds = pairwise(batch.cu_seqlens.tolist())
        for group_id, (start, end) in zip(batch.group_ids.tolist(), bounds, strict=True):
            found[group_id].append(logps[start:end])
    for answers in found:
        yield from answers


def _read(path: Path, about: dict[str, str]) -> torch.Tensor | None:
    """What was kept under these names; None where there is nothing, or another model's."""
    try:
        with safe_open(path, framework="pt") as file:
            return file.get_tensor("logps") if file.metadata() == about else None
    except (FileNotFoundError, SafetensorError):
        return None
