"""Load a checkpoint into a model: strictly, to resume or evaluate, or what fits, to fine-tune.

Shapes in comments: C rows of a class head ("no object" included), Q queries, D width.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from util.checkpoints.adoption import is_pretext, no_detector_message, pretext_prefixes
from util.checkpoints.architecture import has_mask_head, infer_detector, strip_detr_prefix
from util.checkpoints.checkpoint import Checkpoint
from util.checkpoints.classes import count_classes, infer_classes, infer_classification
from util.checkpoints.load_report import LoadReport
from util.errors import UserError

# Buffers that a FLOP counter left in some published files.
OPERATION_COUNTERS = ("total_ops", "total_params")

# Parameters that must come from the file. The class head may not fit, and pretexts have parts of their own.
REQUIRED_PREFIXES = ("backbone.", "input_proj.", "transformer.", "query_embed.", "bbox_embed.")


def load_strict(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Load a checkpoint into `model` strictly, to resume or evaluate.

    Raises:
        UserError: names or shapes of file and model differ.
    """
    state = {
        key: value
        for key, value in checkpoint.model.items()
        if not key.endswith(OPERATION_COUNTERS)
    }
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise UserError(_mismatch_message(model, state, checkpoint.source, error)) from error


def without_mask_head(checkpoint: Checkpoint) -> Checkpoint:
    """Return the detector of a checkpoint with a mask head; one without is returned as it is."""
    if not has_mask_head(checkpoint.model):
        return replace(checkpoint, model=strip_detr_prefix(checkpoint.model))
    detector = {key: value for key, value in checkpoint.model.items() if key.startswith("detr.")}
    return replace(checkpoint, model=strip_detr_prefix(detector))


def _mismatch_message(
    model: nn.Module, state: Mapping[str, Tensor], source: str, error: RuntimeError
) -> str:
    target = model.state_dict()
    missing = [f"lacks {key}" for key in target if key not in state]
    unexpected = [f"also has {key}" for key in state if key not in target]
    shapes = [
        f"has {key} as {list(value.shape)}, the model as {list(target[key].shape)}"
        for key, value in state.items()
        if key in target and value.shape != target[key].shape
    ]
    differences = shapes + missing + unexpected
    if not differences:  # another error of load_state_dict
        differences = [str(error).splitlines()[0]]

    if has_mask_head(target) and not has_mask_head(state):
        remedy = (
            f"to train a mask head on this detector, give --frozen_weights {source} (the detector stays fixed) or "
            f"--pretrain {source} instead of --resume"
        )
    elif has_mask_head(state) and not has_mask_head(target):
        remedy = (
            "extract the detector of this mask model with "
            f"tools/convert_checkpoint.py {source} --drop_masks --to predetr --out FILE"
        )
    else:
        remedy = f"{_suggest_flag(differences[0])}, or start from its weights with --pretrain"
    return (
        f"{source} does not match the model: it {differences[0]} "
        f"({len(differences)} differences); {remedy}"
    )


@dataclass(frozen=True)
class _ClassHead:
    """How the class head of a file maps to the model's.

    Attributes:
        loads: whether the file's class head is loaded at all.
        rows: row of the model -> row of the file, for classes in both; None if either has no names.
        has_background: whether the last row is "no object".
        encoder_key: part of the parameter names of a two-stage encoder's class head.
    """

    loads: bool
    rows: dict[int, int] | None
    has_background: bool
    encoder_key: str


def load_pretrained(
    model: nn.Module, checkpoint: Checkpoint, class_names: Mapping[int, str] | None = None
) -> LoadReport:
    """Initialize `model` from a pre-trained checkpoint or from another detector, and report every tensor.

    - A pretext gives everything but its class head and its own parameters.
    - A detector with the same classification (`model.classification.kind`) also gives the class rows whose names are in
      `class_names`. Without names in the file, a head of equal shape is loaded whole; a head with 91 rows and another
      shape than the model's is assumed to have COCO's names.
    - Query embeddings are tiled or truncated to the model's number of queries.
    - All other detector parameters must be in the file with equal shapes.

    Args:
        class_names: the model's classes, row -> name.

    Raises:
        UserError: the file contains another detector, lacks a tensor, or has one that the model would not use. The
            model is unchanged then.
    """
    source, target = checkpoint.source, model.state_dict()
    state = _match_mask_prefix(checkpoint.model, target)
    _check_detector(state, target, source)

    report = LoadReport()
    head = _match_class_head(model, checkpoint, class_names, report)
    skipped = pretext_prefixes() if is_pretext(checkpoint) else ()
    loaded: dict[str, Tensor] = {}
    for key, tensor in state.items():
        if key not in target:
            report.unused[key] = tensor.numel()
        elif not key.startswith(skipped):
            fitted = _fit_tensor(key, tensor, target[key], head, report)
            if fitted is not None:
                loaded[key] = fitted

    _check_complete(loaded, target, report, source)
    _note_foreign_classes(model, checkpoint, class_names, head, report)
    # Not strict: what is missing keeps its initial values and is in the report.
    model.load_state_dict(loaded, strict=False)
    report.loaded = {key: target[key].numel() for key in target if key in loaded}
    report.reinitialized = {
        key: target[key].numel() for key in target if key not in loaded and not _is_counter(key)
    }
    return report


def _match_class_head(
    model: nn.Module,
    checkpoint: Checkpoint,
    class_names: Mapping[int, str] | None,
    report: LoadReport,
) -> _ClassHead:
    target = model.state_dict()
    in_file, in_model = infer_classification(checkpoint), model.classification.kind
    loads = not is_pretext(checkpoint)
    if loads and in_file != in_model:
        # Logits of a softmax are trained relative to each other, those of a sigmoid one by one.
        loads = False
        report.notes.append(
            f"class_embed: starts from scratch: the file's head is {in_file}, the model's {in_model}"
        )

    rows = None
    if loads:
        names = _class_names_of_file(checkpoint, count_classes(target, in_model))
        rows = _match_rows_by_name(names, class_names)
        if rows is not None and not checkpoint.class_names:
            report.notes.append(
                f"class_embed: {checkpoint.source} has no class names, so its 91 rows are taken to be COCO's"
            )
    return _ClassHead(
        loads=loads,
        rows=rows,
        has_background=in_file == "softmax",
        encoder_key=_encoder_head_key(target),
    )


def _fit_tensor(
    key: str, tensor: Tensor, target: Tensor, head: _ClassHead, report: LoadReport
) -> Tensor | None:
    """Return what to load into the model's parameter `target`; None to keep its initial values."""
    if _is_class_head(key):
        if not head.loads:
            return None
        if head.encoder_key in key:
            return _fit_encoder_head(tensor, target, head.has_background)
        return _fit_class_head(tensor, target, head, report)
    if key.endswith("query_embed.weight"):
        return _fit_queries(tensor, target, report)
    return tensor


def _is_class_head(key: str) -> bool:
    return "class_embed" in key


def _is_counter(key: str) -> bool:
    """Return True for buffers of live batch norm and of FLOP counters, which don't affect the outputs."""
    return key.endswith(("num_batches_tracked", *OPERATION_COUNTERS))


def _match_mask_prefix(
    state: Mapping[str, Tensor], target: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Add or remove the prefix `detr.` of models with a mask head, so that the names of file and model match."""
    in_file = any(key.startswith("detr.") for key in state)
    in_model = any(key.startswith("detr.") for key in target)
    if in_model and not in_file:
        return {f"detr.{key}": value for key, value in state.items()}
    if in_file and not in_model:
        return strip_detr_prefix(state)
    return dict(state)


def _check_detector(state: Mapping[str, Tensor], target: Mapping[str, Tensor], source: str) -> None:
    found, wanted = infer_detector(state), infer_detector(target)
    if found is None:
        raise UserError(no_detector_message(state, source))
    if found != wanted:
        raise UserError(
            f"{source} contains the detector {found}, the model is {wanted}; "
            f"add --detector {found} or choose another file"
        )


def _fit_queries(tensor: Tensor, target: Tensor, report: LoadReport) -> Tensor:
    """Tile or truncate the query embeddings: query i of the model is query i mod Q of the file."""
    before, after = len(tensor), len(target)
    if before == after:
        return tensor
    change = "tiled" if after > before else "truncated"
    report.notes.append(f"query_embed: {before} queries {change} to {after}")
    return tensor[torch.arange(after) % before]  # [Q of the model, D]


def _class_names_of_file(checkpoint: Checkpoint, num_classes: int) -> dict[int, str]:
    """Return row -> name. COCO's names are assumed only for a head of another size than the model's.

    A head of equal size and without names is loaded whole, which needs no assumption.
    """
    classes = infer_classes(checkpoint)
    return classes.names if classes.named or classes.num_classes != num_classes else {}


def _match_rows_by_name(
    names: dict[int, str], class_names: Mapping[int, str] | None
) -> dict[int, int] | None:
    """Return {row of the model: row of the file} for class names in both; None if a side has no names."""
    wanted = {int(row): name for row, name in (class_names or {}).items()}
    if not names or not wanted:
        return None
    if names == wanted:  # the same dataset: rows without a name (COCO has eleven) match too
        return {row: row for row in range(max(names) + 1)}
    # Sorted backwards so that the first row wins where a name occurs twice.
    row_of = {name: row for row, name in sorted(names.items(), reverse=True)}
    return {row: row_of[name] for row, name in wanted.items() if name in row_of}


def _fit_class_head(
    tensor: Tensor, target: Tensor, head: _ClassHead, report: LoadReport
) -> Tensor | None:
    """Return the model's weight [C, D] or bias [C] with the matching rows of the file; None if no row matches.

    "No object", the last row of a softmax head, always matches.
    """
    if head.rows is None:
        return tensor if tensor.shape == target.shape else None
    if tensor.shape[1:] != target.shape[1:]:  # another width D
        return None

    background = int(head.has_background)
    pairs = [
        (row, source_row)
        for row, source_row in head.rows.items()
        if row < len(target) - background and source_row < len(tensor) - background
    ]
    note = f"class_embed: {len(pairs)} of {len(target) - background} class rows kept by name"
    if note not in report.notes:  # once, not for every decoder layer
        report.notes.append(note)
    if not pairs:
        return None
    if head.has_background:
        pairs.append((-1, -1))

    fitted = target.clone()  # rows without a match keep their initial values
    rows, source_rows = torch.tensor(pairs).unbind(1)
    fitted[rows] = tensor.to(fitted)[source_rows]  # [matching rows, D], of a bias [matching rows]
    return fitted


def _note_foreign_classes(
    model: nn.Module,
    checkpoint: Checkpoint,
    class_names: Mapping[int, str] | None,
    head: _ClassHead,
    report: LoadReport,
) -> None:
    """Add a note if a class head that is loaded whole brings classes that the data do not have."""
    if not head.loads or head.rows is not None or not class_names:
        return
    rows = count_classes(model.state_dict(), infer_classification(checkpoint))
    classes = infer_classes(checkpoint)
    foreign = [name for row, name in classes.names.items() if row not in class_names]
    if classes.num_classes == rows and foreign:
        count = rows - sum(row < rows for row in class_names)
        report.notes.append(
            f"class_embed: {count} of {rows} class rows are not classes of the data (such as '{foreign[0]}'), and may "
            "still be predicted; --dataset_file custom makes a class head of the data's classes alone"
        )


def _encoder_head_key(target: Mapping[str, Tensor]) -> str:
    """Return the part of a name that the class head of a two-stage encoder has.

    Deformable DETR numbers its heads by decoder layer. The encoder's head comes after the last one.
    """
    pattern = re.compile(r"transformer\.decoder\.layers\.(\d+)\.")
    layers = {match[1] for match in map(pattern.search, target) if match}
    return f"class_embed.{len(layers)}."


def _fit_encoder_head(tensor: Tensor, target: Tensor, has_background: bool) -> Tensor | None:
    """Return the class head of a two-stage encoder, for other classes too.

    Its training targets all have label 0 (models/criterion.py), so that row 0 scores objects against background,
    regardless of their class.
    """
    if tensor.shape == target.shape:
        return tensor
    if tensor.shape[1:] != target.shape[1:]:
        return None
    fitted = target.clone()
    fitted[0] = tensor[0]
    if has_background:
        fitted[-1] = tensor[-1]
    return fitted


def _check_complete(
    loaded: dict[str, Tensor], target: Mapping[str, Tensor], report: LoadReport, source: str
) -> None:
    """Check that no detector parameter silently keeps its initial values, changes its shape, or stays in the file."""
    for key, value in loaded.items():
        if value.shape != target[key].shape:
            raise UserError(
                f"{source}: {key} is {list(value.shape)}, the model's is {list(target[key].shape)}; "
                f"{_suggest_flag(key)}"
            )
    missing = [key for key in target if key not in loaded and _is_required(key)]
    if missing:
        raise UserError(
            f"{source} lacks {len(missing)} tensors of the model, first {missing[0]}; {_suggest_flag(missing[0])}"
        )
    unused = [key for key in report.unused if _is_required(key)]
    if unused:
        raise UserError(
            f"{source} has {len(unused)} tensors that the model does not use, first {unused[0]}; "
            f"{_suggest_flag(unused[0])}"
        )


def _is_required(key: str) -> bool:
    in_detector = key.removeprefix("detr.").startswith(REQUIRED_PREFIXES)
    return in_detector and not _is_class_head(key) and not _is_counter(key)


def _suggest_flag(key: str) -> str:
    """Return which flags decide over a parameter. `key` may be a sentence with its name."""
    points = "--nheads, --num_feature_levels, --enc_n_points and --dec_n_points"
    flags = {  # the first match counts, so parts of layers come before the layers
        "encoder.norm.": "--pre_norm",
        ".sampling_offsets.": points,
        ".attention_weights.": points,
        "encoder.layers.": "--enc_layers, --hidden_dim and --dim_feedforward",
        "decoder.layers.": "--dec_layers, --hidden_dim and --dim_feedforward",
        "backbone.1.": "--position_embedding",
        "backbone.0.": "--backbone",
        "input_proj.": "--backbone and --num_feature_levels",
        "level_embed": "--num_feature_levels",
        "decoder.bbox_embed.": "--with_box_refine",
        "enc_output": "--two_stage",
        "class_embed.": "--num_classes and --classification",
        "query_embed.": "--num_queries",
        "feature_embed.": "--object_embedding_loss and --obj_embedding_head",
    }
    matches = (flag for part, flag in flags.items() if part in key)
    flag = next(matches, "--detector and its architecture flags")
    return f"set {flag} as in the run that wrote the file"
