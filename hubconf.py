"""Detectors for `torch.hub.load`, with the names of the published hubs.

model, postprocessor = torch.hub.load("PATH", "detr_resnet50", source="local", pretrained=True,
return_postprocessor=True) outputs = model.eval()(images)           # normalised, [B, 3, H, W] or a list of [3, H, W] of
several sizes found = postprocessor(outputs, sizes)    # for each image scores, labels, and boxes in pixels; sizes [B,
2]: (height, width)
"""

import sys as _sys
from collections.abc import Callable as _Callable
from pathlib import Path as _Path
from typing import Any as _Any

dependencies = ["torch", "torchvision", "scipy", "numpy"]

_DETR = {"detector": "detr", "backbone": "resnet50", "dilation": False}
_CONDITIONAL = {**_DETR, "detector": "conditional_detr"}
_DEFORMABLE = {
    **_DETR,
    "detector": "deformable_detr",
    "num_feature_levels": 4,
    "with_box_refine": False,
    "two_stage": False,
}
_R101, _DC5, _ONE_LEVEL, _REFINE = (
    {"backbone": "resnet101"},
    {"dilation": True},
    {"num_feature_levels": 1},
    {"with_box_refine": True},
)
_FILES = "https://dl.fbaipublicfiles.com/detr/"
_CONDITIONAL_PAGE = "https://github.com/Atten4Vis/ConditionalDETR"
_DEFORMABLE_PAGE = "https://github.com/fundamentalvision/Deformable-DETR"

# name -> (what it is, its settings by flag name, address of the published weights or of the page that links them)
_MODELS: dict[str, tuple[str, dict[str, _Any], str]] = {
    "detr_resnet50": ("DETR-R50, AP 42.0", _DETR, _FILES + "detr-r50-e632da11.pth"),
    "detr_resnet50_dc5": ("DETR-DC5-R50, AP 43.3", {**_DETR, **_DC5}, _FILES + "detr-r50-dc5-f0fb7ef5.pth"),
    "detr_resnet101": ("DETR-R101, AP 43.5", {**_DETR, **_R101}, _FILES + "detr-r101-2c7b67e5.pth"),
    "detr_resnet101_dc5": ("DETR-DC5-R101, AP 44.9", {**_DETR, **_R101, **_DC5}, _FILES + "detr-r101-dc5-a2e86def.pth"),
    "conditional_detr_resnet50": ("Conditional DETR-R50, AP 41.0", _CONDITIONAL, _CONDITIONAL_PAGE),
    "conditional_detr_resnet50_dc5": ("Conditional DETR-DC5-R50, AP 43.7", {**_CONDITIONAL, **_DC5}, _CONDITIONAL_PAGE),
    "conditional_detr_resnet101": ("Conditional DETR-R101, AP 42.8", {**_CONDITIONAL, **_R101}, _CONDITIONAL_PAGE),
    "conditional_detr_resnet101_dc5": (
        "Conditional DETR-DC5-R101, AP 45.0",
        {**_CONDITIONAL, **_R101, **_DC5},
        _CONDITIONAL_PAGE,
    ),
    "deformable_detr_resnet50": ("Deformable DETR-R50, AP 44.5", _DEFORMABLE, _DEFORMABLE_PAGE),
    "deformable_detr_resnet50_single_scale": (
        "Deformable DETR-R50 with one level, AP 39.4",
        {**_DEFORMABLE, **_ONE_LEVEL},
        _DEFORMABLE_PAGE,
    ),
    "deformable_detr_resnet50_single_scale_dc5": (
        "Deformable DETR-DC5-R50 with one level, AP 41.5",
        {**_DEFORMABLE, **_ONE_LEVEL, **_DC5},
        _DEFORMABLE_PAGE,
    ),
    "deformable_detr_resnet50_refine": (
        "Deformable DETR-R50 with iterative box refinement, AP 46.2",
        {**_DEFORMABLE, **_REFINE},
        _DEFORMABLE_PAGE,
    ),
    "deformable_detr_resnet50_refine_two_stage": (
        "two-stage Deformable DETR-R50 with iterative box refinement, AP 46.9",
        {**_DEFORMABLE, **_REFINE, "two_stage": True},
        _DEFORMABLE_PAGE,
    ),
}
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
    entry_point.__doc__ = _DOCUMENTATION.format(_MODELS[name][0])
    return entry_point


globals().update({name: _entry_point(name) for name in _MODELS})


def _build(
    name: str, pretrained: bool | str, num_classes: int, return_postprocessor: bool, backbone_weights: str
) -> _Any:
    _check_packages()
    from models import build_model
    from util.checkpoints.checkpoint import load_checkpoint, load_exactly
    from util.errors import UserError
    from util.settings.arguments import make_parser
    from util.settings.flags import FINETUNE

    if num_classes < 1:
        raise UserError(f"num_classes={num_classes}: a detector knows at least one class")
    checkpoint = load_checkpoint(_source(name, pretrained)) if pretrained else None
    args = make_parser(FINETUNE).parse_args([])
    vars(args).update(_MODELS[name][1], num_classes=num_classes, backbone_weights=backbone_weights)
    if checkpoint:
        _adopt(name, args, checkpoint)
    model, _, postprocessors = build_model(args)
    model.aux_loss = False
    if checkpoint:
        load_exactly(model, checkpoint)
    return (model, postprocessors["bbox"]) if return_postprocessor else model


def _source(name: str, pretrained: bool | str) -> str:
    from util.errors import UserError

    published = _MODELS[name][2]
    if pretrained is True and not published.endswith(".pth"):
        raise UserError(
            f"{name}: {published} links the published weights to a file-sharing site, from where a program can't "
            f"fetch them: "
            'download the file with a browser and give pretrained="PATH"'
        )
    return published if pretrained is True else str(pretrained)


def _adopt(name: str, args: _Any, checkpoint: _Any) -> None:
    """Takes from the file what the entry's name leaves open. Raises UserError where the file holds another model."""
    from util.checkpoints.architecture import architecture
    from util.checkpoints.checkpoint import adopt_architecture, is_pretext
    from util.checkpoints.classes import classes_of, head_kind
    from util.errors import UserError

    settings = _MODELS[name][1]
    certain, likely = architecture(checkpoint)
    held = {**likely, **certain}
    differing = [
        f"{flag} {held[flag]} (not {value})" for flag, value in settings.items() if held.get(flag, value) != value
    ]
    if differing:
        fitting = (
            other
            for other, model in _MODELS.items()
            if all(held.get(flag, value) == value for flag, value in model[1].items())
        )
        raise UserError(
            f"{checkpoint.source} is no {name}, for it has {', '.join(differing)}: load {next(fitting, 'another file')}"
        )
    adopt_architecture(checkpoint, args, set(settings))
    if is_pretext(checkpoint):
        raise UserError(
            f"{checkpoint.source} is from pre-training and knows no classes: fine-tune it with finetune_main.py "
            f"--pretrain"
        )
    count = classes_of(checkpoint).count
    if count != args.num_classes:
        raise UserError(
            f"{checkpoint.source} knows {count} classes, not {args.num_classes}: give num_classes={count}, or train "
            "others with finetune_main.py --pretrain"
        )
    args.classification, args.backbone_weights, args.backbone_norm = (
        head_kind(checkpoint),
        "none",
        args.backbone_norm or "frozen",
    )


def _check_packages() -> None:
    """Other projects have packages of these names too, and Python holds one of each."""
    here = _Path(__file__).resolve().parent
    for name in ("models", "util"):
        module = _sys.modules.get(name)
        if module is not None and _Path(module.__file__ or "").resolve().parent.parent != here:
            raise ImportError(
                f"the package {name} of {module.__file__ or name} is already imported, and {here} has one of this "
                "name: load this model in a Python process of its own"
            )
