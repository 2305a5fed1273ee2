"""Frozen norms applied by the convolution before them equal separate norms, and never use old weights."""

import copy
from collections import Counter

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from models.backbone import Backbone
from models.frozen_norm import FoldedConv2d, FrozenBatchNorm2d, fold_frozen_norms


class Operations(TorchDispatchMode):
    """Counts operations by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def fill_norms(module: nn.Module) -> None:
    for norm in module.modules():
        if isinstance(norm, FrozenBatchNorm2d):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.uniform_(norm.bias, -0.5, 0.5)
            nn.init.uniform_(norm.running_mean, -0.5, 0.5)
            nn.init.uniform_(norm.running_var, 0.5, 1.5)


def unfolded(backbone: Backbone) -> Backbone:
    """Return a copy with separate norms."""
    plain = copy.deepcopy(backbone)
    for module in plain.modules():
        if isinstance(module, FoldedConv2d):
            module.norm.folded = False
            module._weight_and_bias = lambda dtype, m=module: (m.weight, m.bias)
    return plain


@pytest.fixture(params=["resnet18", "timm:tf_efficientnet_lite0", "timm:resnet18"])
def backbone(request: pytest.FixtureRequest) -> Backbone:
    if request.param.startswith("timm:"):
        pytest.importorskip("timm", reason="timm is an extra")
    torch.manual_seed(0)
    backbone = Backbone(request.param, stages=(2, 3, 4))
    fill_norms(backbone)
    return backbone


def small_backbone() -> Backbone:
    backbone = Backbone("resnet18")
    fill_norms(backbone)
    return backbone


def test_equals_separate_norms(backbone: Backbone) -> None:
    """Maps and gradients in float64, for an image whose size no stride divides."""
    backbone.double()
    plain = unfolded(backbone)
    images = torch.randn(1, 3, 75, 91, dtype=torch.float64)
    gradients = []
    for network in (plain, backbone):
        maps = network(images)
        sum(x.square().mean() for x in maps).backward()
        gradients.append({k: p.grad for k, p in network.named_parameters() if p.requires_grad})
    for ours, theirs in zip(backbone(images), plain(images), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-8, atol=1e-10)
    with torch.no_grad():
        for ours, theirs in zip(backbone(images), plain(images), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_every_norm_is_folded(backbone: Backbone) -> None:
    """No operation of a norm is left, and where nothing trains a second pass computes no weights."""
    norms = [m for m in backbone.modules() if isinstance(m, FrozenBatchNorm2d)]
    assert norms
    assert all(norm.folded for norm in norms)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in backbone.modules())

    images = torch.randn(1, 3, 64, 64)
    backbone(images)
    with Operations() as operations:
        backbone(images)
    trainable = [m for m in backbone.modules() if isinstance(m, FoldedConv2d)]
    trainable = [m for m in trainable if m.weight.requires_grad]
    assert operations.counts["mul"] == len(trainable)  # the weights, and no activations
    backbone.requires_grad_(False)
    backbone(images)
    with Operations() as operations:
        backbone(images)
    assert operations.counts["mul"] == operations.counts["rsqrt"] == 0


def test_names_are_unchanged() -> None:
    frozen, live = Backbone("resnet18"), Backbone("resnet18", "live")
    assert list(frozen.state_dict()) == list(live.state_dict())


def change_by_optimizer(network: Backbone) -> None:
    """PyTorch does not count a fused step as a change of its parameters."""
    parameters = [p for p in network.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    torch.optim.SGD(parameters, lr=0.01, fused=True).step()


def change_by_loading(network: Backbone) -> None:
    torch.manual_seed(1)
    network.load_state_dict(small_backbone().state_dict())


def change_statistics(network: Backbone) -> None:
    with torch.no_grad():
        network.body.layer1[0].bn1.running_mean.add_(0.5)


def change_tensor(network: Backbone) -> None:
    conv = network.body.conv1
    conv.weight = nn.Parameter(conv.weight.detach() * 2, requires_grad=False)


def change_data(network: Backbone) -> None:
    network.body.conv1.weight.data = network.body.conv1.weight.data * 2


def change_in_data(network: Backbone) -> None:
    """PyTorch counts no change by `tensor.data`; a change of mode forgets the weights all the same."""
    network.body.conv1.weight.data.mul_(2)
    network.eval()


def change_dtype(network: Backbone) -> None:
    network.double()


CHANGES = (
    change_by_optimizer,
    change_by_loading,
    change_statistics,
    change_tensor,
    change_data,
    change_in_data,
    change_dtype,
)


@pytest.mark.parametrize("change", CHANGES)
def test_no_old_weights_after(change) -> None:
    torch.manual_seed(0)
    network = small_backbone()
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        before = network(images)[0]
        change(network)
        images = images.to(network.body.conv1.weight.dtype)
        after = network(images)[0]
        torch.testing.assert_close(after, unfolded(network)(images)[0], rtol=1e-3, atol=1e-3)
    if change is not change_dtype:
        assert (after - before).abs().max() > 1e-2


def test_training_after_inference_mode() -> None:
    network = small_backbone()
    images = torch.randn(1, 3, 64, 64, requires_grad=True)
    with torch.inference_mode():
        network(images)
    network(images)[0].sum().backward()
    assert images.grad is not None


def test_bf16_weights_are_folded_in_float32() -> None:
    conv = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), FrozenBatchNorm2d(4))
    fill_norms(conv)
    expected = conv[0].weight.detach() * conv[1].scale_and_shift()[0].view(-1, 1, 1, 1)
    fold_frozen_norms(conv)
    with torch.autocast("cpu", torch.bfloat16):
        assert conv(torch.randn(1, 3, 4, 4)).dtype == torch.bfloat16
    with torch.no_grad():
        weight, _ = conv[0]._weight_and_bias(torch.bfloat16)
    assert torch.equal(weight, expected.bfloat16())


class TwoReaders(nn.Module):
    """A network that reads the output of its convolution also without the norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 1), FrozenBatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return self.norm(x) + x


def test_output_that_others_read_is_not_folded() -> None:
    network = TwoReaders()
    fill_norms(network)
    images = torch.randn(1, 3, 4, 4)
    expected = network(images)
    fold_frozen_norms(network)
    assert not network.norm.folded
    assert torch.equal(network(images), expected)


@pytest.mark.parametrize(("stride", "dilation"), [(1, 1), (2, 1), (1, 2)])
def test_weight_gradient_from_contiguous_copies(stride: int, dilation: int) -> None:
    """Channels-last images on a CPU take another way to the same gradients than contiguous ones."""
    torch.manual_seed(0)
    conv = nn.Conv2d(5, 6, 3, stride, dilation, dilation, bias=False)
    network = nn.Sequential(conv, FrozenBatchNorm2d(6))
    fill_norms(network)
    fold_frozen_norms(nn.Sequential(nn.Conv2d(3, 5, 1), network))
    results = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(2, 5, 9, 12, generator=torch.Generator().manual_seed(1))
        x = x.to(memory_format=memory_format).requires_grad_()
        output = network(x)
        fast = type(output.grad_fn).__name__ == "_ContiguousWeightGradientBackward"
        assert fast is (memory_format is torch.channels_last)
        (output * torch.arange(output.numel()).view(output.shape)).sum().backward()
        results.append((output.detach(), x.grad, conv.weight.grad))
        conv.weight.grad = None
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-3)
