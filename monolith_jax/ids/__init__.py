"""64-bit ids to rows (host, no jax). In: the ids of a batch. Out: a plan of rows, without one collision."""
