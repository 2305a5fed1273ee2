"""Checks of a dataset: one small function per kind of finding, listed in `table.py`.

At its start, each run calls the checks that need only the annotations, and loads a few images (`startup.py`). This
takes less than two seconds for COCO. `tools/check_dataset.py` also decodes every image, and lists all findings.
"""
