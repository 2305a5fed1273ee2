"""DETR (Carion et al., ECCV 2020), post-norm and pre-norm."""

from typing import Any, cast

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
    as_weights,
    flatten_map,
    full_precision,
    under_autocast,
    without_autocast,
)
from models.transformer import MLP, Block, Encoder, EncoderLayer, clones, reset_matrices
from util.nested_tensor import NestedTensor
from util.settings import Settings


class DecoderLayer(Block):
    def __init__(
        self, dim: int, *, num_heads: int, dim_feedforward: int, dropout: float, pre_norm: bool
    ) -> None:
        super().__init__(dropout, pre_norm)
        self.self_attn = MultiheadAttention(dim, num_heads, dropout)
        self.multihead_attn = MultiheadAttention(dim, num_heads, dropout)
        self.add_feed_forward(dim, dim_feedforward, num_norms=3)

    def forward(
        self, x: Tensor, query_position: Tensor, memory: Memory, query_groups: int
    ) -> Tensor:
        """x, query_position [B, Q, D] -> [B, Q, D]"""

        def self_attention(y: Tensor) -> Tensor:
            return self.self_attn(
                y + query_position, y + query_position, y, query_groups=query_groups
            )

        def cross_attention(y: Tensor) -> Tensor:
            key = memory.tokens + memory.position
            return self.multihead_attn(y + query_position, key, memory.tokens, memory.padding_mask)

        x = self.residual(x, self.norm1, self_attention)
        x = self.residual(x, self.norm2, cross_attention)
        return self.residual(x, self.norm3, self.feed_forward)


class Decoder(nn.Module):
    """A stack of decoder layers; every layer's output passes the one shared norm, the next layer sees it without."""

    def __init__(self, layer: DecoderLayer, num_layers: int, dim: int) -> None:
        super().__init__()
        self.layers: Any = clones(layer, num_layers)
        self.norm = nn.LayerNorm(dim)

    def forward(
        self, x: Tensor, query_position: Tensor, memory: Memory, query_groups: int
    ) -> Tensor:
        """[B, Q, D] -> [L, B, Q, D]"""
        outputs = []
        for layer in self.layers:
            x = layer(x, query_position, memory, query_groups)
            outputs.append(self.norm(x))
        return torch.stack(outputs)


class Transformer(nn.Module):
    def __init__(self, encoder: Encoder, decoder: nn.Module) -> None:
        super().__init__()
        self.encoder, self.decoder = encoder, decoder
        reset_matrices(self)


def layer_sizes(settings: Settings) -> dict[str, Any]:
    """What the flags say of an encoder or decoder layer, beside its width."""
    return {
        "num_heads": settings.nheads,
        "dim_feedforward": settings.dim_feedforward,
        "dropout": settings.dropout,
        "pre_norm": settings.pre_norm,
    }


def detector_sizes(settings: Settings) -> dict[str, Any]:
    """What the flags say of a `SingleScaleDetector`."""
    return {
        "num_queries": settings.num_queries,
        "hidden_dim": settings.hidden_dim,
        "aux_loss": settings.aux_loss,
    }


def build_encoder(settings: Settings) -> Encoder:
    layer = EncoderLayer(settings.hidden_dim, **layer_sizes(settings))
    return Encoder(layer, settings.enc_layers, settings.hidden_dim)


class SingleScaleDetector(Detector):
    """A detector on the last map of the backbone, with DETR's encoder, one table of queries, and heads shared by all
    layers.

    Attributes stand in the published order, on which the state of a published optimizer depends.
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
        self.input_proj = nn.Conv2d(
            cast(Backbone, backbone[0]).num_channels[-1], hidden_dim, kernel_size=1
        )
        self.backbone = backbone
        self.num_queries, self.hidden_dim, self.aux_loss = num_queries, hidden_dim, aux_loss
        self.classification = classification
        classification.init_head(self.class_embed)

    def encode(self, samples: NestedTensor) -> Memory:
        features = self.backbone(samples)
        last = features[-1]
        position = flatten_map(last.position)
        padding_mask = last.mask.flatten(1) if samples.padded else None
        tokens = flatten_map(self.input_proj(last.tensor))
        if under_autocast(
            tokens
        ):  # post-norm layers widen their sums at once, pre-norm ones never would
            tokens = full_precision(tokens)
        tokens = self.transformer.encoder(tokens, position, padding_mask)
        return Memory(
            features,
            tokens=tokens,
            position=position,
            padding_mask=padding_mask,
            shapes=[tuple(last.tensor.shape[-2:])],
        )

    def kernels(self, device: torch.device, dtype: torch.dtype) -> dict[str, str]:
        layers = self.transformer.encoder.layers
        return layers[0].self_attn.kernels(device, dtype) if len(layers) else {}

    def learned_queries(self, batch: int, count: int | None = None) -> Queries:
        return Queries(self.query_embed.weight[:count].expand(batch, -1, -1))

    def decoder_inputs(self, memory: Memory, queries: Queries | None) -> tuple[Tensor, Tensor]:
        """Content and position of the queries, [B, Q, D] each; the content starts from zeros unless it is given."""
        queries = queries or self.learned_queries(memory.tokens.shape[0])
        content = torch.zeros_like(queries.position) if queries.content is None else queries.content
        return content, queries.position

    def predict(self, states: States) -> dict:
        layers = as_weights(states.layers, self.class_embed)
        with without_autocast(layers):
            logits, offsets = self.class_embed(layers), self.bbox_embed(layers)
            return self.layer_outputs(logits, self.boxes(offsets, states))

    def boxes(self, offsets: Tensor, states: States) -> Tensor:
        """Output of the box head [L, B, Q, 4] -> boxes (cx, cy, w, h) in [0, 1]."""
        return offsets.sigmoid()


class DETR(SingleScaleDetector):
    def decode(
        self, memory: Memory, queries: Queries | None = None, query_groups: int = 1
    ) -> States:
        content, position = self.decoder_inputs(memory, queries)
        return States(self.transformer.decoder(content, position, memory, query_groups))


def build(
    settings: Settings, backbone: BackboneWithPositions, classification: Classification
) -> DETR:
    layer = DecoderLayer(settings.hidden_dim, **layer_sizes(settings))
    transformer = Transformer(
        build_encoder(settings), Decoder(layer, settings.dec_layers, settings.hidden_dim)
    )
    return DETR(backbone, transformer, classification, **detector_sizes(settings))
