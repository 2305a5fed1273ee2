"""Published detectors that `hubconf.py` and `Predictor` load by name."""

from typing import Any, NamedTuple

from util.checkpoints.architecture import infer_architecture
from util.checkpoints.checkpoint import Checkpoint
from util.errors import UserError


class HubModel(NamedTuple):
    """A published detector.

    title: name and published metrics (COCO val2017). settings: architecture by flag name. url: the published weights,
    or the page that links them where they are on a file-sharing site.
    """

    title: str
    settings: dict[str, Any]
    url: str


_DETR = {"detector": "detr", "backbone": "resnet50", "dilation": False, "masks": False}
_CONDITIONAL = {**_DETR, "detector": "conditional_detr"}
_DEFORMABLE = {
    **_DETR,
    "detector": "deformable_detr",
    "num_feature_levels": 4,
    "with_box_refine": False,
    "two_stage": False,
}
_R101 = {"backbone": "resnet101"}
_DC5 = {"dilation": True}  # stride 16 instead of 32 in the last stage
_MASKS = {"masks": True}
_SINGLE_SCALE = {"num_feature_levels": 1}
_REFINE = {"with_box_refine": True}

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
    "detr_resnet50_panoptic": HubModel(
        "panoptic DETR-R50, box AP 38.8, segm AP 31.1, PQ 43.4",
        {**_DETR, **_MASKS},
        _FILES + "detr-r50-panoptic-00ce5173.pth",
    ),
    "detr_resnet50_dc5_panoptic": HubModel(
        "panoptic DETR-DC5-R50, box AP 40.2, segm AP 31.9, PQ 44.6",
        {**_DETR, **_DC5, **_MASKS},
        _FILES + "detr-r50-dc5-panoptic-da08f1b1.pth",
    ),
    "detr_resnet101_panoptic": HubModel(
        "panoptic DETR-R101, box AP 40.1, segm AP 33.0, PQ 45.1",
        {**_DETR, **_R101, **_MASKS},
        _FILES + "detr-r101-panoptic-40021d53.pth",
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
        {**_DEFORMABLE, **_SINGLE_SCALE},
        _DEFORMABLE_PAGE,
    ),
    "deformable_detr_resnet50_single_scale_dc5": HubModel(
        "Deformable DETR-DC5-R50 with one level, AP 41.5",
        {**_DEFORMABLE, **_SINGLE_SCALE, **_DC5},
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


def is_panoptic(name: str) -> bool:
    """Return True for a panoptic model. The published mask models are all panoptic."""
    return HUB_MODELS[name].settings["masks"]


def published_url(name: str) -> str:
    """Return the URL of the published weights.

    Raises:
        UserError: they are on a file-sharing site and can't be downloaded by a program.
    """
    url = HUB_MODELS[name].url
    if not url.endswith(".pth"):
        raise UserError(
            f"{name}: {url} links the published weights to a file-sharing site, which a program can't download "
            "from; download the file with a browser and give its path"
        )
    return url


def check_hub_model(checkpoint: Checkpoint, name: str) -> None:
    """Check that a checkpoint has the architecture of the hub model `name`.

    Raises:
        UserError: it has another architecture; the message names the hub model that fits.
    """
    certain, likely = infer_architecture(checkpoint)
    found = {"masks": False, **likely, **certain}  # a mask head shows in the weights
    differences = [
        f"{flag} {found[flag]} (not {value})"
        for flag, value in HUB_MODELS[name].settings.items()
        if found.get(flag, value) != value
    ]
    if differences:
        fitting = (other for other, model in HUB_MODELS.items() if _fits(found, model.settings))
        raise UserError(
            f"{checkpoint.source} is not a {name}: it has {', '.join(differences)}; "
            f"load {next(fitting, 'another file')}"
        )


def _fits(found: dict[str, Any], settings: dict[str, Any]) -> bool:
    """Return True if no setting differs. What the checkpoint does not show, such as dilation, may have any value."""
    return all(found.get(flag, value) == value for flag, value in settings.items())
