"""What a point of a sweep does: one module a kind.

In: the config of the kind, an experiment's files and bindings, a folder of its own. Out: `Measured` rows. A kind is a frozen
dataclass, which a sweep's gin file builds as `Sweep.point`, and a function `run`; what it imports is imported when it runs.
"""
