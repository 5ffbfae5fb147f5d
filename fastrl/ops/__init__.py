"""Meaning, shapes, autograd and `torch.library` registration: one file per op."""
