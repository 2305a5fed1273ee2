"""Conditional DETR (Meng et al., ICCV 2021): cross-attention whose query has a content and a spatial half."""

from typing import Any, cast

import torch
from torch import Tensor, nn

from models.attention import ProjectedAttention
from models.backbone import BackboneWithPositions
from models.classification import Classification, inverse_sigmoid
from models.detector import Memory, Queries, States, as_weights, without_autocast
from models.detr import SingleScaleDetector, Transformer, build_encoder, detector_sizes
from models.position_encoding import sine_embed_points
from models.transformer import MLP, Block, clones
from util.errors import UserError
from util.settings import Settings


def concat_heads(a: Tensor, b: Tensor, num_heads: int) -> Tensor:
    """Joins two tensors [B, S, D] head by head: [B, S, 2 D], head h holding (a_h, b_h)."""
    a, b = (x.unflatten(-1, (num_heads, -1)) for x in (a, b))
    return torch.cat([a, b], dim=-1).flatten(-2)


class ConditionalDecoderLayer(Block):
    """Self-attention, conditional cross-attention (section 3.3, equation 1), feed-forward; post-norm.

    Only the first layer adds the query position to the content query and the key position to the content key, so only
    the first has `ca_qpos_proj`.
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
        """x, query_position and query_sine [B, Q, D] -> [B, Q, D]"""

        def self_attention(y: Tensor) -> Tensor:
            query = self.sa_qcontent_proj(y) + self.sa_qpos_proj(query_position)
            key = self.sa_kcontent_proj(y) + self.sa_kpos_proj(query_position)
            return self.self_attn(query, key, self.sa_v_proj(y), query_groups=query_groups)

        def cross_attention(y: Tensor) -> Tensor:
            query, key = self.ca_qcontent_proj(y), self.ca_kcontent_proj(memory.tokens)
            key_position = self.ca_kpos_proj(memory.position)
            if self.ca_qpos_proj is not None:
                query, key = query + self.ca_qpos_proj(query_position), key + key_position
            query = concat_heads(query, self.ca_qpos_sine_proj(query_sine), self.num_heads)
            key = concat_heads(key, key_position, self.num_heads)
            return self.cross_attn(query, key, self.ca_v_proj(memory.tokens), memory.padding_mask)

        x = self.residual(x, self.norm1, self_attention)
        x = self.residual(x, self.norm2, cross_attention)
        return self.residual(x, self.norm3, self.feed_forward)


class ConditionalDecoder(nn.Module):
    def __init__(self, layer: ConditionalDecoderLayer, num_layers: int, dim: int) -> None:
        super().__init__()
        self.layers: Any = clones(layer, num_layers)
        self.norm = nn.LayerNorm(dim)
        self.query_scale = MLP(dim, dim, dim, num_layers=2)
        self.ref_point_head = MLP(dim, dim, 2, num_layers=2)
        for later in self.layers[1:]:
            later.register_module("ca_qpos_proj", None)
        if num_layers == 1:
            # Only layers after the first scale their spatial query; distributed training waits for every parameter's
            # gradient.
            self.query_scale.requires_grad_(False)

    def forward(
        self, x: Tensor, query_position: Tensor, memory: Memory, query_groups: int
    ) -> tuple[Tensor, Tensor]:
        """[B, Q, D] -> layers [L, B, Q, D] and reference points (x, y) [B, Q, 2] in [0, 1], the same for all layers."""
        with without_autocast(x):  # half of a box's centre is predicted here
            reference = self.ref_point_head(
                as_weights(query_position, self.ref_point_head)
            ).sigmoid()
        sine = sine_embed_points(reference, x.shape[-1])
        outputs = []
        for i, layer in enumerate(self.layers):
            scaled = sine if i == 0 else sine * self.query_scale(x)
            x = layer(x, query_position, scaled, memory, query_groups)
            outputs.append(self.norm(x))
        return torch.stack(outputs), reference


class ConditionalDETR(SingleScaleDetector):
    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
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
        """The box head predicts the centre relative to the reference point (section 3.2)."""
        assert states.references is not None  # decode gives them
        centre = offsets[..., :2] + inverse_sigmoid(torch.stack(states.references))
        return torch.cat([centre, offsets[..., 2:]], dim=-1).sigmoid()


def build(
    settings: Settings, backbone: BackboneWithPositions, classification: Classification
) -> ConditionalDETR:
    if settings.pre_norm:
        raise UserError(
            "--pre_norm: Conditional DETR is defined post-norm only (its spatial queries are scaled by normalised "
            "decoder outputs, and no pre-norm weights exist): leave --pre_norm out or use --detector detr"
        )
    layer = ConditionalDecoderLayer(
        settings.hidden_dim, settings.nheads, settings.dim_feedforward, settings.dropout
    )
    transformer = Transformer(
        build_encoder(settings), ConditionalDecoder(layer, settings.dec_layers, settings.hidden_dim)
    )
    return ConditionalDETR(backbone, transformer, classification, **detector_sizes(settings))
