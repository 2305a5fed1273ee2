"""Siamese DETR (Chen et al., CVPR 2023) on any detector: regions of one view are found in the other.

Shapes: B images of two views each, M regions, Q queries, D model width, F backbone channels. A batch holds view 1 of
all images, then view 2; box m of a view shows the same region as box m of the other one.
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

ROI_SIZE = 7  # cells of a map's grid that a region is read with


class Siamese(QueryPatchPretext):
    """Each image is encoded once. The queries of one view, made from the features of its regions, decode the other
    view's memory.

    Targets are the regions' boxes in the view that is decoded, without disturbance. Region discrimination predicts the
    feature of the region's crop from the queries' view; global discrimination compares the pooled memories of the two
    views as SimSiam does. A part whose weight is 0 is not built.

    Args:
        box_disturbance: fraction of width and height by which a corner of a query's box moves at most.
        reproduce_published: padding counts in the pooled memory, and on a detector whose queries have a learned content
            (Deformable DETR) the queries of the first image serve the whole batch.
        teacher_momentum: None: targets are the network's own, without gradient, as published. Else a momentum teacher
            gives the projections that global discrimination predicts and, where the backbone trains, the features of
            the regions' crops.
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
            self.enc_head = nn.ModuleList([GlobalHead(dim * len(channels), dim)])
            self.losses += ("global_contrast",)
        if teacher_momentum is not None:
            self.teacher = MomentumTeacher(self, teacher_momentum)

    @classmethod
    def from_settings(cls, settings: Settings, detector: Detector) -> "Siamese":
        if settings.global_loss_coef and settings.batch_size * get_world_size() < 2:
            raise UserError(
                "--batch_size 1: batch norm of global discrimination needs two images; use 2 or more, or "
                "--global_loss_coef 0"
            )
        if (
            settings.teacher_momentum is not None
            and not settings.global_loss_coef
            and (not settings.feature_loss_coef or detector.backbone[0].frozen)
        ):
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
        return (
            {"loss_enc_global_contra": settings.global_loss_coef}
            if "global_contrast" in self.losses
            else {}
        )

    def forward(self, samples, targets: Targets) -> dict:
        """samples: 2B normalised views; each target has `boxes` [M, 4], `size` (h, w) and, for region discrimination,
        `patches` [M, 3, S, S], normalised like the images.

        Returns the detector's outputs for the 2B views, each asked with the regions of its partner, so that the targets
        of a view are those of the outputs. With them `pred_features` [2B, Q, F] in each layer and `target_features` [2B
        * M, F], and `projections` and `predictions` [2B, D].

        Raises:
            ValueError: views bring different numbers of regions, or not `num_patches` of them.
        """
        boxes = self._stack_boxes(targets)
        samples = as_nested_tensor(samples)
        memory = self.detector.encode(samples)
        if self.teacher is not None:
            self.teacher.train(self.training)
        sizes = torch.stack([target["size"] for target in targets])
        features = self.region_features(memory, self.disturb_boxes(boxes, sizes))
        states = self.detector.decode(memory, self.region_queries(swap_views(features)))
        outputs = self.detector.predict(states)
        if "features" in self.losses:
            self.predict_features(outputs, states.layers, self.crop_features(targets))
        if "global_contrast" in self.losses:
            with without_autocast(memory.tokens):
                outputs["projections"], outputs["predictions"] = self.enc_head[0](
                    self.pooled_memory(memory)
                )
            if self.teacher is not None:
                taught = self.teacher.encode(samples, memory)
                with without_autocast(memory.tokens):
                    outputs["projections"] = self.teacher.network.enc_head[0].project(
                        self.pooled_memory(taught)
                    )
        return outputs

    def frozen_parts(self) -> dict[str, nn.Module]:
        return {} if self.teacher is None else {"momentum_teacher": self.teacher.network}

    def after_step(self, progress: float) -> None:
        if self.teacher is not None:
            self.teacher.update(self, progress)

    def _stack_boxes(self, targets: Targets) -> Tensor:
        counts = sorted({len(target["boxes"]) for target in targets})
        if counts != [self.num_patches] or len(targets) % 2:
            raise ValueError(
                f"two views an image and {self.num_patches} regions a view are needed; got {len(targets)} views "
                f"with {counts}"
            )
        return torch.stack([target["boxes"] for target in targets])

    def disturb_boxes(self, boxes_cxcywh: Tensor, sizes: Tensor) -> Tensor:
        """Boxes [2B, M, 4] of views with `sizes` (h, w) [2B, 2] -> boxes_xyxy_abs [2B, M, 4], each corner moved, inside
        the view.
        """
        sides = sizes.flip(-1).repeat(1, 2)[:, None].to(boxes_cxcywh.dtype)
        corners = box_cxcywh_to_xyxy(boxes_cxcywh) * sides
        return (
            jitter_boxes(corners, self.sample_noise(corners), self.box_disturbance)
            .clamp(min=0)
            .minimum(sides)
        )

    def sample_noise(self, boxes: Tensor) -> Tensor:
        """What decides how far each coordinate moves."""
        return torch.randn_like(boxes)

    def region_features(self, memory: Memory, boxes_xyxy_abs: Tensor) -> Tensor:
        """Maps of the backbone, read at regions [2B, M, 4] and pooled: [2B, M, F]. Several levels are joined."""
        strides, parts = self.detector.backbone[0].strides, []
        for feature, stride in zip(memory.features, strides, strict=True):
            maps = full_precision(feature.tensor)
            boxes = list(boxes_xyxy_abs.to(maps.dtype))
            with without_autocast(maps):
                parts.append(
                    roi_align(maps, boxes, ROI_SIZE, spatial_scale=1 / stride).mean((2, 3))
                )
        return torch.cat(parts, 1).unflatten(0, boxes_xyxy_abs.shape[:2])

    def region_queries(self, features: Tensor) -> Queries:
        """[2B, M, F] -> queries of 2B views; query n belongs to region n // (Q / M)."""
        learned = self.detector.learned_queries(len(features))
        if self.reproduce_published and learned.content is not None:
            halves = features.unflatten(0, (2, -1))
            features = halves[:, :1].expand_as(halves).flatten(0, 1)
        from_regions = self.patch2query(features).repeat_interleave(
            self.detector.num_queries // self.num_patches, dim=1
        )
        return Queries(learned.position + from_regions, learned.content)

    @torch.no_grad()
    def crop_features(self, targets: Targets) -> Tensor:
        """What the queries of each view predict: features of the crops of the other one, [2B * M, F]."""
        crops, backbone = (
            torch.stack([target["patches"] for target in targets]),
            self.detector.backbone[0],
        )
        encoder = (
            backbone
            if self.teacher is None or backbone.frozen
            else self.teacher.network.detector.backbone[0]
        )
        return pooled_features(encoder, swap_views(crops).flatten(0, 1))

    def pooled_memory(self, memory: Memory) -> Tensor:
        """The mean of the memory's tokens, [2B, levels * D]: of each map that the backbone gave, joined."""
        cells = [height * width for height, width in memory.shapes]
        levels = full_precision(memory.tokens).split(cells, 1)[: len(memory.features)]
        if memory.padding_mask is None or self.reproduce_published:
            return torch.cat([level.mean(1) for level in levels], 1)
        shown = [~mask[..., None] for mask in memory.padding_mask.split(cells, 1)]
        # Further levels, which the backbone did not give, are left over.
        return torch.cat(
            [
                (level * here).sum(1) / here.sum(1)
                for level, here in zip(levels, shown, strict=False)
            ],
            1,
        )


class GlobalHead(nn.Module):
    """Projector and predictor of SimSiam (Chen and He, CVPR 2021, section 3); statistics are of each view by itself."""

    def __init__(self, channels: int, dim: int) -> None:
        super().__init__()
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
        """[2B, C] -> projections and predictions [2B, D]"""
        projections = self.project(pooled)
        return projections, torch.cat([self.predictor.mlp(view) for view in projections.chunk(2)])

    def project(self, pooled: Tensor) -> Tensor:
        return torch.cat([self.projector.mlp(view) for view in pooled.chunk(2)])


def swap_views(views: Tensor) -> Tensor:
    """What belongs to 2B views -> what belongs to the other view of each."""
    return views.roll(len(views) // 2, 0)


def jitter_boxes(boxes_xyxy: Tensor, normals: Tensor, fraction: float) -> Tensor:
    """Each coordinate moved by (2 sigmoid(z) - 1) * fraction of the box's width or height, z normal."""
    sides = (boxes_xyxy[..., 2:] - boxes_xyxy[..., :2]).repeat(*[1] * (boxes_xyxy.ndim - 1), 2)
    return boxes_xyxy + (2 * normals.sigmoid() - 1) * fraction * sides
