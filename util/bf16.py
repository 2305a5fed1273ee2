"""The dtypes of `--amp`, and whether a device computes in bfloat16."""

from collections.abc import Mapping
from typing import Any

import torch

from util.logger import log

AMP_DTYPES = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}  # values of --amp


def cpu_capabilities() -> Mapping[str, Any]:
    """Return PyTorch's list of what this CPU can do; empty before PyTorch 2.11, which has none."""
    get = getattr(torch.cpu, "get_capabilities", None)
    return get() if get else {}


def bf16_instructions(capabilities: Mapping[str, Any]) -> list[str]:
    """Return the names of a CPU's bfloat16 instruction sets, such as `avx512_bf16` and `amx_bf16`, sorted."""
    return sorted(name for name, has in capabilities.items() if "bf16" in name and has)


def log_bf16(device: torch.device, amp: bool) -> None:
    """Log whether bfloat16 is fast on the CPU, if it is used there. All GPUs that PyTorch supports compute in it or
    emulate it; nothing is logged for them.
    """
    capabilities = cpu_capabilities()
    if not amp or device.type != "cpu" or not capabilities:
        return
    found = bf16_instructions(capabilities)
    if found:
        log.info("--amp bf16: this CPU has bfloat16 instructions (%s)", ", ".join(found))
    else:
        log.warning(
            "this CPU has no bfloat16 instructions: --amp bf16 would be slower than float32; use --amp no"
        )
