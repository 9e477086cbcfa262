"""Events to batches (host, no jax but in `batcher`). In: files and logs. Out: checked examples in stream order."""
