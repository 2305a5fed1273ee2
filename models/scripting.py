"""Models that TorchScript can't compile say what to use instead."""

from typing import NoReturn

from util.errors import UserError


class NotScriptable:
    """Base class of modules that `torch.jit.script` refuses in one line."""

    def __prepare_scriptable__(self) -> NoReturn:
        # Called by torch.jit.script, which would otherwise end with an error about some type annotation.
        raise UserError(
            "torch.jit.script: PyTorch has deprecated TorchScript, and these models don't support it; export with "
            "tools/export.py (ONNX or torch.export, docs/export.md)"
        )
