"""The lakehouse: features and events that are written once, by a stream, and read by training, by the server, and by others.

In: a log of impressions and actions, changes of profiles in PostgreSQL, or what Flink writes. Out: Paimon tables (`tables`) in
a folder or an object store; examples with the features of their time, for training from history; changes of features, for
training online and for the server. No module but those here imports pypaimon (extra `lake`).
"""
