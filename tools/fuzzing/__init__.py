"""Damaged and hostile input files for tools/fuzz.py."""
