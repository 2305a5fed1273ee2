"""Positional encodings: sine (Carion et al. 2020, appendix A.4), half-cell shifted sine, learned.

Shapes: B images, h x w size of a feature map, D model width.
"""

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from util.errors import UserError
from util.moved_names import moved_from

if not TYPE_CHECKING:  # a checker must not take every name for one of this module
    __getattr__ = moved_from("models.position_encoding")

TEMPERATURE = 10000.0


def sine_features(values: Tensor, num_features: int) -> Tensor:
    """Return sin and cos of `values` [...] at num_features / 2 frequencies, interleaved.

    values: in radians. Returns float32 [..., num_features].
    """
    index = torch.arange(num_features, dtype=torch.float32, device=values.device)
    # A sine and the cosine after it share one frequency.
    scale = TEMPERATURE ** (2 * torch.div(index, 2, rounding_mode="floor") / num_features)
    angles = values[..., None] / scale  # [..., num_features]
    interleaved = torch.stack([angles[..., 0::2].sin(), angles[..., 1::2].cos()], dim=-1)
    return interleaved.flatten(-2)  # [..., num_features / 2, 2] -> [..., num_features]


def sine_embed_points(points_xy: Tensor, dim: int) -> Tensor:
    """Embed points [..., 2] in [0, 1] sinusoidally (Meng et al. 2021, equation 5).

    Returns [..., dim] in the dtype of the points, y features before x features as in the encoding
    of feature maps.
    """
    scaled = points_xy * (2 * math.pi)
    features = [
        sine_features(scaled[..., axis], dim // 2) for axis in (1, 0)
    ]  # [..., dim / 2] each
    return torch.cat(features, dim=-1).to(points_xy.dtype)


class SinePositionEncoding(nn.Module):
    """Sinusoidal encoding of the position of each cell in the valid part of its image.

    `shift` is subtracted from the cell count, which starts at 1: 0 in DETR, UP-DETR, Conditional
    DETR and Siamese DETR (`sine`), 0.5 in Deformable DETR and DETReg (`sine_shifted`).
    """

    def __init__(self, dim: int, shift: float = 0.0, normalize: bool = True) -> None:
        super().__init__()
        self.num_features, self.shift, self.normalize = dim // 2, shift, normalize

    def forward(self, mask: Tensor) -> Tensor:
        """Encode every cell.

        mask: bool [B, h, w], True on padding. Returns [B, D, h, w], y features before x features,
        in float32 for every dtype of the model.
        """
        valid = ~mask
        y = valid.cumsum(1, dtype=torch.float32)  # [B, h, w], counts from 1
        x = valid.cumsum(2, dtype=torch.float32)  # [B, h, w]
        if self.normalize:
            # The last count is the size of the valid part, or 0 in a row or column of padding.
            eps, scale = 1e-6, 2 * math.pi
            y = (y - self.shift) / (y[:, -1:, :] + eps) * scale
            x = (x - self.shift) / (x[:, :, -1:] + eps) * scale
        encoding = torch.cat(
            [sine_features(y, self.num_features), sine_features(x, self.num_features)], dim=-1
        )  # [B, h, w, D]
        return encoding.permute(0, 3, 1, 2)  # [B, D, h, w]


class LearnedPositionEncoding(nn.Module):
    """Learned embeddings of 50 rows and 50 columns, column (x) features first."""

    MAX_CELLS = 50  # per side, as published

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.row_embed = nn.Embedding(self.MAX_CELLS, dim // 2)
        self.col_embed = nn.Embedding(self.MAX_CELLS, dim // 2)
        nn.init.uniform_(self.row_embed.weight)
        nn.init.uniform_(self.col_embed.weight)

    def forward(self, mask: Tensor) -> Tensor:
        """Encode every cell: bool [B, h, w] -> [B, D, h, w], equal for all images.

        Raises:
            UserError: a side of the map has more than 50 cells.
        """
        batch, height, width = mask.shape
        if max(height, width) > self.MAX_CELLS:
            raise UserError(
                f"learned positions reach {self.MAX_CELLS} cells a side, this map is {height} x {width}: "
                "use a smaller --image_size, no --dilation, or --position_embedding sine"
            )
        rows = self.row_embed.weight[:height]  # [h, D / 2]
        columns = self.col_embed.weight[:width]  # [w, D / 2]
        rows = rows[:, None].expand(-1, width, -1)  # [h, w, D / 2]
        columns = columns[None].expand(height, -1, -1)  # [h, w, D / 2]
        encoding = torch.cat([columns, rows], dim=-1)  # [h, w, D]
        return encoding.permute(2, 0, 1).expand(batch, -1, -1, -1)  # [B, D, h, w]


POSITION_ENCODINGS = {
    "sine": lambda dim: SinePositionEncoding(dim),
    "sine_shifted": lambda dim: SinePositionEncoding(dim, shift=0.5),
    "learned": LearnedPositionEncoding,
}
