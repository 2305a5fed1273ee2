"""Safetensors files: weights that any program can read without running code, with metadata.

The metadata of a file of this project are the entries of a checkpoint that describe the weights (settings, class
names, normalization, ...), each as JSON. `load_checkpoint` reads them, so that such a file stands for a checkpoint,
except that no run can be continued from it.
"""

import os
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from util.checkpoints.checkpoint import DESCRIPTION, Checkpoint, to_plain
from util.checkpoints.weight_files import PRODUCER, import_safetensors
from util.files import to_json, write_atomically


def describe_weights(checkpoint: Checkpoint) -> dict[str, str]:
    """Return the metadata of a checkpoint's weights: name -> JSON."""
    entries = {name: getattr(checkpoint, name) for name in DESCRIPTION}
    known = {name: value for name, value in entries.items() if value not in (None, {})}
    return {PRODUCER: "1", **{name: to_json(to_plain(value)) for name, value in known.items()}}


def save_safetensors(
    state: Mapping[str, Tensor], path: str | os.PathLike, metadata: Mapping[str, str]
) -> Path:
    """Write tensors and metadata atomically. A tensor with several names is stored under each of them.

    Raises:
        UserError: the package safetensors is missing, or the file can't be written.
    """
    safetensors = import_safetensors(path)
    # Copies: the format has no shared storage, and other readers expect every name of a shared head.
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in state.items()}
    content = safetensors.save(tensors, {"format": "pt", **metadata})
    return write_atomically(path, lambda file: file.write(content))
