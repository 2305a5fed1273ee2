"""Checkpoints and weight files: what they hold, reading, adopting and converting them."""
