"""Vectors to logits to a loss (device, flax nnx). Models know nothing of ids, rows, meshes or streams."""
