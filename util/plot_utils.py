"""Names of DETR's `util.plot_utils`, which published notebooks import: each raises an ImportError with its place."""

from util.moved_names import raise_with_place

__getattr__ = raise_with_place(
    "util.plot_utils",
    {
        "plot_logs": "now util.plots.curves.plot_logs(folder, fields, out_png), which writes an image and does not "
        "smooth (no ewm_col)",
        "plot_precision_recall": "not part of this project; evaluation writes AP of each class to log.txt",
    },
)
