"""What is said about bfloat16 on a CPU."""

import pytest
import torch

from tests.tiny import captured_log
from util import bf16

CPU = torch.device("cpu")
FAST = {"avx2": True, "avx512_bf16": True, "amx_bf16": True, "num_physical_cores": 8}
SLOW = {"avx2": True, "avx512_bf16": False, "amx_bf16": False}


def lines(monkeypatch: pytest.MonkeyPatch, capabilities: dict, amp: bool, device: str) -> list[str]:
    monkeypatch.setattr(bf16, "cpu_capabilities", lambda: capabilities)
    with captured_log() as found:
        bf16.log_bf16(torch.device(device), amp)
    return found


def test_one_line_says_whether_bf16_is_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    (fast,) = lines(monkeypatch, FAST, True, "cpu")
    assert "this CPU has bfloat16 instructions (amx_bf16, avx512_bf16)" in fast
    (slow,) = lines(monkeypatch, SLOW, True, "cpu")
    assert "no bfloat16 instructions: --amp bf16 would be slower" in slow


@pytest.mark.parametrize(
    ("capabilities", "amp", "device"),
    [(SLOW, False, "cpu"), (SLOW, True, "cuda"), ({}, True, "cpu")],
)
def test_nothing_is_said_without_need(
    monkeypatch: pytest.MonkeyPatch, capabilities: dict, amp: bool, device: str
) -> None:
    """float32, a GPU, and a PyTorch that does not tell."""
    assert lines(monkeypatch, capabilities, amp, device) == []


def test_capabilities_of_this_cpu() -> None:
    known = bf16.cpu_capabilities()
    assert set(bf16.bf16_instructions(known)) <= set(known)
