"""Features of queries on demand.

The losses compare the features of matched queries with their targets. So a head predicts the features
of these queries only, of all decoder layers in one call: 10 of UP-DETR's 100 queries have a match.

Shapes: L decoder layers, B images, Q queries, D model width, F features.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from models.detector import full_precision, without_autocast


@dataclass
class FeaturePredictor:
    """Predicts the features of any queries.

    head: [..., D] -> [..., F]; runs in full precision.
    layers: decoder states [L, B, Q, D], of all layers or of the last ones.
    """

    head: nn.Module
    layers: Tensor

    def __call__(self, states: Tensor) -> Tensor:
        """[..., D] -> [..., F]"""
        with without_autocast(states):
            return self.head(full_precision(states))


class FeatureOutputs(dict[str, Any]):
    """Outputs of one decoder layer. `pred_features` [B, Q, F] of all queries are computed when first read."""

    def __init__(
        self, outputs: dict[str, Any], predict_features: FeaturePredictor, layer: int
    ) -> None:
        super().__init__(outputs)
        self.predict_features, self.layer = predict_features, layer

    def __missing__(self, key: str) -> Any:
        if key != "pred_features":
            raise KeyError(key)
        self[key] = self.predict_features(self.predict_features.layers[self.layer])
        return self[key]


def add_features(outputs: dict[str, Any], head: nn.Module, layers: Tensor) -> FeatureOutputs:
    """Return the outputs of a detector with `pred_features` on demand.

    layers: decoder states [L, B, Q, D] of all layers, or [1, B, Q, D] to predict those of the last layer only.
    """
    predict = FeaturePredictor(head, layers)
    earlier = outputs.get("aux_outputs", []) if len(layers) > 1 else []
    if earlier:
        aux = [FeatureOutputs(own, predict, layer) for layer, own in enumerate(earlier)]
        outputs = {**outputs, "aux_outputs": aux}
    return FeatureOutputs(outputs, predict, layer=-1)


def select_features(outputs: Sequence[dict[str, Any]], index: Tensor) -> Tensor:
    """Return the predicted features [K, F] of queries, in float32 or float64.

    Args:
        outputs: of L decoder layers, the last layer last, with `pred_features` [B, Q, F] each.
        index: int64 [K], indices into the queries flattened from [L, B, Q].
    """
    last = outputs[-1]
    if isinstance(last, FeatureOutputs) and "pred_features" not in last:
        layers = last.predict_features.layers[-len(outputs) :]  # [L, B, Q, D]
        return last.predict_features(layers.flatten(0, 2)[index])
    features = torch.stack([layer["pred_features"] for layer in outputs])  # [L, B, Q, F]
    return full_precision(features).flatten(0, 2)[index]
