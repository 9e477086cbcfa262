"""From the trained state to the served one. In: plans that ran and the state after them. Out: a folder of deltas on disk."""
