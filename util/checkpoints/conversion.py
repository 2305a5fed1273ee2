"""Tell which codebase wrote a checkpoint, and convert it to the layout of another codebase."""

from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from util.checkpoints.adoption import is_pretext, pretext_prefixes
from util.checkpoints.architecture import (
    has_mask_head,
    infer_architecture,
    infer_detector,
    strip_detr_prefix,
)
from util.checkpoints.checkpoint import DESCRIPTION, Checkpoint
from util.checkpoints.classes import count_classes
from util.checkpoints.published_layouts import SIAMESE_HEADS, to_siamese_names
from util.errors import UserError

OURS = "predetr"
CODEBASES = {
    OURS: "PreDETR",
    "detr": "DETR",
    "conditional_detr": "Conditional DETR",
    "deformable_detr": "Deformable DETR",
    "updetr": "UP-DETR",
    "detreg": "DETReg",
    "siamese": "Siamese DETR",
    "hugging_face": "Hugging Face transformers",
}

# Deformable DETR with box refinement or two-stage registers its heads a second time inside the decoder.
DECODER_PREFIX = "transformer.decoder."
MASK_PREFIXES = ("mask_head.", "bbox_attention.")

# An optimizer counts its parameters by position: without the file's tensors in the file's order its state is useless.
TRAINING_STATE = ("optimizer", "lr_scheduler", "meta")


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The checkpoint layout of a published codebase.

    name: of the codebase. detectors: those it can build. pretext_prefixes: pretext parameters that it has.
    mask_heads: detectors on which it has DETR's mask head. shifted_sine: detectors whose `sine` positional encoding is
    shifted by half a cell there. usage: how to load the file there.
    """

    name: str
    detectors: tuple[str, ...]
    pretext_prefixes: tuple[str, ...] = ()
    mask_heads: tuple[str, ...] = ()
    shifted_sine: tuple[str, ...] = ()
    usage: str


LAYOUTS = {
    "detr": Layout(
        name="DETR, Conditional DETR and Deformable DETR",
        detectors=("detr", "conditional_detr", "deformable_detr"),
        # The code of the other two has a mask head that does not fit their transformers, and fails.
        mask_heads=("detr",),
        shifted_sine=("deformable_detr",),
        usage=(
            "--resume FILE --eval in the codebase of the detector, or --pretrain FILE in the fine-tuning code of "
            "Siamese DETR"
        ),
    ),
    "updetr": Layout(
        name="UP-DETR",
        detectors=("detr",),
        pretext_prefixes=("patch2query.", "feature_align."),
        usage="--pretrain FILE; --resume FILE --eval for a detector",
    ),
    "detreg": Layout(
        name="DETReg",
        detectors=("detr", "deformable_detr"),
        pretext_prefixes=("feature_embed.",),
        shifted_sine=("detr", "deformable_detr"),
        usage=(
            "--pretrain FILE; --resume FILE --eval for a detector. `args` is an argparse.Namespace, which DETReg "
            "reads: with PyTorch 2.6 or later its torch.load needs weights_only=False"
        ),
    ),
    "siamese": Layout(
        name="Siamese DETR",
        detectors=("detr", "conditional_detr", "deformable_detr"),
        pretext_prefixes=("patch2query.", "feature_align.", "enc_head."),
        usage="--load_from FILE of its train.py",
    ),
}
TRANSFORMERS = "transformers"  # a folder, see `hugging_face_folder`
FORMATS = (OURS, *LAYOUTS, TRANSFORMERS)


def infer_codebase(checkpoint: Checkpoint) -> str:
    """Return the key in CODEBASES of the codebase that wrote a checkpoint, from parameter names and stored settings.

    Fine-tuned detectors of DETR, UP-DETR and DETReg have the same parameter names. Without settings they count as files
    of the detector's own codebase.
    """
    state, settings = checkpoint.model, checkpoint.args
    detector = infer_detector(state)
    if settings.get("script") or checkpoint.converted_from:
        return OURS
    if checkpoint.hugging_face:
        return "hugging_face"

    has_patches = "patch2query.weight" in state
    # UP-DETR itself only builds DETR, and its files have a class head. `convert_to_detr` drops the head.
    if checkpoint.siamese_pretext or (
        has_patches and (detector != "detr" or not count_classes(state, "focal"))
    ):
        return "siamese"
    if "object_embedding_loss" in settings or any(
        key.startswith("feature_embed.") for key in state
    ):
        return "detreg"
    if has_patches or (detector == "detr" and "pretrain" in settings):
        return "updetr"
    # Siamese DETR's fine-tuning code is based on Conditional DETR and stores `pretrain` too.
    return "siamese" if "pretrain" in settings else detector


def infer_pretext(checkpoint: Checkpoint) -> str | None:
    """Return `random_query_patch`, `region_prior` or `siamese`; None for a detector trained with labels."""
    if not is_pretext(checkpoint):
        return None
    stored = checkpoint.args.get("pretext") or checkpoint.siamese_pretext
    if stored:
        return stored
    pretexts = {"detreg": "region_prior", "siamese": "siamese"}
    return pretexts.get(infer_codebase(checkpoint), "random_query_patch")


def convert(
    checkpoint: Checkpoint, to: str, drop_masks: bool = False
) -> tuple[dict[str, Any], list[str]]:
    """Convert a checkpoint to the format `to`, one of FORMATS that is a file.

    `predetr` keeps everything of detector and pretext, and stores the settings that parameter names don't show. The
    published layouts contain weights only. A mask head stays where the codebase has one, unless `drop_masks`. No tensor
    changes its values.

    Returns:
        The content of the new file, and notes on what was dropped or is computed differently there.

    Raises:
        UserError: the codebase of that layout does not have this detector, or has no place for its weights.
    """
    notes: list[str] = []
    state = checkpoint.model
    has_place = to == OURS or infer_detector(state) in LAYOUTS[to].mask_heads
    if drop_masks or not has_place:
        state = _drop(strip_detr_prefix(state), MASK_PREFIXES, notes)
        checkpoint = replace(checkpoint, model=state)  # its architecture has no mask head now
    if to == OURS:
        return _to_predetr(checkpoint, state, notes), notes

    layout, detector, pretext = LAYOUTS[to], infer_detector(state), infer_pretext(checkpoint)
    _check_supported(checkpoint, to, detector, pretext)
    unsupported = tuple(
        prefix for prefix in pretext_prefixes() if prefix not in layout.pretext_prefixes
    )
    state = _drop(state, unsupported, notes)
    if to == "detr" and pretext:
        # The class head of a pretext has other classes than any labelled dataset.
        state = _drop(state, ("class_embed.", f"{DECODER_PREFIX}class_embed."), notes)
    _note_positional_encoding(checkpoint, layout, detector, notes)

    if to == "siamese":  # as mmcv saves it
        state = to_siamese_names(state, pretext, checkpoint.source)
        return {"meta": {}, "state_dict": state}, notes
    if to == "detreg":
        return {"model": state, "args": _detreg_args(checkpoint, pretext)}, notes
    return {"model": state}, notes


def _check_supported(
    checkpoint: Checkpoint, to: str, detector: str | None, pretext: str | None
) -> None:
    layout = LAYOUTS[to]
    if detector not in layout.detectors:
        raise UserError(
            f"{checkpoint.source} contains the detector {detector}, which {layout.name} does not have "
            f"({', '.join(layout.detectors)}); choose another --to"
        )
    if to == "siamese" and pretext not in SIAMESE_HEADS:
        raise UserError(
            f"{checkpoint.source} has no pretext of Siamese DETR's codebase, which only pre-trains; its fine-tuning "
            "code reads the format detr: use --to detr"
        )


def _detreg_args(checkpoint: Checkpoint, pretext: str | None) -> Namespace:
    certain, likely = infer_architecture(checkpoint)
    # DETReg's --resume takes the seed from the stored args. 42 is its default.
    seed = checkpoint.args.get("seed", 42)
    return Namespace(**likely, **certain, seed=seed, object_embedding_loss=bool(pretext))


def _to_predetr(
    checkpoint: Checkpoint, state: dict[str, Tensor], notes: list[str]
) -> dict[str, Any]:
    codebase = infer_codebase(checkpoint)
    if codebase == OURS:
        return _without_masks(checkpoint, state, notes)

    entries = checkpoint.to_dict()
    is_reordered = checkpoint.siamese_pretext or len(state) != checkpoint.num_tensors
    dropped = sorted(set(entries) & set(TRAINING_STATE)) if is_reordered else []
    if dropped:
        notes.append(f"dropped: {', '.join(dropped)}, which only that codebase can resume from")
        entries = {key: value for key, value in entries.items() if key not in dropped}

    certain, likely = infer_architecture(checkpoint)
    # The inferred values win: DETReg, for instance, stores `sine` for its shifted encoding.
    settings = {**checkpoint.args, **likely, **certain}
    if settings.get("masks") and not has_mask_head(state):
        settings["masks"] = False
    pretext = infer_pretext(checkpoint)
    if pretext:
        settings["pretext"] = pretext
    return {**entries, "model": state, "args": settings, "converted_from": codebase}


def _without_masks(
    checkpoint: Checkpoint, state: dict[str, Tensor], notes: list[str]
) -> dict[str, Any]:
    """Return a checkpoint of this project whose mask head was left out, without its training state."""
    if len(state) == checkpoint.num_tensors:
        raise UserError(
            f"{checkpoint.source} is already a {CODEBASES[OURS]} checkpoint; choose another --to"
        )
    notes.append("dropped: the training state, which counts the parameters of the mask head too")
    entries = {name: getattr(checkpoint, name) for name in DESCRIPTION}
    entries["args"] = {**checkpoint.args, "masks": False}
    return {**{k: v for k, v in entries.items() if v is not None}, "model": state}


def _drop(
    state: Mapping[str, Tensor], prefixes: tuple[str, ...], notes: list[str]
) -> dict[str, Tensor]:
    """Return the state dict without names that start with one of `prefixes`; a note lists the dropped modules."""
    kept = {key: value for key, value in state.items() if not key.startswith(prefixes)}
    modules = sorted(
        {key.removeprefix(DECODER_PREFIX).split(".")[0] for key in state if key not in kept}
    )
    if modules:
        notes.append(f"dropped: {len(state) - len(kept)} tensors of {', '.join(modules)}")
    return kept


def _note_positional_encoding(
    checkpoint: Checkpoint, layout: Layout, detector: str | None, notes: list[str]
) -> None:
    certain, likely = infer_architecture(checkpoint)
    trained = certain.get("position_embedding", likely.get("position_embedding"))
    computed = "sine_shifted" if detector in layout.shifted_sine else "sine"
    if trained not in (computed, "learned"):
        notes.append(
            f"warning: trained with the positional encoding {trained}, but {layout.name} computes {computed}: they "
            "differ by half a cell, so metrics there will differ"
        )
