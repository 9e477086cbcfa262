"""How good a run is.

In: scores, labels and masks of examples that the model has not trained on yet, in stream order; or the folder of a finished
run. Out: metrics per head and hour of event time (`prequential`), tables and a figure (`report`). `metrics` holds the plain
functions that both rest on. Nothing here imports jax.
"""
