"""Triton kernels of multi-scale deformable attention, forward and backward. `models.ms_deform_attn`
imports this file on first use.

A program computes BLOCK_Q neighboring queries of one head. In the encoder neighboring queries
sample neighboring pixels, most of which are then in the cache of their multiprocessor. All sums are
in float32. The forward pass saves nothing but its inputs: the backward pass reads the corners again
and adds to the gradient of value atomically, four channels at once from Hopper on.

These kernels were checked with Triton's interpreter and compiled for Ampere and Hopper, but have
not been run on a GPU yet: `tests/test_gpu.py` checks and `tools/benchmark.py kernels` times
them there.

Both read either locations and weights, or (FUSED) what a query's linear layer predicts: sampling
offsets in pixels around a reference point and logits of the weights, whose softmax is taken here.
Then no locations, weights or their gradients are written to memory, which in float32 are several
times what is read of `value`.

Shapes: B images, S tokens (pixels of all maps), Q queries, H heads, D channels per head, L levels
(maps), P points, N = H * L * P samples of a query. A tile is [BLOCK_Q, BLOCK_D], queries x
channels; a column is [BLOCK_Q, 1].
"""

import contextlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class Launch(NamedTuple):
    """How a kernel is divided: elements (queries x channels) and warps of a program."""

    elements: int
    warps: int


# To be tuned by `tools/benchmark.py kernels --sweep`, which changes them.
FORWARD, BACKWARD = Launch(512, 2), Launch(512, 2)
MAX_QUERIES = 64  # of a program, however narrow the heads


@triton.jit
def _level_shape(shapes, level, L: tl.constexpr):
    """Return height and width of a level.

    A tuple cannot be indexed with a run-time number, so select among all levels.
    """
    height, width = tl.cast(shapes[0], tl.float32), tl.cast(shapes[1], tl.float32)
    for i in tl.static_range(1, L):
        height = tl.where(level == i, shapes[2 * i], height)
        width = tl.where(level == i, shapes[2 * i + 1], width)
    return height, width


@triton.jit
def _program_block(Q, H: tl.constexpr, BLOCK_Q: tl.constexpr):
    """Return (image, head, first query) of this program.

    The head changes fastest: programs that run at the same time then add to different channels.
    """
    blocks = tl.cdiv(Q, BLOCK_Q)
    index = tl.program_id(0)
    return index // H // blocks, index % H, index // H % blocks * BLOCK_Q


@triton.jit
def _softmax_statistics(logits, rows, inside, STRIDE: tl.constexpr, COUNT: tl.constexpr):
    """Return (maximum, 1 / sum of exponentials) of each row's COUNT logits, float32 [BLOCK_Q].

    Logit by logit: a tile of all of them would have another layout than the rows.
    """
    at = logits + rows * STRIDE
    highest = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    for i in tl.static_range(1, COUNT):
        highest = tl.maximum(highest, tl.load(at + i, mask=inside, other=0.0).to(tl.float32))
    total = tl.zeros_like(highest)
    for i in tl.static_range(COUNT):
        total += tl.exp(tl.load(at + i, mask=inside, other=0.0).to(tl.float32) - highest)
    return highest, 1 / total


@triton.jit
def _reference_point(references, rows, level, inside, L: tl.constexpr, FUSED: tl.constexpr):
    """Return the reference point (x, y) of each row on a level, relative to the map; not FUSED: (0, 0)."""
    x = tl.zeros_like(rows).to(tl.float32)
    y = x
    if FUSED:
        at = references + rows * (2 * L) + 2 * level
        # Outside of the queries: far outside of the map, where nothing is read.
        x = tl.load(at, mask=inside, other=-9.0).to(tl.float32)
        y = tl.load(at + 1, mask=inside, other=-9.0).to(tl.float32)
    return x, y


@triton.jit
def _sample_position(locations, inside, height, width, reference, FUSED: tl.constexpr):
    """Return (left pixel, upper pixel, distance from it in x, in y) of a sampling point.

    All are float32 [BLOCK_Q], one point per row. locations: pointers to x of each row, y is next
    to it; relative to the map, if FUSED in pixels from the reference point.
    """
    missing: tl.constexpr = 0.0 if FUSED else -9.0
    x = tl.load(locations, mask=inside, other=missing).to(tl.float32)
    y = tl.load(locations + 1, mask=inside, other=missing).to(tl.float32)
    if FUSED:
        x, y = reference[0] * width + x - 0.5, reference[1] * height + y - 0.5
    else:
        x, y = x * width - 0.5, y * height - 0.5
    # Two pixels outside nothing is read. The clamp keeps coordinates in the range of an integer.
    x = tl.minimum(tl.maximum(x, -2.0), width + 1.0)
    y = tl.minimum(tl.maximum(y, -2.0), height + 1.0)
    left, upper = tl.floor(x), tl.floor(y)
    return left, upper, x - left, y - upper


@triton.jit
def _attention_weight(weights, inside, statistics, FUSED: tl.constexpr):
    """Return the weight of a point of each row, float32 [BLOCK_Q]. weights: pointers to it or its logit."""
    weight = tl.load(weights, mask=inside, other=0.0).to(tl.float32)
    if FUSED:
        weight = tl.exp(weight - statistics[0]) * statistics[1]
    return weight


@triton.jit
def _corners(left, upper, start, height, width, channels, D: tl.constexpr, PIXEL: tl.constexpr):
    """Return offsets and masks of the four corners, each a tile.

    The order is upper left, upper right, lower left, lower right. PIXEL is the stride of a pixel.
    """
    is_channel = channels < D
    in_left, in_right = (left >= 0) & (left < width), (left >= -1) & (left < width - 1)
    in_upper, in_lower = (upper >= 0) & (upper < height), (upper >= -1) & (upper < height - 1)
    pixel = start + upper.to(tl.int32) * width.to(tl.int32) + left.to(tl.int32)
    corner = pixel.to(tl.int64)[:, None] * PIXEL + channels  # int64: offsets may exceed 32 bits
    below = corner + width.to(tl.int64) * PIXEL
    offsets = corner, corner + PIXEL, below, below + PIXEL
    return offsets, (
        (in_upper & in_left)[:, None] & is_channel,
        (in_upper & in_right)[:, None] & is_channel,
        (in_lower & in_left)[:, None] & is_channel,
        (in_lower & in_right)[:, None] & is_channel,
    )


@triton.jit
def _load_corners(value, offsets, masks):
    """Load the four corners as float32 tiles, 0 outside of the map."""
    return (
        tl.load(value + offsets[0], mask=masks[0], other=0.0).to(tl.float32),
        tl.load(value + offsets[1], mask=masks[1], other=0.0).to(tl.float32),
        tl.load(value + offsets[2], mask=masks[2], other=0.0).to(tl.float32),
        tl.load(value + offsets[3], mask=masks[3], other=0.0).to(tl.float32),
    )


@triton.jit
def _corner_weights(weight, dx, dy):
    """Return attention weight times bilinear weight of each corner, as columns."""
    above, below = weight * (1 - dy), weight * dy
    return (
        (above * (1 - dx))[:, None],
        (above * dx)[:, None],
        (below * (1 - dx))[:, None],
        (below * dx)[:, None],
    )


@triton.jit
def _point_gradients(g00, g01, g10, g11, weight, dx, dy, height, width):
    """Return the gradients of x, y and the attention weight of a point, as columns.

    g00 .. g11: dot products of the output's gradient with the four corners.
    """
    # Width and height: the location is in [0, 1], the pixel coordinate is location * size - 0.5.
    # They are 1 if offsets are in pixels.
    grad_x = weight * width * ((1 - dy) * (g01 - g00) + dy * (g11 - g10))
    grad_y = weight * height * ((1 - dx) * (g10 - g00) + dx * (g11 - g01))
    grad_weight = (1 - dy) * ((1 - dx) * g00 + dx * g01) + dy * ((1 - dx) * g10 + dx * g11)
    return grad_x[:, None], grad_y[:, None], grad_weight[:, None]


@triton.jit
def _store_columns(target, rows, tile, columns, inside, COUNT: tl.constexpr):
    tl.store(
        target + rows[:, None] + columns,
        tile.to(target.dtype.element_ty),
        mask=inside[:, None] & (columns < COUNT),
    )


# S and Q differ between batches of images: without this, Triton would compile a kernel for each
# kind of number (1, divisible by 16, other).
@triton.jit(do_not_specialize=["S", "Q"])
def _forward_kernel(
    value,
    locations,
    weights,
    references,
    output,
    shapes,
    S,
    Q,
    H: tl.constexpr,
    D: tl.constexpr,
    L: tl.constexpr,
    P: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_D: tl.constexpr,
    FUSED: tl.constexpr,
):
    image, head, first = _program_block(Q, H, BLOCK_Q)
    rows = tl.arange(0, BLOCK_Q)
    channels = tl.arange(0, BLOCK_D)[None, :]
    inside = first + rows < Q
    # Index of this program's first row in [B, Q, H]; the next query is H further.
    item = (image.to(tl.int64) * Q + first) * H + head
    value += image.to(tl.int64) * S * (H * D) + head * D  # value is [B, S, H, D]
    # Offsets of x, y and logits are in one row of 3 N, locations and weights in two tensors.
    LOCATION_ROW: tl.constexpr = (3 if FUSED else 2) * H * L * P
    WEIGHT_ROW: tl.constexpr = (3 if FUSED else 1) * H * L * P
    query = image.to(tl.int64) * Q + first
    locations += query * LOCATION_ROW + head * (2 * L * P)
    weights += query * WEIGHT_ROW + head * (L * P)
    references += query * (2 * L)
    statistics = (0.0, 0.0)
    if FUSED:
        statistics = _softmax_statistics(weights, rows, inside, WEIGHT_ROW, L * P)

    result = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    start = 0  # first pixel of the level
    for level in range(L):
        height, width = _level_shape(shapes, level, L)
        reference = _reference_point(references, rows, level, inside, L, FUSED)
        for p in tl.static_range(P):
            point = level * P + p
            left, upper, dx, dy = _sample_position(
                locations + rows * LOCATION_ROW + 2 * point,
                inside,
                height,
                width,
                reference,
                FUSED,
            )
            at, on_map = _corners(left, upper, start, height, width, channels, D, H * D)
            v00, v01, v10, v11 = _load_corners(value, at, on_map)
            weight = _attention_weight(
                weights + rows * WEIGHT_ROW + point, inside, statistics, FUSED
            )
            w00, w01, w10, w11 = _corner_weights(weight, dx, dy)
            result += v00 * w00 + v01 * w01 + v10 * w10 + v11 * w11
        start += height.to(tl.int32) * width.to(tl.int32)

    output += item * D + rows[:, None] * (H * D) + channels
    tl.store(output, result.to(output.dtype.element_ty), mask=inside[:, None] & (channels < D))


@triton.jit(do_not_specialize=["S", "Q"])
def _backward_kernel(
    grad_output,
    value,
    locations,
    weights,
    references,
    output,
    grad_value,
    grad_locations,
    grad_weights,
    shapes,
    S,
    Q,
    H: tl.constexpr,
    D: tl.constexpr,
    L: tl.constexpr,
    P: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_D: tl.constexpr,
    FUSED: tl.constexpr,
):
    image, head, first = _program_block(Q, H, BLOCK_Q)
    rows = tl.arange(0, BLOCK_Q)
    # A thread takes 4 channels in every read: as many as the widest atomic addition has, so that no
    # tile moves between layouts.
    channels = tl.max_contiguous(tl.arange(0, BLOCK_D), 4)[None, :]
    inside = first + rows < Q
    item = (image.to(tl.int64) * Q + first) * H + head  # as in the forward kernel
    of_image = image.to(tl.int64) * S * (H * D) + head * D
    value, grad_value = value + of_image, grad_value + of_image
    grad_output += item * D + rows[:, None] * (H * D) + channels
    on_head = inside[:, None] & (channels < D)
    grad = tl.load(grad_output, mask=on_head, other=0.0).to(tl.float32)

    LOCATION_ROW: tl.constexpr = (3 if FUSED else 2) * H * L * P  # as in the forward kernel
    WEIGHT_ROW: tl.constexpr = (3 if FUSED else 1) * H * L * P
    query = image.to(tl.int64) * Q + first
    of_locations = query * LOCATION_ROW + head * (2 * L * P)
    of_weights = query * WEIGHT_ROW + head * (L * P)
    locations, grad_locations = locations + of_locations, grad_locations + of_locations
    weights, grad_weights = weights + of_weights, grad_weights + of_weights
    references += query * (2 * L)
    statistics = (0.0, 0.0)
    if FUSED:
        statistics = _softmax_statistics(weights, rows, inside, WEIGHT_ROW, L * P)
        # The mean gradient of the weights, which softmax subtracts: the sum over all points of
        # weight times gradient is the product of the output with its gradient.
        output += item * D + rows[:, None] * (H * D) + channels
        mean = tl.sum(grad * tl.load(output, mask=on_head, other=0.0).to(tl.float32), 1)

    start = 0
    for level in range(L):
        height, width = _level_shape(shapes, level, L)
        reference = _reference_point(references, rows, level, inside, L, FUSED)
        location_rows = rows * LOCATION_ROW + 2 * level * P  # first point of the level
        weight_rows = rows * WEIGHT_ROW + level * P
        # Gradients of all points of the level are collected in a tile and stored at once.
        location_tile = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)  # columns x_0, y_0, x_1, y_1, ...
        weight_tile = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)  # columns: points
        for p in tl.static_range(P):
            left, upper, dx, dy = _sample_position(
                locations + location_rows + 2 * p, inside, height, width, reference, FUSED
            )
            at, on_map = _corners(left, upper, start, height, width, channels, D, H * D)
            v00, v01, v10, v11 = _load_corners(value, at, on_map)
            g00 = tl.sum(grad * v00, 1)  # [BLOCK_Q]
            g01 = tl.sum(grad * v01, 1)
            g10 = tl.sum(grad * v10, 1)
            g11 = tl.sum(grad * v11, 1)
            weight = _attention_weight(weights + weight_rows + p, inside, statistics, FUSED)
            grad_x, grad_y, grad_weight = _point_gradients(
                g00,
                g01,
                g10,
                g11,
                weight,
                dx,
                dy,
                1.0 if FUSED else height,
                1.0 if FUSED else width,
            )
            if FUSED:
                grad_weight = weight[:, None] * (grad_weight - mean[:, None])
            location_tile = tl.where(channels == 2 * p, grad_x, location_tile)
            location_tile = tl.where(channels == 2 * p + 1, grad_y, location_tile)
            weight_tile = tl.where(channels == p, grad_weight, weight_tile)

            corner_weights = _corner_weights(weight, dx, dy)
            for corner in tl.static_range(4):
                # Atomic: other queries, of this program and of others, read the same pixels.
                tl.atomic_add(
                    grad_value + at[corner],
                    grad * corner_weights[corner],
                    mask=on_map[corner],
                    sem="relaxed",
                )
        _store_columns(grad_locations, location_rows, location_tile, channels, inside, 2 * P)
        _store_columns(grad_weights, weight_rows, weight_tile, channels, inside, P)
        start += height.to(tl.int32) * width.to(tl.int32)


def forward(value: Tensor, shapes: Sequence[int], locations: Tensor, weights: Tensor) -> Tensor:
    """Run the forward kernel on contiguous tensors, in the shapes of `models.ms_deform_attn`.

    shapes: (h, w, h, w, ...). Returns [B, Q, H * D] in the dtype of value.
    """
    output = value.new_empty(*locations.shape[:2], value.shape[2] * value.shape[3])  # [B, Q, H * D]
    tensors = (value, locations, weights, weights, output)
    Q, P = locations.shape[1], locations.shape[4]
    _launch(_forward_kernel, FORWARD, tensors, shapes, value, Q, P, fused=False, columns=1)
    return output


def backward(
    grad_output: Tensor, value: Tensor, shapes: Sequence[int], locations: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of value, locations and weights, each in the dtype of its tensor.

    The gradient of value is summed in float32.
    """
    # Zeros, since the kernel adds to it. Every entry of the other two is written.
    grad_value = torch.zeros_like(value, dtype=torch.float32)
    grad_locations, grad_weights = torch.empty_like(locations), torch.empty_like(weights)
    inputs = (grad_output, value, locations, weights, weights, grad_output)
    gradients = (grad_value, grad_locations, grad_weights)
    Q, P = locations.shape[1], locations.shape[4]
    tensors = (*inputs, *gradients)
    _launch(_backward_kernel, BACKWARD, tensors, shapes, value, Q, P, fused=False, columns=2 * P)
    return grad_value.to(value.dtype), grad_locations, grad_weights


def fused_forward(
    value: Tensor, shapes: Sequence[int], samples: Tensor, references: Tensor
) -> Tensor:
    """`forward` from samples [B, Q, 3 N] and references [B, Q, L, 2], see `ms_deform_attn_fused`."""
    output = value.new_empty(*samples.shape[:2], value.shape[2] * value.shape[3])  # [B, Q, H * D]
    tensors = (value, *_offsets_and_logits(samples), references, output)
    Q, P = samples.shape[1], _num_points(samples, value, shapes)
    _launch(_forward_kernel, FORWARD, tensors, shapes, value, Q, P, fused=True, columns=1)
    return output


def fused_backward(
    grad_output: Tensor,
    value: Tensor,
    shapes: Sequence[int],
    samples: Tensor,
    references: Tensor,
    output: Tensor,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of value and samples, each in the dtype of its tensor.

    output: of `fused_forward`.
    """
    grad_value = torch.zeros_like(value, dtype=torch.float32)  # as in `backward`
    grad_samples = torch.empty_like(samples)
    inputs = (grad_output, value, *_offsets_and_logits(samples), references, output)
    gradients = (grad_value, *_offsets_and_logits(grad_samples))
    Q, P = samples.shape[1], _num_points(samples, value, shapes)
    tensors = (*inputs, *gradients)
    _launch(_backward_kernel, BACKWARD, tensors, shapes, value, Q, P, fused=True, columns=2 * P)
    return grad_value.to(value.dtype), grad_samples


def _offsets_and_logits(samples: Tensor) -> tuple[Tensor, Tensor]:
    """Return views at the first offset and the first logit of the first row."""
    return samples, samples[..., samples.shape[-1] // 3 * 2 :]


def _num_points(samples: Tensor, value: Tensor, shapes: Sequence[int]) -> int:
    """Return P of samples [B, Q, 3 * H * L * P]; shapes has 2 L numbers."""
    return samples.shape[-1] // (3 * value.shape[2] * (len(shapes) // 2))


def _launch(
    kernel,
    launch: Launch,
    tensors: tuple[Tensor, ...],
    shapes: Sequence[int],
    value: Tensor,
    queries: int,
    points: int,
    *,
    fused: bool,
    columns: int,
) -> None:
    """Run a kernel with tiles wide enough for the channels of a head and for `columns` columns."""
    B, S, H, D = value.shape
    L = len(shapes) // 2
    block_d = triton.next_power_of_2(max(D, columns, 4))
    block_q = min(max(launch.elements // block_d, 1), MAX_QUERIES)
    programs = B * H * triton.cdiv(queries, block_q)
    if programs == 0:
        return

    # As floats: Triton recompiles a kernel for integers that are 1 or divisible by 16, never for
    # other values of a float.
    sizes = tuple(float(size) for size in shapes)
    with torch.cuda.device(value.device) if value.is_cuda else contextlib.nullcontext():
        kernel[(programs,)](
            *tensors,
            sizes,
            S,
            queries,
            H,
            D,
            L,
            points,
            block_q,
            block_d,
            fused,
            num_warps=launch.warps,
            num_stages=1,
            enable_fp_fusion=True,
        )
