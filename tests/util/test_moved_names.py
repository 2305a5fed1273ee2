"""What published notebooks import from DETR: an ImportError with the new place, which exists."""

import importlib
import re

import pytest


@pytest.mark.parametrize(
    ("line", "place"),
    [
        ("from util.misc import nested_tensor_from_tensor_list", "nested_tensor_from_list"),
        ("from util.misc import NestedTensor, nested_tensor_from_tensor_list", "NestedTensor"),
        ("import util.misc as utils; utils.all_gather", "all_gather_object"),
        ("import util.misc as utils; utils.init_distributed_mode", "init_distributed"),
        ("from util.misc import collate_fn", "collate"),
        ("from util.plot_utils import plot_logs", "plot_logs"),
    ],
)
def test_import_error_names_the_new_place(line: str, place: str) -> None:
    with pytest.raises(ImportError, match="now ") as error:
        exec(line)  # noqa: S102
    module, name = re.search(r"now ([\w.]+)\.(\w+)", str(error.value)).groups()
    assert name == place
    assert hasattr(importlib.import_module(module), name)


def test_other_names_are_said_to_be_absent() -> None:
    with pytest.raises(ImportError, match=r"util\.misc\.SmoothedValue: not part of this project"):
        exec("from util.misc import SmoothedValue")  # noqa: S102
