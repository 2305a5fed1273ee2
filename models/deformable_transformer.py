"""Encoder and decoder of Deformable DETR (Zhu et al., ICLR 2021).

Every query reads a few sampling points of each feature map.

Shapes: B images, S tokens (the cells of all maps, map by map, row by row), Q queries, D model
width, H heads, L levels (feature maps), P points, N decoder layers, h x w size of a map. Points,
sizes and references are (x, y) or (w, h); `shapes` on the host are (h, w).
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from models.attention import MultiheadAttention, ObservedAttention
from models.classification import inverse_sigmoid
from models.detector import Memory, to_weight_dtype, without_autocast
from models.ms_deform_attn import (
    ms_deform_attn,
    ms_deform_attn_fused,
    sampling_points,
    select_implementation,
)
from models.position_encoding import sine_features
from models.scripting import NotScriptable
from models.transformer import TransformerLayer, get_clones, xavier_init_matrices

# Side of the box proposed at each cell of the finest level, relative to the image. It doubles with
# each level (appendix A.4).
PROPOSAL_SIZE = 0.05


@dataclass(kw_only=True)
class DeformableMemory(Memory):
    """`Memory` of several levels.

    sizes_wh: float32 [L, 2], size of each padded map, in cells.
    valid_sizes_wh: float32 [B, L, 2], size of the part of each map that is not padding, in cells.
    """

    sizes_wh: Tensor
    valid_sizes_wh: Tensor

    @property
    def valid_ratios(self) -> Tensor:
        """Valid fraction of each padded map, [B, L, 2] in (0, 1].

        A point relative to the image times this ratio is relative to the padded map.
        """
        return self.valid_sizes_wh / self.sizes_wh


@dataclass
class SampledAttention:
    """What deformable attention reads for each query. Points are (x, y) relative to the padded maps, in [0, 1] inside.

    references: points [B, Q, L, 2] or boxes (cx, cy, w, h) [B, Q, L, 4].
    locations: the sampling points, float32 [B, Q, H, L, P, 2].
    weights: float32 [B, Q, H, L, P]; those of a head sum to 1.
    """

    references: Tensor
    locations: Tensor
    weights: Tensor


class DeformableAttention(ObservedAttention):
    """Multi-scale deformable attention (equation 3).

    Sampling offsets and attention weights are predicted from the query alone; there are no keys.
    A forward hook gets (output, weights [B, Q, H, L, P]), `record` a `SampledAttention`.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int,
        num_levels: int,
        num_points: int,
        implementation: str = "auto",
    ) -> None:
        super().__init__()
        self.num_heads, self.num_levels, self.num_points = num_heads, num_levels, num_points
        self.implementation = implementation
        num_samples = num_heads * num_levels * num_points  # per query
        self.sampling_offsets = nn.Linear(dim, num_samples * 2)
        self.attention_weights = nn.Linear(dim, num_samples)
        self.value_proj = nn.Linear(dim, dim)
        self.output_proj = nn.Linear(dim, dim)

    def reset_parameters(self) -> None:
        """Initialize with fixed offsets and equal attention weights, as published.

        Head i samples in direction 2 pi i / H, its point p at p + 1 cells, on all levels.
        """
        angles = torch.arange(self.num_heads, dtype=torch.float32) * (2 * math.pi / self.num_heads)
        directions = torch.stack([angles.cos(), angles.sin()], -1)  # [H, 2]
        # Points are on squares rather than circles: the larger coordinate of a direction is 1.
        directions = directions / directions.abs().amax(-1, keepdim=True)
        steps = torch.arange(1, self.num_points + 1, dtype=torch.float32)  # [P]
        offsets = directions[:, None, None] * steps[:, None]  # [H, 1, P, 2]
        with torch.no_grad():
            bias = offsets.expand(-1, self.num_levels, -1, -1).flatten()  # [H * L * P * 2]
            self.sampling_offsets.bias.copy_(bias)
        for parameter in (
            self.sampling_offsets.weight,
            self.attention_weights.weight,
            self.attention_weights.bias,
        ):
            nn.init.zeros_(parameter)
        for projection in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(projection.weight)
            nn.init.zeros_(projection.bias)

    def forward(
        self, query: Tensor, references: Tensor, tokens: Tensor, memory: DeformableMemory
    ) -> Any:
        """Sample `tokens` around the references of each query.

        Args:
            query: [B, Q, D].
            references: points [B, Q, L, 2] or boxes (cx, cy, w, h) [B, Q, L, 4], relative to the
                padded maps.
            tokens: [B, S, D], in the layout of `memory`.

        Returns:
            [B, Q, D]
        """
        value = self.value_proj(tokens)  # [B, S, D]
        if memory.padding_mask is not None:
            # After the projection, whose bias would otherwise be read from the padding.
            value = value.masked_fill(memory.padding_mask[..., None], 0.0)
        value = value.unflatten(-1, (self.num_heads, -1))  # [B, S, H, D / H]

        samples = self._predict_samples(query)  # [B, Q, 3 * H * L * P]
        if self._runs_fused(value, references):
            return self.output_proj(ms_deform_attn_fused(value, memory.shapes, samples, references))
        locations, weights = sampling_points(samples, references, memory.sizes_wh, self.num_heads)
        sampled = ms_deform_attn(value, memory.shapes, locations, weights, self.implementation)
        out = self.output_proj(sampled)  # [B, Q, D]
        if self.record is not None:
            read = (references, locations, weights)
            self.record(SampledAttention(*(x.detach() for x in read)))
        return (out, weights.detach()) if self._forward_hooks else out

    def _predict_samples(self, query: Tensor) -> Tensor:
        """Return sampling offsets (x, y) of all points, then logits of their weights, from one product.

        [B, Q, D] -> [B, Q, 3 * H * L * P]
        """
        layers = (self.sampling_offsets, self.attention_weights)
        weight = torch.cat([layer.weight for layer in layers])  # [3 * H * L * P, D]
        bias = torch.cat([layer.bias for layer in layers])  # [3 * H * L * P]
        return functional.linear(query, weight, bias)

    def _runs_fused(self, value: Tensor, references: Tensor) -> bool:
        """Whether one kernel computes sampling points and attention: in the encoder, on Triton.

        The few queries of a decoder gain nothing, and their references train. Whoever observes this
        layer reads the weights.
        """
        kernel = select_implementation(self.implementation, value.device, value.dtype)
        observed = self.record is not None or bool(self._forward_hooks)
        is_point = references.shape[-1] == 2 and not references.requires_grad
        return kernel == "triton" and is_point and not observed


class DeformableEncoderLayer(TransformerLayer):
    """Deformable self-attention and feed-forward; post-norm.

    Attributes are assigned in the published order: a published optimizer state addresses parameters
    by index.
    """

    def __init__(
        self, attention: DeformableAttention, dim: int, dim_feedforward: int, dropout: float
    ) -> None:
        super().__init__(dropout, pre_norm=False)
        self.self_attn = attention
        self.norm1 = nn.LayerNorm(dim)
        self.linear1 = nn.Linear(dim, dim_feedforward)
        self.linear2 = nn.Linear(dim_feedforward, dim)
        self.norm2 = nn.LayerNorm(dim)

    def forward(self, x: Tensor, references: Tensor, memory: DeformableMemory) -> Tensor:
        """Encode one layer: x [B, S, D], references [B, S, L, 2] -> [B, S, D]."""

        def attention(y: Tensor) -> Tensor:
            return self.self_attn(y + memory.position, references, y, memory)

        x = self.residual(x, self.norm1, attention)
        return self.residual(x, self.norm2, self.feed_forward)


class DeformableEncoder(nn.Module):
    """A stack of encoder layers, without a final norm."""

    def __init__(self, layer: DeformableEncoderLayer, num_layers: int) -> None:
        super().__init__()
        self.layers: Any = get_clones(layer, num_layers)

    def forward(self, memory: DeformableMemory) -> Tensor:
        """Encode the tokens of `memory`: [B, S, D]."""
        x = memory.tokens  # [B, S, D]
        references = encoder_reference_points(memory)  # [B, S, L, 2]
        for layer in self.layers:
            x = layer(x, references, memory)
        return x


class DeformableDecoderLayer(TransformerLayer):
    """Self-attention, deformable cross-attention, feed-forward; post-norm.

    Self-attention runs first although its norm is `norm2`: norm numbers and attribute order are the
    published ones.
    """

    def __init__(
        self,
        attention: DeformableAttention,
        dim: int,
        *,
        num_heads: int,
        dim_feedforward: int,
        dropout: float,
    ) -> None:
        super().__init__(dropout, pre_norm=False)
        self.cross_attn = attention
        self.norm1 = nn.LayerNorm(dim)
        self.self_attn = MultiheadAttention(dim, num_heads, dropout)
        self.norm2 = nn.LayerNorm(dim)
        self.linear1 = nn.Linear(dim, dim_feedforward)
        self.linear2 = nn.Linear(dim_feedforward, dim)
        self.norm3 = nn.LayerNorm(dim)

    def forward(
        self,
        x: Tensor,
        position: Tensor,
        references: Tensor,
        memory: DeformableMemory,
        query_groups: int,
    ) -> Tensor:
        """Decode one layer.

        x, position: [B, Q, D]. references: [B, Q, 2 or 4], relative to the images. Returns
        [B, Q, D].
        """
        # From the image to each padded map; widths and heights scale as x and y do.
        ratios = memory.valid_ratios.repeat(1, 1, references.shape[-1] // 2)  # [B, L, 2 or 4]
        map_references = references[:, :, None] * ratios[:, None]  # [B, Q, L, 2 or 4]

        def self_attention(y: Tensor) -> Tensor:
            query = y + position  # [B, Q, D], also the key
            return self.self_attn(query, query, y, query_groups=query_groups)

        def cross_attention(y: Tensor) -> Tensor:
            return self.cross_attn(y + position, map_references, memory.tokens, memory)

        x = self.residual(x, self.norm2, self_attention)
        x = self.residual(x, self.norm1, cross_attention)
        return self.residual(x, self.norm3, self.feed_forward)


class DeformableDecoder(nn.Module):
    """A stack of decoder layers, without a norm on their outputs.

    With `bbox_embed`, set by the detector, each layer refines the references of the next (iterative
    bounding box refinement, section 4.2 and appendix A.4). `class_embed` is not used here:
    published checkpoints list the heads a second time under both names.
    """

    def __init__(self, layer: DeformableDecoderLayer, num_layers: int) -> None:
        super().__init__()
        self.layers: Any = get_clones(layer, num_layers)
        self.bbox_embed: Any = None
        self.class_embed: Any = None

    def forward(
        self,
        x: Tensor,
        position: Tensor,
        references: Tensor,
        memory: DeformableMemory,
        query_groups: int,
    ) -> tuple[Tensor, list[Tensor]]:
        """Decode x, position [B, Q, D] from references [B, Q, 2 or 4].

        Returns the outputs of all layers [N, B, Q, D], and the references that each started from.
        """
        outputs, layer_references = [], []
        for i, layer in enumerate(self.layers):
            layer_references.append(references)
            x = layer(x, position, references, memory, query_groups)  # [B, Q, D]
            outputs.append(x)
            is_last = i + 1 == len(self.layers)
            if self.bbox_embed is not None and not is_last:
                references = self._refine_references(i, x, references)  # [B, Q, 4]
        return torch.stack(outputs), layer_references

    @torch.no_grad()
    def _refine_references(self, i: int, x: Tensor, references: Tensor) -> Tensor:
        """Return the boxes of layer i, [B, Q, 4], as references of the next layer.

        Without gradient, as published: each layer's head learns from that layer's own loss.
        """
        with without_autocast(x):
            deltas = self.bbox_embed[i](to_weight_dtype(x, self.bbox_embed))  # [B, Q, 4]
            return apply_box_deltas(deltas, references)


class DeformableTransformer(NotScriptable, nn.Module):
    """Encoder and decoder, with the layers that turn queries into references.

    One-stage: `reference_points` predicts a point from each query position. Two-stage: encoder
    proposals are the references.
    """

    def __init__(
        self,
        encoder: DeformableEncoder,
        decoder: DeformableDecoder,
        *,
        dim: int,
        num_levels: int,
        two_stage: bool,
    ) -> None:
        super().__init__()
        self.level_embed = nn.Parameter(torch.empty(num_levels, dim))  # [L, D]
        self.encoder, self.decoder = encoder, decoder
        if two_stage:
            self.enc_output = nn.Linear(dim, dim)
            self.enc_output_norm = nn.LayerNorm(dim)
            self.pos_trans = nn.Linear(2 * dim, 2 * dim)
            self.pos_trans_norm = nn.LayerNorm(2 * dim)
        else:
            self.reference_points = nn.Linear(dim, 2)

        # Order matters: the general rule first, then what differs from it.
        xavier_init_matrices(self)
        for module in self.modules():
            if isinstance(module, DeformableAttention):
                module.reset_parameters()
        nn.init.normal_(self.level_embed)
        if not two_stage:
            nn.init.zeros_(self.reference_points.bias)


def apply_box_deltas(deltas: Tensor, references: Tensor) -> Tensor:
    """Add box head outputs to references, in logits.

    deltas: [..., 4]. references: points (x, y) [..., 2] or boxes (cx, cy, w, h) [..., 4] in [0, 1].
    Returns boxes (cx, cy, w, h) in [0, 1], [..., 4].
    """
    start = inverse_sigmoid(references)
    if start.shape[-1] == 2:
        start = functional.pad(start, (0, 2))  # [..., 4]; w and h come from the delta alone
    return (deltas + start).sigmoid()


def valid_size_wh(mask: Tensor) -> Tensor:
    """Return the size (w, h) of the part that is not padding: bool [B, h, w] -> float32 [B, 2].

    Padding is at the bottom and the right, so the first row and the first column tell it.
    """
    width, height = (~mask[:, 0]).sum(1), (~mask[:, :, 0]).sum(1)  # [B] each
    return torch.stack([width, height], -1).float()  # [B, 2]


def cell_centers(height: int, width: int, device: torch.device) -> Tensor:
    """Return the centers (x, y) of a map's cells, in cells, row by row: float32 [h * w, 2]."""
    y = torch.arange(height, dtype=torch.float32, device=device) + 0.5  # [h]
    x = torch.arange(width, dtype=torch.float32, device=device) + 0.5  # [w]
    grid = torch.stack([x.expand(height, -1), y[:, None].expand(-1, width)], -1)  # [h, w, 2]
    return grid.flatten(0, 1)  # [h * w, 2]


def encoder_reference_points(memory: DeformableMemory) -> Tensor:
    """Return the position of each token on every padded map: float32 [B, S, L, 2]."""
    ratios = memory.valid_ratios  # [B, L, 2]
    points = []
    for level, (height, width) in enumerate(memory.shapes):
        centers = cell_centers(height, width, memory.sizes_wh.device)  # [h * w, 2], in cells
        valid_size = ratios[:, level, None] * memory.sizes_wh[level]  # [B, 1, 2]
        points.append(centers / valid_size)  # [B, h * w, 2], relative to the image
    return torch.cat(points, 1)[:, :, None] * ratios[:, None]  # [B, S, L, 2]


def initial_proposals(memory: DeformableMemory) -> tuple[Tensor, Tensor]:
    """Return the box that each token proposes, before the heads refine it (appendix A.4).

    Returns:
        logits of (cx, cy, w, h), float32 [B, S, 4], infinite where the token is padding or a
        coordinate is outside of (0.01, 0.99); and bool [B, S], True on the other tokens.
    """
    boxes = []
    for level, (height, width) in enumerate(memory.shapes):
        centers = cell_centers(height, width, memory.sizes_wh.device)  # [h * w, 2], in cells
        centers = centers / memory.valid_sizes_wh[:, level, None]  # [B, h * w, 2]
        sides = torch.full_like(centers, PROPOSAL_SIZE * 2**level)  # [B, h * w, 2]
        boxes.append(torch.cat([centers, sides], -1))
    boxes_cxcywh = torch.cat(boxes, 1)  # [B, S, 4]

    valid = ((boxes_cxcywh > 0.01) & (boxes_cxcywh < 0.99)).all(-1)  # [B, S]
    if memory.padding_mask is not None:
        valid = valid & ~memory.padding_mask
    logits = torch.log(boxes_cxcywh / (1 - boxes_cxcywh))  # [B, S, 4]
    # As published. Sigmoid turns infinity into 1, for every output of the box head.
    return logits.masked_fill(~valid[..., None], math.inf), valid


def sine_embed_boxes(boxes_cxcywh: Tensor, dim: int) -> Tensor:
    """Embed boxes [..., 4] in [0, 1] sinusoidally: [..., 2 * dim], dim / 2 per coordinate."""
    features = sine_features(boxes_cxcywh * (2 * math.pi), dim // 2)  # [..., 4, dim / 2]
    return features.flatten(-2)  # [..., 2 * dim]
