"""Rows to vectors, on the mesh (device). In: plans. Out: vectors for the towers, and the rows' update from their gradients."""
