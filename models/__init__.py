"""Detectors, pretexts and their losses. `build_model(settings)` makes what both entry scripts train.

Adding a detector or a pretext is one file and one line in `util.settings.registry`. A detector's file has
`build(settings, backbone, classification) -> Detector`, a pretext's a subclass of `Pretext`.
"""

from argparse import Namespace
from typing import Any

from torch import nn

from models.backbone import Backbone, BackboneWithPositions
from models.classification import Classification, matching_costs
from models.criterion import SetCriterion, expand_weights
from models.position_encoding import POSITION_ENCODINGS
from models.postprocess import PostProcess
from models.trainable import TrainableModel
from util.checkpoints.backbone_weights import load_backbone_weights
from util.settings import Settings, resolve
from util.settings.registry import DETECTORS, PRETEXTS, load, lookup


def build_backbone(settings: Settings) -> BackboneWithPositions:
    """The feature extractor with its weights and its positional encoding."""
    stages = (2, 3, 4)[-settings.num_feature_levels :]  # further levels are made by the detector
    backbone = Backbone(
        settings.backbone,
        settings.backbone_norm,
        dilation=settings.dilation,
        stages=stages,
        trainable=settings.lr_backbone > 0,
    )
    if settings.backbone_weights != "none":
        load_backbone_weights(backbone.body, settings.backbone, settings.backbone_weights)
    # A checkpoint may say anything of it.
    positions = lookup(POSITION_ENCODINGS, "--position_embedding", settings.position_embedding)
    return BackboneWithPositions(backbone, positions(settings.hidden_dim))


def build_model(
    args: Settings | Namespace, num_classes: int | None = None
) -> tuple[TrainableModel, SetCriterion, dict[str, nn.Module]]:
    """The model (a detector, or a pretext around one), its criterion and its post-processors.

    A detector is called `model(samples)`, a pretext `model(samples, targets)`; `criterion(outputs, targets)` gives the
    losses and `criterion.weight_dict` their weights.

    Args:
        args: settings, or parsed flags, which are resolved first.
        num_classes: of a detector's head, as the data or a checkpoint says; by default that of the settings.
    """
    settings = resolve(args)
    pretext: Any = load(PRETEXTS[settings.pretext].pretext) if settings.pretext else None
    if pretext:
        classification = pretext.build_classification(settings)
    else:
        count = settings.num_classes if num_classes is None else num_classes
        classification = Classification(settings.classification, count, **matching_costs(settings))
    detector = load(DETECTORS[settings.detector].builder)(
        settings, build_backbone(settings), classification
    )
    model = pretext.from_settings(settings, detector) if pretext else detector
    num_aux = settings.dec_layers - 1 if settings.aux_loss else 0
    weight_dict = expand_weights(model.loss_weights(settings), num_aux, detector.two_stage)
    weight_dict.update(model.last_layer_weights(settings))
    criterion = SetCriterion(
        classification,
        weight_dict,
        losses=model.losses,
        eos_coef=settings.eos_coef,
        focal_alpha=settings.focal_alpha,
        reproduce_published=settings.reproduce_published,
    )
    return model, criterion, {"bbox": PostProcess(classification)}
