"""What a checkpoint holds, and reading and writing its file.

A file of torch.save holds plain containers and tensors only, under the published keys (`Checkpoint` has a field for
each). Its `model` is a state dict with the published parameter names.
"""

import dataclasses
import os
from argparse import Namespace
from collections import Counter, OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from util.checkpoints.published_layouts import siamese_pretext, to_detr_names
from util.checkpoints.weight_files import read_weights
from util.errors import UserError
from util.files import write_atomically

VERSION = 1
LATEST, BEST = "checkpoint.pth", "checkpoint_best.pth"
CONTAINERS = (dict, OrderedDict, Counter, list, tuple, set)
SCALARS = (type(None), bool, int, float, str, bytes)


@dataclass(kw_only=True)
class Checkpoint:
    """The content of a checkpoint. Files of other programs have some of it; what they have besides is in `others`.

    The weights, and what they mean:
        model: state dict, with DETR's names and without `module.`.
        args: the settings of the run by flag name; empty if the file has none.
        class_names: row of the class head -> name. category_ids: row -> category id in the annotation files, where
            rows are not these ids. normalization: `mean` and `std` of the backbone, for RGB in 0..1.
        frozen: state dict of each frozen network of a pretext, such as its target encoder.
        version: of this format. converted_from: the codebase that the file was converted from.

    The state of the training, for an exact resume:
        optimizer, lr_scheduler: their state dicts. epoch: the last finished one, counted from 0, as published. batch:
        steps done in the next one. averages: of its values so far. pending: values of a finished epoch that is not
        logged yet. best: the best AP so far. seconds: of training. world_size: number of processes. position_unit:
        what `batch` counts. random_states: of the global generators, by rank.

    Not in the file:
        source: path or address, for messages. siamese: the pretext, if the file had the names of Siamese DETR's
        codebase. tensors: how many the file's model has.
    """

    model: dict[str, Tensor]
    args: dict[str, Any] = field(default_factory=dict)
    class_names: dict[int, str] = field(default_factory=dict)
    category_ids: dict[int, int] | None = None
    normalization: dict[str, Any] | None = None
    frozen: dict[str, dict[str, Tensor]] | None = None
    version: int | None = None
    converted_from: str | None = None

    optimizer: dict[str, Any] | None = None
    lr_scheduler: dict[str, Any] | None = None
    epoch: int | None = None
    batch: int | None = None
    averages: dict[str, list[float]] | None = None
    pending: dict[str, Any] | None = None
    best: float | None = None
    seconds: float | None = None
    world_size: int | None = None
    position_unit: list[int] | None = None
    random_states: list[dict[str, Any]] | None = None

    others: dict[str, Any] = field(default_factory=dict)
    source: str = "the checkpoint"
    siamese: str | None = None
    tensors: int = 0

    def __post_init__(self) -> None:
        self.tensors = self.tensors or len(self.model)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any], source: str = "the checkpoint") -> "Checkpoint":
        """From the entries of a file whose `model` is a state dict. An entry that other programs use for other things
        goes to `others`.
        """
        known, others = {}, {}
        for key, value in content.items():
            value = _as_field(key, value)
            (others if value is None else known)[key] = content[key] if value is None else value
        others = {key: value for key, value in others.items() if value is not None}
        return cls(**known, others=others, source=source)

    def to_dict(self) -> dict[str, Any]:
        """The entries of a file, without those that have no value. What a file of another program lacks stays out."""
        entries = {name: getattr(self, name) for name in STORED_FIELDS}
        if self.version is None:
            entries.update(args=self.args or None, class_names=self.class_names or None)
        return {
            **self.others,
            **{name: value for name, value in entries.items() if value is not None},
        }

    @property
    def can_resume(self) -> bool:
        """Whether it holds the state of a training, not weights alone."""
        return None not in (self.optimizer, self.lr_scheduler, self.epoch)


STORED_FIELDS = [
    entry.name
    for entry in dataclasses.fields(Checkpoint)
    if entry.name not in ("others", "source", "siamese", "tensors")
]
_MAPPINGS = (
    "model",
    "category_ids",
    "normalization",
    "frozen",
    "optimizer",
    "lr_scheduler",
    "averages",
    "pending",
)
_NUMBERS = ("version", "epoch", "batch", "best", "seconds", "world_size")


def _as_field(key: str, value: Any) -> Any:
    """The value as the field `key` holds it; None if it is no such field's."""
    if key == "args":
        plain = plain_settings(value)
        return plain if isinstance(plain, Mapping) else None
    if key == "class_names" and isinstance(value, list | tuple):  # of other programs
        return dict(enumerate(value))
    if key in ("class_names", "category_ids"):
        return _by_row(value)
    if key in _MAPPINGS:
        return value if isinstance(value, Mapping) else None
    if key in _NUMBERS:
        return value if isinstance(value, int | float) else None
    if key in ("position_unit", "random_states"):
        return value if isinstance(value, list) else None
    return value if key == "converted_from" else None


def _by_row(value: Any) -> dict[int, Any] | None:
    """JSON makes text of rows; None where the keys are no rows, as in {"cat": 0}."""
    try:
        return {int(row): entry for row, entry in value.items()}
    except (AttributeError, TypeError, ValueError):
        return None


# --------------------------------------------------------------------------------------------------------------- files


def load_checkpoint(path_or_url: str | os.PathLike, map_location: Any = "cpu") -> Checkpoint:
    """A checkpoint from a local path or an https address (downloaded once), read without running code in it.

    `model` is a state dict without `module.`; a bare state dict and `state_dict` (mmcv) become `model`, and the names
    of Siamese DETR's codebase become DETR's.

    Raises:
        UserError: one line that names the file and what is wrong with it.
    """
    return as_checkpoint(read_weights(path_or_url, map_location), path_or_url)


def as_checkpoint(content: Any, source: str | os.PathLike) -> Checkpoint:
    """What `load_checkpoint` makes of the content of a file.

    Raises:
        UserError: it holds no weights.
    """
    if not isinstance(content, Mapping):
        raise UserError(
            f"{source} holds a {type(content).__name__}, not a checkpoint with the entry 'model'; choose another file"
        )
    checkpoint = Checkpoint.from_dict(_with_model(content, source), str(source))
    state = strip_prefix(checkpoint.model, "module.")
    checkpoint.siamese, checkpoint.model = siamese_pretext(state), to_detr_names(state)
    return checkpoint


def save_checkpoint(checkpoint: Checkpoint | Mapping[str, Any], path: str | os.PathLike) -> None:
    """Saves atomically: after any interruption `path` is the previous file or the complete new one.

    Raises:
        TypeError: anything but plain containers, numbers, texts and tensors, since nothing else could be loaded with
            `weights_only=True`.
        UserError: the disk is full, or the folder can't be written.
    """
    entries = checkpoint.to_dict() if isinstance(checkpoint, Checkpoint) else dict(checkpoint)
    _check_plain(entries, "checkpoint")
    write_atomically(path, lambda file: torch.save(entries, file))


def find_resume(path_or_auto: str | None, output_dir: str | os.PathLike | None) -> str | None:
    """The path to resume from; None: start from scratch. `auto` is output_dir/checkpoint.pth, if it exists."""
    if not path_or_auto:
        return None
    if path_or_auto != "auto":
        return str(path_or_auto)
    if not output_dir:
        raise UserError(
            "--resume auto looks for checkpoint.pth in --output_dir: add --output_dir DIR"
        )
    path = Path(output_dir) / LATEST
    return str(path) if path.exists() else None


def _with_model(content: Mapping[str, Any], source: Any) -> dict[str, Any]:
    for name in ("model", "state_dict"):
        if is_state_dict(content.get(name)):
            rest = {key: value for key, value in content.items() if key not in (name, "model")}
            return {"model": content[name], **rest}
    if is_state_dict(content):
        return {"model": content}
    for name in ("model", "state_dict"):
        entries = content.get(name).items() if isinstance(content.get(name), Mapping) else ()
        odd = next(
            (
                f"{key!r} ({type(value).__name__})"
                for key, value in entries
                if not is_state_dict({key: value})
            ),
            None,
        )
        if odd:
            raise UserError(
                f"{source}: '{name}' holds {odd}, which is no named tensor; save model.state_dict() in its place, or "
                "choose another file"
            )
    keys = ", ".join(str(key) for key in list(content)[:5]) or "nothing"
    raise UserError(f"{source} holds {keys}, but no 'model' with weights; choose another file")


def is_state_dict(value: Any) -> bool:
    """True for a non-empty mapping of names to tensors."""
    return (
        isinstance(value, Mapping)
        and len(value) > 0
        and all(isinstance(key, str) and isinstance(entry, Tensor) for key, entry in value.items())
    )


def strip_prefix(state: Mapping[str, Tensor], prefix: str = "module.") -> dict[str, Tensor]:
    """The state dict without `prefix`, if every key has it; else a copy as it is."""
    if state and all(key.startswith(prefix) for key in state):
        return {key[len(prefix) :]: value for key, value in state.items()}
    return dict(state)


def plain_settings(value: Any) -> Any:
    """Settings as plain containers: Namespace -> dict, paths -> text, numpy numbers and arrays -> Python's."""
    if isinstance(value, Namespace):
        value = vars(value)
    if isinstance(value, Mapping):
        return {key: plain_settings(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set):
        return type(value)(plain_settings(item) for item in value)
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    return str(value) if isinstance(value, PurePath | torch.device) else value


def _check_plain(value: Any, where: str) -> None:
    if type(value) in SCALARS or type(value) in (Tensor, nn.Parameter):
        return
    if type(value) not in CONTAINERS:
        raise TypeError(
            f"{where} is a {type(value).__module__}.{type(value).__qualname__}; "
            "a checkpoint holds only plain containers, numbers, texts and tensors"
        )
    if isinstance(value, dict):
        for key, entry in value.items():
            _check_plain(key, f"a key of {where}")
            _check_plain(entry, f"{where}[{key!r}]")
    else:
        for index, entry in enumerate(value):
            _check_plain(entry, f"{where}[{index}]")
