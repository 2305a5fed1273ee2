"""Metrics of predicted boxes, masks and panoptic segments, one file per metric."""
