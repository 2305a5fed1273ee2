"""`--tf32` sets how PyTorch computes float32 on NVIDIA GPUs."""

from collections.abc import Iterator

import pytest
import torch

from tests.tiny import captured_log
from util.runs.session import start_session
from util.settings import FINETUNE, make_parser

Switches = tuple[bool, bool]  # convolutions, matrix products


def switches() -> Switches:
    return torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32


def set_switches(values: Switches) -> None:
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = values


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    before = switches()
    yield
    set_switches(before)


@pytest.mark.parametrize("before", [(True, False), (False, True)])
@pytest.mark.parametrize(
    ("flags", "expected"),
    [([], None), (["--tf32", "yes"], (True, True)), (["--tf32", "no"], (False, False))],
)
def test_tf32(before: Switches, flags: list[str], expected: Switches | None) -> None:
    """Both switches, or PyTorch's own values without the flag. A CPU accepts it and computes as before."""
    x = torch.randn(32, 32, generator=torch.Generator().manual_seed(0))
    product = x @ x
    set_switches(before)
    args = make_parser(FINETUNE).parse_args(["--device", "cpu", *flags])
    with captured_log() as lines:
        session = start_session(args)
    assert switches() == (expected or before)
    assert session.settings.tf32 == (flags[1] if flags else None)
    assert torch.equal(x @ x, product)
    assert not any("tf32" in line for line in lines)
