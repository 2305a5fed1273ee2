"""Triton kernels of multi-scale deformable attention, forward and backward. `models.ms_deform_attn` imports this file
when they are used.

A program computes BLOCK_Q neighbouring queries of one head. In the encoder neighbours look at neighbouring pixels,
which are then mostly in the cache of their multiprocessor. All sums are in float32. The forward pass keeps nothing but
its inputs; the backward pass reads the corners again, and adds to the gradient of value with atomic additions, four
channels in one from Hopper on.

These kernels were checked with Triton's interpreter and compiled for Ampere and Hopper, but have not been run on a GPU
yet: `tests/test_gpu.py` checks and `tools/benchmark.py ms_deform_attn` times them there.
"""

import contextlib
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

ELEMENTS = 512  # of the tile (queries x channels) of a program
WARPS = 2
MOST_QUERIES = 64  # a program takes at most, however narrow the heads


@triton.jit
def _level_shape(shapes, level, L: tl.constexpr):
    """Height and width of a level. A tuple can't be indexed with a number that is known only at run time."""
    height, width = tl.cast(shapes[0], tl.float32), tl.cast(shapes[1], tl.float32)
    for i in tl.static_range(1, L):
        height = tl.where(level == i, shapes[2 * i], height)
        width = tl.where(level == i, shapes[2 * i + 1], width)
    return height, width


@triton.jit
def _program(Q, H: tl.constexpr, BLOCK_Q: tl.constexpr):
    """(image, head, first query) of this program. Heads run fastest: programs at work together then add to different
    channels.
    """
    blocks = tl.cdiv(Q, BLOCK_Q)
    index = tl.program_id(0)
    return index // H // blocks, index % H, index // H % blocks * BLOCK_Q


@triton.jit
def _sample_position(locations, point, inside, height, width):
    """(left pixel, upper pixel, distance from it in x, in y) of a sampling point in each row of the tile, float32."""
    x = tl.load(locations + 2 * point, mask=inside, other=-9.0).to(tl.float32) * width - 0.5
    y = tl.load(locations + 2 * point + 1, mask=inside, other=-9.0).to(tl.float32) * height - 0.5
    # Two pixels outside nothing is read any more; clamped, no number is too large for an integer.
    x = tl.minimum(tl.maximum(x, -2.0), width + 1.0)
    y = tl.minimum(tl.maximum(y, -2.0), height + 1.0)
    left, upper = tl.floor(x), tl.floor(y)
    return left, upper, x - left, y - upper


@triton.jit
def _corners(left, upper, start, height, width, channels, D: tl.constexpr, PIXEL: tl.constexpr):
    """Offsets and masks of the corners upper left, upper right, lower left, lower right, each for the tile; pixels are
    PIXEL apart.
    """
    is_channel = channels < D
    in_left, in_right = (left >= 0) & (left < width), (left >= -1) & (left < width - 1)
    in_upper, in_lower = (upper >= 0) & (upper < height), (upper >= -1) & (upper < height - 1)
    pixel = start + upper.to(tl.int32) * width.to(tl.int32) + left.to(tl.int32)
    corner = pixel.to(tl.int64)[:, None] * PIXEL + channels
    below = corner + width.to(tl.int64) * PIXEL
    offsets = corner, corner + PIXEL, below, below + PIXEL
    return offsets, (
        (in_upper & in_left)[:, None] & is_channel,
        (in_upper & in_right)[:, None] & is_channel,
        (in_lower & in_left)[:, None] & is_channel,
        (in_lower & in_right)[:, None] & is_channel,
    )


@triton.jit
def _read(value, offsets, masks):
    """The four corners in float32, 0 outside the map."""
    return (
        tl.load(value + offsets[0], mask=masks[0], other=0.0).to(tl.float32),
        tl.load(value + offsets[1], mask=masks[1], other=0.0).to(tl.float32),
        tl.load(value + offsets[2], mask=masks[2], other=0.0).to(tl.float32),
        tl.load(value + offsets[3], mask=masks[3], other=0.0).to(tl.float32),
    )


@triton.jit
def _corner_shares(weight, dx, dy):
    """Weight of each corner in the sum, as a column."""
    above, below = weight * (1 - dy), weight * dy
    return (
        (above * (1 - dx))[:, None],
        (above * dx)[:, None],
        (below * (1 - dx))[:, None],
        (below * dx)[:, None],
    )


@triton.jit
def _derivatives(g00, g01, g10, g11, weight, dx, dy, height, width):
    """By x, by y and by the weight, as columns, from the products of the output's gradient with the four corners."""
    by_x = weight * width * ((1 - dy) * (g01 - g00) + dy * (g11 - g10))
    by_y = weight * height * ((1 - dx) * (g10 - g00) + dx * (g11 - g01))
    by_weight = (1 - dy) * ((1 - dx) * g00 + dx * g01) + dy * ((1 - dx) * g10 + dx * g11)
    return by_x[:, None], by_y[:, None], by_weight[:, None]


@triton.jit
def _store_columns(target, rows, tile, columns, inside, COUNT: tl.constexpr):
    tl.store(
        target + rows[:, None] + columns,
        tile.to(target.dtype.element_ty),
        mask=inside[:, None] & (columns < COUNT),
    )


@triton.jit(do_not_specialize=["S", "Q"])
def _forward_kernel(
    value,
    locations,
    weights,
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
):
    image, head, first = _program(Q, H, BLOCK_Q)
    rows = tl.arange(0, BLOCK_Q)
    channels = tl.arange(0, BLOCK_D)[None, :]
    inside = first + rows < Q
    item = (image.to(tl.int64) * Q + first) * H + head  # of the first row, in the order [B, Q, H]
    value += image.to(tl.int64) * S * (H * D) + head * D
    result = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    start = 0
    for level in range(L):
        height, width = _level_shape(shapes, level, L)
        for p in tl.static_range(P):
            point = item * (L * P) + rows * (H * L * P) + level * P + p
            left, upper, dx, dy = _sample_position(locations, point, inside, height, width)
            at, on_map = _corners(left, upper, start, height, width, channels, D, H * D)
            v00, v01, v10, v11 = _read(value, at, on_map)
            share = _corner_shares(
                tl.load(weights + point, mask=inside, other=0.0).to(tl.float32), dx, dy
            )
            result += v00 * share[0] + v01 * share[1] + v10 * share[2] + v11 * share[3]
        start += height.to(tl.int32) * width.to(tl.int32)
    output += item * D + rows[:, None] * (H * D) + channels
    tl.store(output, result.to(output.dtype.element_ty), mask=inside[:, None] & (channels < D))


@triton.jit(do_not_specialize=["S", "Q"])
def _backward_kernel(
    grad_output,
    value,
    locations,
    weights,
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
):
    image, head, first = _program(Q, H, BLOCK_Q)
    rows = tl.arange(0, BLOCK_Q)
    # A thread takes 4 channels in every read: as many as the widest addition has, so that no tile moves between
    # layouts.
    channels = tl.max_contiguous(tl.arange(0, BLOCK_D), 4)[None, :]
    inside = first + rows < Q
    item = (image.to(tl.int64) * Q + first) * H + head
    of_image = image.to(tl.int64) * S * (H * D) + head * D
    value, grad_value = value + of_image, grad_value + of_image
    grad_output += item * D + rows[:, None] * (H * D) + channels
    grad = tl.load(grad_output, mask=inside[:, None] & (channels < D), other=0.0).to(tl.float32)
    start = 0
    for level in range(L):
        height, width = _level_shape(shapes, level, L)
        points = item * (L * P) + rows * (H * L * P) + level * P
        by_place = tl.zeros(
            [BLOCK_Q, BLOCK_D], tl.float32
        )  # columns: x, y of the first point, x, y of the second ...
        by_share = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)  # columns: the points
        for p in tl.static_range(P):
            left, upper, dx, dy = _sample_position(locations, points + p, inside, height, width)
            at, on_map = _corners(left, upper, start, height, width, channels, D, H * D)
            v00, v01, v10, v11 = _read(value, at, on_map)
            g00, g01, g10, g11 = (
                tl.sum(grad * v00, 1),
                tl.sum(grad * v01, 1),
                tl.sum(grad * v10, 1),
                tl.sum(grad * v11, 1),
            )
            weight = tl.load(weights + points + p, mask=inside, other=0.0).to(tl.float32)
            by_x, by_y, by_weight = _derivatives(g00, g01, g10, g11, weight, dx, dy, height, width)
            by_place = tl.where(
                channels == 2 * p, by_x, tl.where(channels == 2 * p + 1, by_y, by_place)
            )
            by_share = tl.where(channels == p, by_weight, by_share)
            share = _corner_shares(weight, dx, dy)
            for corner in tl.static_range(4):
                tl.atomic_add(
                    grad_value + at[corner],
                    grad * share[corner],
                    mask=on_map[corner],
                    sem="relaxed",
                )
        _store_columns(grad_locations, 2 * points, by_place, channels, inside, 2 * P)
        _store_columns(grad_weights, points, by_share, channels, inside, P)
        start += height.to(tl.int32) * width.to(tl.int32)


def forward(value: Tensor, shapes: Sequence[int], locations: Tensor, weights: Tensor) -> Tensor:
    """Contiguous tensors as in `models.ms_deform_attn`, shapes as (h, w, h, w ...) -> [B, Q, H * D] in the dtype of
    value.
    """
    output = value.new_empty(*locations.shape[:2], value.shape[2] * value.shape[3])
    _launch(_forward_kernel, (value, locations, weights, output), shapes, value, locations, 1)
    return output


def backward(
    grad_output: Tensor, value: Tensor, shapes: Sequence[int], locations: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of value, locations and weights, each in the dtype of its tensor; that of value is summed in
    float32.
    """
    grad_value = torch.zeros_like(value, dtype=torch.float32)
    grad_locations, grad_weights = torch.empty_like(locations), torch.empty_like(weights)
    tensors = (grad_output, value, locations, weights, grad_value, grad_locations, grad_weights)
    _launch(_backward_kernel, tensors, shapes, value, locations, 2 * locations.shape[4])
    return grad_value.to(value.dtype), grad_locations, grad_weights


def _launch(
    kernel,
    tensors: tuple[Tensor, ...],
    shapes: Sequence[int],
    value: Tensor,
    locations: Tensor,
    columns: int,
) -> None:
    """Runs a kernel whose tile has room for the channels of a head and for `columns` other numbers of a query."""
    B, S, H, D = value.shape
    _, Q, _, L, P, _ = locations.shape
    block_d = triton.next_power_of_2(max(D, columns, 4))
    block_q = min(max(ELEMENTS // block_d, 1), MOST_QUERIES)
    programs = B * H * triton.cdiv(Q, block_q)
    if programs == 0:
        return
    # Triton recompiles a kernel for integers that are 1 or divisible by 16, never for other values of a float.
    sizes = tuple(float(size) for size in shapes)
    with torch.cuda.device(value.device) if value.is_cuda else contextlib.nullcontext():
        kernel[(programs,)](
            *tensors,
            sizes,
            S,
            Q,
            H,
            D,
            L,
            P,
            block_q,
            block_d,
            num_warps=WARPS,
            num_stages=1,
            enable_fp_fusion=True,
        )
