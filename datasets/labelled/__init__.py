"""Labelled images: one file for each kind of data."""
