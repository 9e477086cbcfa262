"""Flink jobs that write the lake, as SQL, and a cluster on this machine to try them on."""
