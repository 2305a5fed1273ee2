"""Plots: curves of a run, boxes on images, and pages of images."""
