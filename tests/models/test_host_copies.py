"""The host waits for the GPU once per forward pass and criterion, found out on fake CUDA tensors, without a GPU."""

from unittest import mock

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from models import build_model, matcher, ms_deform_attn
from tests.tiny import make_batch, make_targets, tiny_args
from util.nested_tensor import NestedTensor
from util.packed_targets import PackedTargets
from util.settings import FINETUNE, PRETRAIN
from util.settings.registry import DETECTORS

CUDA = torch.device("cuda")


class BlockingCopies(TorchDispatchMode):
    """Records copies between host and device for which the host waits.

    On fake tensors an operation raises if it needs their values on the host, such as `item` and `nonzero`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        name = function.overloadpacket.__name__
        if name in ("_to_copy", "copy_"):
            source = args[1] if name == "copy_" else args[0]
            waits = not kwargs.get("non_blocking", args[2] if len(args) > 2 else False)
            if waits and source.device.type != result.device.type:
                self.found.append(f"{name} from {source.device.type} to {result.device.type}")
        return result


def move_to_fake_cuda(model: nn.Module, fake: FakeTensorMode) -> None:
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            moved = fake.from_tensor(parameter.detach()).to(CUDA)
            setattr(module, name, nn.Parameter(moved, parameter.requires_grad))
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, fake.from_tensor(buffer).to(CUDA))


REGIONS = ("--proposals", "random", "--max_prop", "10", "--num_patches", "10")


@pytest.mark.parametrize(
    ("script", "flags", "counts", "expected"),
    [
        (FINETUNE, ("--detector", "detr"), [0, 0], 0),
        *((FINETUNE, ("--detector", name), [0, 4], 1) for name in DETECTORS),
        # Encoder proposals are matched apart.
        (FINETUNE, ("--detector", "deformable_detr", "--two_stage"), [3, 4], 2),
        (FINETUNE, ("--masks",), [1, 4], 1),
        (PRETRAIN, ("--pretext", "random_query_patch", "--feature_recon"), [5, 5], 1),
        (PRETRAIN, ("--pretext", "region_prior", "--object_embedding_loss", *REGIONS), [5, 5], 1),
        (PRETRAIN, ("--pretext", "siamese", "--proposals", "random"), [5] * 4, 1),
    ],
)
def test_host_waits_once_for_the_matcher(
    script: str,
    flags: tuple[str, ...],
    counts: list[int],
    expected: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    waits = []

    def copy_to_host(values: torch.Tensor, _: object) -> np.ndarray:
        waits.append(values.shape)
        return np.random.default_rng(0).random(values.shape)

    monkeypatch.setattr(matcher, "copy_to_host", copy_to_host)
    monkeypatch.setattr(ms_deform_attn, "HAS_TRITON", False)
    # There is no pinned memory without a GPU. `non_blocking` tells that the product asks for it.
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)

    args = tiny_args(script, *flags)
    targets = make_targets(counts, patches=counts[0] if script == PRETRAIN else 0)
    for target in targets:
        target["size"] = torch.tensor([64, 64])
        if args.masks:
            target["masks"] = torch.zeros(len(target["boxes"]), 64, 64, dtype=torch.bool)
    samples, packed = make_batch(len(counts)), PackedTargets.pack(targets)
    model, criterion, _ = build_model(args)
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        for module in (model.train(), criterion.train(), *model.frozen_parts().values()):
            move_to_fake_cuda(module, fake)
        for key, value in packed.tensors.items():
            packed.tensors[key] = fake.from_tensor(value).to(CUDA)
        image, mask = (fake.from_tensor(x).to(CUDA) for x in (samples.tensors, samples.mask))
        images = NestedTensor(image, mask, False)
        with BlockingCopies() as copies:
            outputs = model(images, packed) if model.needs_targets else model(images)
            criterion.total_loss(criterion(outputs, packed))
    assert copies.found == []
    assert len(waits) == expected


def test_what_is_queued_while_waiting_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of calls on a fake GPU: copy, event, the other work, and a wait for the event alone."""
    host, values = mock.Mock(), mock.Mock(is_cuda=True, shape=(2, 3, 4), dtype=torch.float32)
    calls = mock.Mock()
    calls.attach_mock(host.copy_, "copy")
    monkeypatch.setattr(torch, "empty", lambda *_, **__: host)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: "stream")
    monkeypatch.setattr(torch.cuda, "Event", lambda: calls.event)
    assert matcher.copy_to_host(values, calls.work) is host.numpy()
    assert calls.mock_calls == [
        mock.call.copy(values, non_blocking=True),
        mock.call.event.record("stream"),
        mock.call.work(),
        mock.call.event.synchronize(),
    ]
