"""Whose file a checkpoint is, and the same weights in the layout of another code base."""

from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from util.checkpoints.adoption import is_pretext, pretext_parts
from util.checkpoints.architecture import architecture, detector_kind, without_detr_prefix
from util.checkpoints.checkpoint import Checkpoint
from util.checkpoints.classes import class_rows
from util.checkpoints.published_layouts import SIAMESE_HEADS, to_siamese_names
from util.errors import UserError

OURS = "predetr"
CODE_BASES = {
    OURS: "PreDETR",
    "detr": "DETR",
    "conditional_detr": "Conditional DETR",
    "deformable_detr": "Deformable DETR",
    "updetr": "UP-DETR",
    "detreg": "DETReg",
    "siamese": "Siamese DETR",
}
ALIASES = "transformer.decoder."  # below it the heads stand a second time in some Deformable DETRs
MASK_PARTS = ("mask_head.", "bbox_attention.")
TRAINING_STATE = (
    "optimizer",
    "lr_scheduler",
    "meta",
)  # goes on only with the parameters in the order of the file


@dataclass(frozen=True)
class Layout:
    """A published layout. detectors: what its code base builds. parts: of a pretext, which it has a place for. shifted:
    detectors whose `sine` position code is shifted by half a cell there. loading: how the file is given to it."""

    name: str
    detectors: tuple[str, ...]
    parts: tuple[str, ...]
    shifted: tuple[str, ...]
    loading: str


LAYOUTS = {
    "detr": Layout(
        "DETR, Conditional DETR and Deformable DETR",
        ("detr", "conditional_detr", "deformable_detr"),
        (),
        ("deformable_detr",),
        "--resume FILE --eval in the code base of the detector, or --pretrain FILE in the fine-tuning code of "
        "Siamese DETR",
    ),
    "updetr": Layout(
        "UP-DETR",
        ("detr",),
        ("patch2query.", "feature_align."),
        (),
        "--pretrain FILE; --resume FILE --eval for a detector",
    ),
    "detreg": Layout(
        "DETReg",
        ("detr", "deformable_detr"),
        ("feature_embed.",),
        ("detr", "deformable_detr"),
        "--pretrain FILE; --resume FILE --eval for a detector. `args` is an argparse.Namespace, which DETReg reads: "
        "its torch.load needs weights_only=False from PyTorch 2.6 on",
    ),
    "siamese": Layout(
        "Siamese DETR",
        ("detr", "conditional_detr", "deformable_detr"),
        ("patch2query.", "feature_align.", "enc_head."),
        (),
        "--load_from FILE of its train.py",
    ),
}
FORMATS = (OURS, *LAYOUTS)


def code_base(checkpoint: Checkpoint) -> str:
    """A key of CODE_BASES: who wrote the file, as far as names and stored settings tell.

    The files of a fine-tuned detector are alike in DETR, UP-DETR and DETReg: without settings they count as the
    detector's own.
    """
    state, settings = checkpoint.model, checkpoint.args
    kind = detector_kind(state)
    if settings.get("script") or checkpoint.converted_from:
        return OURS
    patches = "patch2query.weight" in state
    if checkpoint.siamese or patches and (kind != "detr" or not class_rows(state, "focal")):
        return "siamese"
    if "object_embedding_loss" in settings or any(
        key.startswith("feature_embed.") for key in state
    ):
        return "detreg"
    if patches or kind == "detr" and "pretrain" in settings:
        return "updetr"
    return "siamese" if "pretrain" in settings else kind


def pretext_of(checkpoint: Checkpoint) -> str | None:
    """`random_query_patch`, `region_prior` or `siamese`; None for a detector that was trained with labels."""
    if not is_pretext(checkpoint):
        return None
    stored = checkpoint.args.get("pretext")
    if stored or checkpoint.siamese:
        return stored or checkpoint.siamese
    return {"detreg": "region_prior", "siamese": "siamese"}.get(
        code_base(checkpoint), "random_query_patch"
    )


def convert(checkpoint: Checkpoint, to: str) -> tuple[dict[str, Any], list[str]]:
    """The content of a file in the format `to` (one of FORMATS), and lines that say what was left out or what differs
    there.

    The tensors are those of the checkpoint. `predetr` keeps all of a detector and its pretext, and stores what the
    names don't tell. A published layout holds weights alone.

    Raises:
        UserError: the code base of that layout has no such detector or no place for its weights.
    """
    state, notes = _without_masks(checkpoint)
    if to == OURS:
        return _ours(checkpoint, state, notes), notes
    layout, kind, pretext = LAYOUTS[to], detector_kind(state), pretext_of(checkpoint)
    if kind not in layout.detectors:
        raise UserError(
            f"{checkpoint.source} holds {kind}, which {layout.name} does not have ({', '.join(layout.detectors)}); "
            "choose another --to"
        )
    if to == "siamese" and pretext not in SIAMESE_HEADS:
        raise UserError(
            f"{checkpoint.source} holds no pretext of Siamese DETR's code base, which only pre-trains; its "
            "fine-tuning code reads the format detr: choose --to detr"
        )
    state = _drop(state, tuple(part for part in pretext_parts() if part not in layout.parts), notes)
    if to == "detr" and pretext:
        state = _drop(state, ("class_embed.", f"{ALIASES}class_embed."), notes)
    _note_positions(checkpoint, layout, kind, notes)
    if to == "siamese":
        return {
            "meta": {},
            "state_dict": to_siamese_names(state, pretext, checkpoint.source),
        }, notes
    if to == "detreg":
        certain, likely = architecture(checkpoint)
        seed = checkpoint.args.get("seed", 42)
        return {
            "model": state,
            "args": Namespace(**likely, **certain, seed=seed, object_embedding_loss=bool(pretext)),
        }, notes
    return {"model": state}, notes


def _ours(checkpoint: Checkpoint, state: dict[str, Tensor], notes: list[str]) -> dict[str, Any]:
    origin = code_base(checkpoint)
    if origin == OURS:
        raise UserError(
            f"{checkpoint.source} is a checkpoint of {CODE_BASES[OURS]} already; choose another --to"
        )
    reordered = checkpoint.siamese or len(state) != checkpoint.tensors
    entries = checkpoint.to_dict()
    rest = {
        key: value for key, value in entries.items() if not (reordered and key in TRAINING_STATE)
    }
    left = sorted(set(entries) - set(rest))
    if left:
        notes.append(f"left out: {', '.join(left)}, which belong to training in that code base")
    certain, likely = architecture(checkpoint)
    settings = {**checkpoint.args, **likely, **certain}
    if pretext_of(checkpoint):
        settings["pretext"] = pretext_of(checkpoint)
    return {**rest, "model": state, "args": settings, "converted_from": origin}


def _without_masks(checkpoint: Checkpoint) -> tuple[dict[str, Tensor], list[str]]:
    notes: list[str] = []
    return _drop(without_detr_prefix(checkpoint.model), MASK_PARTS, notes), notes


def _drop(
    state: Mapping[str, Tensor], parts: tuple[str, ...], notes: list[str]
) -> dict[str, Tensor]:
    """The state without names that begin with `parts`, which a note then names."""
    kept = {key: value for key, value in state.items() if not (parts and key.startswith(parts))}
    names = sorted({key.removeprefix(ALIASES).split(".")[0] for key in state if key not in kept})
    if names:
        notes.append(f"left out: {len(state) - len(kept)} tensors of {', '.join(names)}")
    return kept


def _note_positions(checkpoint: Checkpoint, layout: Layout, kind: str, notes: list[str]) -> None:
    certain, likely = architecture(checkpoint)
    trained = certain.get("position_embedding", likely.get("position_embedding"))
    there = "sine_shifted" if kind in layout.shifted else "sine"
    if trained not in (there, "learned"):
        notes.append(
            f"warning: trained with the position code {trained}, where {layout.name} computes {there}: half a cell "
            "apart, so that the numbers there will differ"
        )
