"""Frozen batch norm, applied by the convolution before it.

A frozen norm multiplies each channel by a constant and adds another one. So convolution and norm together are one
convolution with the weight `weight * scale` and the bias `shift`: exact, also with zero padding, which comes before the
norm, and autograd finds the gradient of the original weight through the product. Scaling a weight costs far less than
scaling activations, which a training step would read and write again in both passes.

Parameters, buffers and their names stay where they are. Scale and shift are computed once; so is the folded weight
of layers whose weights do not train.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
import torchvision
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from models.precision import full_precision, under_autocast

SAMPLE_SIZE = (96, 160)  # of the image that finds which norm follows which convolution


class Derived:
    """A value computed from tensors, kept until one of them changes.

    A change is an in-place operation (optimizer step, `load_state_dict`), another tensor, or another storage
    (`model.to`). Writing through `tensor.data` leaves no trace: `clear` after it. Copies and pickles start empty.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self._options: Any = None
        self._sources: list[tuple[Tensor, int]] = []
        self._value: Any = None

    def __reduce__(self) -> tuple:
        return (Derived, ())

    def get(self, compute: Callable[[], Any], sources: list[Tensor], options: Any = None) -> Any:
        """Return `compute()`, a function of `sources` and `options` alone, without gradient."""
        if torch.compiler.is_compiling() or any(x.is_inference() or x.is_meta for x in sources):
            return compute()
        if self._options != options or not self._is_current(sources):
            # Normal tensors even under inference mode: a training step may read them later.
            with torch.inference_mode(False), torch.no_grad():
                self._value = compute()
            # Aliases keep the storage alive, so that no other tensor gets its address.
            self._sources = [(x.detach(), x._version) for x in sources]
            self._options = options
        return self._value

    def _is_current(self, sources: list[Tensor]) -> bool:
        return len(sources) == len(self._sources) and all(
            x._version == version and x.is_set_to(alias)
            for x, (alias, version) in zip(sources, self._sources, strict=True)
        )


class FrozenBatchNorm2d(torchvision.ops.FrozenBatchNorm2d):
    """Batch norm with constant statistics and affine parameters, in the dtype of its input.

    torchvision's own would turn half-precision activations into float32 under autocast.

    folded: the convolution before it applies this norm, see `fold_frozen_norms`; then it returns its input.
    """

    folded = False

    def __init__(self, num_features: int, eps: float = 1e-5) -> None:
        super().__init__(num_features, eps)
        self._constants = Derived()

    def train(self, mode: bool = True) -> "FrozenBatchNorm2d":
        self._constants.clear()
        return super().train(mode)

    def scale_and_shift(self) -> tuple[Tensor, Tensor]:
        """Return what channels are multiplied by and what is added, [C] each, not in half precision."""
        sources = [self.weight, self.bias, self.running_mean, self.running_var]
        return self._constants.get(self._scale_and_shift, sources)

    def _scale_and_shift(self) -> tuple[Tensor, Tensor]:
        scale = full_precision(self.weight) * (full_precision(self.running_var) + self.eps).rsqrt()
        return scale, full_precision(self.bias) - full_precision(self.running_mean) * scale

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H, W]"""
        if self.folded:
            return x
        scale, shift = (value.to(x.dtype).view(1, -1, 1, 1) for value in self.scale_and_shift())
        return x * scale + shift


class FrozenBatchNormAct2d(FrozenBatchNorm2d):
    """timm's frozen norm with an activation."""

    drop: nn.Module
    act: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H, W]"""
        return self.act(self.drop(super().forward(x)))


class _ContiguousWeightGradient(torch.autograd.Function):
    """A convolution whose weight gradient is computed from contiguous copies.

    On CPUs oneDNN computes it 1.5 to 4 times as fast as in channels last; all else is faster in channels last.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, stride, padding, dilation):
        ctx.save_for_backward(x, weight)
        ctx.options = (stride, padding, dilation)
        return nn.functional.conv2d(x, weight, bias, stride, padding, dilation)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        stride, padding, dilation = ctx.options
        options = (list(weight.shape[:1]), stride, padding, dilation, False, [0, 0], 1)
        needs_x, _, needs_bias = ctx.needs_input_grad[:3]
        grad_x, _, grad_bias = torch.ops.aten.convolution_backward(
            grad, x, weight, *options, [needs_x, False, needs_bias]
        )
        plain = (tensor.contiguous() for tensor in (grad, x, weight))
        grad_weight = torch.ops.aten.convolution_backward(*plain, *options, [False, True, False])[1]
        return grad_x, grad_weight, grad_bias, None, None, None


class FoldedConv2d(nn.Conv2d):
    """A convolution that applies the frozen norm after it.

    norm: that norm, which is not a submodule here.
    pad: pads the input first, as of timm's `Conv2dSame`; None: zero padding of the convolution.
    """

    norm: FrozenBatchNorm2d
    pad: Callable[..., Tensor] | None
    _folded: Derived

    def train(self, mode: bool = True) -> "FoldedConv2d":
        self._folded.clear()
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C', H', W']"""
        if self.pad is not None:
            x = self.pad(x, self.kernel_size, self.stride, self.dilation)
        weight, bias = self._weight_and_bias(self._compute_dtype(x))
        if self._has_slow_weight_gradient(x, weight):
            return _ContiguousWeightGradient.apply(
                x, weight, bias, self.stride, self.padding, self.dilation
            )
        return self._conv_forward(x, weight, bias)

    def _has_slow_weight_gradient(self, x: Tensor, weight: Tensor) -> bool:
        """Whether `_ContiguousWeightGradient` is faster: on a CPU in float32, with larger kernels than 1x1."""
        return (
            weight.requires_grad
            and torch.is_grad_enabled()
            and x.device.type == "cpu"
            and x.dtype == weight.dtype == torch.float32
            and self.groups == 1
            and (self.padding_mode, type(self.padding)) == ("zeros", tuple)
            and self.kernel_size != (1, 1)
            and not torch.compiler.is_compiling()
            and x.is_contiguous(memory_format=torch.channels_last)
        )

    def _compute_dtype(self, x: Tensor) -> torch.dtype:
        return torch.get_autocast_dtype(x.device.type) if under_autocast(x) else self.weight.dtype

    def _weight_and_bias(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        parameters = [self.weight] if self.bias is None else [self.weight, self.bias]
        # Also without gradients: a fused optimizer step changes weights without counting it as a change.
        if any(x.requires_grad for x in parameters):
            return self._fold(dtype)
        norm = self.norm
        sources = [*parameters, norm.weight, norm.bias, norm.running_mean, norm.running_var]
        return self._folded.get(lambda: self._fold(dtype), sources, dtype)

    def _fold(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return weight and bias of convolution and norm together, computed before any cast to half precision."""
        scale, shift = self.norm.scale_and_shift()
        if self.bias is not None:
            shift = shift + full_precision(self.bias) * scale
        weight = full_precision(self.weight) * scale.view(-1, 1, 1, 1)
        return weight.to(dtype), shift.to(dtype)


def adopt_frozen_norms(network: nn.Module) -> None:
    """Turn frozen norms of torchvision and timm into `FrozenBatchNorm2d`, in place."""
    for module in network.modules():
        kind = type(module).__name__
        if kind in ("FrozenBatchNorm2d", "FrozenBatchNormAct2d") and not isinstance(
            module, FrozenBatchNorm2d
        ):
            # The same buffers and attributes, another `forward`.
            with_act = kind == "FrozenBatchNormAct2d"
            module.__class__ = FrozenBatchNormAct2d if with_act else FrozenBatchNorm2d
            cast(FrozenBatchNorm2d, module)._constants = Derived()


def fold_frozen_norms(network: nn.Module) -> None:
    """Let convolutions apply the frozen norms that follow them, in place.

    Only where the norm is all that reads the convolution's output. Other norms are applied as they are.
    """
    adopt_frozen_norms(network)
    for conv, norm in _find_pairs(network):
        norm.folded = True
        pad = _padding_of(conv)
        # The same parameters and attributes, another `forward`: module names are those of weight files.
        conv.__class__ = FoldedConv2d
        # Around `nn.Module.__setattr__`, which would register the norm as a submodule.
        conv.__dict__.update(norm=norm, pad=pad, _folded=Derived())


@torch.no_grad()
def bake_frozen_norms(network: nn.Module) -> None:
    """Give folded convolutions the weight and bias of convolution and norm together, in place; for an export.

    The graph then has one operation instead of the computation of its weight.
    """
    for module in network.modules():
        if isinstance(module, FoldedConv2d) and module.pad is None:
            weight, bias = module._fold(module.weight.dtype)
            module.__class__ = nn.Conv2d  # type: ignore[assignment]
            module.weight, module.bias = nn.Parameter(weight, False), nn.Parameter(bias, False)


def _padding_of(conv: nn.Conv2d) -> Callable[..., Tensor] | None:
    if type(conv) is nn.Conv2d:
        return None
    from timm.layers import pad_same

    return pad_same


class _Readers(TorchFunctionMode):
    """Counts by how many operations a tensor is read, by its id. Keeps the tensors, so that ids stay unique."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[int] = Counter()
        self.tensors: list[Tensor] = []

    def __torch_function__(
        self, func: Any, types: Iterable, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if any(isinstance(x, Tensor) for x in tree_leaves(result)):  # not `x.shape`, `x.dtype`
            read = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
            self.counts.update({id(x) for x in read})
            self.tensors += read
        return result


@torch.no_grad()
def _find_pairs(network: nn.Module) -> list[tuple[nn.Conv2d, FrozenBatchNorm2d]]:
    """Run a network on an empty image, and return the convolutions whose outputs only one frozen norm reads."""
    kinds = [type(module).__name__ for module in network.modules()]
    if not any(kind.startswith("FrozenBatchNorm") for kind in kinds):
        return []
    outputs: dict[int, nn.Conv2d] = {}
    inputs: list[tuple[int, FrozenBatchNorm2d]] = []
    calls: Counter[nn.Module] = Counter()
    readers = _Readers()

    def after_conv(conv: Any, args: Any, output: Tensor) -> None:
        calls[conv] += 1
        outputs[id(output)] = conv
        readers.tensors.append(output)

    def before_norm(norm: Any, args: Any) -> None:
        calls[norm] += 1
        inputs.append((id(args[0]), norm))

    hooks: list[Any] = []
    for module in network.modules():
        if type(module) is nn.Conv2d or type(module).__name__ == "Conv2dSame":
            hooks.append(module.register_forward_hook(after_conv))
        elif isinstance(module, FrozenBatchNorm2d):
            hooks.append(module.register_forward_pre_hook(before_norm))
    training = network.training
    device = next(network.parameters()).device
    with readers:
        network.eval()(torch.zeros(1, 3, *SAMPLE_SIZE, device=device))
    network.train(training)
    for hook in hooks:
        hook.remove()
    return [
        (outputs[key], norm)
        for key, norm in inputs
        if key in outputs
        and readers.counts[key] == 1
        and calls[outputs[key]] == 1
        and calls[norm] == 1
    ]
