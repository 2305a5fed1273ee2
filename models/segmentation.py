"""Mask head on any detector: instance and panoptic segmentation (Carion et al. 2020, section 4.4).

The mask of a query depends on no other query. So masks are predicted on demand, for the queries that
someone asks for: the criterion asks for matched ones, post-processing for those that it keeps. This
is exact, and it is what makes the head cheap: it works on queries x image.

Shapes: B images, Q queries, K selected queries of any images, D model width, H heads, h x w size of
the backbone's last map, h1 x w1 of its first (stride 4).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from models.backbone import BackboneWithPositions
from models.detector import (
    Detector,
    Memory,
    Queries,
    States,
    full_precision,
    under_autocast,
    without_autocast,
)
from util.moved_names import moved_from
from util.nested_tensor import NestedTensor, as_nested_tensor
from util.settings import Settings

if not TYPE_CHECKING:  # a checker must not take every name for one of this module
    __getattr__ = moved_from("models.segmentation")

# Queries that go through the head at once without gradients. A query needs about 40 MB at 800 pixels.
QUERIES_PER_CHUNK = 32
NUM_GROUPS = 8  # of group norm


class MaskAttention(nn.Module):
    """Attention maps of queries over the image, one per head, without values.

    As published, one softmax runs over all heads and cells together. UP-DETR's and Siamese DETR's copies
    of the code normalize each head by itself, which gives other masks with DETR's weights.
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q_linear = nn.Linear(dim, dim)
        self.k_linear = nn.Linear(dim, dim)
        for linear in (self.q_linear, self.k_linear):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, queries: Tensor, memory: Tensor, padding_mask: Tensor | None) -> Tensor:
        """Attend from queries [B, Q, D] to memory [B, D, h, w].

        padding_mask: bool [B, h, w], True on cells to ignore; None if no image is padded.

        Returns:
            [B, Q, H, h, w]
        """
        query = self.q_linear(queries).unflatten(-1, (self.num_heads, -1))  # [B, Q, H, D / H]
        query = query * query.shape[-1] ** -0.5
        key = functional.conv2d(memory, self.k_linear.weight[..., None, None], self.k_linear.bias)
        key = key.unflatten(1, (self.num_heads, -1))  # [B, H, D / H, h, w]

        logits = torch.einsum("bqnc,bnchw->bqnhw", query, key)  # [B, Q, H, h, w]
        if padding_mask is not None:
            logits = logits.masked_fill(padding_mask[:, None, None], float("-inf"))
        return logits.flatten(2).softmax(-1).view_as(logits)


class MaskHead(nn.Module):
    """Upsample attention maps to masks, with the backbone's maps as a feature pyramid.

    Names of parameters are the published ones.

    Args:
        dim: width D of the projected last map.
        num_heads: H attention maps of each query.
        pyramid_channels: channels of the backbone's maps of stages 3, 2 and 1.
    """

    lay1: nn.Conv2d
    lay2: nn.Conv2d
    lay3: nn.Conv2d
    lay4: nn.Conv2d
    lay5: nn.Conv2d
    gn1: nn.GroupNorm
    gn2: nn.GroupNorm
    gn3: nn.GroupNorm
    gn4: nn.GroupNorm
    gn5: nn.GroupNorm
    adapter1: nn.Conv2d
    adapter2: nn.Conv2d
    adapter3: nn.Conv2d

    def __init__(self, dim: int, num_heads: int, pyramid_channels: Sequence[int]) -> None:
        super().__init__()
        # Widths are the published ones: D + H twice, then D / 2, D / 4, D / 8 and D / 16.
        width = dim + num_heads
        widths = [width, width, dim // 2, dim // 4, dim // 8, dim // 16]
        for i, (before, after) in enumerate(zip(widths[:-1], widths[1:], strict=True), start=1):
            self.add_module(f"lay{i}", nn.Conv2d(before, after, kernel_size=3, padding=1))
            self.add_module(f"gn{i}", nn.GroupNorm(_num_groups(after), after))
        self.out_lay = nn.Conv2d(widths[-1], 1, kernel_size=3, padding=1)
        for i, channels in enumerate(pyramid_channels, start=1):
            self.add_module(f"adapter{i}", nn.Conv2d(channels, widths[i + 1], kernel_size=1))

        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_uniform_(module.weight, a=1)
                assert module.bias is not None
                nn.init.zeros_(module.bias)

    def image_features(self, source: Tensor, pyramid: Sequence[Tensor]) -> list[Tensor]:
        """Compute what all queries of an image share, once per image.

        source: projected last map [B, D, h, w]. pyramid: maps of stages 3, 2 and 1.

        Returns:
            The first convolution's response to `source`, and the adapted maps.
        """
        # The input of the first convolution is (source, attention maps). A convolution is linear in its input
        # channels, so the part of `source`, 32 times the work of the other, need not be repeated per query.
        weight = self.lay1.weight[:, : source.shape[1]]
        response = functional.conv2d(source, weight, self.lay1.bias, padding=1)
        adapters = (self.adapter1, self.adapter2, self.adapter3)
        return [response, *(layer(x) for layer, x in zip(adapters, pyramid, strict=True))]

    def forward(self, attention: Tensor, features: list[Tensor], image: Tensor) -> Tensor:
        """Predict mask logits.

        attention: [K, H, h, w]. features: from `image_features`. image: int64 [K], the image of each query.

        Returns:
            [K, h1, w1]
        """
        response, *pyramid = features
        weight = self.lay1.weight[:, -attention.shape[1] :]
        x = response[image] + functional.conv2d(attention, weight, padding=1)  # [K, D + H, h, w]
        x = self.gn1(x).relu()
        x = self.gn2(self.lay2(x)).relu()

        later = ((self.lay3, self.gn3), (self.lay4, self.gn4), (self.lay5, self.gn5))
        for (conv, norm), level in zip(later, pyramid, strict=True):
            x = functional.interpolate(x, size=level.shape[-2:], mode="nearest") + level[image]
            x = norm(conv(x)).relu()  # [K, D / 4 ... D / 16, height, width]
        return self.out_lay(x)[:, 0]


def _num_groups(channels: int) -> int:
    """Return the published 8 groups; fewer for a narrow model whose channels 8 does not divide."""
    return next(groups for groups in range(NUM_GROUPS, 0, -1) if channels % groups == 0)


@dataclass
class MaskPredictor:
    """Predicts the masks of any queries of a batch.

    attention: of all queries, [B, Q, H, h, w].
    features: from `MaskHead.image_features`.
    amp_dtype: run the head in this dtype by autocast; None: without autocast.
    """

    head: MaskHead
    attention: Tensor
    features: list[Tensor]
    amp_dtype: torch.dtype | None

    def __call__(self, image: Tensor, query: Tensor) -> Tensor:
        """Return the mask logits [K, h1, w1] of queries, given by image index [K] and query index [K]."""
        # An exported graph has one call: the number of chunks would depend on the batch.
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self._predict(image, query)
        chunks = zip(image.split(QUERIES_PER_CHUNK), query.split(QUERIES_PER_CHUNK), strict=True)
        return torch.cat([self._predict(*chunk) for chunk in chunks])

    def _predict(self, image: Tensor, query: Tensor) -> Tensor:
        # The criterion calls this outside of the autocast context of the forward pass.
        context = without_autocast(self.attention)
        if self.amp_dtype is not None:
            context = torch.autocast(self.attention.device.type, self.amp_dtype)
        with context:
            return self.head(self.attention[image, query], self.features, image)


class SegmentationOutputs(dict[str, Any]):
    """Outputs of a detector with a mask head.

    `outputs["pred_masks"]`, mask logits [B, Q, h1, w1] of all queries, are computed when they are first read.
    """

    def __init__(self, outputs: dict[str, Any], predict_masks: MaskPredictor) -> None:
        super().__init__(outputs)
        self.predict_masks = predict_masks

    def __missing__(self, key: str) -> Any:
        if key != "pred_masks":
            raise KeyError(key)
        attention = self.predict_masks.attention
        batch, queries = attention.shape[:2]
        image, query = torch.meshgrid(
            torch.arange(batch, device=attention.device),
            torch.arange(queries, device=attention.device),
            indexing="ij",
        )  # [B, Q] each
        masks = self.predict_masks(image.flatten(), query.flatten())  # [B * Q, h1, w1]
        self[key] = masks.unflatten(0, (batch, queries))
        return self[key]


def select_masks(outputs: dict[str, Any], image: Tensor, query: Tensor) -> Tensor:
    """Return the mask logits [K, h1, w1] of queries, in float32 or float64.

    Args:
        outputs: of a detector with a mask head, or a dict with the `pred_masks` [B, Q, h1, w1] of all queries.
        image, query: int64 [K], index of the image and of the query in it.
    """
    if isinstance(outputs, SegmentationOutputs):
        return full_precision(outputs.predict_masks(image, query))
    return full_precision(outputs["pred_masks"][image, query])


class SegmentationDetector(Detector):
    """A detector with a mask head.

    Without masks it is used like the detector inside. State-dict keys are the published ones, with the detector
    under `detr.`.

    Args:
        frozen: train the mask head only, on a detector that is fixed and in evaluation mode.
        frozen_dropout: keep the dropout of a frozen detector on, as published.
    """

    losses = (*Detector.losses, "masks")

    def __init__(
        self,
        detr: Detector,
        num_heads: int,
        *,
        frozen: bool = False,
        frozen_dropout: bool = False,
    ) -> None:
        super().__init__()
        self.detr = detr
        self.bbox_attention = MaskAttention(detr.hidden_dim, num_heads)
        pyramid_channels = detr.backbone[0].num_channels[-2::-1]  # stages 3, 2, 1
        self.mask_head = MaskHead(detr.hidden_dim, num_heads, pyramid_channels)

        self.num_queries, self.hidden_dim = detr.num_queries, detr.hidden_dim
        self.two_stage, self.classification = detr.two_stage, detr.classification
        self.frozen, self.frozen_dropout = frozen, frozen_dropout
        if frozen:
            detr.requires_grad_(False)

    @property
    def backbone(self) -> BackboneWithPositions:  # type: ignore[override]
        return self.detr.backbone

    @property
    def aux_loss(self) -> bool:
        return self.detr.aux_loss

    @aux_loss.setter
    def aux_loss(self, value: bool) -> None:
        self.detr.aux_loss = value

    def train(self, mode: bool = True) -> "SegmentationDetector":
        super().train(mode)
        if self.frozen and not self.frozen_dropout:
            self.detr.eval()
        return self

    def last_layer_weights(self, settings: Settings) -> dict[str, float]:
        return {"loss_mask": settings.mask_loss_coef, "loss_dice": settings.dice_loss_coef}

    def encode(self, samples: NestedTensor) -> Memory:
        return self.detr.encode(samples)

    def decode(
        self, memory: Memory, queries: Queries | None = None, query_groups: int = 1
    ) -> States:
        return self.detr.decode(memory, queries, query_groups)

    def predict(self, states: States) -> dict:
        return self.detr.predict(states)

    def learned_queries(self, batch: int, count: int | None = None) -> Queries:
        return self.detr.learned_queries(batch, count)

    def kernels(self, device: torch.device, dtype: torch.dtype) -> dict[str, str]:
        return self.detr.kernels(device, dtype)

    def forward(self, samples: NestedTensor | Tensor | list[Tensor]) -> SegmentationOutputs:
        """Detect and segment objects in normalized images.

        Returns:
            What the detector returns, with `pred_masks` on demand, see `SegmentationOutputs`.
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            memory = self.detr.encode(as_nested_tensor(samples))
            states = self.detr.decode(memory)
        return self.segment(memory, states)

    def segment(self, memory: Memory, states: States) -> SegmentationOutputs:
        """Predict what `predict` does, and masks on demand."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            outputs = self.detr.predict(states)

        *early, last = memory.features
        padding_mask = None if memory.padding_mask is None else last.mask  # [B, h, w]
        attention = self.bbox_attention(states.layers[-1], memory.last_map(), padding_mask)
        source = memory.projected_map  # [B, D, h, w]
        pyramid = [feature.tensor for feature in reversed(early)]
        features = self.mask_head.image_features(source, pyramid)

        amp_dtype = None
        if under_autocast(source):
            amp_dtype = torch.get_autocast_dtype(source.device.type)
        predictor = MaskPredictor(self.mask_head, attention, features, amp_dtype)
        return SegmentationOutputs(outputs, predictor)
