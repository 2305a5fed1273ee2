"""Conditional DETR (Meng et al., ICCV 2021): cross-attention with a content and a spatial query.

Shapes: B images, Q queries, S memory tokens, D model width, H heads, L decoder layers.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn

from models.attention import ProjectedAttention
from models.backbone import BackboneWithPositions
from models.classification import Classification, inverse_sigmoid
from models.detector import Memory, Queries, States, to_weight_dtype, without_autocast
from models.detr import SingleScaleDetector, Transformer, build_encoder, detector_kwargs
from models.position_encoding import sine_embed_points
from models.transformer import MLP, TransformerLayer, get_clones
from util.errors import UserError
from util.settings import Settings


def concat_heads(a: Tensor, b: Tensor, num_heads: int) -> Tensor:
    """Concatenate two tensors [B, S, D] head by head: [B, S, 2 D], head h is (a_h, b_h)."""
    a, b = (x.unflatten(-1, (num_heads, -1)) for x in (a, b))  # [B, S, H, D / H] each
    return torch.cat([a, b], dim=-1).flatten(-2)  # [B, S, H, 2 D / H] -> [B, S, 2 D]


class ConditionalDecoderLayer(TransformerLayer):
    """Self-attention, conditional cross-attention (section 3.3, equation 1), feed-forward.

    Post-norm only. Only the first layer adds the query position to the content query and the key
    position to the content key, so only the first layer has `ca_qpos_proj`.
    """

    sa_qcontent_proj: nn.Linear
    sa_qpos_proj: nn.Linear
    sa_kcontent_proj: nn.Linear
    sa_kpos_proj: nn.Linear
    sa_v_proj: nn.Linear
    ca_qcontent_proj: nn.Linear
    ca_qpos_proj: nn.Linear | None
    ca_kcontent_proj: nn.Linear
    ca_kpos_proj: nn.Linear
    ca_v_proj: nn.Linear
    ca_qpos_sine_proj: nn.Linear

    def __init__(self, dim: int, num_heads: int, dim_feedforward: int, dropout: float) -> None:
        super().__init__(dropout, pre_norm=False)
        self.num_heads = num_heads
        for name in ("qcontent", "qpos", "kcontent", "kpos", "v"):
            self.add_module(f"sa_{name}_proj", nn.Linear(dim, dim))
        self.self_attn = ProjectedAttention(dim, num_heads, dropout)
        for name in ("qcontent", "qpos", "kcontent", "kpos", "v", "qpos_sine"):
            self.add_module(f"ca_{name}_proj", nn.Linear(dim, dim))
        self.cross_attn = ProjectedAttention(dim, num_heads, dropout)
        self.add_feed_forward(dim, dim_feedforward, num_norms=3)

    def forward(
        self,
        x: Tensor,
        query_position: Tensor,
        query_sine: Tensor,
        memory: Memory,
        query_groups: int,
    ) -> Tensor:
        """Decode one layer: x, query_position and query_sine [B, Q, D] -> [B, Q, D]."""

        def self_attention(y: Tensor) -> Tensor:
            query = self.sa_qcontent_proj(y) + self.sa_qpos_proj(query_position)  # [B, Q, D]
            key = self.sa_kcontent_proj(y) + self.sa_kpos_proj(query_position)  # [B, Q, D]
            return self.self_attn(query, key, self.sa_v_proj(y), query_groups=query_groups)

        def cross_attention(y: Tensor) -> Tensor:
            query = self.ca_qcontent_proj(y)  # [B, Q, D]
            key = self.ca_kcontent_proj(memory.tokens)  # [B, S, D]
            key_position = self.ca_kpos_proj(memory.position)  # [B, S, D]
            if self.ca_qpos_proj is not None:
                query = query + self.ca_qpos_proj(query_position)
                key = key + key_position

            # Concatenated per head, the dot product is content . content + spatial . spatial. Both
            # terms share the scale 1 / sqrt(2 D / H).
            query_spatial = self.ca_qpos_sine_proj(query_sine)  # [B, Q, D]
            query = concat_heads(query, query_spatial, self.num_heads)  # [B, Q, 2 D]
            key = concat_heads(key, key_position, self.num_heads)  # [B, S, 2 D]
            value = self.ca_v_proj(memory.tokens)  # [B, S, D]
            return self.cross_attn(query, key, value, memory.padding_mask)

        x = self.residual(x, self.norm1, self_attention)
        x = self.residual(x, self.norm2, cross_attention)
        return self.residual(x, self.norm3, self.feed_forward)


class ConditionalDecoder(nn.Module):
    """The decoder, and the reference point that each query predicts from its position."""

    def __init__(self, layer: ConditionalDecoderLayer, num_layers: int, dim: int) -> None:
        super().__init__()
        self.layers: Any = get_clones(layer, num_layers)
        self.norm = nn.LayerNorm(dim)
        self.query_scale = MLP(dim, dim, dim, num_layers=2)
        self.ref_point_head = MLP(dim, dim, 2, num_layers=2)
        for later in self.layers[1:]:
            later.register_module("ca_qpos_proj", None)
        if num_layers == 1:
            # Only layers after the first use `query_scale`. Without them its weights get no
            # gradient, and DDP would wait for one.
            self.query_scale.requires_grad_(False)

    def forward(
        self, x: Tensor, query_position: Tensor, memory: Memory, query_groups: int
    ) -> tuple[Tensor, Tensor]:
        """Decode x and query_position [B, Q, D].

        Returns the outputs of all layers [L, B, Q, D], and the reference points (x, y) [B, Q, 2] in
        [0, 1] that they share.
        """
        with without_autocast(x):  # the reference point is part of the box center: float32
            position = to_weight_dtype(query_position, self.ref_point_head)
            reference = self.ref_point_head(position).sigmoid()  # [B, Q, 2]
        sine = sine_embed_points(reference, x.shape[-1])  # [B, Q, D]

        outputs = []
        for i, layer in enumerate(self.layers):
            # Spatial query (section 3.3): the sinusoidal embedding of the reference point, scaled
            # by a transformation of the previous layer's output before the shared norm. The first
            # layer has no previous output and uses the embedding unscaled.
            query_sine = sine if i == 0 else sine * self.query_scale(x)  # [B, Q, D]
            x = layer(x, query_position, query_sine, memory, query_groups)  # [B, Q, D]
            outputs.append(self.norm(x))
        return torch.stack(outputs), reference  # [L, B, Q, D], [B, Q, 2]


class ConditionalDETR(SingleScaleDetector):
    """DETR's encoder and heads with the conditional decoder."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        # Zero offsets: boxes start at their reference points with sides of sigmoid(0) = 0.5.
        last = cast(nn.Linear, self.bbox_embed.layers[-1])
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    def decode(
        self, memory: Memory, queries: Queries | None = None, query_groups: int = 1
    ) -> States:
        content, position = self.decoder_inputs(memory, queries)
        layers, reference = self.transformer.decoder(content, position, memory, query_groups)
        return States(layers, [reference] * len(layers))

    def boxes(self, offsets: Tensor, states: States) -> Tensor:
        """Add the box head's output to the reference point, in logits (section 3.2).

        offsets: [L, B, Q, 4]. Returns (cx, cy, w, h) in [0, 1], [L, B, Q, 4].
        """
        assert states.references is not None  # set by `decode`
        reference = inverse_sigmoid(states.references[0])  # [B, Q, 2], shared by all layers
        center = offsets[..., :2] + reference  # [L, B, Q, 2]
        return torch.cat([center, offsets[..., 2:]], dim=-1).sigmoid()  # [L, B, Q, 4]


def build(
    settings: Settings, backbone: BackboneWithPositions, classification: Classification
) -> ConditionalDETR:
    """Build Conditional DETR.

    Raises:
        UserError: `--pre_norm`.
    """
    if settings.pre_norm:
        raise UserError(
            "--pre_norm: Conditional DETR is defined post-norm only (normalized decoder outputs scale "
            "its spatial queries, and no pre-norm weights exist); remove --pre_norm or use "
            "--detector detr"
        )
    layer = ConditionalDecoderLayer(
        settings.hidden_dim, settings.nheads, settings.dim_feedforward, settings.dropout
    )
    # This order fixes the random draws of the initial weights: layer, encoder, decoder.
    encoder = build_encoder(settings)
    decoder = ConditionalDecoder(layer, settings.dec_layers, settings.hidden_dim)
    transformer = Transformer(encoder, decoder)
    return ConditionalDETR(backbone, transformer, classification, **detector_kwargs(settings))
