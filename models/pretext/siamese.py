"""Siamese DETR (Chen et al., CVPR 2023): regions of one view are detected in the other view.

Shapes: B images with two views each, M regions per view, Q queries, D model width, S memory tokens,
F backbone channels, L levels of the backbone, S x S crop size. A batch has view 1 of all images,
then view 2. Box m of a view shows the same region as box m of the other view.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torchvision.ops import roi_align

from models.detector import Detector, Memory, Queries, full_precision, without_autocast
from models.pretext import QueryPatchPretext, check_region_queries, pooled_features
from models.pretext.momentum_teacher import MomentumTeacher
from models.synced_batch_norm import SyncedBatchNorm
from models.transformer import MLP
from util.box_ops import box_cxcywh_to_xyxy
from util.distributed import get_world_size
from util.errors import UserError
from util.nested_tensor import as_nested_tensor
from util.packed_targets import Targets
from util.settings import Settings

ROI_SIZE = 7  # output cells per side of RoIAlign


class Siamese(QueryPatchPretext):
    """Siamese DETR's pretext.

    Every view is encoded once. The queries of one view, built from the features of its regions,
    decode the memory of the other view. Targets are the regions' boxes in the decoded view, without
    disturbance.

    Region discrimination predicts the feature of a region's crop, cut from the view of the queries.
    Global discrimination compares the pooled memories of the two views as SimSiam does. A part with
    weight 0 is not built.

    Args:
        box_disturbance: maximal shift of a box corner, as a fraction of width and height.
        reproduce_published: include padding in the pooled memory, and on a detector with learned
            query content (Deformable DETR) use the queries of the first image for the whole batch.
        teacher_momentum: None: targets come from the network itself, without gradient, as
            published. Otherwise a momentum teacher gives the projections that global discrimination
            predicts and, if the backbone trains, the features of the regions' crops.
    """

    teacher: MomentumTeacher | None = None

    def __init__(
        self,
        detector: Detector,
        num_patches: int,
        *,
        box_disturbance: float = 0.1,
        region_discrimination: bool = True,
        global_discrimination: bool = True,
        reproduce_published: bool = False,
        teacher_momentum: float | None = None,
    ) -> None:
        super().__init__(detector)
        check_region_queries(detector, num_patches)
        self.num_patches, self.box_disturbance = num_patches, box_disturbance
        self.reproduce_published = reproduce_published

        channels, dim = detector.backbone[0].num_channels, detector.hidden_dim
        self.patch2query = nn.Linear(sum(channels), dim)
        self.losses = ("labels", "boxes", "cardinality")
        if region_discrimination:
            self.feature_align = MLP(dim, dim, sum(channels), num_layers=2)
            self.losses += ("features",)
        if global_discrimination:
            # A list of one head: published checkpoints name it `enc_head.0`.
            self.enc_head = nn.ModuleList([GlobalHead(dim * len(channels), dim)])
            self.losses += ("global_contrast",)
        if teacher_momentum is not None:  # last, since it copies all of the above
            self.teacher = MomentumTeacher(self, teacher_momentum)

    @classmethod
    def from_settings(cls, settings: Settings, detector: Detector) -> "Siamese":
        if settings.global_loss_coef and settings.batch_size * get_world_size() < 2:
            raise UserError(
                "--batch_size 1: batch norm of global discrimination needs two images; use 2 or more, or "
                "--global_loss_coef 0"
            )
        teaches_projections = bool(settings.global_loss_coef)
        teaches_features = bool(settings.feature_loss_coef) and not detector.backbone[0].frozen
        if settings.teacher_momentum is not None and not (teaches_projections or teaches_features):
            raise UserError(
                f"--teacher_momentum {settings.teacher_momentum:g} has no target to give: leave it out, or use "
                "--global_loss_coef, or --lr_backbone with --feature_loss_coef"
            )
        return cls(
            detector,
            settings.num_patches,
            box_disturbance=settings.box_disturbance,
            region_discrimination=settings.feature_loss_coef > 0,
            global_discrimination=settings.global_loss_coef > 0,
            reproduce_published=settings.reproduce_published,
            teacher_momentum=settings.teacher_momentum,
        )

    def last_layer_weights(self, settings: Settings) -> dict[str, float]:
        if "global_contrast" not in self.losses:
            return {}
        return {"loss_enc_global_contra": settings.global_loss_coef}

    def forward(self, samples, targets: Targets) -> dict:
        """Detect the regions of each view in the other view of its image.

        Args:
            samples: 2B normalized views.
            targets: of each view `boxes` [M, 4] (cx, cy, w, h), `size` (h, w) and, for region
                discrimination, `patches` [M, 3, S, S], normalized like the images.

        Returns:
            The detector's outputs for the 2B views, queried with the regions of the other view, so
            that a view's targets are those of its outputs. With region discrimination also
            `pred_features` [2B, Q, F] in each layer and `target_features` [2B * M, F]; with global
            discrimination `projections` and `predictions` [2B, D].

        Raises:
            ValueError: an odd number of views, or a view without exactly `num_patches` regions.
        """
        boxes = self._stack_boxes(targets)  # [2B, M, 4]
        samples = as_nested_tensor(samples)
        memory = self.detector.encode(samples)
        if self.teacher is not None:
            self.teacher.train(self.training)

        sizes_hw = torch.stack([target["size"] for target in targets])  # [2B, 2]
        features = self.region_features(memory, self.disturb_boxes(boxes, sizes_hw))  # [2B, M, F]
        queries = self.region_queries(swap_views(features))
        states = self.detector.decode(memory, queries)
        outputs = self.detector.predict(states)
        if "features" in self.losses:
            outputs = self.with_features(outputs, states.layers, self.crop_features(targets))
        if "global_contrast" in self.losses:
            self._add_projections(outputs, samples, memory)
        return outputs

    def _add_projections(self, outputs: dict, samples, memory: Memory) -> None:
        """Add `projections` (a teacher's, if any) and `predictions` to `outputs`, [2B, D] each."""
        with without_autocast(memory.tokens):
            pooled = self.pooled_memory(memory)  # [2B, L * D]
            outputs["projections"], outputs["predictions"] = self.enc_head[0](pooled)
        if self.teacher is not None:
            teacher_memory = self.teacher.encode(samples, memory)
            with without_autocast(memory.tokens):
                pooled = self.pooled_memory(teacher_memory)
                outputs["projections"] = self.teacher.network.enc_head[0].project(pooled)

    def frozen_parts(self) -> dict[str, nn.Module]:
        return {} if self.teacher is None else {"momentum_teacher": self.teacher.network}

    def after_step(self, progress: float) -> None:
        if self.teacher is not None:
            self.teacher.update(self, progress)

    def _stack_boxes(self, targets: Targets) -> Tensor:
        counts = sorted({len(target["boxes"]) for target in targets})
        if counts != [self.num_patches] or len(targets) % 2:
            raise ValueError(
                f"two views per image and {self.num_patches} regions per view are required; got "
                f"{len(targets)} views with {counts}"
            )
        return torch.stack([target["boxes"] for target in targets])  # [2B, M, 4]

    def disturb_boxes(self, boxes_cxcywh: Tensor, sizes_hw: Tensor) -> Tensor:
        """Convert boxes to pixels, move each corner randomly, and clip them to their views.

        boxes_cxcywh: [2B, M, 4], normalized. sizes_hw: size of the views, [2B, 2]. Returns
        boxes_xyxy_abs [2B, M, 4].
        """
        sides = sizes_hw.flip(-1).repeat(1, 2)[:, None]  # [2B, 1, 4], (w, h, w, h)
        sides = sides.to(boxes_cxcywh.dtype)
        corners = box_cxcywh_to_xyxy(boxes_cxcywh) * sides  # [2B, M, 4]
        moved = jitter_boxes(corners, self.sample_noise(corners), self.box_disturbance)
        return moved.clamp(min=0).minimum(sides)

    def sample_noise(self, boxes: Tensor) -> Tensor:
        """Draw the noise of `jitter_boxes`, in the shape of `boxes`."""
        return torch.randn_like(boxes)

    def region_features(self, memory: Memory, boxes_xyxy_abs: Tensor) -> Tensor:
        """Read the backbone's feature maps at regions by RoIAlign, and pool each region.

        boxes_xyxy_abs: [2B, M, 4], in pixels of the views. Returns [2B, M, F], over all levels.
        """
        strides, parts = self.detector.backbone[0].strides, []
        for feature, stride in zip(memory.features, strides, strict=True):
            maps = full_precision(feature.tensor)  # [2B, C, h, w]
            boxes = list(boxes_xyxy_abs.to(maps.dtype))  # 2B x [M, 4]
            with without_autocast(maps):
                regions = roi_align(maps, boxes, ROI_SIZE, spatial_scale=1 / stride)
                parts.append(regions.mean((2, 3)))  # [2B * M, C, 7, 7] -> [2B * M, C]
        return torch.cat(parts, 1).unflatten(0, boxes_xyxy_abs.shape[:2])  # [2B, M, F]

    def region_queries(self, features: Tensor) -> Queries:
        """Build queries from region features [2B, M, F]; query n belongs to region n // (Q / M)."""
        learned = self.detector.learned_queries(len(features))
        if self.reproduce_published and learned.content is not None:
            # The published Deformable DETR indexes [:, 0]: the first image of each view serves all.
            views = features.unflatten(0, (2, -1))  # [2, B, M, F]
            features = views[:, :1].expand_as(views).flatten(0, 1)  # [2B, M, F]
        queries_per_region = self.detector.num_queries // self.num_patches
        from_regions = self.patch2query(features)  # [2B, M, D]
        from_regions = from_regions.repeat_interleave(queries_per_region, dim=1)  # [2B, Q, D]
        return Queries(learned.position + from_regions, learned.content)

    @torch.no_grad()
    def crop_features(self, targets: Targets) -> Tensor:
        """Return the targets of each view's queries: the other view's crop features [2B * M, F]."""
        crops = torch.stack([target["patches"] for target in targets])  # [2B, M, 3, S, S]
        encoder = self.detector.backbone[0]
        if self.teacher is not None and not encoder.frozen:
            encoder = self.teacher.network.detector.backbone[0]
        return pooled_features(encoder, swap_views(crops).flatten(0, 1))

    def pooled_memory(self, memory: Memory) -> Tensor:
        """Average the memory's tokens per level and concatenate the levels: [2B, L * D].

        Further levels of the detector, which the backbone does not have, are ignored.
        """
        cells = [height * width for height, width in memory.shapes]
        levels = full_precision(memory.tokens).split(cells, 1)  # [2B, h * w, D] per level
        own = slice(memory.last_level + 1 - len(memory.features), memory.last_level + 1)
        levels = levels[own]
        if memory.padding_mask is None or self.reproduce_published:
            return torch.cat([level.mean(1) for level in levels], 1)  # [2B, L * D]

        valid = [~mask[..., None] for mask in memory.padding_mask.split(cells, 1)]  # [2B, h * w, 1]
        means = [
            (level * inside).sum(1) / inside.sum(1)  # [2B, D]
            for level, inside in zip(levels, valid[own], strict=True)
        ]
        return torch.cat(means, 1)  # [2B, L * D]


class GlobalHead(nn.Module):
    """Projector and predictor of SimSiam (Chen and He, CVPR 2021, section 3).

    Batch norm sees one view at a time, so its statistics are those of a view.
    """

    def __init__(self, channels: int, dim: int) -> None:
        super().__init__()
        # Nested in modules with an attribute `mlp`, as in published checkpoints.
        self.projector: Any = nn.Module()
        self.predictor: Any = nn.Module()
        self.projector.mlp = nn.Sequential(
            nn.Linear(channels, dim),
            SyncedBatchNorm(dim),
            nn.ReLU(),
            nn.Linear(dim, dim),
            SyncedBatchNorm(dim),
            nn.ReLU(),
            nn.Linear(dim, dim),
            SyncedBatchNorm(dim),
        )
        self.predictor.mlp = nn.Sequential(
            nn.Linear(dim, dim), SyncedBatchNorm(dim), nn.ReLU(), nn.Linear(dim, dim)
        )

    def forward(self, pooled: Tensor) -> tuple[Tensor, Tensor]:
        """[2B, C] -> projections and predictions, [2B, D] each"""
        projections = self.project(pooled)
        return projections, torch.cat([self.predictor.mlp(view) for view in projections.chunk(2)])

    def project(self, pooled: Tensor) -> Tensor:
        """[2B, C] -> [2B, D]"""
        return torch.cat([self.projector.mlp(view) for view in pooled.chunk(2)])


def swap_views(views: Tensor) -> Tensor:
    """Swap the two views of each image: [2B, ...] -> [2B, ...]."""
    return views.roll(len(views) // 2, 0)


def jitter_boxes(boxes_xyxy: Tensor, noise: Tensor, fraction: float) -> Tensor:
    """Move each coordinate by (2 * sigmoid(noise) - 1) * fraction of the box's width or height.

    boxes_xyxy, noise: [..., 4], noise standard normal. The bounded sigmoid limits a shift to
    `fraction`.
    """
    sides = boxes_xyxy[..., 2:] - boxes_xyxy[..., :2]  # [..., 2]
    sides = torch.cat([sides, sides], -1)  # [..., 4], (w, h, w, h)
    return boxes_xyxy + (2 * noise.sigmoid() - 1) * fraction * sides
