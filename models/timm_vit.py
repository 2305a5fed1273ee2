"""A vision transformer of timm with one map at the stride of its patches, as `--backbone timm:vit_NAME`."""

from typing import Any

from torch import Tensor, nn

from models.backbone import Body
from util.checkpoints.backbone_weights import backbone_normalization
from util.errors import UserError


class TimmViT(nn.Module):
    """The patch tokens after one block of a timm network, with its final norm, as a map.

    The position embedding is resampled to the size of the image as timm does. Blocks after the one that is read are
    dropped, class and register tokens are not returned.

    Args:
        model: a network of timm with `forward_intermediates`.
        block: index of the block.
    """

    def __init__(self, model: Any, block: int) -> None:
        super().__init__()
        # With the norm, which DINOv2 and DINOv3 apply to all layers that they read: without it a few channels are a
        # hundred times larger than the others.
        self.blocks = model.prune_intermediate_layers([block], prune_norm=False, prune_head=True)
        self.model = model

    def forward(self, images: Tensor) -> list[Tensor]:
        """[B, 3, H, W], multiples of the patch -> [[B, C, H / patch, W / patch]]"""
        return self.model.forward_intermediates(
            images, indices=self.blocks, norm=True, intermediates_only=True
        )


def is_vit(extractor: Any) -> bool:
    """Return whether all maps of a feature extractor of timm have the same stride."""
    return len({info["reduction"] for info in extractor.feature_info.info}) == 1


def build_vit(extractor: Any, name: str, dilation: bool, stages: tuple[int, ...]) -> Body:
    """Build the body of a vision transformer, whatever the number of stages, with one map.

    Stage 4 is the last block, stage 2 the one at half depth. Several stages are the last one alone: blocks have the
    same stride, and the last one has what the earlier ones found (ViTDet, Li et al., ECCV 2022, section 3).

    Args:
        extractor: what `timm.create_model(name, features_only=True)` returned.
        name: timm's, without the prefix.

    Raises:
        UserError: dilation, or stages for a mask head.
    """
    import timm

    if dilation:
        raise UserError(
            f"--dilation changes the stride of a convolutional network; --backbone timm:{name} has the stride of its "
            "patches: omit it"
        )
    if 1 in stages:
        raise UserError(
            f"--masks reads maps of four strides, --backbone timm:{name} has one: choose a convolutional network"
        )
    info = extractor.feature_info.info
    try:
        model = timm.create_model(name, pretrained=False, num_classes=0, dynamic_img_size=True)
    except TypeError:  # reads any size without, or none but its own, which is checked afterwards
        model = timm.create_model(name, pretrained=False, num_classes=0)
    mean, std = backbone_normalization(f"timm:{name}")
    return Body(
        TimmViT(model, len(info) * max(stages) // 4 - 1),
        strides=[info[-1]["reduction"]],
        num_channels=[info[-1]["num_chs"]],
        mean=mean,
        std=std,
        # All blocks train or none: the stem is one layer, and there is no batch norm whose statistics it must fit.
        early_names=set(),
        patch_size=info[-1]["reduction"],
    )
