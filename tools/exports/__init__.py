"""Export of detectors to other formats, see `tools/export.py`."""
