"""Benchmarks: one file for each subject of `tools/benchmark.py`, and what they share."""
