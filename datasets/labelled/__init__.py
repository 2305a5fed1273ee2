"""Labelled datasets, one file per kind."""
