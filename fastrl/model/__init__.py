"""Models: loading them, and cutting them at the language-model head."""

from fastrl.model.head import CutModel, cut
from fastrl.model.load import load_model, stop_token_ids

__all__ = ["CutModel", "cut", "load_model", "stop_token_ids"]
