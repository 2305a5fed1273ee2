"""Detectors for `torch.hub.load`, with the names of the published hubs.

load = torch.hub.load
model, postprocessor = load("PATH", "detr_resnet50", source="local", pretrained=True, return_postprocessor=True)
outputs = model.eval()(images)  # normalized, [B, 3, H, W] or a list of [3, H, W] of several sizes
results = postprocessor(outputs, sizes_hw)  # per image scores, labels, and boxes in pixels; sizes_hw is [B, 2]
"""

from collections.abc import Callable as _Callable
from typing import Any as _Any

from predetr import check_import_conflicts as _check_packages

dependencies = ["torch", "torchvision", "scipy", "numpy"]

_check_packages(("models", "util"))

from util.checkpoints.hub_models import HUB_MODELS as _HUB_MODELS  # noqa: E402

_DOCUMENTATION = """{} on COCO val2017, as published.

Without auxiliary outputs, as in the published hubs, and in training mode: call `.eval()` before it predicts.

Args:
    pretrained: True for the published weights, or the path or address of a checkpoint of this detector. Number of
        queries, norm order and widths are taken from the file; nothing else is fetched.
    num_classes: largest category id + 1.
    return_postprocessor: return (model, postprocessor).
    backbone_weights: where the backbone starts when nothing is pretrained, see `--backbone_weights`; "none": at random.

Raises:
    UserError: the file does not hold this model, or can't be had; one line says why and what to do.
"""


def _entry_point(name: str) -> _Callable:
    def entry_point(
        pretrained: bool | str = False,
        num_classes: int = 91,
        return_postprocessor: bool = False,
        backbone_weights: str = "imagenet",
    ) -> _Any:
        return _build(name, pretrained, num_classes, return_postprocessor, backbone_weights)

    entry_point.__name__ = entry_point.__qualname__ = name
    entry_point.__doc__ = _DOCUMENTATION.format(_HUB_MODELS[name].title)
    return entry_point


globals().update({name: _entry_point(name) for name in _HUB_MODELS})


def _build(
    name: str,
    pretrained: bool | str,
    num_classes: int,
    return_postprocessor: bool,
    backbone_weights: str,
) -> _Any:
    _check_packages(("models", "util"))
    from models import build_model
    from util.checkpoints.checkpoint import load_checkpoint
    from util.checkpoints.hub_models import published_url
    from util.checkpoints.loading import load_strict
    from util.errors import UserError
    from util.settings import FINETUNE, resolve

    if num_classes < 1:
        raise UserError(f"num_classes={num_classes}: a detector knows at least one class")
    given = {
        **_HUB_MODELS[name].settings,
        "num_classes": num_classes,
        "backbone_weights": backbone_weights,
    }
    adopted: dict[str, _Any] = {}
    checkpoint = (
        load_checkpoint(published_url(name) if pretrained is True else str(pretrained))
        if pretrained
        else None
    )
    if checkpoint:
        adopted = _adopt(name, given, checkpoint)
        given["backbone_weights"] = "none"
    model, _, postprocessors = build_model(resolve(given, adopted, FINETUNE))
    model.base_detector().aux_loss = False
    if checkpoint:
        load_strict(model, checkpoint)
    return (model, postprocessors["bbox"]) if return_postprocessor else model


def _adopt(name: str, given: dict[str, _Any], checkpoint: _Any) -> dict[str, _Any]:
    """Takes from the file what the entry's name leaves open. Raises UserError where the file holds another model."""
    from util.checkpoints.adoption import adopt_architecture, is_pretext
    from util.checkpoints.classes import infer_classes, infer_classification
    from util.checkpoints.hub_models import check_hub_model
    from util.errors import UserError

    check_hub_model(checkpoint, name)
    adopted, _ = adopt_architecture(checkpoint, given)
    if is_pretext(checkpoint):
        raise UserError(
            f"{checkpoint.source} is from pre-training and knows no classes: fine-tune it with finetune_main.py "
            "--pretrain"
        )
    count = infer_classes(checkpoint).num_classes
    if count != given["num_classes"]:
        raise UserError(
            f"{checkpoint.source} knows {count} classes, not {given['num_classes']}: give num_classes={count}, or "
            "train others with finetune_main.py --pretrain"
        )
    return {
        "backbone_norm": "frozen",
        **adopted,
        "classification": infer_classification(checkpoint),
    }
