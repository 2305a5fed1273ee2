"""Names of DETR's `util.plot_utils`, which published notebooks import: each raises an ImportError with its place."""

from util.moved_names import moved_from

__getattr__ = moved_from("util.plot_utils", is_empty=True)
