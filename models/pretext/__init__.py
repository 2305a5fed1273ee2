"""Pretext tasks: what a detector learns without labels.

A pretext wraps any detector, without knowing which: `pretext(samples, targets) -> outputs` for
`SetCriterion`. It owns its extra heads, its classification and its list of losses. `state_dict()`
is flat: the detector's keys have no prefix, next to the pretext's own.

A pretext is a class here and a line in `PRETEXTS`; its samples come from the file of the same name
in `datasets/pretext`.

Shapes: B images, Q queries, M patches per image, D model width, L decoder layers, F feature
channels, N crops, S x S their size.
"""

import torch
from torch import Tensor, nn

from models.backbone import Backbone
from models.classification import Classification, matching_costs
from models.detector import Detector, full_precision
from models.feature_head import add_features
from models.trainable import TrainableModel
from util.errors import UserError
from util.settings import Settings

DETECTOR_PREFIX = "detector."


class Pretext(TrainableModel):
    """Base class of the pretexts: the wrapped detector and the flat state dict."""

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
        """Build the pretext around a detector."""
        raise NotImplementedError

    @staticmethod
    def build_classification(settings: Settings) -> Classification:
        """Return the classes that the pretext predicts, for the detector's class head."""
        raise NotImplementedError

    def base_detector(self) -> Detector:
        return self.detector

    def _apply(self, fn, *args, **kwargs):
        # Frozen parts are no submodules, but follow the model to its device and dtype.
        for part in self.frozen_parts().values():
            part._apply(fn, *args, **kwargs)
        return super()._apply(fn, *args, **kwargs)


class QueryPatchPretext(Pretext):
    """Base class of pretexts whose queries come from patches or regions, which they detect."""

    # Predicts the feature of a query's patch, if `losses` has "features".
    feature_align: nn.Module

    @staticmethod
    def build_classification(settings: Settings) -> Classification:
        """Return softmax over two classes and "no object", on every detector.

        As published, patches have label 1 and class 0 is unused.
        """
        return Classification("softmax", 2, **matching_costs(settings))

    def loss_weights(self, settings: Settings) -> dict[str, float]:
        weights = super().loss_weights(settings)
        if "features" in self.losses:
            weights["loss_feature"] = settings.feature_loss_coef
        return weights

    def with_features(self, outputs: dict, layers: Tensor, target_features: Tensor) -> dict:
        """Return outputs with `pred_features` [B, Q, F] of each decoder layer and `target_features`.

        layers: [L, B, Q, D]. target_features: [B * M, F].
        """
        outputs["target_features"] = target_features
        return add_features(outputs, self.feature_align, layers)

    @staticmethod
    def patch_boxes(outputs: dict, num_patches: int) -> tuple[Tensor, Tensor]:
        """Return where each patch was found: the box of the most confident query of its group.

        As in UP-DETR's demo. Returns boxes_cxcywh [B, M, 4] and scores [B, M].
        """
        scores = outputs["pred_logits"].softmax(-1)[..., :-1].amax(-1)  # [B, Q]
        scores = scores.unflatten(1, (num_patches, -1))  # [B, M, Q / M]
        boxes = outputs["pred_boxes"].unflatten(1, (num_patches, -1))  # [B, M, Q / M, 4]
        best = scores.argmax(-1)[..., None, None].expand(-1, -1, 1, 4)  # [B, M, 1, 4]
        return boxes.gather(2, best).squeeze(2), scores.amax(-1)  # [B, M, 4], [B, M]


def check_region_queries(detector: Detector, num_patches: int) -> None:
    """Check that a detector has equally many learned queries for each of `num_patches` patches.

    Raises:
        UserError: it has no learned queries, or their number is not a multiple of `num_patches`.
    """
    if detector.two_stage:
        raise UserError(
            "--two_stage: a two-stage detector has no learned queries to add patches to; leave it out "
            "with this pretext"
        )
    if detector.num_queries % num_patches:
        suggestion = max(1, round(detector.num_queries / num_patches)) * num_patches
        raise UserError(
            f"--num_patches {num_patches} does not divide --num_queries {detector.num_queries}: every patch "
            f"needs the same number of queries, for instance --num_queries {suggestion}"
        )


def pooled_features(backbone: Backbone, images: Tensor) -> Tensor:
    """Return average-pooled feature maps, concatenated over levels: [N, 3, S, S] -> [N, F].

    Keeps a graph only if the backbone trains.
    """
    with torch.set_grad_enabled(torch.is_grad_enabled() and not backbone.frozen):
        maps = backbone(images)  # [N, C, h, w] per level; F is the sum of their channels
        return torch.cat([full_precision(x).mean((2, 3)) for x in maps], dim=1)  # [N, F]


def _flatten_keys(module: Pretext, state_dict: dict, prefix: str, local_metadata: dict) -> None:
    """Remove the prefix `detector.` from the keys of a state dict, in place.

    Every key is taken out and put back, which keeps their order.
    """
    for key in list(state_dict):
        value = state_dict.pop(key)
        if key.startswith(prefix):
            key = key.replace(prefix + DETECTOR_PREFIX, prefix, 1)
        state_dict[key] = value


def _nest_keys(module: Pretext, state_dict: dict, prefix: str, *_) -> None:
    """Add the prefix `detector.` to every key that is not the pretext's own, in place."""
    own = {name for name, _ in module.named_children()} - {"detector"}
    for key in list(state_dict):
        rest = key.removeprefix(prefix)
        if key.startswith(prefix) and rest.split(".")[0] not in own:
            state_dict[prefix + DETECTOR_PREFIX + rest] = state_dict.pop(key)
