"""Losses on log-probabilities: what to compute is a spec, how much each token weighs is an aggregation."""
