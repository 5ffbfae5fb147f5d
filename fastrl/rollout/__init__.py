"""Samplers: prompts in, samples out."""

from fastrl.rollout.base import Sampler, SamplingParams

__all__ = ["Sampler", "SamplingParams"]
