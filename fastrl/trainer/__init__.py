"""Configuration, the loop, the optimizer step, checkpoints, and what a person sees of a run."""
