"""The detector contract, and what all detectors share.

A detector has three stages, so that a pretext can enter between them:

    memory  = detector.encode(samples)                        # backbone and encoder
    states  = detector.decode(memory, queries, query_groups)  # decoder, learned queries by default
    outputs = detector.predict(states)                        # heads of all decoder layers

`detector(samples)` runs the three in a row.

Shapes: B images, Q queries, D model width, L decoder layers, S memory tokens, C class outputs,
h x w size of a feature map. Boxes are (cx, cy, w, h) in [0, 1], relative to each image without its
padding.
"""

from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor

from models.backbone import BackboneWithPositions, FeatureMap
from models.precision import full_precision as full_precision
from models.precision import to_weight_dtype as to_weight_dtype
from models.precision import under_autocast as under_autocast
from models.precision import without_autocast as without_autocast
from models.trainable import TrainableModel
from util.nested_tensor import NestedTensor, as_nested_tensor


@dataclass
class Memory:
    """Output of the encoder for a batch.

    features: backbone feature maps, before any projection.
    tokens, position: encoder output and positional encoding, [B, S, D].
    padding_mask: bool [B, S], True on padding; None if no image is padded.
    shapes: (h, w) of each level, in the order of the tokens.
    projected_map: the backbone's last map after its input projection, [B, D, h, w]. Mask heads read it.
    last_level: the level of that map.
    """

    features: list[FeatureMap]
    _: KW_ONLY
    tokens: Tensor
    position: Tensor
    padding_mask: Tensor | None
    shapes: list[tuple[int, int]]
    projected_map: Tensor
    last_level: int = 0

    def last_map(self) -> Tensor:
        """Return the encoder output at the cells of the backbone's last map, [B, D, h, w]."""
        sizes = [height * width for height, width in self.shapes]
        tokens = self.tokens.split(sizes, dim=1)[self.last_level]  # [B, h * w, D]
        return tokens.transpose(1, 2).unflatten(2, self.shapes[self.last_level])


@dataclass
class Queries:
    """Object queries.

    position: query positional embedding, [B, Q, D].
    content: what the decoder starts from, [B, Q, D]; None for zeros.
    """

    position: Tensor
    content: Tensor | None = None


@dataclass
class States:
    """Output of the decoder.

    layers: hidden states of all layers, [L, B, Q, D].
    references: per layer, what its boxes are relative to: points [B, Q, 2] or boxes [B, Q, 4] in
        [0, 1]. None if boxes are predicted absolutely.
    encoder_proposals: `pred_logits` [B, S, C] and `pred_boxes` [B, S, 4] of a two-stage detector.
    """

    layers: Tensor
    references: list[Tensor] | None = None
    encoder_proposals: dict[str, Tensor] | None = None


class Detector(TrainableModel):
    """Base class of the detectors. A subclass implements `encode`, `decode` and `predict`."""

    num_queries: int
    hidden_dim: int
    aux_loss: bool
    backbone: BackboneWithPositions
    # A two-stage detector builds its queries from encoder proposals: it has no learned queries, and
    # a pretext cannot bring its own.
    two_stage: bool = False

    def base_detector(self) -> "Detector":
        return self

    def encode(self, samples: NestedTensor) -> Memory:
        """Run backbone and encoder on normalized images."""
        raise NotImplementedError

    def decode(
        self, memory: Memory, queries: Queries | None = None, query_groups: int = 1
    ) -> States:
        """Decode queries against the memory.

        queries: default to `learned_queries`. query_groups: number of groups of queries that do not
        attend to each other, see `models.attention.attend`.
        """
        raise NotImplementedError

    def predict(self, states: States) -> dict:
        """Predict classes and boxes of all decoder layers; returns what `forward` does."""
        raise NotImplementedError

    def learned_queries(self, batch: int, count: int | None = None) -> Queries:
        """Return the detector's own queries for `batch` images: all, or the first `count`."""
        raise NotImplementedError

    def kernels(self, device: torch.device, dtype: torch.dtype) -> dict[str, str]:
        """Return operation -> attention kernel for activations of this dtype; for the log."""
        return {}

    def forward(self, samples: NestedTensor | Tensor | list[Tensor]) -> dict:
        """Detect objects in normalized images.

        Returns:
            `pred_logits` [B, Q, C] and `pred_boxes` [B, Q, 4] of the last decoder layer, and
            `aux_outputs`, a list with the same of each earlier layer. A two-stage detector adds
            `enc_outputs`, the same of all S memory tokens, which the criterion scores separately.
        """
        return self.predict(self.decode(self.encode(as_nested_tensor(samples))))

    def build_outputs(self, logits: Tensor, boxes_cxcywh: Tensor) -> dict:
        """Build DETR's output dict from logits [L, B, Q, C] and boxes [L, B, Q, 4]."""
        # The gradient of `unbind` is one stack; each index would have a gradient of full size.
        pairs = zip(logits.unbind(), boxes_cxcywh.unbind(), strict=True)
        *earlier, outputs = ({"pred_logits": a, "pred_boxes": b} for a, b in pairs)
        return {**outputs, "aux_outputs": earlier} if self.aux_loss else outputs


def flatten_map(x: Tensor) -> Tensor:
    """Flatten a map into tokens, row by row: [B, D, h, w] -> [B, h * w, D]."""
    return x.flatten(2).transpose(1, 2)
