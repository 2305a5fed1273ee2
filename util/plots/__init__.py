"""Pictures: curves, boxes and pages of images."""
