"""ResNets of torchvision, with the published names."""

import torchvision
from torch import Tensor, nn
from torchvision.models._utils import IntermediateLayerGetter

from models.backbone import Body
from util.checkpoints.backbone_weights import backbone_normalization
from util.errors import UserError


class FrozenBatchNorm2d(torchvision.ops.FrozenBatchNorm2d):
    """Batch norm whose statistics and affine are constants, in the type of its input: under autocast nothing is
    widened.
    """

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        shift = self.bias - self.running_mean * scale
        return x * scale.to(x.dtype).view(1, -1, 1, 1) + shift.to(x.dtype).view(1, -1, 1, 1)


class LiveBatchNorm2d(nn.BatchNorm2d):
    """Batch norm that trains, with the state-dict keys of the frozen one (no `num_batches_tracked`)."""

    def __init__(self, num_features: int) -> None:
        super().__init__(num_features)
        self.register_buffer("num_batches_tracked", None)

    def _load_from_state_dict(
        self, state_dict: dict, prefix: str, local_metadata: dict, *args
    ) -> None:
        # Without a version PyTorch would add a counter that this norm does not have, and then find it unexpected.
        state_dict.pop(f"{prefix}num_batches_tracked", None)
        super()._load_from_state_dict(
            state_dict, prefix, {**local_metadata, "version": self._version}, *args
        )


def build(name: str, norm: str, dilation: bool, stages: tuple[int, ...]) -> Body:
    """`resnet18`, `resnet34`, `resnet50` or `resnet101`."""
    if dilation and name in ("resnet18", "resnet34"):
        raise UserError(
            f"--dilation needs a ResNet with bottleneck blocks, --backbone {name} has none: use resnet50 or resnet101"
        )
    norm_layer = FrozenBatchNorm2d if norm == "frozen" else LiveBatchNorm2d
    resnet = getattr(torchvision.models, name)(
        weights=None, norm_layer=norm_layer, replace_stride_with_dilation=[False, False, dilation]
    )
    body = IntermediateLayerGetter(
        resnet, {f"layer{stage}": str(i) for i, stage in enumerate(stages)}
    )
    width = 64 if name in ("resnet18", "resnet34") else 256
    channels = [width * 2 ** (stage - 1) for stage in stages]
    strides = [16 if dilation and stage == 4 else 2 ** (stage + 1) for stage in stages]
    early = {
        name
        for name, _ in body.named_parameters()
        if not name.startswith(("layer2", "layer3", "layer4"))
    }
    mean, std = backbone_normalization(name)
    return Body(body, strides=strides, num_channels=channels, mean=mean, std=std, early=early)
