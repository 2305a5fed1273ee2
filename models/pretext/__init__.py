"""What a detector learns without labels.

A pretext wraps any detector: `pretext(samples, targets) -> outputs` for `SetCriterion`. It owns its extra heads, its
classification and its list of losses. `state_dict()` is flat: the detector's keys have no prefix, beside the pretext's
own. It never looks at which detector it wraps. A pretext is a class here and a line in `PRETEXTS`; what it sees of an
image is a file in `datasets`.
"""

import torch
from torch import Tensor, nn

from models.backbone import Backbone
from models.classification import Classification, matching_costs
from models.detector import Detector, full_precision, without_autocast
from models.trainable import TrainableModel
from util.errors import UserError
from util.settings import Settings

DETECTOR_PREFIX = "detector."


class Pretext(TrainableModel):
    """Base of the pretexts: the wrapped detector and the flat state dict."""

    needs_targets = True
    detector: Detector

    def __init__(self, detector: Detector) -> None:
        super().__init__()
        self.detector = detector
        self.classification = detector.classification
        self.register_state_dict_post_hook(_flatten_keys)
        self.register_load_state_dict_pre_hook(_nest_keys)

    @classmethod
    def from_settings(cls, settings: Settings, detector: Detector) -> "Pretext":
        raise NotImplementedError  # the contract

    @staticmethod
    def build_classification(settings: Settings) -> Classification:
        """The classes that the pretext tells apart; decides the detector's class head."""
        raise NotImplementedError  # the contract

    def base_detector(self) -> Detector:
        return self.detector

    def _apply(self, fn, *args, **kwargs):
        """Frozen parts go where the model goes."""
        for part in self.frozen_parts().values():
            part._apply(fn, *args, **kwargs)
        return super()._apply(fn, *args, **kwargs)


class QueryPatchPretext(Pretext):
    """Base of the pretexts whose queries are made of patches or regions of an image, and find them."""

    feature_align: (
        nn.Module
    )  # predicts the feature of a query's patch, where `losses` has "features"

    @staticmethod
    def build_classification(settings: Settings) -> Classification:
        """Softmax over two classes (patches have label 1, class 0 is unused, as published) and "no object", on every
        detector.
        """
        return Classification("softmax", 2, **matching_costs(settings))

    def loss_weights(self, settings: Settings) -> dict[str, float]:
        weights = super().loss_weights(settings)
        return (
            {**weights, "loss_feature": settings.feature_loss_coef}
            if "features" in self.losses
            else weights
        )

    def predict_features(self, outputs: dict, layers: Tensor, target_features: Tensor) -> None:
        """Adds `pred_features` [B, Q, F] of each decoder layer to its outputs, and the targets [B * M, F]. layers: [L,
        B, Q, D].
        """
        with without_autocast(layers):
            predicted = self.feature_align(full_precision(layers))
        outputs["pred_features"], outputs["target_features"] = predicted[-1], target_features
        for layer, aux in enumerate(outputs.get("aux_outputs", [])):
            aux["pred_features"] = predicted[layer]

    @staticmethod
    def patch_boxes(outputs: dict, num_patches: int) -> tuple[Tensor, Tensor]:
        """Where each patch was found, as in UP-DETR's demonstration: the box of the most confident query of its group.

        Returns boxes_cxcywh [B, M, 4] and scores [B, M].
        """
        scores = (
            outputs["pred_logits"].softmax(-1)[..., :-1].amax(-1).unflatten(1, (num_patches, -1))
        )
        best = scores.argmax(-1)[..., None, None].expand(-1, -1, 1, 4)
        boxes = outputs["pred_boxes"].unflatten(1, (num_patches, -1)).gather(2, best)
        return boxes.squeeze(2), scores.amax(-1)


def check_region_queries(detector: Detector, num_patches: int) -> None:
    """
    Raises:
        UserError: the detector has no learned queries, or `num_patches` regions can't have equally many of them.
    """
    if detector.two_stage:
        raise UserError(
            "--two_stage: such a detector has no learned queries that patches could be added to; leave it out with "
            "this pretext"
        )
    if detector.num_queries % num_patches:
        raise UserError(
            f"--num_patches {num_patches} does not divide --num_queries {detector.num_queries}: every patch needs the "
            "same number of queries, for instance --num_queries "
            f"{max(1, round(detector.num_queries / num_patches)) * num_patches}"
        )


def pooled_features(backbone: Backbone, images: Tensor) -> Tensor:
    """The mean of each map of the backbone: [N, 3, S, S] -> [N, F]; several levels are joined. Gradients only where it
    trains.
    """
    with torch.set_grad_enabled(torch.is_grad_enabled() and not backbone.frozen):
        return torch.cat([full_precision(x).mean((2, 3)) for x in backbone(images)], dim=1)


def _flatten_keys(module: Pretext, state_dict: dict, prefix: str, local_metadata: dict) -> None:
    for key in list(state_dict):
        value = state_dict.pop(key)
        state_dict[
            key.replace(prefix + DETECTOR_PREFIX, prefix, 1) if key.startswith(prefix) else key
        ] = value


def _nest_keys(module: Pretext, state_dict: dict, prefix: str, *_) -> None:
    own = {name for name, _ in module.named_children()} - {"detector"}
    for key in list(state_dict):
        rest = key.removeprefix(prefix)
        if key.startswith(prefix) and rest.split(".")[0] not in own:
            state_dict[prefix + DETECTOR_PREFIX + rest] = state_dict.pop(key)
