"""`--compile`: backbone, encoder and decoder compiled by `torch.compile`, and a count of how often."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from util.logger import log

# Modules of a detector that dynamo traces without a break. The matcher reads its costs on the host, which would break
# a graph; heads and losses are few operations.
PARTS = {
    "backbone": "backbone.0",
    "encoder": "transformer.encoder",
    "decoder": "transformer.decoder",
}
# Padded and unpadded batches, training and evaluation, and a last smaller batch each need a graph of their own, the
# first two sizes too. PyTorch's limit of 8 would silently leave some of them uncompiled.
RECOMPILE_LIMIT = 64
Backend = Callable[[torch.fx.GraphModule, list[torch.Tensor]], Callable]


class Compilation:
    """The compiled parts of a detector. Parameters keep their names.

    The first batch compiles each part for its size, another size once more for any size, as PyTorch does by default.
    A part that can't be compiled runs uncompiled, which is logged once.

    Args:
        backend: a backend of `torch.compile`, by name or as a function.

    Attributes:
        counts: part -> how many graphs were compiled for it so far.
        failed: part -> why it is not compiled.
    """

    def __init__(self, detector: nn.Module, backend: str | Backend = "inductor") -> None:
        self.compile_graph = (
            torch._dynamo.lookup_backend(backend) if isinstance(backend, str) else backend
        )
        self.counts: Counter[str] = Counter()
        self.failed: dict[str, str] = {}
        self.logged = ""
        torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT

        modules = dict(detector.named_modules())
        self.parts = [part for part, name in PARTS.items() if name in modules]
        for part in self.parts:
            modules[PARTS[part]].compile(backend=self._backend(part))
        log.info(
            "--compile: %s are compiled in the first steps, which takes minutes; matcher and losses are not",
            ", ".join(self.parts),
        )

    def _backend(self, part: str) -> Backend:
        def compile_or_fall_back(
            graph: torch.fx.GraphModule, inputs: list[torch.Tensor]
        ) -> Callable:
            try:
                compiled = self.compile_graph(graph, inputs)
            except torch._dynamo.exc.RestartAnalysis:  # no failure: dynamo starts again
                raise
            except Exception as error:  # noqa: BLE001  # whatever a compiler on this machine raises
                self._report_failure(part, error)
                return graph.forward
            self.counts[part] += 1
            return compiled

        return compile_or_fall_back

    def _report_failure(self, part: str, error: Exception) -> None:
        if part not in self.failed:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            log.warning("--compile: the %s runs uncompiled (%s)", part, reason[:200])
            self.failed[part] = reason

    def log_counts(self) -> None:
        """Log how many graphs were compiled, if it has changed since the last call."""
        text = ", ".join(f"{part} {self.counts[part]}" for part in self.parts)
        if text != self.logged:
            log.info("--compile: graphs compiled so far: %s", text)
        self.logged = text


def compile_detector(model: Any, enabled: bool) -> Compilation | None:
    """Compile the detector of `model`, a detector or a pretext around one, if `enabled`."""
    return Compilation(model.base_detector()) if enabled else None
