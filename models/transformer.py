"""Transformer layers that detectors share: feed-forward, encoder, and the MLP of the heads.

Tensors are batch first. Shapes: B images, S tokens, D model width.
"""

import copy
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.nn import functional

from models.attention import MultiheadAttention
from util.moved_names import moved_from

if not TYPE_CHECKING:  # a checker must not take every name for one of this module
    __getattr__ = moved_from("models.transformer")


def get_clones(layer: nn.Module, count: int) -> nn.ModuleList:
    """Return `count` deep copies of a layer.

    As published, the copies start with equal biases; `xavier_init_matrices` draws the matrices
    again.
    """
    return nn.ModuleList(copy.deepcopy(layer) for _ in range(count))


def xavier_init_matrices(module: nn.Module) -> None:
    """Initialize every parameter of two or more dimensions by Xavier uniform."""
    for parameter in module.parameters():
        if parameter.dim() > 1:
            nn.init.xavier_uniform_(parameter)


class MLP(nn.Module):
    """Linear layers with ReLU between them."""

    def __init__(self, dim_in: int, dim_hidden: int, dim_out: int, num_layers: int) -> None:
        super().__init__()
        dims = [dim_in] + [dim_hidden] * (num_layers - 1) + [dim_out]
        self.layers: Any = nn.ModuleList(
            nn.Linear(a, b) for a, b in zip(dims[:-1], dims[1:], strict=True)
        )

    def forward(self, x: Tensor) -> Tensor:
        """[..., dim_in] -> [..., dim_out]"""
        for layer in self.layers[:-1]:
            x = functional.relu(layer(x))
        return self.layers[-1](x)


class TransformerLayer(nn.Module):
    """Base of encoder and decoder layers: residual connections, feed-forward network, layer norms.

    Subclasses create their attention first and then call `add_feed_forward`. This is the published
    parameter order: a published optimizer state addresses parameters by index.
    """

    norm1: nn.LayerNorm
    norm2: nn.LayerNorm
    norm3: nn.LayerNorm

    def __init__(self, dropout: float, pre_norm: bool) -> None:
        super().__init__()
        self.drop, self.pre_norm = nn.Dropout(dropout), pre_norm

    def add_feed_forward(self, dim: int, dim_feedforward: int, num_norms: int) -> None:
        """Add `linear1`, `linear2` and `norm1` .. `norm{num_norms}`."""
        self.linear1 = nn.Linear(dim, dim_feedforward)
        self.linear2 = nn.Linear(dim_feedforward, dim)
        for i in range(num_norms):
            self.add_module(f"norm{i + 1}", nn.LayerNorm(dim))

    def feed_forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D], with dropout after the ReLU."""
        return self.linear2(self.drop(functional.relu(self.linear1(x))))

    def residual(self, x: Tensor, norm: nn.LayerNorm, sublayer) -> Tensor:
        """Add `sublayer(x)` to `x`; the norm is before the sublayer, or post-norm after the sum."""
        if self.pre_norm:
            return x + self.drop(sublayer(norm(x)))
        return norm(x + self.drop(sublayer(x)))


class EncoderLayer(TransformerLayer):
    """Self-attention and feed-forward."""

    def __init__(
        self, dim: int, *, num_heads: int, dim_feedforward: int, dropout: float, pre_norm: bool
    ) -> None:
        super().__init__(dropout, pre_norm)
        self.self_attn = MultiheadAttention(dim, num_heads, dropout)
        self.add_feed_forward(dim, dim_feedforward, num_norms=2)

    def forward(self, x: Tensor, position: Tensor, padding_mask: Tensor | None) -> Tensor:
        """Encode one layer: x, position [B, S, D], padding_mask bool [B, S] -> [B, S, D]."""

        def attention(y: Tensor) -> Tensor:
            query = y + position  # [B, S, D], also the key
            return self.self_attn(query, query, y, padding_mask)

        x = self.residual(x, self.norm1, attention)
        return self.residual(x, self.norm2, self.feed_forward)


class Encoder(nn.Module):
    """A stack of encoder layers. As published, only a pre-norm model has a final norm."""

    def __init__(self, layer: EncoderLayer, num_layers: int, dim: int) -> None:
        super().__init__()
        self.layers: Any = get_clones(layer, num_layers)
        self.norm = nn.LayerNorm(dim) if layer.pre_norm else None

    def forward(self, x: Tensor, position: Tensor, padding_mask: Tensor | None) -> Tensor:
        """Encode x, position [B, S, D], padding_mask bool [B, S] or None -> [B, S, D]."""
        for layer in self.layers:
            x = layer(x, position, padding_mask)
        return x if self.norm is None else self.norm(x)
