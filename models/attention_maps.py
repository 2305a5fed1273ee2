"""Attention of a detector: weights of every layer and head, and where deformable attention samples.

    with record_attention(model) as attention:
        outputs = model(images)
    weights = attention.decoder_cross[-1]  # last layer, [B, H, Q, S]
    seen = attention.image(0, size_hw=(480, 640))  # the first image, in pixels
    heat = seen.decoder_map(query=7)  # [h, w]

It is a context manager rather than a flag of `forward`: outputs, criterion and export stay the same, it works around
any call (a detector, a pretext, `Predictor`), and without it attention costs nothing, because the fused kernels never
compute weights.

Shapes: B images, Q queries, S tokens (the cells of all maps, map by map, row by row), H heads, L levels (feature maps;
1 for DETR and Conditional DETR), P points, h x w cells of the part of a map that the image covers.
"""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from models.attention import ObservedAttention
from models.deformable_transformer import SampledAttention
from models.detector import Memory
from models.trainable import TrainableModel
from util.errors import UserError

# Names of the attention modules of a layer, as in published checkpoints.
ENCODER, DECODER_SELF, DECODER_CROSS = (
    ("self_attn",),
    ("self_attn",),
    ("cross_attn", "multihead_attn"),
)


@dataclass
class Attention:
    """The attention of one forward pass, a list item per layer; None for a layer that was not asked for.

    Weights are float32, without dropout and gradient, on the device of the model. Rows sum to 1; padding has 0.
    Deformable attention has a `SampledAttention` in place of a tensor.

    encoder: self-attention [B, H, S, S], from query token to key token.
    decoder_self: self-attention of the queries [B, H, Q, Q]; with G query groups [B * G, H, Q / G, Q / G].
    decoder_cross: attention of the queries to the tokens [B, H, Q, S].
    shapes: (height, width) of each padded map, in cells; their areas sum to S.
    valid_sizes_hw: int64 [B, L, 2], (height, width) of the part of each map that is not padding, in cells. Padding is
        at the bottom and the right.
    """

    encoder: list[Any] = field(default_factory=list)
    decoder_self: list[Any] = field(default_factory=list)
    decoder_cross: list[Any] = field(default_factory=list)
    shapes: list[tuple[int, int]] = field(default_factory=list)
    valid_sizes_hw: Tensor = field(default_factory=lambda: torch.zeros(0, 0, 2, dtype=torch.int64))

    def image(self, index: int, size_hw: tuple[int, int]) -> "ImageAttention":
        """Return the attention in one image of the batch, in pixels of an image of this (height, width).

        size_hw: of the original image, or of the resized one; cells are mapped in proportion.

        Raises:
            UserError: no forward pass was recorded.
        """
        if not self.shapes:
            raise UserError(
                "no attention was recorded: call the model inside of `with record_attention(model) as attention:`"
            )
        return ImageAttention(self, index, size_hw)

    def _add_memory(self, memory: Memory) -> None:
        self.shapes = [(int(height), int(width)) for height, width in memory.shapes]
        self.valid_sizes_hw = _valid_sizes_hw(memory)


def _valid_sizes_hw(memory: Memory) -> Tensor:
    """Return (height, width) of the part of each map that is not padding, int64 [B, L, 2]."""
    batch, device = len(memory.tokens), memory.tokens.device
    if memory.padding_mask is None:
        return torch.tensor(memory.shapes, device=device).expand(batch, -1, -1)
    areas = [height * width for height, width in memory.shapes]
    levels = memory.padding_mask.split(areas, dim=1)  # L x [B, h * w]
    sizes = []
    for mask, shape in zip(levels, memory.shapes, strict=True):
        valid = ~mask.unflatten(1, shape)  # [B, h, w]
        sizes.append(torch.stack([valid.any(2).sum(1), valid.any(1).sum(1)], -1))  # [B, 2]
    return torch.stack(sizes, 1)


@contextmanager
def record_attention(
    model: TrainableModel, layers: Iterable[int] | None = None
) -> Iterator[Attention]:
    """Record the attention of a detector while it runs inside of this context; of several calls the last one counts.

    The outputs of the model do not change. The weights of an encoder layer take 4 B H S² bytes: 35 MB for an image of
    800 x 1333 pixels (S = 1050, 8 heads), 560 MB with `--dilation`.

    Args:
        model: a detector, or a pretext around one.
        layers: the layers to record, of encoder and decoder; negative numbers count from the last. Default: all.

    Raises:
        UserError: the model is compiled, has no such layer, or has other attention modules.
        ValueError: its attention is already being recorded.
    """
    transformer = _find_transformer(model)
    attention = Attention()
    parts = [
        (attention.encoder, transformer.encoder, ENCODER),
        (attention.decoder_self, transformer.decoder, DECODER_SELF),
        (attention.decoder_cross, transformer.decoder, DECODER_CROSS),
    ]
    chosen = None if layers is None else list(layers)

    with ExitStack() as stack:
        for target, stage, names in parts:
            modules = [_attention_module(layer, names) for layer in stage.layers]
            target.extend([None] * len(modules))
            for i in _layer_indices(len(modules), chosen):
                modules[i].record = _setter(target, i)
                stack.callback(setattr, modules[i], "record", None)
        hook = transformer.decoder.register_forward_pre_hook(
            lambda _decoder, inputs: attention._add_memory(_memory(inputs))
        )
        stack.callback(hook.remove)
        yield attention


def _setter(target: list, i: int) -> Any:
    def record(value: Any) -> None:
        target[i] = value

    return record


def _find_transformer(model: Any) -> Any:
    """Return the module with the stages `encoder` and `decoder`.

    Raises:
        UserError: see `record_attention`.
    """
    if hasattr(model, "_orig_mod"):  # torch.compile(model)
        raise UserError(
            "attention of a compiled model can't be recorded: use the model before torch.compile"
        )
    detector = model.base_detector()
    transformer = getattr(getattr(detector, "detr", detector), "transformer", None)  # mask head
    stages = [getattr(transformer, name, None) for name in ("encoder", "decoder")]
    if not all(hasattr(stage, "layers") for stage in stages):
        raise UserError(
            f"{type(detector).__name__} has no transformer.encoder.layers and transformer.decoder.layers: its "
            "attention can't be recorded"
        )
    if any(getattr(stage, "_compiled_call_impl", None) is not None for stage in stages):
        raise UserError(
            "attention of a compiled detector can't be recorded: build it without --compile, a Predictor with "
            "compile=False"
        )
    return transformer


def _attention_module(layer: nn.Module, names: tuple[str, ...]) -> ObservedAttention:
    module = next((getattr(layer, name) for name in names if hasattr(layer, name)), None)
    if not isinstance(module, ObservedAttention):
        raise UserError(
            f"{type(layer).__name__}.{names[0]} is no models.attention.ObservedAttention: its attention can't be "
            "recorded"
        )
    if module.record is not None:
        raise ValueError("the attention of this model is already being recorded")
    return module


def _layer_indices(num_layers: int, chosen: list[int] | None) -> list[int]:
    if chosen is None:
        return list(range(num_layers))
    wrong = [i for i in chosen if not -num_layers <= i < num_layers]
    if wrong:
        raise UserError(
            f"layer {wrong[0]}: this model has {num_layers}; give 0 to {num_layers - 1}, or -1 for the last"
        )
    return sorted({i % num_layers for i in chosen})


def _memory(inputs: tuple) -> Memory:
    return next(value for value in inputs if isinstance(value, Memory))


@dataclass(frozen=True)
class Samples:
    """What one query of deformable attention reads, in pixels of the image.

    reference_xy: what its offsets start from, per level: points (x, y) [L, 2] or boxes (cx, cy, w, h) [L, 4].
    points_xy: the sampling points, [H, L, P, 2]; may be outside of the image.
    weights: [H, L, P]; those of a head sum to 1.
    """

    reference_xy: Tensor
    points_xy: Tensor
    weights: Tensor


class ImageAttention:
    """Attention in one image of a batch, in its pixels. Maps are without padding: they cover the image.

    A cell covers an equal part of the image, as the model's positional encoding and reference points have it. `head`
    is one head, None averages over all. Maps and points are on the CPU.

    Args:
        attention: of the batch.
        index: of the image in the batch.
        size_hw: height and width of the image, in pixels.
    """

    def __init__(self, attention: Attention, index: int, size_hw: tuple[int, int]) -> None:
        self.attention, self.index, self.size_hw = attention, index, size_hw

    @property
    def is_deformable(self) -> bool:
        """Whether queries have sampling points in place of maps."""
        layers = [*self.attention.encoder, *self.attention.decoder_cross]
        return any(isinstance(layer, SampledAttention) for layer in layers)

    def map_size(self, level: int = 0) -> tuple[int, int]:
        """Return (height, width) of the part of a map that the image covers, in cells."""
        height, width = self.attention.valid_sizes_hw[self.index, level].tolist()
        return height, width

    def cell(self, x: float, y: float, level: int = 0) -> tuple[int, int]:
        """Return (row, column) of the cell at a pixel.

        Raises:
            UserError: the pixel is outside of the image.
        """
        height, width = self.size_hw
        if not (0 <= x < width and 0 <= y < height):
            raise UserError(
                f"point ({x:g}, {y:g}) is outside of the image: x is in 0..{width - 1}, y in 0..{height - 1}"
            )
        rows, columns = self.map_size(level)
        return int(y * rows / height), int(x * columns / width)

    def encoder_map(
        self, x: float, y: float, layer: int = -1, head: int | None = None, level: int = 0
    ) -> Tensor:
        """Return what the token at a pixel attends to in the encoder: float32 [h, w].

        Raises:
            UserError: deformable attention, a layer that was not recorded, or a point outside of the image.
        """
        return self._map(self.attention.encoder, layer, self._token(x, y, level), head)

    def decoder_map(self, query: int, layer: int = -1, head: int | None = None) -> Tensor:
        """Return what an object query attends to in the decoder: float32 [h, w].

        Raises:
            UserError: deformable attention, or a layer that was not recorded.
        """
        return self._map(self.attention.decoder_cross, layer, query, head)

    def encoder_samples(self, x: float, y: float, layer: int = -1, level: int = 0) -> Samples:
        """Return where the token of a level at a pixel samples in the encoder.

        Raises:
            UserError: no deformable attention, a layer that was not recorded, or a point outside of the image.
        """
        return self._samples(self.attention.encoder, layer, self._token(x, y, level))

    def decoder_samples(self, query: int, layer: int = -1) -> Samples:
        """Return where an object query samples in the decoder.

        Raises:
            UserError: no deformable attention, or a layer that was not recorded.
        """
        return self._samples(self.attention.decoder_cross, layer, query)

    def _token(self, x: float, y: float, level: int) -> int:
        row, column = self.cell(x, y, level)
        before = sum(height * width for height, width in self.attention.shapes[:level])
        return before + row * self.attention.shapes[level][1] + column

    def _map(self, layers: list, layer: int, row: int, head: int | None) -> Tensor:
        weights = _recorded(layers, layer)
        if isinstance(weights, SampledAttention):
            raise UserError(
                "deformable attention has sampling points, no weights of all cells: use decoder_samples and "
                "encoder_samples, or tools/visualize.py sampling"
            )
        of_heads = weights[self.index, :, row]  # [H, S]
        of_row = of_heads.mean(0) if head is None else of_heads[head]
        height, width = self.map_size()
        return of_row.unflatten(0, self.attention.shapes[0])[:height, :width].cpu()

    def _samples(self, layers: list, layer: int, row: int) -> Samples:
        sampled = _recorded(layers, layer)
        if not isinstance(sampled, SampledAttention):
            raise UserError(
                "this detector attends to all cells and has no sampling points: use decoder_map and encoder_map, or "
                "tools/visualize.py attention"
            )
        references, points, weights = (
            x[self.index, row].cpu()
            for x in (sampled.references, sampled.locations, sampled.weights)
        )
        # From the padded map to the image.
        shapes_hw = torch.tensor(self.attention.shapes)  # [L, 2]
        ratios_hw = self.attention.valid_sizes_hw[self.index].cpu() / shapes_hw  # [L, 2]
        scale = torch.tensor(self.size_hw).flip(0) / ratios_hw.flip(1)  # [L, 2], (x, y)
        return Samples(
            references * scale.repeat(1, references.shape[-1] // 2),
            points * scale[:, None],
            weights,
        )


def _recorded(layers: list, layer: int) -> Tensor | SampledAttention:
    _layer_indices(len(layers), [layer])
    value = layers[layer]
    if value is None:
        raise UserError(f"layer {layer} was not recorded: add it to `layers`, or omit `layers`")
    return value
