"""The formats of `tools/export.py`: content of a file from a recorded graph, and a function that runs it.

ONNX files run in ONNX Runtime, `.pt2` archives with `torch.export.load` alone.
"""

import contextlib
import importlib.util
import io
import json
import logging
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from tools.exports.graph import Graph, Recorded, record
from util.errors import UserError

ONNX_PACKAGES = ("onnx", "onnxruntime", "onnxscript")
AXES = {0: "batch", 2: "height", 3: "width"}  # names of the dynamic axes of images
METADATA = "metadata.json"  # in a .pt2 archive

Run = Callable[[dict[str, Tensor]], dict[str, Tensor]]


def check_packages(*names: str) -> None:
    """Check that optional packages are installed.

    Raises:
        UserError: with the command that installs the missing ones.
    """
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"{' and '.join(missing)} not installed, which this export needs: pip install {' '.join(missing)}"
        )


def to_onnx(recorded: Recorded, metadata: Mapping[str, str]) -> bytes:
    """Return an ONNX file of a recorded graph.

    Raises:
        UserError: onnx or onnxscript is not installed.
    """
    check_packages(*ONNX_PACKAGES)
    with _quiet(), torch.no_grad():
        program = torch.onnx.export(
            recorded.program,
            dynamo=True,
            verbose=False,
            output_names=recorded.graph.output_names,
        )
    assert program is not None
    model = program.model_proto
    _name_axes(model.graph)
    for name, text in metadata.items():
        model.metadata_props.add(key=name, value=text)
    return model.SerializeToString()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hide what the exporter's optimizer reports of its steps."""
    logger = logging.getLogger("onnxscript")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _name_axes(graph: Any) -> None:
    """Call the symbols of dynamic axes, such as `s34`, batch, height and width."""
    images = next(value for value in graph.input if value.name == "images")
    dims = images.type.tensor_type.shape.dim
    names = {dims[axis].dim_param: name for axis, name in AXES.items()}
    for value in [*graph.input, *graph.output, *graph.value_info]:
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.dim_param = re.sub(
                    r"\bs\d+\b", lambda match: names.get(match[0], match[0]), dim.dim_param
                )


def run_onnx(content: Any, num_threads: int | None = None) -> Run:
    """Return a function that runs an ONNX file, given by path or content, in ONNX Runtime on the CPU.

    Args:
        num_threads: by default as many as PyTorch uses.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = num_threads or torch.get_num_threads()
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]

    def run(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        arrays = {name: value.contiguous().numpy() for name, value in inputs.items()}
        return dict(zip(names, map(torch.from_numpy, session.run(None, arrays)), strict=True))

    return run


def to_archive(recorded: Recorded, metadata: Mapping[str, str]) -> bytes:
    """Return a `.pt2` archive of a recorded graph."""
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.export.save(
            recorded.program, file, extra_files={METADATA: json.dumps(dict(metadata))}
        )
    return file.getvalue()


def run_archive(content: bytes) -> Run:
    """Return a function that runs a `.pt2` archive."""
    module = torch.export.load(io.BytesIO(content)).module()

    def run(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        with torch.no_grad():
            return module(**inputs)

    return run


def onnx_detector(graph: Graph) -> Run:
    """Return a function that runs a graph in ONNX Runtime, by way of the file that `tools/export.py` writes."""
    return run_onnx(to_onnx(record(graph), {}))
