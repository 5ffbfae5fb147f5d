"""Log-probabilities of every answer under the frozen reference model: computed once, cached in the run's folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from fastrl.data.pack import spread
from fastrl.data.sampler import fingerprint
from fastrl.files import complete_or_absent
from fastrl.model.policy import Policy
from fastrl.progress import Progress, unseen
from fastrl.trainer.learner import Learner
from fastrl.types import Group, MicroBatch

FOLDER, FILE = "reference", "logps.safetensors"
AT_ONCE = 256  # groups packed at a time


@dataclass(frozen=True)
class AskedOnce:
    """A frozen reference model, possibly the policy before training, and the groups that it scores once."""

    reference: Policy
    fingerprint: str  # of the reference's weights
    dtype: str
    groups: Sequence[Group]

    def fill_in(self, learner: Learner, run_dir: Path | None, *, progress: Progress = unseen) -> None:
        """Sets `ref_logps` of every answer: reads them from the cache in `run_dir`, or computes and caches them.

        The cache is keyed by the reference's weights, the answers, the dtype and the temperature, so values from
        another model or data set are never used. Without `run_dir` nothing is cached. `progress` counts answers, before
        each micro-batch.
        """
        groups = [*self.groups, *(Group(one.prompt, [one.mismatched]) for one in self.groups if one.mismatched)]
        about = {"model": self.fingerprint, "answers": fingerprint(groups), "dtype": self.dtype}
        about["temperature"] = str(learner.temperature)
        samples = [sample for group in groups for sample in group.samples]
        path = run_dir / FOLDER / FILE if run_dir else None
        kept = _read(path, about) if path else None
        lacking = learner.world.gather(kept is None)  # a disk that only some can read
        if kept is None or any(lacking):
            self._ask(learner, groups, progress)
            if path and learner.world.first:
                kept = torch.tensor(
                    [logp for sample in samples for logp in sample.ref_logps or ()], dtype=torch.float32
                )
                with complete_or_absent(path.parent) as aside:
                    save_file({"logps": kept}, aside / FILE, metadata=about)
            return
        for sample, logps in zip(samples, kept.split([len(sample.token_ids) for sample in samples]), strict=True):
            sample.ref_logps = logps.tolist()

    def _ask(self, learner: Learner, groups: Sequence[Group], progress: Progress) -> None:
        answers, found = sum(len(group.samples) for group in groups), 0
        for start in range(0, len(groups), AT_ONCE):
            batches = learner.pack(groups[start : start + AT_ONCE], whole_groups=True)

            def score(batch: MicroBatch) -> dict[str, torch.Tensor]:
                nonlocal found
                progress(found, answers)
                found += len(batch.samples)
                return {"ref_logps": self.reference.score(batch, temperature=learner.temperature)}

            for batch, read in zip(batches, learner.world.map(batches, score), strict=True):
                spread(batch, read)


def _read(path: Path, about: dict[str, str]) -> torch.Tensor | None:
    """The cached values; None if there are none, or if their key differs."""
    try:
        with safe_open(path, framework="pt") as file:
            return file.get_tensor("logps") if file.metadata() == about else None
    except (FileNotFoundError, SafetensorError):
        return None
