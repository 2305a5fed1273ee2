"""Detectors, pretext tasks and their losses. `build_model` builds what both entry scripts train.

A new detector or pretext task is one file and one line in `util.settings.registry`. A detector's
file has `build(settings, backbone, classification) -> Detector`; a pretext's file has a subclass of
`Pretext`.
"""

from argparse import Namespace
from collections.abc import Mapping
from typing import Any

from torch import nn

from models.backbone import Backbone, BackboneWithPositions
from models.classification import Classification, matching_costs
from models.criterion import SetCriterion, expand_weight_dict
from models.position_encoding import POSITION_ENCODINGS
from models.postprocess import build_postprocessors
from models.segmentation import SegmentationDetector
from models.trainable import TrainableModel
from util.checkpoints.backbone_weights import load_backbone_weights
from util.logger import log
from util.settings import Settings, resolve
from util.settings.registry import DETECTORS, PRETEXTS, import_object, lookup


def build_backbone(settings: Settings) -> BackboneWithPositions:
    """Build the backbone, load its weights and add the positional encoding."""
    # One level reads stage 4 alone, more levels add stages 3 and 2. Levels beyond these three are
    # strided convolutions of the detector. A mask head reads all four stages.
    detector_stages = (2, 3, 4)[-settings.num_feature_levels :]
    stages = (1, 2, 3, 4) if settings.masks else detector_stages
    backbone = Backbone(
        settings.backbone,
        settings.backbone_norm,
        dilation=settings.dilation,
        stages=stages,
        trainable=settings.lr_backbone > 0,
    )
    if settings.backbone_weights != "none":
        load_backbone_weights(backbone.body, settings.backbone, settings.backbone_weights)

    # The name may come from a checkpoint, so it has not passed the parser's choices.
    build_encoding = lookup(POSITION_ENCODINGS, "--position_embedding", settings.position_embedding)
    with_positions = BackboneWithPositions(backbone, build_encoding(settings.hidden_dim))
    with_positions.num_levels = len(detector_stages)
    return with_positions


def build_model(
    args: Settings | Namespace,
    num_classes: int | None = None,
    things: Mapping[int, bool] | None = None,
) -> tuple[TrainableModel, SetCriterion, dict[str, nn.Module]]:
    """Build the model (a detector, or a pretext around one), its criterion and its post-processors.

    Call a detector as `model(samples)` and a pretext as `model(samples, targets)`.
    `criterion(outputs, targets)` returns the losses, `criterion.weight_dict` has their weights.

    Args:
        args: settings, or parsed flags, which are resolved first.
        num_classes: number of classes of a detector's head, known from the dataset or a checkpoint.
            Default: `settings.num_classes`. A pretext defines its own classes and ignores it.
        things: category id -> whether it is a thing, of panoptic data. Default: COCO's.
    """
    settings = resolve(args)
    pretext: Any = import_object(PRETEXTS[settings.pretext].pretext) if settings.pretext else None
    if pretext and isinstance(args, Namespace) and not settings.was_given("pretext"):
        # In DETR's codebase, `main.get_args_parser` is the parser of a detector.
        log.warning(
            "build_model with the flags of main.py builds the pretext %s around a detector; for a "
            "detector use the parser of finetune_main.py, or give --pretext to keep it",
            settings.pretext,
        )

    # One Classification object configures head, matcher, criterion and post-processor.
    if pretext:
        classification = pretext.build_classification(settings)
    else:
        if num_classes is None:
            num_classes = settings.num_classes
        classification = Classification(
            settings.classification, num_classes, **matching_costs(settings)
        )

    build_detector = import_object(DETECTORS[settings.detector].builder)
    detector = build_detector(settings, build_backbone(settings), classification)
    if settings.masks:
        detector = SegmentationDetector(
            detector,
            settings.nheads,
            frozen=bool(settings.frozen_weights),
            frozen_dropout=settings.reproduce_published,
        )
    model = pretext.from_settings(settings, detector) if pretext else detector

    num_aux_layers = settings.dec_layers - 1 if settings.aux_loss else 0
    weight_dict = expand_weight_dict(
        model.loss_weights(settings), num_aux_layers, detector.two_stage
    )
    weight_dict.update(model.last_layer_weights(settings))
    criterion = SetCriterion(
        classification,
        weight_dict,
        losses=model.losses,
        eos_coef=settings.eos_coef,
        focal_alpha=settings.focal_alpha,
        reproduce_published=settings.reproduce_published,
    )
    return model, criterion, build_postprocessors(settings, classification, things)
