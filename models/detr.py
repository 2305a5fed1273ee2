"""DETR (Carion et al., ECCV 2020), post-norm and pre-norm, and the base of single-scale detectors.

Shapes: B images, Q queries, S memory tokens, D model width, L decoder layers, C class outputs,
h x w size of the feature map.
"""

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from models.attention import MultiheadAttention
from models.backbone import Backbone, BackboneWithPositions
from models.classification import Classification
from models.detector import (
    Detector,
    Memory,
    Queries,
    States,
    flatten_map,
    full_precision,
    to_weight_dtype,
    under_autocast,
    without_autocast,
)
from models.scripting import NotScriptable
from models.transformer import (
    MLP,
    Encoder,
    EncoderLayer,
    TransformerLayer,
    get_clones,
    xavier_init_matrices,
)
from util.moved_names import moved_from
from util.nested_tensor import NestedTensor
from util.settings import Settings

if not TYPE_CHECKING:  # a checker must not take every name for one of this module
    __getattr__ = moved_from("models.detr")


class DecoderLayer(TransformerLayer):
    """Self-attention, cross-attention and feed-forward (appendix A.3)."""

    def __init__(
        self, dim: int, *, num_heads: int, dim_feedforward: int, dropout: float, pre_norm: bool
    ) -> None:
        super().__init__(dropout, pre_norm)
        self.self_attn = MultiheadAttention(dim, num_heads, dropout)
        self.multihead_attn = MultiheadAttention(dim, num_heads, dropout)
        self.add_feed_forward(dim, dim_feedforward, num_norms=3)

    def forward(
        self,
        x: Tensor,
        query_position: Tensor,
        memory: Memory,
        memory_key: Tensor,
        query_groups: int,
    ) -> Tensor:
        """Decode one layer: x, query_position [B, Q, D] -> [B, Q, D].

        memory_key: tokens and positions of the memory added, [B, S, D], which all layers share.
        """

        # Positions are added to queries and keys in every layer, never to values.
        def self_attention(y: Tensor) -> Tensor:
            query = y + query_position  # [B, Q, D], also the key
            return self.self_attn(query, query, y, query_groups=query_groups)

        def cross_attention(y: Tensor) -> Tensor:
            return self.multihead_attn(
                y + query_position, memory_key, memory.tokens, memory.padding_mask
            )

        x = self.residual(x, self.norm1, self_attention)
        x = self.residual(x, self.norm2, cross_attention)
        return self.residual(x, self.norm3, self.feed_forward)


class Decoder(nn.Module):
    """A stack of decoder layers with one shared output norm.

    As published, every layer's output passes the norm on its way to the heads, while the next layer
    reads it without. So the outputs of a post-norm model are normalized twice.
    """

    def __init__(self, layer: DecoderLayer, num_layers: int, dim: int) -> None:
        super().__init__()
        self.layers: Any = get_clones(layer, num_layers)
        self.norm = nn.LayerNorm(dim)

    def forward(
        self, x: Tensor, query_position: Tensor, memory: Memory, query_groups: int
    ) -> Tensor:
        """Decode x, query_position [B, Q, D] -> outputs of all layers [L, B, Q, D]."""
        outputs = []
        memory_key = memory.tokens + memory.position  # [B, S, D]
        for layer in self.layers:
            x = layer(x, query_position, memory, memory_key, query_groups)  # [B, Q, D]
            outputs.append(self.norm(x))
        return torch.stack(outputs)  # [L, B, Q, D]


class Transformer(NotScriptable, nn.Module):
    """Encoder and decoder, with every matrix initialized by Xavier uniform."""

    def __init__(self, encoder: Encoder, decoder: nn.Module) -> None:
        super().__init__()
        self.encoder, self.decoder = encoder, decoder
        xavier_init_matrices(self)


def layer_kwargs(settings: Settings) -> dict[str, Any]:
    """Return the arguments of encoder and decoder layers from the flags, except the width."""
    return {
        "num_heads": settings.nheads,
        "dim_feedforward": settings.dim_feedforward,
        "dropout": settings.dropout,
        "pre_norm": settings.pre_norm,
    }


def detector_kwargs(settings: Settings) -> dict[str, Any]:
    """Return the keyword arguments of `SingleScaleDetector` from the flags."""
    return {
        "num_queries": settings.num_queries,
        "hidden_dim": settings.hidden_dim,
        "aux_loss": settings.aux_loss,
    }


def build_encoder(settings: Settings) -> Encoder:
    """Build DETR's encoder."""
    layer = EncoderLayer(settings.hidden_dim, **layer_kwargs(settings))
    return Encoder(layer, settings.enc_layers, settings.hidden_dim)


class SingleScaleDetector(Detector):
    """Base of detectors on the last feature map: DETR's encoder, one query table, shared heads.

    Attributes are assigned in the published order: a published optimizer state addresses parameters
    by index.
    """

    def __init__(
        self,
        backbone: BackboneWithPositions,
        transformer: Transformer,
        classification: Classification,
        *,
        num_queries: int,
        hidden_dim: int,
        aux_loss: bool,
    ) -> None:
        super().__init__()
        self.transformer = transformer
        self.class_embed = nn.Linear(hidden_dim, classification.num_outputs)
        self.bbox_embed = MLP(hidden_dim, hidden_dim, 4, num_layers=3)
        self.query_embed = nn.Embedding(num_queries, hidden_dim)
        num_channels = cast(Backbone, backbone[0]).num_channels[-1]
        self.input_proj = nn.Conv2d(num_channels, hidden_dim, kernel_size=1)
        self.backbone = backbone

        self.num_queries, self.hidden_dim, self.aux_loss = num_queries, hidden_dim, aux_loss
        self.classification = classification
        classification.init_head(self.class_embed)

    def encode(self, samples: NestedTensor) -> Memory:
        features = self.backbone(samples)
        last = features[-1]
        position = flatten_map(last.position)  # [B, S, D], S = h * w
        padding_mask = last.mask.flatten(1) if samples.padded else None  # [B, S]
        projected = self.input_proj(last.tensor)  # [B, D, h, w]
        tokens = flatten_map(projected)  # [B, S, D]
        if under_autocast(tokens):
            # On a GPU autocast runs layer norm in float32, so the sums of a post-norm model are
            # float32 after its first norm. The residual stream of a pre-norm model passes no norm
            # and would stay in half precision.
            tokens = full_precision(tokens)

        tokens = self.transformer.encoder(tokens, position, padding_mask)  # [B, S, D]
        return Memory(
            features,
            tokens=tokens,
            position=position,
            padding_mask=padding_mask,
            shapes=[tuple(last.tensor.shape[-2:])],
            projected_map=projected,
        )

    def kernels(self, device: torch.device, dtype: torch.dtype) -> dict[str, str]:
        layers = self.transformer.encoder.layers
        return layers[0].self_attn.kernels(device, dtype) if len(layers) else {}

    def learned_queries(self, batch: int, count: int | None = None) -> Queries:
        return Queries(self.query_embed.weight[:count].expand(batch, -1, -1))  # [B, Q, D]

    def decoder_inputs(self, memory: Memory, queries: Queries | None) -> tuple[Tensor, Tensor]:
        """Return content and position of the queries, [B, Q, D] each; content defaults to zeros."""
        queries = queries or self.learned_queries(memory.tokens.shape[0])
        content = torch.zeros_like(queries.position) if queries.content is None else queries.content
        return content, queries.position

    def predict(self, states: States) -> dict:
        layers = to_weight_dtype(states.layers, self.class_embed)  # [L, B, Q, D]
        with without_autocast(layers):
            logits = self.class_embed(layers)  # [L, B, Q, C]
            offsets = self.bbox_embed(layers)  # [L, B, Q, 4]
            return self.build_outputs(logits, self.boxes(offsets, states))

    def boxes(self, offsets: Tensor, states: States) -> Tensor:
        """Turn the box head's output [L, B, Q, 4] into boxes (cx, cy, w, h) in [0, 1]."""
        return offsets.sigmoid()


class DETR(SingleScaleDetector):
    """DETR's decoder on a `SingleScaleDetector`."""

    def decode(
        self, memory: Memory, queries: Queries | None = None, query_groups: int = 1
    ) -> States:
        content, position = self.decoder_inputs(memory, queries)
        return States(self.transformer.decoder(content, position, memory, query_groups))


def build(
    settings: Settings, backbone: BackboneWithPositions, classification: Classification
) -> DETR:
    """Build DETR."""
    layer = DecoderLayer(settings.hidden_dim, **layer_kwargs(settings))
    # This order fixes the random draws of the initial weights: layer, encoder, decoder.
    encoder = build_encoder(settings)
    decoder = Decoder(layer, settings.dec_layers, settings.hidden_dim)
    transformer = Transformer(encoder, decoder)
    return DETR(backbone, transformer, classification, **detector_kwargs(settings))
