"""Trained state to answers. In: the folder of deltas that a trainer writes, and requests. Out: vectors and scores.

Knows nothing of training: the two meet in the files on disk and in the code below both (features, ids, tables, models, sync).
"""
