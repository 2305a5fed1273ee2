"""Detectors, pretexts and their losses. `build_model(args)` makes what both entry scripts train.

Adding a detector or a pretext is one file and one line in `util.settings.registry`. A detector's file has
`build(args, backbone, classification) -> Detector`, a pretext's a subclass of `Pretext`.
"""

from torch import nn

from models.backbone import Backbone, BackboneWithPositions
from models.classification import Classification
from models.criterion import SetCriterion, expand_weights
from models.position_encoding import POSITION_ENCODINGS
from models.postprocess import PostProcess
from util.checkpoints.backbone_weights import load_backbone_weights
from util.settings.arguments import resolve
from util.settings.registry import DETECTORS, PRETEXTS, choose, load


def build_backbone(args) -> BackboneWithPositions:
    """The feature extractor with its weights and its position code."""
    stages = (2, 3, 4)[-args.num_feature_levels :]  # further levels are made by the detector
    backbone = Backbone(args.backbone, args.backbone_norm, args.dilation, stages, trainable=args.lr_backbone > 0)
    if args.backbone_weights != "none":
        load_backbone_weights(backbone.body, args.backbone, args.backbone_weights)
    positions = choose(
        POSITION_ENCODINGS, "--position_embedding", args.position_embedding
    )  # from a checkpoint it may be any
    return BackboneWithPositions(backbone, positions(args.hidden_dim))


def build_model(args) -> tuple[nn.Module, SetCriterion, dict[str, PostProcess]]:
    """The model (a detector, or a pretext around one), its criterion and its post-processors, from parsed flags.

    Flags that were not given are resolved first. A detector is called `model(samples)`, a pretext `model(samples,
    targets)`; `criterion(outputs, targets)` gives the losses and `criterion.weight_dict` their weights.
    """
    args = resolve(args)
    pretext = load(PRETEXTS[args.pretext].pretext) if args.pretext else None
    if pretext:
        classification = pretext.build_classification(args)
    else:
        classification = Classification(
            args.classification, args.num_classes, args.set_cost_class, args.set_cost_bbox, args.set_cost_giou
        )
    detector = load(DETECTORS[args.detector].builder)(args, build_backbone(args), classification)
    model = pretext.from_args(args, detector) if pretext else detector
    num_aux = args.dec_layers - 1 if args.aux_loss else 0
    weight_dict = expand_weights(model.loss_weights(args), num_aux, detector.two_stage)
    weight_dict.update(model.last_layer_weights(args))
    criterion = SetCriterion(
        classification, weight_dict, model.losses, args.eos_coef, args.focal_alpha, args.reproduce_published
    )
    return model, criterion, {"bbox": PostProcess(classification)}
