"""Encoder and decoder of Deformable DETR (Zhu et al., ICLR 2021): every query reads a few points of each map.

Shapes: B images, S tokens (all cells of all maps, map by map), Q queries, D model width, H heads, L maps (levels), P
points. Points, sizes and references are (x, y); sizes of maps on the host are (h, w).
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from models.attention import MultiheadAttention
from models.classification import inverse_sigmoid
from models.detector import Memory, as_weights, full_precision, without_autocast
from models.ms_deform_attn import ms_deform_attn
from models.position_encoding import sine_features
from models.transformer import Block, clones, reset_matrices

# Side of the box proposed at each cell of the finest level, relative to the image; it doubles
# with each level.
PROPOSAL_SIZE = 0.05


@dataclass(kw_only=True)
class DeformableMemory(Memory):
    """sizes: float32 [L, 2], (w, h) of the maps. valid_sizes: float32 [B, L, 2], cells of each map that are not
    padding.
    """

    sizes: Tensor
    valid_sizes: Tensor

    @property
    def valid_ratios(self) -> Tensor:
        """[B, L, 2] in (0, 1]: points relative to the image times this are relative to the padded map."""
        return self.valid_sizes / self.sizes


class DeformableAttention(nn.Module):
    """Multi-scale deformable attention (equation 3): offsets and weights of the points come from the query alone."""

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
        points = num_heads * num_levels * num_points
        self.sampling_offsets = nn.Linear(dim, points * 2)
        self.attention_weights = nn.Linear(dim, points)
        self.value_proj = nn.Linear(dim, dim)
        self.output_proj = nn.Linear(dim, dim)

    def reset_parameters(self) -> None:
        """Head h looks into direction 2 pi h / H, point p at p + 1 cells, on every map alike, all with equal weight."""
        angles = torch.arange(self.num_heads, dtype=torch.float32) * (2 * math.pi / self.num_heads)
        directions = torch.stack([angles.cos(), angles.sin()], -1)
        directions = directions / directions.abs().amax(-1, keepdim=True)
        steps = torch.arange(1, self.num_points + 1, dtype=torch.float32)
        offsets = directions[:, None, None] * steps[:, None]
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(offsets.expand(-1, self.num_levels, -1, -1).flatten())
        for weight in (
            self.sampling_offsets.weight,
            self.attention_weights.weight,
            self.attention_weights.bias,
        ):
            nn.init.zeros_(weight)
        for projection in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(projection.weight)
            nn.init.zeros_(projection.bias)

    def forward(
        self, query: Tensor, references: Tensor, tokens: Tensor, memory: DeformableMemory
    ) -> Tensor:
        """What each query reads of `tokens`, which lie as `memory` describes.

        query [B, Q, D], tokens [B, S, D]; references [B, Q, L, 2] (points) or [B, Q, L, 4] (cx, cy, w, h), relative to
        the padded maps. Returns [B, Q, D].
        """
        value = self.value_proj(tokens)
        if memory.padding_mask is not None:
            value = value.masked_fill(memory.padding_mask[..., None], 0.0)
        heads = (self.num_heads, self.num_levels, self.num_points)
        offsets = full_precision(self.sampling_offsets(query)).unflatten(-1, (*heads, 2))
        weights = (
            full_precision(self.attention_weights(query))
            .unflatten(-1, (self.num_heads, -1))
            .softmax(-1)
            .unflatten(-1, heads[1:])
        )
        references = references[:, :, None, :, None]  # to all heads and points
        if references.shape[-1] == 2:
            locations = references + offsets / memory.sizes[:, None]
        else:
            locations = references[..., :2] + offsets / self.num_points * references[..., 2:] * 0.5
        value = value.unflatten(-1, (self.num_heads, -1))
        return self.output_proj(
            ms_deform_attn(value, memory.shapes, locations, weights, self.implementation)
        )


class DeformableEncoderLayer(Block):
    """Attributes stand in the published order, on which the state of a published optimizer depends."""

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
        """x [B, S, D], references [B, S, L, 2] -> [B, S, D]"""
        x = self.residual(
            x, self.norm1, lambda y: self.self_attn(y + memory.position, references, y, memory)
        )
        return self.residual(x, self.norm2, self.feed_forward)


class DeformableEncoder(nn.Module):
    def __init__(self, layer: DeformableEncoderLayer, num_layers: int) -> None:
        super().__init__()
        self.layers: Any = clones(layer, num_layers)

    def forward(self, memory: DeformableMemory) -> Tensor:
        """The tokens of `memory`, each of which has seen the others: [B, S, D]."""
        x, references = memory.tokens, cell_references(memory)
        for layer in self.layers:
            x = layer(x, references, memory)
        return x


class DeformableDecoderLayer(Block):
    """Self-attention comes first, although its norm is the second: numbers and order of attributes are the published
    ones.
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
        """x, position [B, Q, D]; references [B, Q, 2 or 4], relative to the images. Returns [B, Q, D]."""
        ratios = memory.valid_ratios.repeat(1, 1, references.shape[-1] // 2)
        on_maps = references[:, :, None] * ratios[:, None]

        def self_attention(y: Tensor) -> Tensor:
            return self.self_attn(y + position, y + position, y, query_groups=query_groups)

        x = self.residual(x, self.norm2, self_attention)
        x = self.residual(
            x, self.norm1, lambda y: self.cross_attn(y + position, on_maps, memory.tokens, memory)
        )
        return self.residual(x, self.norm3, self.feed_forward)


class DeformableDecoder(nn.Module):
    """`bbox_embed`, given by the detector, makes each layer refine the references of the next (appendix A.4).

    `class_embed` is not used here. Both stand here because published checkpoints list the heads a second time under
    these names.
    """

    def __init__(self, layer: DeformableDecoderLayer, num_layers: int) -> None:
        super().__init__()
        self.layers: Any = clones(layer, num_layers)
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
        """x, position [B, Q, D], references [B, Q, 2 or 4] -> layers [L, B, Q, D], and the references that each layer
        started from.
        """
        outputs, started_from = [], []
        for i, layer in enumerate(self.layers):
            started_from.append(references)
            x = layer(x, position, references, memory, query_groups)
            outputs.append(x)
            if self.bbox_embed is not None and i + 1 < len(self.layers):
                references = self._refined(i, x, references)
        return torch.stack(outputs), started_from

    @torch.no_grad()
    def _refined(self, i: int, x: Tensor, references: Tensor) -> Tensor:
        """[B, Q, 4], without gradient: each layer learns from its own loss alone."""
        with without_autocast(x):
            return apply_box_deltas(self.bbox_embed[i](as_weights(x, self.bbox_embed)), references)


class DeformableTransformer(nn.Module):
    """Encoder, decoder, and where queries come from: `reference_points` turns positions into references; in a two-stage
    model proposals of the encoder take their place."""

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
        self.level_embed = nn.Parameter(torch.empty(num_levels, dim))
        self.encoder, self.decoder = encoder, decoder
        if two_stage:
            self.enc_output = nn.Linear(dim, dim)
            self.enc_output_norm = nn.LayerNorm(dim)
            self.pos_trans = nn.Linear(2 * dim, 2 * dim)
            self.pos_trans_norm = nn.LayerNorm(2 * dim)
        else:
            self.reference_points = nn.Linear(dim, 2)
        reset_matrices(self)
        for module in self.modules():
            if isinstance(module, DeformableAttention):
                module.reset_parameters()
        nn.init.normal_(self.level_embed)
        if not two_stage:
            nn.init.zeros_(self.reference_points.bias)


def apply_box_deltas(deltas: Tensor, references: Tensor) -> Tensor:
    """Boxes (cx, cy, w, h) in [0, 1] from outputs of the box head [..., 4], relative to references: centres or whole
    boxes.
    """
    start = inverse_sigmoid(references)
    if start.shape[-1] == 2:
        start = functional.pad(start, (0, 2))
    return (deltas + start).sigmoid()


def valid_size(mask: Tensor) -> Tensor:
    """Cells of a map that are not padding: bool [B, h, w] -> float32 [B, 2], (w, h)."""
    return torch.stack([(~mask[:, 0]).sum(1), (~mask[:, :, 0]).sum(1)], -1).float()


def cell_centres(height: int, width: int, device: torch.device) -> Tensor:
    """Centres (x, y) of a map's cells, in cells, row by row: float32 [height * width, 2]."""
    y = torch.arange(height, dtype=torch.float32, device=device) + 0.5
    x = torch.arange(width, dtype=torch.float32, device=device) + 0.5
    return torch.stack([x.expand(height, -1), y[:, None].expand(-1, width)], -1).flatten(0, 1)


def cell_references(memory: DeformableMemory) -> Tensor:
    """Where each token lies on every padded map: float32 [B, S, L, 2]."""
    ratios, device = memory.valid_ratios, memory.sizes.device
    on_images = [
        cell_centres(*shape, device) / (ratios[:, level, None] * memory.sizes[level])
        for level, shape in enumerate(memory.shapes)
    ]
    return torch.cat(on_images, 1)[:, :, None] * ratios[:, None]


def cell_proposals(memory: DeformableMemory) -> tuple[Tensor, Tensor]:
    """The box that each token proposes before it is refined (section 4.2 and appendix A.4).

    Returns logits of (cx, cy, w, h), float32 [B, S, 4], infinite where the token is padding or its box touches the
    border; and bool [B, S], True on the others.
    """
    boxes = []
    for level, shape in enumerate(memory.shapes):
        centre = cell_centres(*shape, memory.sizes.device) / memory.valid_sizes[:, level, None]
        boxes.append(torch.cat([centre, torch.full_like(centre, PROPOSAL_SIZE * 2**level)], -1))
    boxes_cxcywh = torch.cat(boxes, 1)
    valid = ((boxes_cxcywh > 0.01) & (boxes_cxcywh < 0.99)).all(-1)
    if memory.padding_mask is not None:
        valid = valid & ~memory.padding_mask
    logits = torch.log(boxes_cxcywh / (1 - boxes_cxcywh))
    return logits.masked_fill(~valid[..., None], math.inf), valid


def embed_boxes(boxes_cxcywh: Tensor, dim: int) -> Tensor:
    """Sine code of boxes [..., 4] in [0, 1], dim / 2 features a coordinate: [..., 2 dim]."""
    return sine_features(boxes_cxcywh * (2 * math.pi), dim // 2).flatten(-2)
