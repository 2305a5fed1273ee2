"""Positional encodings of maps: sine (Carion et al. 2020, appendix A.4), sine with a half-cell shift, and learned."""

import math

import torch
from torch import Tensor, nn

from util.errors import UserError

TEMPERATURE = 10000.0


def sine_features(values: Tensor, num_features: int) -> Tensor:
    """sin and cos of `values` [...] (radians) at `num_features` / 2 frequencies, interleaved: [..., num_features],
    float32.
    """
    index = torch.arange(num_features, dtype=torch.float32, device=values.device)
    frequency = TEMPERATURE ** (2 * torch.div(index, 2, rounding_mode="floor") / num_features)
    angles = values[..., None] / frequency
    return torch.stack([angles[..., 0::2].sin(), angles[..., 1::2].cos()], dim=-1).flatten(-2)


def sine_embed_points(points_xy: Tensor, dim: int) -> Tensor:
    """Sine code of points [..., 2] in [0, 1], y features first: [..., dim] in their dtype (Meng et al. 2021, equation
    5).
    """
    scaled = points_xy * (2 * math.pi)
    features = [sine_features(scaled[..., axis], dim // 2) for axis in (1, 0)]
    return torch.cat(features, dim=-1).to(points_xy.dtype)


class SinePositionEncoding(nn.Module):
    """Code of a cell from the share of valid cells above and left of it.

    `shift` is subtracted from the count: 0 in DETR, UP-DETR, Conditional and Siamese DETR (`sine`), 0.5 in Deformable
    DETR and DETReg (`sine_shifted`). Always computed in float32, whatever the model's type.
    """

    def __init__(self, dim: int, shift: float = 0.0, normalize: bool = True) -> None:
        super().__init__()
        self.num_features, self.shift, self.normalize = dim // 2, shift, normalize

    def forward(self, mask: Tensor) -> Tensor:
        """mask: bool [B, h, w], True on padding. Returns float32 [B, dim, h, w], y features before x features."""
        valid = ~mask
        y, x = valid.cumsum(1, dtype=torch.float32), valid.cumsum(2, dtype=torch.float32)
        if self.normalize:
            eps, scale = 1e-6, 2 * math.pi
            y = (y - self.shift) / (y[:, -1:, :] + eps) * scale
            x = (x - self.shift) / (x[:, :, -1:] + eps) * scale
        code = torch.cat(
            [sine_features(y, self.num_features), sine_features(x, self.num_features)], dim=-1
        )
        return code.permute(0, 3, 1, 2)


class LearnedPositionEncoding(nn.Module):
    """One learned row and column code of 50 each; column (x) features first. Maps of more than 50 cells a side are
    refused.
    """

    MAX_CELLS = 50

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.row_embed = nn.Embedding(self.MAX_CELLS, dim // 2)
        self.col_embed = nn.Embedding(self.MAX_CELLS, dim // 2)
        nn.init.uniform_(self.row_embed.weight)
        nn.init.uniform_(self.col_embed.weight)

    def forward(self, mask: Tensor) -> Tensor:
        """mask: bool [B, h, w]; returns [B, dim, h, w], equal for all images."""
        batch, height, width = mask.shape
        if max(height, width) > self.MAX_CELLS:
            raise UserError(
                f"learned positions reach {self.MAX_CELLS} cells a side, this map is {height} x {width}: "
                "use a smaller --image_size, no --dilation, or --position_embedding sine"
            )
        rows, columns = self.row_embed.weight[:height], self.col_embed.weight[:width]
        code = torch.cat(
            [columns[None].expand(height, -1, -1), rows[:, None].expand(-1, width, -1)], dim=-1
        )
        return code.permute(2, 0, 1).expand(batch, -1, -1, -1)


POSITION_ENCODINGS = {
    "sine": lambda dim: SinePositionEncoding(dim),
    "sine_shifted": lambda dim: SinePositionEncoding(dim, shift=0.5),
    "learned": LearnedPositionEncoding,
}
