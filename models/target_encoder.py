"""Frozen networks that encode image crops: the targets of DETReg's object embedding (Bar et al.,
CVPR 2022, section 3.2).

Shapes: N crops, S x S their size, C encoder channels, h x w size of a feature map.
"""

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional

from models.backbone import Backbone
from util.checkpoints.backbone_weights import load_backbone_weights
from util.errors import UserError

SWAV_HEAD_DIMS = (2048, 2048, 128)  # features, hidden, output of SwAV's projection head


class IntermediateEncoder(nn.Module):
    """Mean-pooled feature map of stage 2, as in the published code: 512 channels for a ResNet-50.

    Copies the current weights of `backbone`; later stages are dropped.
    """

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = Backbone(backbone.name, "frozen", stages=(2,), trainable=False)
        self.num_channels = self.backbone.num_channels[-1]
        self.copy_weights(backbone)

    def copy_weights(self, backbone: Backbone) -> None:
        """Copy the weights up to stage 2 from a backbone of the same architecture.

        Raises:
            UserError: the backbone lacks one of them.
        """
        source = backbone.body.state_dict()
        keys = list(self.backbone.body.state_dict())
        missing = [key for key in keys if key not in source]
        if missing:
            raise UserError(
                f"--obj_embedding_head intermediate: --backbone {backbone.name} has no {missing[0]} in "
                "stage 2; use another backbone"
            )
        self.backbone.body.load_state_dict({key: copy.deepcopy(source[key]) for key in keys})

    def forward(self, crops: Tensor) -> Tensor:
        """[N, 3, S, S] -> [N, C]"""
        return self.backbone(crops)[-1].mean((2, 3))  # [N, C, h, w] -> [N, C]


class HeadEncoder(nn.Module):
    """SwAV's network with its projection head, under the parameter names of SwAV's file."""

    def __init__(self, name: str) -> None:
        super().__init__()
        backbone = Backbone(name, "live", trainable=False)
        features, hidden, self.num_channels = SWAV_HEAD_DIMS
        if backbone.num_channels != [features]:
            raise UserError(
                "--obj_embedding_head head needs the network of SwAV's file, resnet50; --backbone is "
                f"{name}"
            )
        # Stages without the prefix `body.`, as in SwAV's file.
        self.stages = [stage for stage, _ in backbone.body.named_children()]
        for stage, module in backbone.body.named_children():
            self.add_module(stage, module)
        self.projection_head = nn.Sequential(
            nn.Linear(features, hidden),
            nn.BatchNorm1d(hidden),
            nn.ReLU(),
            nn.Linear(hidden, self.num_channels),
        )

    def forward(self, crops: Tensor) -> Tensor:
        """[N, 3, S, S] -> unit vectors [N, 128]"""
        x = crops
        for stage in self.stages:
            x = getattr(self, stage)(x)  # finally [N, 2048, h, w]
        pooled = x.mean((2, 3))  # [N, 2048]
        return functional.normalize(self.projection_head(pooled), dim=1)  # [N, 128]


def build_target_encoder(head: str, backbone: Backbone, weights: str) -> nn.Module:
    """Build a frozen target encoder in evaluation mode.

    Args:
        head: `intermediate` or `head`.
        backbone: whose architecture, and for `intermediate` also whose weights, are used.
        weights: source of the backbone weights, from which `head` loads too. `none` leaves it
            random, for a checkpoint to fill.

    Raises:
        UserError: the weights cannot be loaded, or have no projection head for `head`.
    """
    if head == "intermediate":
        encoder: nn.Module = IntermediateEncoder(backbone)
    else:
        encoder = HeadEncoder(backbone.name)
        if weights != "none":
            _load_swav_weights(encoder, backbone.name, weights)
    return encoder.requires_grad_(False).eval()


def _load_swav_weights(encoder: nn.Module, name: str, weights: str) -> None:
    try:
        load_backbone_weights(encoder, name, weights)
    except UserError as error:
        raise UserError(
            f"--obj_embedding_head head needs a file with SwAV's projection head: {error}, or "
            "--obj_embedding_head intermediate"
        ) from error


@torch.no_grad()
def encode_crops(
    encoder: nn.Module, crops: list[Tensor], published_batch_norm: bool = False
) -> Tensor:
    """Encode the crops of all images.

    Args:
        crops: [N_i, 3, S, S] per image.
        published_batch_norm: DETReg leaves its `head` network in training mode, so that batch norm
            uses the statistics of one image's crops and updates its running ones. True reproduces
            this.

    Returns:
        [sum N_i, C], image by image.
    """
    if published_batch_norm:
        # Batch norm in training mode raises on a single sample.
        return torch.cat([encoder.train(len(each) > 1)(each) for each in crops])
    return encoder(torch.cat(crops))
