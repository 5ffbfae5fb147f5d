"""Data: prompts, the order they are drawn in, and how sequences are laid out for a forward pass."""

from fastrl.data.preferences import load_preferences
from fastrl.data.prompts import load_prompts, split
from fastrl.data.sampler import PromptSampler

__all__ = ["PromptSampler", "load_preferences", "load_prompts", "split"]
