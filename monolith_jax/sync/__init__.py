"""Trained state to served state. In: the rows that a run changed. Out: a log of deltas, that any reader catches up with."""
