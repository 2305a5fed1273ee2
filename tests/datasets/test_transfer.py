"""Batches on their way to the device: on a GPU on a stream of their own."""

import contextlib

import pytest
import torch

from datasets.collate import collate, to_device
from datasets.transfer import LookAhead, Transfer

CPU = torch.device("cpu")
NORMALIZATION = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4]}


def batch() -> tuple:
    generator = torch.Generator().manual_seed(0)
    images = [torch.randint(0, 256, (3, size, 8), dtype=torch.uint8) for size in (6, 8)]
    targets = [{"boxes": torch.rand(2, 4, generator=generator)} for _ in images]
    return collate(list(zip(images, targets, strict=True)))


def test_on_a_cpu_it_is_to_device() -> None:
    samples, targets = Transfer(CPU, NORMALIZATION)(*batch())
    expected, expected_targets = to_device(*batch(), CPU, **NORMALIZATION)
    assert samples.tensors.shape == expected.tensors.shape
    assert torch.equal(targets.tensors["boxes"], expected_targets.tensors["boxes"])


def test_the_current_stream_waits_and_every_tensor_is_recorded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The order of calls on fake streams: copy on the own stream, wait, then record each tensor of the batch."""
    calls: list[tuple] = []

    class Stream:
        def __init__(self, name: object) -> None:
            self.name = name

        def wait_stream(self, other: "Stream") -> None:
            calls.append(("wait", self.name, other.name))

    @contextlib.contextmanager
    def on_stream(stream: Stream):
        calls.append(("enter", stream.name))
        yield
        calls.append(("leave", stream.name))

    current = Stream("current")
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream("own"))
    monkeypatch.setattr(torch.cuda, "stream", on_stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current)
    recorded = []
    monkeypatch.setattr(
        torch.Tensor, "record_stream", lambda self, stream: recorded.append((id(self), stream))
    )
    monkeypatch.setattr(
        "datasets.transfer.to_device",
        lambda samples, targets, device, mean, std: to_device(samples, targets, CPU, mean, std),
    )
    samples, targets = Transfer(torch.device("cuda"), NORMALIZATION)(*batch())
    assert calls == [("enter", "own"), ("leave", "own"), ("wait", "current", "own")]
    tensors = [samples.tensors, samples.mask, *targets.tensors.values()]
    assert recorded == [(id(tensor), current) for tensor in tensors]


def test_look_ahead_reads_no_further_than_asked() -> None:
    read: list[int] = []

    def batches():
        for number in range(3):
            read.append(number)
            yield number, *batch()

    ahead = LookAhead(batches(), Transfer(CPU, NORMALIZATION))
    seen, fetched = [], []
    for (number, samples, _), inputs, targets in ahead:
        assert len(samples) == len(inputs) == len(targets) == 2
        seen.append((number, len(read)))
        if number != 1:
            fetched.append(ahead.fetch_next() is not None)
            assert ahead.fetch_next() is None
    assert seen == [(0, 1), (1, 2), (2, 3)]
    assert fetched == [True, False]  # there is no batch after the last one
    assert read == [0, 1, 2]
