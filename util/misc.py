"""Names of DETR's `util.misc`, which published notebooks import: each raises an ImportError with its new place."""

from util.moved_names import raise_with_place

__getattr__ = raise_with_place(
    "util.misc",
    {
        "NestedTensor": "now util.nested_tensor.NestedTensor",
        "nested_tensor_from_tensor_list": "now util.nested_tensor.nested_tensor_from_list",
        "is_main_process": "now util.distributed.is_main_process",
        "get_rank": "now util.distributed.get_rank",
        "get_world_size": "now util.distributed.get_world_size",
        "all_gather": "now util.distributed.all_gather_object",
        "init_distributed_mode": "now util.distributed.init_distributed",
        "collate_fn": "now datasets.collate.collate",
    },
)
