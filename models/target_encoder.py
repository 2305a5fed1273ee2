"""Frozen networks that encode a crop of an image, the target of DETReg's object embedding (Bar et al., CVPR 2022,
section 3.2).
"""

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional

from models.backbone import Backbone
from util.checkpoints.backbone_weights import load_backbone_weights
from util.errors import UserError

PROJECTION = (2048, 2048, 128)  # SwAV's head: features, hidden, output


class IntermediateEncoder(nn.Module):
    """The mean of the maps of stage 2: crops [N, 3, S, S] -> [N, C], 512 channels for a ResNet-50. Nothing after that
    stage is kept.

    Its weights are those that `backbone` has now.
    """

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = Backbone(backbone.name, "frozen", stages=(2,), trainable=False)
        self.num_channels = self.backbone.num_channels[-1]
        self.copy_weights(backbone)

    def copy_weights(self, backbone: Backbone) -> None:
        """The stages up to the second of another backbone of the same architecture."""
        source = backbone.body.state_dict()
        missing = [key for key in self.backbone.body.state_dict() if key not in source]
        if missing:
            raise UserError(
                f"--obj_embedding_head intermediate: --backbone {backbone.name} has no {missing[0]} in stage 2; "
                f"use another"
            )
        self.backbone.body.load_state_dict(
            {key: copy.deepcopy(source[key]) for key in self.backbone.body.state_dict()}
        )

    def forward(self, crops: Tensor) -> Tensor:
        return self.backbone(crops)[-1].mean((2, 3))


class HeadEncoder(nn.Module):
    """SwAV's network with its projection head: crops [N, 3, S, S] -> unit vectors [N, 128]. Names are those of SwAV's
    file.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        backbone = Backbone(name, "live", trainable=False)
        features, hidden, self.num_channels = PROJECTION
        if backbone.num_channels != [features]:
            raise UserError(
                f"--obj_embedding_head head needs the network of SwAV's file, resnet50; --backbone is {name}"
            )
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
        for stage in self.stages:
            crops = getattr(self, stage)(crops)
        return functional.normalize(self.projection_head(crops.mean((2, 3))), dim=1)


def build_target_encoder(head: str, backbone: Backbone, weights: str) -> nn.Module:
    """`intermediate` or `head`, frozen, in evaluation mode.

    weights: where the backbone's came from; `none` leaves the projection head random, for a checkpoint to fill.

    Raises:
        UserError: the weights can't be had, or have no projection head where that is asked for.
    """
    encoder = (
        IntermediateEncoder(backbone) if head == "intermediate" else HeadEncoder(backbone.name)
    )
    if head == "head" and weights != "none":
        try:
            load_backbone_weights(encoder, backbone.name, weights)
        except UserError as error:
            raise UserError(
                f"--obj_embedding_head head needs a file with SwAV's projection head: {error}, or --obj_embedding_head "
                "intermediate"
            ) from error
    return encoder.requires_grad_(False).eval()


@torch.no_grad()
def encode_crops(
    encoder: nn.Module, crops: list[Tensor], published_statistics: bool = False
) -> Tensor:
    """Crops of each image, [N_i, 3, S, S] -> [sum N_i, C], in one call.

    published_statistics: DETReg never puts its `head` network into evaluation mode, so that batch norm takes the
    statistics of the crops of one image and moves its running ones; True does the same, image by image.
    """
    if published_statistics:
        return torch.cat([encoder.train(len(each) > 1)(each) for each in crops])
    return encoder(torch.cat(crops))
