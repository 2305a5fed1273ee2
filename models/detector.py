"""The contract of a detector, and what all detectors share.

A detector is three stages, so that a pretext can enter between them:

    memory  = detector.encode(samples)                        # backbone and encoder
    states  = detector.decode(memory, queries, query_groups)  # decoder, with learned queries unless others are given
    outputs = detector.predict(states)                        # heads of all decoder layers

`detector(samples)` is the three in a row. Shapes: B images, Q queries, D model width, L decoder layers, S memory
tokens, C class outputs. Boxes are (cx, cy, w, h) relative to each image without its padding.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import KW_ONLY, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from models.backbone import BackboneWithPositions, FeatureMap
from models.trainable import TrainableModel
from util.nested_tensor import NestedTensor, as_nested_tensor


@dataclass
class Memory:
    """What the encoder made of a batch.

    features: maps of the backbone, before any projection. tokens, position: [B, S, D]. padding_mask: bool [B, S], True
    on padding, None where no image is padded. shapes: (h, w) of each level whose tokens are in the memory.
    """

    features: list[FeatureMap]
    _: KW_ONLY
    tokens: Tensor
    position: Tensor
    padding_mask: Tensor | None
    shapes: list[tuple[int, int]] = field(default_factory=list)


@dataclass
class Queries:
    """position [B, Q, D]; content [B, Q, D] or None where the decoder starts from zeros."""

    position: Tensor
    content: Tensor | None = None


@dataclass
class States:
    """layers [L, B, Q, D]; references that each layer's boxes are relative to, [B, Q, 2 or 4] in [0, 1], or None where
    boxes are predicted absolutely; encoder_proposals: `pred_logits` [B, S, C] and `pred_boxes` [B, S, 4] of a two-stage
    detector.
    """

    layers: Tensor
    references: list[Tensor] | None = None
    encoder_proposals: dict[str, Tensor] | None = None


class Detector(TrainableModel):
    """Base of the detectors: owns what they have in common; a subclass says how it encodes, decodes and predicts."""

    num_queries: int
    hidden_dim: int
    aux_loss: bool
    backbone: BackboneWithPositions
    # Two-stage queries come from encoder proposals: there are no learned ones, and a pretext can't
    # bring its own.
    two_stage: bool = False

    def base_detector(self) -> "Detector":
        return self

    def encode(self, samples: NestedTensor) -> Memory:
        raise NotImplementedError  # the contract

    def decode(
        self, memory: Memory, queries: Queries | None = None, query_groups: int = 1
    ) -> States:
        raise NotImplementedError  # the contract

    def predict(self, states: States) -> dict:
        raise NotImplementedError  # the contract

    def learned_queries(self, batch: int, count: int | None = None) -> Queries:
        """The detector's own queries for `batch` images: all, or the first `count`."""
        raise NotImplementedError  # the contract

    def kernels(self, device: torch.device, dtype: torch.dtype) -> dict[str, str]:
        """For the log: what attention runs on for activations of this type, operation -> kernel."""
        return {}

    def forward(self, samples: NestedTensor | Tensor | list[Tensor]) -> dict:
        """Normalised images -> {"pred_logits" [B, Q, C], "pred_boxes" [B, Q, 4], "aux_outputs": the same of each
        earlier layer}.

        A two-stage detector also gives "enc_outputs": the same of all S memory tokens, which the criterion scores
        apart.
        """
        return self.predict(self.decode(self.encode(as_nested_tensor(samples))))

    def layer_outputs(self, logits: Tensor, boxes_cxcywh: Tensor) -> dict:
        """Predictions of all layers, [L, B, Q, C] and [L, B, Q, 4], in the published form."""
        outputs: dict[str, Any] = {"pred_logits": logits[-1], "pred_boxes": boxes_cxcywh[-1]}
        if self.aux_loss:
            earlier = zip(logits[:-1], boxes_cxcywh[:-1], strict=True)
            outputs["aux_outputs"] = [{"pred_logits": a, "pred_boxes": b} for a, b in earlier]
        return outputs


def flatten_map(x: Tensor) -> Tensor:
    """[B, D, h, w] -> [B, h * w, D]"""
    return x.flatten(2).transpose(1, 2)


def full_precision(x: Tensor) -> Tensor:
    """At least float32: matching, losses and results never run in half precision."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def under_autocast(x: Tensor) -> bool:
    """Whether autocast is on for the device of `x`. The meta device, on which sizes are counted, has none."""
    device = x.device.type
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def without_autocast(x: Tensor) -> AbstractContextManager:
    """Autocast is off inside, for the device of `x`."""
    device = x.device.type
    return (
        torch.autocast(device, enabled=False)
        if torch.amp.is_autocast_available(device)
        else nullcontext()
    )


def as_weights(x: Tensor, head: nn.Module) -> Tensor:
    """In the dtype of the head's weights: autocast never reaches heads and boxes, and a model that was made half runs
    as a whole.
    """
    return x.to(next(head.parameters()).dtype)
