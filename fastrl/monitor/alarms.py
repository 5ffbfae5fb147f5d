"""Signs that a run is not learning, each said once."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator

PATIENCE = 3  # steps in a row, because one unlucky batch is no sign of anything


class Alarms:
    """Watches the metrics of each step."""

    def __init__(self) -> None:
        self._streak: Counter[str] = Counter()
        self._said: set[str] = set()

    def check(self, step: int, metrics: dict[str, float]) -> Iterator[str]:
        """The warnings that are new at this step."""
        for name, value in metrics.items():
            if not math.isfinite(value) and name not in self._said:
                self._said.add(name)
                yield f"Step {step}: {name} is {value}."
        for name, (active, advice) in _signs(metrics).items():
            self._streak[name] = self._streak[name] + 1 if active else 0
            if self._streak[name] == PATIENCE and name not in self._said:
                self._said.add(name)
                yield f"Steps {step - PATIENCE + 1} to {step}: {advice}"


def _signs(metrics: dict[str, float]) -> dict[str, tuple[bool, str]]:
    equal = metrics.get("frac_reward_zero_std", 0.0)
    cut = metrics.get("completions/clipped_ratio", 0.0)
    mismatch = metrics.get("sampling/sampling_logp_difference/mean", 0.0)
    return {
        "equal rewards": (
            equal >= 1.0,
            "all completions of each prompt got the same reward, so there is nothing to learn from. "
            "Choose an easier or harder task, more samples per prompt, or a higher temperature.",
        ),
        "length limit": (
            cut > 0.9,
            f"the length limit cut {cut:.0%} of the completions. Raise rollout.max_new_tokens.",
        ),
        "sampler mismatch": (
            mismatch > 0.1,
            f"sampler and trainer differ by {mismatch:.3f} nats per token on the same tokens. Compare their dtype, "
            "temperature and truncation, or set loss.correction.",
        ),
    }
