"""Checkpoints and weight files: format, loading, inferring the architecture, and conversion between codebases."""
