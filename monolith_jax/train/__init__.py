"""Plans to a new state (device), in stream order. In: batches. Out: state, scores of each batch before it was trained on."""
