"""A trained model against what was held out: ranking, retrieval, and the whole way to a feed.

In: a run folder or an exported one. Out: rows for `<workdir>/report/evaluation.jsonl`, tables and figures. `launch.evaluate` is
the command; each module here is one of its questions.
"""
