"""Metrics of predicted boxes, one file per metric."""
