"""ResNets of torchvision, with the parameter names of published DETR checkpoints."""

import torchvision
from torch import nn
from torchvision.models._utils import IntermediateLayerGetter

from models.backbone import Body
from models.frozen_norm import FrozenBatchNorm2d
from util.checkpoints.backbone_weights import backbone_normalization
from util.errors import UserError


class LiveBatchNorm2d(nn.BatchNorm2d):
    """Trainable batch norm with the state-dict keys of the frozen one, no `num_batches_tracked`."""

    def __init__(self, num_features: int) -> None:
        super().__init__(num_features)
        self.register_buffer("num_batches_tracked", None)

    def _load_from_state_dict(
        self, state_dict: dict, prefix: str, local_metadata: dict, *args
    ) -> None:
        state_dict.pop(f"{prefix}num_batches_tracked", None)
        # To a state dict without a version PyTorch adds `num_batches_tracked`, which this norm does
        # not have, and then reports it as unexpected.
        metadata = {**local_metadata, "version": self._version}
        super()._load_from_state_dict(state_dict, prefix, metadata, *args)


def build(name: str, norm: str, dilation: bool, stages: tuple[int, ...]) -> Body:
    """Build `resnet18`, `resnet34`, `resnet50` or `resnet101`, see `models.backbone.Body`.

    Raises:
        UserError: dilation with resnet18 or resnet34.
    """
    basic_blocks = name in ("resnet18", "resnet34")
    if dilation and basic_blocks:
        raise UserError(
            f"--dilation needs a ResNet with bottleneck blocks, --backbone {name} has none: use resnet50 "
            "or resnet101"
        )
    norm_layer = FrozenBatchNorm2d if norm == "frozen" else LiveBatchNorm2d
    resnet = getattr(torchvision.models, name)(
        weights=None, norm_layer=norm_layer, replace_stride_with_dilation=[False, False, dilation]
    )
    body = IntermediateLayerGetter(
        resnet, {f"layer{stage}": str(i) for i, stage in enumerate(stages)}
    )

    # Stage s has stride 2^(s + 1) and twice the channels of the stage before.
    width = 64 if basic_blocks else 256
    channels = [width * 2 ** (stage - 1) for stage in stages]
    strides = [16 if (dilation and stage == 4) else 2 ** (stage + 1) for stage in stages]
    later_stages = ("layer2", "layer3", "layer4")
    early_names = {key for key, _ in body.named_parameters() if not key.startswith(later_stages)}
    mean, std = backbone_normalization(name)
    return Body(
        body,
        strides=strides,
        num_channels=channels,
        mean=mean,
        std=std,
        early_names=early_names,
    )
