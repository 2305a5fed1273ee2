"""Import errors that name the new place of what notebooks import from the published codebases.

docs/migration.md shows what to write instead.
"""

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parent.parent
ELSEWHERE = "not part of this project; docs/migration.md shows what to write"

# Published module -> its new place, of modules that this project does not have.
MODULES = {
    "datasets.coco": "now datasets.labelled.coco; make_coco_transforms is datasets.transforms.detection_transforms",
    "datasets.coco_eval": "now datasets.evaluators.coco",
    "datasets.coco_panoptic": "now datasets.labelled.coco_panoptic",
    "datasets.panoptic_eval": "now datasets.evaluators.panoptic",
    "datasets.selfdet": "now datasets.pretext.random_query_patch, datasets.pretext.region_prior and datasets.proposals",
    "models.ops": "now models.ms_deform_attn (the operator) and models.deformable_transformer (its module)",
    "models.updetr": "now models.pretext.random_query_patch",
    "util.default_args": "now util.settings: build_model(args) fills in the defaults itself",
}

# Module -> published name -> its new place with its module, or what to do instead.
NAMES: dict[str, dict[str, str]] = {
    "util.misc": {
        "NestedTensor": "now util.nested_tensor.NestedTensor",
        "nested_tensor_from_tensor_list": "now util.nested_tensor.nested_tensor_from_list",
        "is_main_process": "now util.distributed.is_main_process",
        "get_rank": "now util.distributed.get_rank",
        "get_world_size": "now util.distributed.get_world_size",
        "all_gather": "now util.distributed.all_gather_object",
        "init_distributed_mode": "now util.distributed.init_distributed",
        "collate_fn": "now datasets.collate.collate",
        "inverse_sigmoid": "now models.classification.inverse_sigmoid",
        "interpolate": "now torch.nn.functional.interpolate, which takes empty batches",
    },
    "util.plot_utils": {
        "plot_logs": "now util.plots.curves.plot_logs(logs, fields, out_png, ewm_col), which writes an image",
        "plot_precision_recall": "now in result.html of each run that evaluates",
    },
    "util.box_ops": {
        "masks_to_boxes": "now torchvision.ops.masks_to_boxes",
        "box_area": "now torchvision.ops.box_area",
    },
    "datasets.transforms": {
        "ToTensor": "now datasets.transforms.ToSample",
        "Normalize": "now datasets.collate.normalize_images, on the whole batch",
    },
    "models.backbone": {
        "build_backbone": "now models.build_backbone",
        "FrozenBatchNorm2d": "now models.frozen_norm.FrozenBatchNorm2d",
        "Joiner": "now models.backbone.BackboneWithPositions",
    },
    "models.detr": {
        "SetCriterion": "now models.criterion.SetCriterion",
        "PostProcess": "now models.postprocess.PostProcess",
    },
    "models.matcher": {
        "build_matcher": "now models.matcher.HungarianMatcher, called by models.criterion.SetCriterion",
    },
    "models.position_encoding": {
        "PositionEmbeddingSine": "now models.position_encoding.SinePositionEncoding",
        "PositionEmbeddingLearned": "now models.position_encoding.LearnedPositionEncoding",
    },
    "models.segmentation": {
        "DETRsegm": "now models.segmentation.SegmentationDetector",
        "PostProcessSegm": "now models.segmentation_postprocess.PostProcessSegm",
        "PostProcessPanoptic": "now models.segmentation_postprocess.PostProcessPanoptic",
    },
    "models.transformer": {
        "Transformer": "now models.detr.Transformer",
    },
}  # fmt: skip


def moved_from(module: str, *, is_empty: bool = False) -> Callable[[str], NoReturn]:
    """Return a module's `__getattr__`, which raises ImportError for names that have moved.

    Args:
        is_empty: the module has nothing else, so that any other name is an ImportError, too.
    """
    places = NAMES[module]

    def find(name: str) -> NoReturn:
        is_private = name.startswith("__")  # Python itself asks for some of these
        if name in places or (is_empty and not is_private):
            raise ImportError(f"{module}.{name}: {places.get(name, ELSEWHERE)}")
        raise AttributeError(f"module {module!r} has no attribute {name!r}")

    return find


class MovedModules:
    """An import finder that finds nothing, and names the new place of a published module of this project's packages."""

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> None:
        """Raise ImportError for a name in `MODULES`. Called by Python when no other finder has found the module."""
        if name in MODULES and _is_ours(name.partition(".")[0]):
            raise ImportError(f"{name}: {MODULES[name]}")


def _is_ours(package: str, modules: Mapping[str, object] = sys.modules) -> bool:
    file = getattr(modules.get(package), "__file__", None)
    return bool(file) and Path(file).resolve().parent == ROOT / package


def name_moved_modules() -> None:
    """Let imports of published modules fail with their new place."""
    if MovedModules not in sys.meta_path:
        sys.meta_path.append(MovedModules)
