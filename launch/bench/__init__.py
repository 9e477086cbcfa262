"""Benchmarks, one script each: a table for people, then one JSON object as the last line."""
