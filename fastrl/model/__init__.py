"""Models: loading them and splitting off their language-model head."""

from fastrl.model.head import SplitModel, split_head
from fastrl.model.load import load_model, stop_token_ids

__all__ = ["SplitModel", "load_model", "split_head", "stop_token_ids"]
