"""Compare an exported detector with the model it was exported from.

Shapes: B images, N queries or detections, M values of each.
"""

from collections.abc import Callable, Iterable

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from tools.exports.graph import EXAMPLE_SHAPE, Graph
from util.errors import UserError

# Largest difference of each output, relative to its largest value, or absolute if that is below 1. The rounding of
# float32 in another order of operations is about 1e-6.
TOLERANCE = 1e-4
# Scores this close may change places by rounding. Larger ones must not: an untrained detector's scores all lie within
# TOLERANCE of each other.
TIE = 1e-5
# Other sizes than the recorded one, odd ones and with other batches, one of them in portrait format.
OTHER_SHAPES = ((1, 3, 233, 160), (3, 3, 129, 302))

Run = Callable[[dict[str, Tensor]], dict[str, Tensor]]


def check(graph: Graph, run: Run, shapes: Iterable[tuple[int, ...]], what: str) -> float:
    """Run the export and the graph on random images of several shapes, and return the largest difference found.

    Args:
        run: the exported graph: inputs by name -> outputs by name.
        what: the export, for the message.

    Raises:
        UserError: the outputs differ by more than TOLERANCE, or the export can't run.
    """
    worst = 0.0
    for shape in shapes:
        assert tuple(shape) != EXAMPLE_SHAPE, "constants of the recorded size would not be found"
        inputs = graph.inputs(shape, seed=1)
        with torch.no_grad():
            expected = graph(**inputs)
        size = " x ".join(map(str, shape))
        try:
            found = run(inputs)
        except Exception as error:  # runtimes raise many types
            reason = str(error).strip().partition("\n")[0]
            raise UserError(f"{what} fails on images of {size} ({reason}); {_REMEDY}") from error
        difference = largest_difference(graph, expected, found)
        if not difference <= TOLERANCE:  # NaN too
            raise UserError(
                f"{what} differs from the model by {difference:.1e} on images of {size}, and {TOLERANCE:.0e} is "
                f"allowed; {_REMEDY}"
            )
        worst = max(worst, difference)
    return worst


_REMEDY = "nothing was written: export with the versions of constraints.txt"


def largest_difference(
    graph: Graph, expected: dict[str, Tensor], found: dict[str, Tensor]
) -> float:
    """Return the largest difference of any output, relative to the largest value of that output."""
    if graph.postprocess is not None or graph.detector.two_stage:
        expected, found = _match_rows(graph, expected, found)
    differences = []
    for name, wanted in expected.items():
        scale = wanted.abs().max().clamp(min=1).double()
        differences.append((wanted.double() - found[name].double()).abs().max() / scale)
    return float(torch.stack(differences).max())


def _match_rows(
    graph: Graph, expected: dict[str, Tensor], found: dict[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return both outputs with rows in the same order: [B * N, ...].

    Detections with almost equal scores, and the queries of a two-stage detector, which are encoder proposals ordered by
    score, may swap places by rounding. Of the `top_k` results the last may be another one: it is not compared.
    """
    rows, other_rows = (_comparable_rows(graph, outputs) for outputs in (expected, found))
    distances = torch.cdist(rows, other_rows, p=float("inf")).nan_to_num(1)  # [B, N, N]
    # Whatever is beyond the tolerance costs the same: one row without a counterpart must not shift the others.
    distances = distances.clamp(max=TOLERANCE)
    nearest = torch.stack([torch.from_numpy(linear_sum_assignment(x)[1]) for x in distances])
    image = torch.arange(len(nearest))[:, None].expand_as(nearest)  # [B, N]
    kept = torch.ones_like(nearest, dtype=torch.bool)
    if "scores" in expected:
        scores = expected["scores"]
        is_last = scores <= scores[:, -1:] + TIE
        kept = ~is_last | is_last.all(1, keepdim=True)
    return (
        {name: value[kept] for name, value in expected.items()},
        {name: value[image, nearest][kept] for name, value in found.items()},
    )


def _comparable_rows(graph: Graph, outputs: dict[str, Tensor]) -> Tensor:
    """Return the rows [B, N, M] of all outputs but masks, each value in the order of 1."""
    boxes = outputs["boxes"].double()
    if "scores" not in outputs:
        return torch.cat([outputs["logits"].double(), boxes], -1)
    boxes = boxes / boxes.abs().max().clamp(min=1)
    numbers = torch.stack([outputs["scores"].double(), outputs["labels"].double()], -1)
    return torch.cat([numbers, boxes], -1)
