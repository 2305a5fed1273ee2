"""Blocks that detectors share: feed-forward, encoder, heads' MLP. Batch first: tokens are [B, S, D]."""

import copy
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from models.attention import MultiheadAttention


def clones(layer: nn.Module, count: int) -> nn.ModuleList:
    """`count` copies that start equal, as published: biases stay so, matrices are drawn again by `reset_matrices`."""
    return nn.ModuleList(copy.deepcopy(layer) for _ in range(count))


def reset_matrices(module: nn.Module) -> None:
    """Xavier-uniform for every parameter of two or more dimensions."""
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


class Block(nn.Module):
    """What encoder and decoder layers share: residual dropout, the feed-forward network and `num_norms` layer norms.

    Subclasses make their attention first and then call `add_feed_forward`: the order of the parameters is the published
    one, on which the state of a published optimizer depends.
    """

    norm1: nn.LayerNorm
    norm2: nn.LayerNorm
    norm3: nn.LayerNorm

    def __init__(self, dropout: float, pre_norm: bool) -> None:
        super().__init__()
        self.drop, self.pre_norm = nn.Dropout(dropout), pre_norm

    def add_feed_forward(self, dim: int, dim_feedforward: int, num_norms: int) -> None:
        self.linear1 = nn.Linear(dim, dim_feedforward)
        self.linear2 = nn.Linear(dim_feedforward, dim)
        for i in range(num_norms):
            self.add_module(f"norm{i + 1}", nn.LayerNorm(dim))

    def feed_forward(self, x: Tensor) -> Tensor:
        return self.linear2(self.drop(functional.relu(self.linear1(x))))

    def residual(self, x: Tensor, norm: nn.LayerNorm, sublayer) -> Tensor:
        """`x` plus what `sublayer` makes of it, with the norm behind the sum, or before the sublayer in a pre-norm
        model.
        """
        if self.pre_norm:
            return x + self.drop(sublayer(norm(x)))
        return norm(x + self.drop(sublayer(x)))


class EncoderLayer(Block):
    def __init__(
        self, dim: int, *, num_heads: int, dim_feedforward: int, dropout: float, pre_norm: bool
    ) -> None:
        super().__init__(dropout, pre_norm)
        self.self_attn = MultiheadAttention(dim, num_heads, dropout)
        self.add_feed_forward(dim, dim_feedforward, num_norms=2)

    def forward(self, x: Tensor, position: Tensor, padding_mask: Tensor | None) -> Tensor:
        """x, position [B, S, D]; padding_mask bool [B, S] or None."""

        def attention(y: Tensor) -> Tensor:
            return self.self_attn(y + position, y + position, y, padding_mask)

        x = self.residual(x, self.norm1, attention)
        return self.residual(x, self.norm2, self.feed_forward)


class Encoder(nn.Module):
    """A stack of encoder layers. Its final norm exists only in pre-norm models, as published."""

    def __init__(self, layer: EncoderLayer, num_layers: int, dim: int) -> None:
        super().__init__()
        self.layers: Any = clones(layer, num_layers)
        self.norm = nn.LayerNorm(dim) if layer.pre_norm else None

    def forward(self, x: Tensor, position: Tensor, padding_mask: Tensor | None) -> Tensor:
        for layer in self.layers:
            x = layer(x, position, padding_mask)
        return x if self.norm is None else self.norm(x)
