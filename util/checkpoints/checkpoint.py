"""The checkpoint format, and reading and writing its file.

A checkpoint is a `torch.save` file with plain containers and tensors only, so that it loads with `weights_only=True`.
Its keys are the published ones plus this project's own; `Checkpoint` has a field for each. `model` is a state dict with
the published parameter names.
"""

import dataclasses
import math
import os
import warnings
from argparse import Namespace
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from util.checkpoints.hugging_face import from_hugging_face, is_hugging_face, read_config
from util.checkpoints.other_codebases import check_codebase
from util.checkpoints.published_layouts import infer_siamese_pretext, to_detr_names
from util.checkpoints.weight_files import check_finite, read_weights
from util.checkpoints.wrapper_names import strip_wrappers
from util.errors import UserError
from util.files import is_disk_error, user_error, write_atomically

VERSION = 1
LATEST, BEST = "checkpoint.pth", "checkpoint_best.pth"
# What `weights_only=True` loads. Module state dicts are OrderedDicts, and MultiStepLR stores a Counter.
CONTAINERS = (dict, OrderedDict, Counter, list, tuple, set)
# Entries with weights, of this and other programs; the first one counts. The last ones are averages of the weights.
MODEL_ENTRIES = (
    "model",
    "state_dict",
    "model_state_dict",
    "model_state",
    "net",
    "network",
    "weights",
    "ema",
    "model_ema",
    "ema_state_dict",
)
MAX_NAME = 500  # characters of the name of a parameter or class
SCALARS = (type(None), bool, int, float, str, bytes)


@dataclass(kw_only=True)
class Checkpoint:
    """The content of a checkpoint file. Fields that a file of another program lacks are None or empty.

    Weights, and what they mean:
        model: state dict with DETR's parameter names, without `module.`.
        raw_model: with `--ema` the weights that training continues with; `model` has their moving average.
        args: settings of the run by flag name.
        class_names: row of the class head -> class name.
        category_ids: row of the class head -> category id in the annotation files; None: the rows are the ids.
        things: row of the class head -> whether it is a thing, of a panoptic detector.
        normalization: `mean` and `std` of the backbone, for RGB in 0..1.
        data_fingerprint: fingerprint of the data, or one each for "train" and "val".
        frozen: state dict of each frozen network of a pretext, such as its target encoder.
        version: version of this format.
        converted_from: the codebase that the file was converted from.

    Training state, for an exact resume:
        optimizer, lr_scheduler: their state dicts.
        scaler: state dict of the loss scaler of `--amp fp16`.
        epoch: the last finished epoch, 0-based as in the published checkpoints; -1 in the first epoch.
        batch: batches done in the epoch after it.
        step: optimizer steps done since the start of the run.
        averages: running averages of that epoch, see `util.runs.meters.Averages`.
        pending: values of a finished epoch that is not logged yet.
        best: best AP so far.
        seconds: training time so far.
        world_size: number of processes.
        position_unit: what `batch` counts: [images in the dataset, images per global batch].
        earlier: the first of these batches, if the epoch began with another batch size or number of processes:
            [images per global batch, number of batches] of each part of the epoch.
        random_states: states of the global random generators, by rank.

    Other content:
        extra: entries of other programs, by key. They are written back by `to_dict`.

    Not in the file:
        source: path or URL, for messages.
        hugging_face: True if the file had the parameter names of Hugging Face transformers.
        siamese_pretext: the pretext, if the file had the parameter names of Siamese DETR's codebase.
        num_tensors: number of tensors of the file's model.
    """

    model: dict[str, Tensor]
    raw_model: dict[str, Tensor] | None = None
    args: dict[str, Any] = field(default_factory=dict)
    class_names: dict[int, str] = field(default_factory=dict)
    category_ids: dict[int, int] | None = None
    things: dict[int, bool] | None = None
    normalization: dict[str, Any] | None = None
    data_fingerprint: str | dict[str, str] | None = None
    frozen: dict[str, dict[str, Tensor]] | None = None
    version: int | None = None
    converted_from: str | None = None

    optimizer: dict[str, Any] | None = None
    lr_scheduler: dict[str, Any] | None = None
    scaler: dict[str, Any] | None = None
    epoch: int | None = None
    batch: int | None = None
    step: int | None = None
    averages: dict[str, list[float]] | None = None
    pending: dict[str, Any] | None = None
    best: float | None = None
    seconds: float | None = None
    world_size: int | None = None
    position_unit: list[int] | None = None
    earlier: list[list[int]] | None = None
    random_states: list[dict[str, Any]] | None = None

    extra: dict[str, Any] = field(default_factory=dict)
    source: str = "the checkpoint"
    siamese_pretext: str | None = None
    hugging_face: bool = False
    num_tensors: int = 0

    def __post_init__(self) -> None:
        self.num_tensors = self.num_tensors or len(self.model)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any], source: str = "the checkpoint") -> "Checkpoint":
        """Build a checkpoint from the entries of a file whose `model` is a state dict.

        Entries with an unknown key, or with a value that does not fit the field of that name, go to `extra`.
        """
        known, extra = {}, {}
        for name, stored in content.items():
            key, value = to_plain(name), to_plain(stored)
            parsed = _parse_entry(key, value)
            if parsed is not None:
                known[key] = parsed
            elif value is not None:
                extra[key] = value
        return cls(**known, extra=extra, source=source)

    def to_dict(self) -> dict[str, Any]:
        """Return the entries of the file. Fields without a value are skipped."""
        entries = {name: getattr(self, name) for name in STORED_FIELDS}
        if self.version is None:
            # A file of another program without `args` or `class_names` must not gain empty ones.
            entries["args"] = self.args or None
            entries["class_names"] = self.class_names or None
        entries = {name: value for name, value in entries.items() if value is not None}
        return {**self.extra, **entries}

    def missing_state(self) -> str | None:
        """Return what a resume needs and the file lacks; None for a file that can be resumed, not just loaded.

        A schedule is not needed: a run can put its own one where it would be.
        """
        optimizer = self.optimizer or {}
        groups = optimizer.get("param_groups")
        is_list = isinstance(groups, list | tuple) and len(groups) > 0
        if not is_list or not all(isinstance(group, Mapping) for group in groups):
            return "no optimizer"
        if not isinstance(optimizer.get("state"), Mapping):
            return "an optimizer without its moments"
        if not all(map(_is_finite, optimizer["state"].values())):
            return "an optimizer with NaN or infinite moments"
        return "no epoch" if self.epoch is None else None


STORED_FIELDS = [
    entry.name
    for entry in dataclasses.fields(Checkpoint)
    if entry.name not in ("extra", "source", "siamese_pretext", "hugging_face", "num_tensors")
]
# Those that describe the weights, without tensors.
DESCRIPTION = (
    "args",
    "class_names",
    "category_ids",
    "things",
    "normalization",
    "data_fingerprint",
    "version",
    "converted_from",
    "epoch",
)
_WHOLE_NUMBERS = ("version", "epoch", "batch", "step", "world_size")
_NUMBERS = (*_WHOLE_NUMBERS, "best", "seconds")


def _is_anything(_value: Any) -> bool:
    return True


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_pair(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) == 2 and all(map(_is_number, value))


def is_state_dict(value: Any) -> bool:
    """Return True for a non-empty mapping of names to tensors."""
    if not isinstance(value, Mapping) or len(value) == 0:
        return False
    return all(isinstance(key, str) and isinstance(entry, Tensor) for key, entry in value.items())


# Field that is a mapping -> whether it may have this value under some key.
_ENTRY_CHECKS: dict[str, Callable[[Any], bool]] = {
    "model": _is_anything,  # checked before
    "normalization": _is_anything,
    "optimizer": _is_anything,
    "lr_scheduler": _is_anything,
    "scaler": _is_anything,
    "averages": _is_pair,
    "pending": _is_number,
    "frozen": is_state_dict,
}


def _is_finite(state: Any) -> bool:
    """Return False if an optimizer's state of one parameter has a tensor with NaN or infinite values."""
    values = state.values() if isinstance(state, Mapping) else ()
    return all(bool(torch.isfinite(value).all()) for value in values if isinstance(value, Tensor))


def _parse_entry(key: str, value: Any) -> Any:
    """Return the plain value in the form that the field `key` has; None if it does not fit such a field."""
    if key == "args":
        if not isinstance(value, Mapping):
            return None
        return {name: entry for name, entry in value.items() if isinstance(name, str)}
    if key == "class_names":
        return _parse_class_names(value)
    if key == "category_ids":
        return _with_int_keys(value, int)
    if key == "things":
        return _with_int_keys(value, bool)
    if key == "raw_model":
        return value if is_state_dict(value) else None
    if key in _ENTRY_CHECKS:
        is_mapping = isinstance(value, Mapping)
        return value if is_mapping and all(map(_ENTRY_CHECKS[key], value.values())) else None
    if key in _NUMBERS:
        number = _parse_number(value, whole=key in _WHOLE_NUMBERS)
        is_count = key in _WHOLE_NUMBERS and number is not None
        return None if is_count and number < (-1 if key == "epoch" else 0) else number
    if key == "random_states":
        return value if isinstance(value, list) else None
    if key == "position_unit":
        return value if _is_pair(value) else None
    if key == "earlier":
        return value if isinstance(value, list) and all(map(_is_pair, value)) else None
    if key == "data_fingerprint":
        return value if isinstance(value, str | Mapping) else None
    return value if key == "converted_from" else None


def _is_pair(value: Any) -> bool:
    is_list = isinstance(value, list) and len(value) == 2
    return is_list and all(type(number) is int and number > 0 for number in value)


def _parse_number(value: Any, *, whole: bool) -> int | float | None:
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return int(value) if whole else value


def _parse_class_names(value: Any) -> dict[int, str] | None:
    """Return row -> name of the list or dict that a program stores; None for anything else.

    A list of COCO's categories gives id -> name; `infer_classes` finds out whether the rows are the ids.
    """
    if isinstance(value, list | tuple) and value and all(map(_is_category, value)):
        names = {entry["id"]: str(entry["name"]) for entry in value}
        return names if len(names) == len(value) else None
    if isinstance(value, list | tuple):
        names = dict(enumerate(value))
    else:
        names = _with_int_keys(value)
        if names is None and isinstance(value, Mapping):
            # The other way round: name -> row.
            names = _with_int_keys({str(row): name for name, row in value.items()})
    return names if names and all(map(_is_class_name, names.values())) else None


def _is_class_name(name: Any) -> bool:
    if not isinstance(name, str) or len(name) > MAX_NAME:
        return False
    # Half of a surrogate pair can't be written to a log or a page.
    return not any("\ud800" <= letter <= "\udfff" for letter in name)


def _is_category(entry: Any) -> bool:
    return isinstance(entry, Mapping) and isinstance(entry.get("id"), int) and "name" in entry


def _with_int_keys(value: Any, kind: type = object) -> dict[int, Any] | None:
    """Return a dict with its keys as integers (JSON turns them into strings); None if they aren't, as in {"cat": 0}.

    kind: of the entries; None is returned for one of another kind.
    """
    if not isinstance(value, Mapping) or not all(
        isinstance(entry, kind) for entry in value.values()
    ):
        return None
    try:
        entries = {int(row): entry for row, entry in value.items() if not isinstance(row, Tensor)}
    except (OverflowError, TypeError, ValueError):
        return None
    numbers = [*entries, *(entry for entry in entries.values() if isinstance(entry, int))]
    return entries if all(abs(number) < 2**53 for number in numbers) else None


# --------------------------------------------------------------------------------------------------------------- files


def load_checkpoint(path_or_url: str | os.PathLike, map_location: Any = "cpu") -> Checkpoint:
    """Load a checkpoint from a path or a URL (downloaded once), without running code in the file.

    A bare state dict and the entries of other programs (`MODEL_ENTRIES`) become `model`, the prefixes of wrappers are
    removed, and the parameter names of Siamese DETR's codebase and of Hugging Face transformers become DETR's.

    Raises:
        UserError: the file can't be read, contains no weights, or some of them are NaN or infinite.
    """
    return parse_checkpoint(read_weights(path_or_url, map_location), path_or_url)


def parse_checkpoint(content: Any, source: str | os.PathLike) -> Checkpoint:
    """Return the checkpoint in a file's content, as `load_checkpoint` does. `source` names the file in messages.

    Raises:
        UserError: the content has no weights, some of them are NaN or infinite, or they are of a related codebase.
    """
    if not isinstance(content, Mapping):
        raise UserError(
            f"{source} contains a {type(content).__name__}, not a checkpoint with the entry 'model'; "
            "choose another file"
        )
    content = _find_model(content, source)
    _check_names(content["model"], source)
    state = strip_wrappers(content["model"], source)
    is_translated = is_hugging_face(state)
    if is_translated:
        state = from_hugging_face(state)
        content = {**read_config(Path(source)), **content}
    checkpoint = Checkpoint.from_dict(content, str(source))
    checkpoint.hugging_face = is_translated
    if "script" not in checkpoint.args:  # an extension of this project may have any names
        check_codebase(state, source)
    for weights in (state, checkpoint.raw_model or {}, *(checkpoint.frozen or {}).values()):
        check_finite(weights, source)
    checkpoint.siamese_pretext = infer_siamese_pretext(state)
    checkpoint.model = to_detr_names(state)
    return checkpoint


def save_checkpoint(checkpoint: Checkpoint | Mapping[str, Any], path: str | os.PathLike) -> None:
    """Save a checkpoint atomically: if interrupted, `path` is either the previous file or the complete new one.

    Raises:
        TypeError: the checkpoint contains anything but plain containers, numbers, strings and tensors, which
            `weights_only=True` would refuse to load.
        UserError: the disk is full, or the folder can't be written.
    """
    entries = checkpoint.to_dict() if isinstance(checkpoint, Checkpoint) else dict(checkpoint)
    _check_plain(entries, "checkpoint")
    write_atomically(path, lambda file: torch.save(entries, file))


def read_entries(path: str | os.PathLike) -> dict[str, Any] | None:
    """Return the entries of a checkpoint of this project without reading its tensors; None without a readable one.

    Raises:
        DiskError: the disk fails, so that nothing is known about the file.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the pickles of damaged files
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except OSError as error:
        if is_disk_error(error):
            raise user_error("read", path, error) from error
        return None
    except Exception:  # noqa: BLE001 - one wrong byte of a pickle may raise anything
        return None  # missing, damaged or of another format
    return content if isinstance(content, dict) else None


def _find_model(content: Mapping[str, Any], source: Any) -> dict[str, Any]:
    """Return the content with its weights under `model`."""
    for name in MODEL_ENTRIES:
        entry = content.get(name)
        if isinstance(entry, Mapping) and is_state_dict(entry.get("module")):
            entry = entry["module"]  # of an exponential moving average
        if is_state_dict(entry):
            # Some programs store a config or a name under `model`, next to the `state_dict`.
            rest = {key: value for key, value in content.items() if key not in (name, "model")}
            return {"model": entry, **rest}
    if is_state_dict(content):
        return {"model": content}

    for name in MODEL_ENTRIES:
        entries = content.get(name)
        if isinstance(entries, Mapping):
            _check_named_tensors(entries, name, source)
    keys = ", ".join(str(key) for key in list(content)[:5]) or "nothing"
    raise UserError(f"{source} contains {keys}, but no 'model' with weights; choose another file")


def _check_names(state: Mapping[str, Tensor], source: Any) -> None:
    for name in state:
        # Patterns are matched to the names, which takes ever longer.
        if len(name) > MAX_NAME or not name.isprintable():
            raise UserError(
                f"{source} has a tensor with the name {name[:60]!r} ({len(name)} characters), which is no parameter "
                "name: choose another file"
            )


def _check_named_tensors(entries: Mapping[Any, Any], name: str, source: Any) -> None:
    for key, value in entries.items():
        if not is_state_dict({key: value}):
            raise UserError(
                f"{source}: '{name}' contains {key!r} ({type(value).__name__}), which is not a named tensor; "
                "save model.state_dict() instead, or choose another file"
            )


def to_plain(value: Any) -> Any:
    """Convert a value to what `weights_only=True` loads.

    Namespace -> dict, NumPy values and arrays -> Python's, subclasses of containers -> the container; anything else
    that is not plain, such as paths, devices and dtypes, becomes a str.
    """
    if isinstance(value, Namespace):
        value = vars(value)
    if isinstance(value, Mapping):
        items = {to_plain(key): to_plain(item) for key, item in value.items()}
        return Counter(items) if isinstance(value, Counter) else items
    for container in (list, tuple, set):
        if isinstance(value, container):
            return container(to_plain(item) for item in value)
    if isinstance(value, np.generic | np.ndarray):
        return to_plain(value.tolist()) if value.dtype.hasobject else value.tolist()
    if isinstance(value, Tensor) or type(value) in SCALARS:
        return value
    for scalar in (int, float, str, bytes):
        if isinstance(value, scalar):  # a subclass, such as an IntEnum
            return scalar(value)
    return str(value)


def _check_plain(value: Any, where: str) -> None:
    """Raise TypeError for anything that `weights_only=True` does not load. `where` is the place in the checkpoint."""
    # Exact types: a subclass of dict or float (np.float64 is one) is pickled with its class.
    if type(value) in SCALARS or type(value) in (Tensor, nn.Parameter):
        return
    if type(value) not in CONTAINERS:
        raise TypeError(
            f"{where} is a {type(value).__module__}.{type(value).__qualname__}; "
            "a checkpoint can only contain plain containers, numbers, strings and tensors"
        )

    if isinstance(value, dict):
        for key, entry in value.items():
            _check_plain(key, f"a key of {where}")
            _check_plain(entry, f"{where}[{key!r}]")
    else:
        for index, entry in enumerate(value):
            _check_plain(entry, f"{where}[{index}]")
