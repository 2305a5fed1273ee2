"""The published detectors that `hubconf.py` and `Predictor` know by name."""

from typing import Any, NamedTuple

from util.checkpoints.architecture import architecture
from util.checkpoints.checkpoint import Checkpoint
from util.errors import UserError


class HubModel(NamedTuple):
    """title: what it is. settings: by flag name. address: of the published weights, or of the page that links them."""

    title: str
    settings: dict[str, Any]
    address: str


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

HUB_MODELS: dict[str, HubModel] = {
    "detr_resnet50": HubModel("DETR-R50, AP 42.0", _DETR, _FILES + "detr-r50-e632da11.pth"),
    "detr_resnet50_dc5": HubModel(
        "DETR-DC5-R50, AP 43.3", {**_DETR, **_DC5}, _FILES + "detr-r50-dc5-f0fb7ef5.pth"
    ),
    "detr_resnet101": HubModel(
        "DETR-R101, AP 43.5", {**_DETR, **_R101}, _FILES + "detr-r101-2c7b67e5.pth"
    ),
    "detr_resnet101_dc5": HubModel(
        "DETR-DC5-R101, AP 44.9", {**_DETR, **_R101, **_DC5}, _FILES + "detr-r101-dc5-a2e86def.pth"
    ),
    "conditional_detr_resnet50": HubModel(
        "Conditional DETR-R50, AP 41.0", _CONDITIONAL, _CONDITIONAL_PAGE
    ),
    "conditional_detr_resnet50_dc5": HubModel(
        "Conditional DETR-DC5-R50, AP 43.7", {**_CONDITIONAL, **_DC5}, _CONDITIONAL_PAGE
    ),
    "conditional_detr_resnet101": HubModel(
        "Conditional DETR-R101, AP 42.8", {**_CONDITIONAL, **_R101}, _CONDITIONAL_PAGE
    ),
    "conditional_detr_resnet101_dc5": HubModel(
        "Conditional DETR-DC5-R101, AP 45.0",
        {**_CONDITIONAL, **_R101, **_DC5},
        _CONDITIONAL_PAGE,
    ),
    "deformable_detr_resnet50": HubModel(
        "Deformable DETR-R50, AP 44.5", _DEFORMABLE, _DEFORMABLE_PAGE
    ),
    "deformable_detr_resnet50_single_scale": HubModel(
        "Deformable DETR-R50 with one level, AP 39.4",
        {**_DEFORMABLE, **_ONE_LEVEL},
        _DEFORMABLE_PAGE,
    ),
    "deformable_detr_resnet50_single_scale_dc5": HubModel(
        "Deformable DETR-DC5-R50 with one level, AP 41.5",
        {**_DEFORMABLE, **_ONE_LEVEL, **_DC5},
        _DEFORMABLE_PAGE,
    ),
    "deformable_detr_resnet50_refine": HubModel(
        "Deformable DETR-R50 with iterative box refinement, AP 46.2",
        {**_DEFORMABLE, **_REFINE},
        _DEFORMABLE_PAGE,
    ),
    "deformable_detr_resnet50_refine_two_stage": HubModel(
        "two-stage Deformable DETR-R50 with iterative box refinement, AP 46.9",
        {**_DEFORMABLE, **_REFINE, "two_stage": True},
        _DEFORMABLE_PAGE,
    ),
}


def published_file(name: str) -> str:
    """The address of the published weights.

    Raises:
        UserError: no program can fetch them.
    """
    address = HUB_MODELS[name].address
    if not address.endswith(".pth"):
        raise UserError(
            f"{name}: {address} links the published weights to a file-sharing site, from which a program can't fetch "
            "them: download the file with a browser and give its path"
        )
    return address


def check_is(checkpoint: Checkpoint, name: str) -> None:
    """
    Raises:
        UserError: the file holds another model; it says which.
    """
    certain, likely = architecture(checkpoint)
    held = {**likely, **certain}
    wanted = HUB_MODELS[name].settings
    differing = [
        f"{flag} {held[flag]} (not {value})"
        for flag, value in wanted.items()
        if held.get(flag, value) != value
    ]
    if differing:
        fitting = (
            other
            for other, model in HUB_MODELS.items()
            if all(held.get(flag, value) == value for flag, value in model.settings.items())
        )
        raise UserError(
            f"{checkpoint.source} is no {name}, for it has {', '.join(differing)}: load {next(fitting, 'another file')}"
        )
