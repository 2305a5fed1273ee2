"""Detectors for `torch.hub.load`, with the names of the published hubs.

load = torch.hub.load
model, postprocessor = load("PATH", "detr_resnet50", source="local", pretrained=True, return_postprocessor=True)
outputs = model.eval()(images)  # normalized, [B, 3, H, W] or a list of [3, H, W] with different sizes
results = postprocessor(outputs, sizes_hw)  # per image scores, labels and boxes in pixels; sizes_hw is [B, 2]

The postprocessor of a panoptic model is called as `postprocessor(outputs, processed_sizes, target_sizes)`. It returns
`png_string`, a PNG with segment ids as RGB, and `segments_info` per image.
"""

# torch.hub lists every public callable of this file as an entry point: imports and helpers start with an underscore.
from collections.abc import Callable as _Callable
from collections.abc import Mapping as _Mapping
from typing import Any as _Any

from predetr import check_import_conflicts as _check_import_conflicts

dependencies = ["torch", "torchvision", "scipy", "numpy"]  # checked by torch.hub

# Before the first import of them: the published DETR hubs have packages of these names too.
_check_import_conflicts(("models", "util"))

from util.checkpoints.hub_models import HUB_MODELS as _HUB_MODELS  # noqa: E402
from util.checkpoints.hub_models import is_panoptic as _is_panoptic  # noqa: E402

_DOCUMENTATION = """{} on COCO val2017, as published.

As in the published hubs, the model has no auxiliary outputs and is in training mode: call `.eval()` before inference.

Args:
    pretrained: True for the published weights, or the path or URL of a checkpoint of this detector. Number of queries,
        norm order and widths are read from the file, and nothing else is downloaded.
    num_classes: largest category id + 1. By default that of the file, without one {}.{}
    return_postprocessor: return (model, postprocessor).
    backbone_weights: initial weights of the backbone without `pretrained`, see `--backbone_weights`; "none": random.

Raises:
    UserError: the file contains another model, or can't be read or downloaded.
"""
_THRESHOLD = """
    threshold: lowest score of a segment, for the postprocessor."""


def _detector_entry_point(name: str) -> _Callable:
    def entry_point(
        pretrained: bool | str = False,
        num_classes: int | None = None,
        return_postprocessor: bool = False,
        backbone_weights: str = "imagenet",
    ) -> _Any:
        model, postprocessors = _build(name, pretrained, num_classes, backbone_weights)
        return (model, postprocessors["bbox"]) if return_postprocessor else model

    return entry_point


def _panoptic_entry_point(name: str) -> _Callable:
    def entry_point(
        pretrained: bool | str = False,
        num_classes: int | None = None,
        threshold: float = 0.85,
        return_postprocessor: bool = False,
        backbone_weights: str = "imagenet",
    ) -> _Any:
        model, postprocessors = _build(name, pretrained, num_classes, backbone_weights)
        postprocessors["panoptic"].threshold = threshold
        return (model, postprocessors["panoptic"]) if return_postprocessor else model

    return entry_point


def _entry_point(name: str) -> _Callable:
    panoptic = _is_panoptic(name)
    entry_point = _panoptic_entry_point(name) if panoptic else _detector_entry_point(name)
    entry_point.__name__ = entry_point.__qualname__ = name
    entry_point.__doc__ = _DOCUMENTATION.format(
        _HUB_MODELS[name].title, _num_coco_classes(name), _THRESHOLD if panoptic else ""
    )
    return entry_point


def _num_coco_classes(name: str) -> int:
    return 250 if _is_panoptic(name) else 91


globals().update({name: _entry_point(name) for name in _HUB_MODELS})


def _build(
    name: str, pretrained: bool | str, num_classes: int | None, backbone_weights: str
) -> tuple[_Any, dict[str, _Any]]:
    """Return the model and its post-processors by name."""
    # Again: another package of these names may have been imported since.
    _check_import_conflicts(("models", "util"))
    from models import build_model
    from util.checkpoints.checkpoint import load_checkpoint
    from util.checkpoints.hub_models import published_url
    from util.checkpoints.loading import load_strict
    from util.errors import UserError
    from util.settings import FINETUNE, resolve

    if num_classes is not None and num_classes < 1:
        raise UserError(f"num_classes={num_classes}: a detector needs at least one class")
    given = {**_HUB_MODELS[name].settings, "backbone_weights": backbone_weights}
    if num_classes is not None:
        given["num_classes"] = num_classes
    checkpoint = None
    adopted: dict[str, _Any] = {}
    if pretrained:
        checkpoint = load_checkpoint(published_url(name) if pretrained is True else str(pretrained))
        adopted = _adopt(name, given, checkpoint)
        given["backbone_weights"] = "none"  # the checkpoint has them

    else:
        given.setdefault("num_classes", _num_coco_classes(name))

    settings = resolve(given, adopted, FINETUNE)
    things = _things(name, settings.num_classes, checkpoint)
    model, _, postprocessors = build_model(settings, things=things)
    model.base_detector().aux_loss = False
    if checkpoint:
        load_strict(model, checkpoint)
    return model, postprocessors


def _things(name: str, num_classes: int, checkpoint: _Any) -> _Mapping[int, bool] | None:
    """Return class -> whether it is a thing: the checkpoint's, or COCO's; None for a model that is not panoptic."""
    from util.checkpoints.classes import infer_classes
    from util.coco import MAX_THING_ID

    if not _is_panoptic(name):
        return None
    stored = infer_classes(checkpoint).things if checkpoint else None
    return stored or {label: label <= MAX_THING_ID for label in range(num_classes)}


def _adopt(name: str, given: dict[str, _Any], checkpoint: _Any) -> dict[str, _Any]:
    """Return the settings that the entry point leaves open, from the checkpoint.

    Raises:
        UserError: the checkpoint contains another model.
    """
    from util.checkpoints.adoption import adopt_architecture, is_pretext
    from util.checkpoints.classes import infer_classes, infer_classification
    from util.checkpoints.hub_models import check_hub_model
    from util.errors import UserError

    check_hub_model(checkpoint, name)
    adopted, _ = adopt_architecture(checkpoint, given)
    if is_pretext(checkpoint):
        raise UserError(
            f"{checkpoint.source} is from pre-training and has no object classes; fine-tune it with finetune_main.py "
            "--pretrain"
        )
    num_classes = infer_classes(checkpoint).num_classes
    if num_classes != given.get("num_classes", num_classes):
        raise UserError(
            f"{checkpoint.source} has {num_classes} classes, not {given['num_classes']}; give "
            f"num_classes={num_classes}, or train other classes with finetune_main.py --pretrain"
        )
    # Published files store no batch norm setting: all of them were trained with frozen batch norm.
    return {
        "backbone_norm": "frozen",
        **adopted,
        "num_classes": num_classes,
        "classification": infer_classification(checkpoint),
    }
