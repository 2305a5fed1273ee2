"""Names of DETR's `util.misc`, which published notebooks import: each raises an ImportError with its new place."""

from util.moved_names import moved_from

__getattr__ = moved_from("util.misc", is_empty=True)
