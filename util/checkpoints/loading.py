"""Weights of a checkpoint into a model: all of them, to resume or evaluate, or what fits, to start from."""

import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from util.checkpoints.adoption import is_pretext, no_detector, pretext_parts
from util.checkpoints.architecture import detector_kind, without_detr_prefix
from util.checkpoints.checkpoint import Checkpoint
from util.checkpoints.classes import class_rows, classes_of, head_kind
from util.checkpoints.load_report import LoadReport
from util.errors import UserError

OPERATION_COUNTERS = (
    "total_ops",
    "total_params",
)  # left in some published files by a tool that counts operations
CORE = ("backbone.", "input_proj.", "transformer.", "query_embed.", "bbox_embed.")


def load_exactly(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Loads `model` strictly, to resume or evaluate. Raises UserError with one line when file and model differ."""
    source, target = checkpoint.source, model.state_dict()
    state = {
        key: value
        for key, value in checkpoint.model.items()
        if not key.endswith(OPERATION_COUNTERS)
    }
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        missing = [f"lacks {key}" for key in target if key not in state]
        surplus = [f"also has {key}" for key in state if key not in target]
        shapes = [
            f"has {key} as {list(value.shape)}, the model as {list(target[key].shape)}"
            for key, value in state.items()
            if key in target and value.shape != target[key].shape
        ]
        differences = shapes + missing + surplus or [str(error).splitlines()[0]]
        masks = any(key.startswith("mask_head.") for key in state)
        remedy = (
            f"take the detector out of this mask model by tools/convert_checkpoint.py {source} --to predetr --out FILE"
            if masks
            else f"{_fitting_flag(differences[0])}, or start from its weights by --pretrain"
        )
        raise UserError(
            f"{source} is not of this model: it {differences[0]} ({len(differences)} differences); {remedy}"
        ) from error


def load_pretrained(
    model: nn.Module, checkpoint: Checkpoint, keep_classes: Mapping[int, str] | None = None
) -> LoadReport:
    """Starts `model` from the weights of a pretext or of a detector.

    From a pretext, class heads and the pretext's own parts are dropped. From a detector of the same classification
    (`model.classification.kind`), the class rows whose names agree with `keep_classes` (the model's classes, row ->
    name) stay. A file without names keeps a head of equal shape, and has COCO's names where it has 91 rows and the
    model another number. Queries of another number are tiled or cut. All else of the
    detector must be in the file, with equal shapes.

    Raises:
        UserError: the file is of another detector, lacks a tensor, or has one that the model would not use.
    """
    source = checkpoint.source
    target = model.state_dict()
    state = _match_mask_prefix(checkpoint.model, target)
    _check_kind(state, target, source)
    report, chosen = LoadReport(), {}
    drop = is_pretext(checkpoint)
    kind, own_kind = head_kind(checkpoint), model.classification.kind
    rows = (
        None
        if drop
        else _agreeing_rows(_class_names(checkpoint, class_rows(target, own_kind)), keep_classes)
    )
    if not drop and kind != own_kind:
        report.notes.append(
            f"class_embed: starts from scratch: the file's head is {kind}, the model's {own_kind}"
        )
    without_head, proposal_head = drop or kind != own_kind, _proposal_head(target)
    for key, tensor in state.items():
        own = target.get(key)
        dropped = without_head and _is_class_head(key) or drop and key.startswith(pretext_parts())
        if own is None:
            report.unused[key] = tensor.numel()
            continue
        value = (
            None
            if dropped
            else _fitted(key, tensor, own, rows, kind == "softmax", proposal_head, report)
        )
        if value is not None:
            chosen[key] = value
    _check_complete(chosen, target, report, source)
    model.load_state_dict(chosen, strict=False)
    report.loaded = {key: target[key].numel() for key in target if key in chosen}
    report.reinitialised = {
        key: target[key].numel() for key in target if key not in chosen and not _is_counter(key)
    }
    return report


def _fitted(
    key: str,
    tensor: Tensor,
    own: Tensor,
    rows: dict[int, int] | None,
    has_background: bool,
    proposal_head: str,
    report: LoadReport,
) -> Tensor | None:
    """What of the file's tensor goes into the model's, None for nothing."""
    if proposal_head in key:
        return _proposal_rows(tensor, own, has_background)
    if _is_class_head(key):
        return _class_rows(tensor, own, rows, has_background, report)
    return _fit_queries(tensor, own, report) if key.endswith("query_embed.weight") else tensor


def _is_class_head(key: str) -> bool:
    return "class_embed" in key


def _is_counter(key: str) -> bool:
    """Left behind by live batch norm, and by tools that count operations."""
    return key.endswith(("num_batches_tracked", *OPERATION_COUNTERS))


def _match_mask_prefix(
    state: Mapping[str, Tensor], target: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Adds or removes the `detr.` of a model with a mask head, so that the names of file and model meet."""
    in_file, in_model = (any(key.startswith("detr.") for key in keys) for keys in (state, target))
    if in_model and not in_file:
        return {f"detr.{key}": value for key, value in state.items()}
    return dict(state) if in_model or not in_file else without_detr_prefix(state)


def _check_kind(state: Mapping[str, Tensor], target: Mapping[str, Tensor], source: str) -> None:
    found, wanted = detector_kind(state), detector_kind(target)
    if found is None:
        raise UserError(no_detector(state, source))
    if found != wanted:
        raise UserError(
            f"{source} looks like {found}, the model is {wanted}; add --detector {found} or choose another file"
        )


def _fit_queries(tensor: Tensor, own: Tensor, report: LoadReport) -> Tensor:
    """[Q, D] of the file as [Q', D] of the model: query i is query i mod Q."""
    before, after = len(tensor), len(own)
    if before == after:
        return tensor
    report.notes.append(
        f"query_embed: {before} queries {'tiled' if after > before else 'cut'} to {after}"
    )
    return tensor[torch.arange(after) % before]


def _class_names(checkpoint: Checkpoint, rows_of_model: int) -> dict[int, str]:
    """Row -> name in the file. In a head of the same size a file without names keeps every row, so that none is
    guessed.
    """
    classes = classes_of(checkpoint)
    return checkpoint.class_names if classes.count == rows_of_model else classes.names


def _agreeing_rows(
    names: dict[int, str], keep_classes: Mapping[int, str] | None
) -> dict[int, int] | None:
    """{row of the model: row of the file} for class names in both; None where a side has no names."""
    wanted = {int(row): name for row, name in (keep_classes or {}).items()}
    if not names or not wanted:
        return None
    if names == wanted:  # rows between that have no name (COCO has eleven) are the same too
        return {row: row for row in range(max(names) + 1)}
    row_of = {name: row for row, name in sorted(names.items(), reverse=True)}
    return {row: row_of[name] for row, name in wanted.items() if name in row_of}


def _class_rows(
    tensor: Tensor,
    own: Tensor,
    rows: dict[int, int] | None,
    has_background: bool,
    report: LoadReport,
) -> Tensor | None:
    """The head [C, D] (or bias [C]) of the model with the rows of the file that agree; None if none does.

    A softmax head ends with the row of "no object", which always agrees.
    """
    if rows is None:
        return tensor if tensor.shape == own.shape else None
    if tensor.shape[1:] != own.shape[1:]:
        return None
    background = int(has_background)
    pairs = [
        (to, at)
        for to, at in rows.items()
        if to < len(own) - background and at < len(tensor) - background
    ]
    note = f"class_embed: {len(pairs)} of {len(own) - background} class rows kept by name"
    if note not in report.notes:
        report.notes.append(note)
    if not pairs:
        return None
    pairs += [(-1, -1)] * background
    head = own.clone()
    to, at = (torch.tensor(side) for side in zip(*pairs, strict=True))
    head[to] = tensor.to(head)[at]
    return head


def _proposal_head(target: Mapping[str, Tensor]) -> str:
    """In the names of the class head of a two-stage detector's encoder, which stands behind those of the decoder
    layers.
    """
    layers = len(
        {
            match[1]
            for match in (
                re.search(r"transformer\.decoder\.layers\.(\d+)\.", name) for name in target
            )
            if match
        }
    )
    return f"class_embed.{layers}."


def _proposal_rows(tensor: Tensor, own: Tensor, has_background: bool) -> Tensor | None:
    """Its first row tells objects from background whatever the classes, so that it is worth keeping with other classes
    too.
    """
    if tensor.shape == own.shape or tensor.shape[1:] != own.shape[1:]:
        return tensor if tensor.shape == own.shape else None
    head = own.clone()
    head[0] = tensor[0]
    if has_background:
        head[-1] = tensor[-1]
    return head


def _check_complete(
    chosen: dict[str, Tensor], target: Mapping[str, Tensor], report: LoadReport, source: str
) -> None:
    """Nothing of the detector may silently start at random, be of another shape, or stay behind in the file."""
    for key, value in chosen.items():
        if value.shape != target[key].shape:
            raise UserError(
                f"{source}: {key} is {list(value.shape)}, the model's is {list(target[key].shape)}; "
                f"{_fitting_flag(key)}"
            )
    missing = [key for key in target if key not in chosen and _is_core(key)]
    if missing:
        raise UserError(
            f"{source} lacks {len(missing)} tensors of the model, first {missing[0]}; {_fitting_flag(missing[0])}"
        )
    behind = [key for key in report.unused if _is_core(key)]
    if behind:
        raise UserError(
            f"{source} has {len(behind)} tensors that the model does not use, first {behind[0]}; "
            f"{_fitting_flag(behind[0])}"
        )


def _is_core(key: str) -> bool:
    core = key.removeprefix("detr.").startswith(CORE)
    return core and not _is_class_head(key) and not _is_counter(key)


def _fitting_flag(key: str) -> str:
    points = "--nheads, --num_feature_levels, --enc_n_points and --dec_n_points"
    flags = {
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
    fitting = next(
        (flag for part, flag in flags.items() if part in key),
        "--detector and its architecture flags",
    )
    return f"give {fitting} as the file was trained"
