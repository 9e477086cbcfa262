"""A real-time recommender in JAX: events in, feeds out, learning online from every event.

The folders are the way of the data: `stream` (events to examples and batches), `ids` (64-bit ids to rows, without collisions),
`tables` (rows to vectors, on the mesh), `models` (vectors to logits and loss), `train` (loss to new state), `evaluate`
(predictions to metrics). `experiment.load` reads the one configuration of a run; `launch` starts it. Nothing is imported here,
so that a host process that only reads a stream never starts JAX.
"""
