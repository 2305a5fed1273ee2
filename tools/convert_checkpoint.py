"""Identify a checkpoint or weight file, and convert it between the published layouts and this project's.

    python tools/convert_checkpoint.py FILE                              # identify FILE
    python tools/convert_checkpoint.py FILE --to FORMAT --out NEW_FILE   # convert FILE

FILE is a path or a URL. The formats are

- `predetr`: this project's. Keeps everything, and stores the settings that parameter names don't show.
- `detr`: DETR, Conditional DETR and Deformable DETR
- `updetr`, `detreg`, `siamese`: UP-DETR, DETReg, Siamese DETR
- `transformers`: a folder for `from_pretrained` of Hugging Face transformers, with class names and image processor

`--pretrain` and `--resume` read every published layout, and transformers' files, unchanged. Conversion is for other
codebases, or to get a file that stores its own settings. No code in a file is run, no file is overwritten, and a file
with names or shapes that fit no known detector is refused.
"""

import argparse
import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

# `python tools/NAME.py` must work from any directory.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from models import build_model
from util.checkpoints.adoption import is_pretext, settings_from_checkpoint
from util.checkpoints.architecture import (
    has_mask_head,
    infer_architecture,
    infer_detector,
    strip_detr_prefix,
)
from util.checkpoints.backbone_weights import identify_backbone
from util.checkpoints.checkpoint import Checkpoint, parse_checkpoint
from util.checkpoints.classes import count_classes, infer_classes, infer_classification
from util.checkpoints.conversion import (
    CODEBASES,
    FORMATS,
    LAYOUTS,
    MASK_PREFIXES,
    OURS,
    TRANSFORMERS,
    convert,
    infer_codebase,
    infer_pretext,
)
from util.checkpoints.hugging_face_folder import make_config, write_folder
from util.checkpoints.loading import without_mask_head
from util.checkpoints.parameter_check import check_parameters
from util.checkpoints.weight_files import read_weights
from util.errors import UserError
from util.files import write_atomically
from util.logger import log
from util.runs.session import run_script
from util.settings import FINETUNE, HelpFormatter, make_parser, resolve

SIZES = ("backbone", "num_queries", "enc_layers", "dec_layers", "hidden_dim", "dim_feedforward")
OPTIONS = (
    "pre_norm",
    "num_feature_levels",
    "with_box_refine",
    "two_stage",
    "nheads",
    "dilation",
    "position_embedding",
)
PRETEXT_OF_CODEBASE = {
    "random_query_patch": "UP-DETR",
    "region_prior": "DETReg",
    "siamese": "Siamese DETR",
}


def parse(argv: list[str]) -> Namespace:
    parser = argparse.ArgumentParser(
        "tools.convert_checkpoint",
        description=__doc__.splitlines()[0],
        allow_abbrev=False,
        formatter_class=HelpFormatter,
    )
    parser.add_argument("file", metavar="FILE", help="checkpoint or weight file: path or URL")
    parser.add_argument("--to", choices=FORMATS, help="format to convert to")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="NEW_FILE",
        help="output file, for transformers a folder; must not exist yet",
    )
    parser.add_argument(
        "--drop_masks", action="store_true", help="leave out a mask head: extract the detector"
    )
    args = parser.parse_args(argv)
    if (args.to is None) != (args.out is None):
        parser.error("--to and --out belong together: give both to convert, neither to identify")
    return args


# ------------------------------------------------------------------------------------------------------------ identify


def describe(checkpoint: Checkpoint) -> list[str]:
    """Return the properties of a checkpoint, one per line."""
    state = strip_detr_prefix(checkpoint.model)
    pretext, detector = infer_pretext(checkpoint), infer_detector(state)
    certain, likely = infer_architecture(checkpoint)
    has_masks = any(key.startswith(MASK_PREFIXES) for key in state)
    rows = {
        "codebase": _codebase(checkpoint, detector, pretext),
        "content": _content(checkpoint, pretext, has_masks),
        "model": f"{checkpoint.num_tensors} tensors, {_num_elements(state):,} parameters and buffers",
        "detector": f"{detector}: {_join_flags(certain, SIZES)}",
        "options": _options(certain, likely),
        "classes": _classes(checkpoint),
        "flags": " ".join(model_flags(checkpoint)) or "none: the defaults of the detector",
        "also in it": _other_entries(checkpoint),
        "checked": f"all names and shapes are those of a {detector}",
        "use": _usage(checkpoint, has_masks),
    }
    return [f"{name:<10} {text}" for name, text in rows.items()]


def needs_finetuning(checkpoint: Checkpoint) -> bool:
    """Return True for a file without object classes: a pretext, or a pretext that was converted without its head."""
    return is_pretext(checkpoint) or not count_classes(checkpoint.model, "focal")


def _content(checkpoint: Checkpoint, pretext: str | None, has_masks: bool) -> str:
    if pretext:
        codebase = PRETEXT_OF_CODEBASE.get(pretext, "a custom one")
        text = f"pre-training ({pretext}, the pretext of {codebase})"
    elif needs_finetuning(checkpoint):
        text = "a detector to be fine-tuned"
    else:
        text = "a trained detector"
    return f"{text}, with a mask head" if has_masks else text


def _usage(checkpoint: Checkpoint, has_masks: bool) -> str:
    path = checkpoint.source
    if has_masks and infer_classes(checkpoint).things:
        data = "--dataset_file coco_panoptic --coco_path DIR --coco_panoptic_path DIR"
        return f"python finetune_main.py {data} --eval --resume {path}"
    flags = "--pretrain" if needs_finetuning(checkpoint) else "--eval --resume"
    return f"python finetune_main.py --coco_path DIR {flags} {path}"


def _codebase(checkpoint: Checkpoint, detector: str | None, pretext: str | None) -> str:
    codebase = infer_codebase(checkpoint)
    name = CODEBASES[codebase]
    if codebase == OURS and checkpoint.converted_from:
        return (
            f"{name}, converted from {CODEBASES.get(checkpoint.converted_from, 'another codebase')}"
        )
    if codebase == "siamese" and not checkpoint.siamese_pretext:
        return f"{name}, from its convert_to_detr or its fine-tuning code"
    # UP-DETR and DETReg don't have Conditional DETR.
    if codebase == detector and not checkpoint.args and detector != "conditional_detr":
        others = "UP-DETR and DETReg" if detector == "detr" else "DETReg"
        return f"{name}, or {others}, whose fine-tuned files have the same names"
    return name


def _options(certain: dict[str, Any], likely: dict[str, Any]) -> str:
    parts = [f"probably {flag} {value}" for flag, value in likely.items()]
    known = _join_flags(certain, OPTIONS)
    if known:
        parts.insert(0, known)
    unknown = [flag for flag in ("dilation", "nheads") if flag not in {**certain, **likely}]
    if unknown:
        parts.append(f"the weights don't show: {' and '.join(unknown)}")
    return "; ".join(parts)


def _join_flags(known: dict[str, Any], flags: tuple[str, ...]) -> str:
    return ", ".join(f"{flag} {known[flag]}" for flag in flags if flag in known)


def _classes(checkpoint: Checkpoint) -> str:
    num_rows = count_classes(checkpoint.model, "focal")  # all rows, "no object" included
    if not num_rows:
        return "no class head (dropped when the file was converted)"

    if infer_classification(checkpoint) == "softmax":
        head = f"{num_rows - 1} classes and `no object` (softmax)"
    else:
        head = f"{num_rows} classes (sigmoid)"
    names = list(checkpoint.class_names.values())
    if not names:
        return f"{head}; without names"
    more = ", ..." if len(names) > 5 else ""
    return f"{head}: {', '.join(names[:5])}{more}"


def model_flags(checkpoint: Checkpoint) -> list[str]:
    """Return the architecture flags that differ from the detector's defaults."""
    certain, likely = infer_architecture(checkpoint)
    known = {**likely, **certain}
    defaults = resolve(
        make_parser(FINETUNE).parse_args(["--detector", known.pop("detector"), "--device", "cpu"])
    )
    flags = []
    for flag, value in known.items():
        if getattr(defaults, flag, value) == value or value is False:
            continue
        flags.append(f"--{flag}" if value is True else f"--{flag} {value}")
    return flags


def _other_entries(checkpoint: Checkpoint) -> str:
    meta = checkpoint.extra.get("meta")  # mmcv's files count epochs and iterations there
    meta = meta if isinstance(meta, dict) else {}
    epoch = meta.get("epoch") if checkpoint.epoch is None else checkpoint.epoch
    entries = []
    if epoch is not None:
        entries.append(f"epoch {epoch}")
    if "iter" in meta:
        entries.append(f"iteration {meta['iter']}")
    entries += [key for key in checkpoint.to_dict() if key not in ("model", "epoch")]
    return ", ".join(entries) or "nothing"


def _num_elements(state: dict[str, torch.Tensor]) -> int:
    """Return the number of elements. Tensors with several names count once."""
    unique = {(value.data_ptr(), value.shape): value.numel() for value in state.values()}
    return sum(unique.values())


# ------------------------------------------------------------------------------------------------------------- convert


def write(checkpoint: Checkpoint, to: str, out: Path, drop_masks: bool = False) -> None:
    """Convert a checkpoint, write it, and log what was dropped and how to load the new file.

    Raises:
        UserError: `out` exists, or the format has no place for this detector.
    """
    if out.exists():
        raise UserError(f"--out {out} exists and is not overwritten; give another name")
    if drop_masks and not has_mask_head(checkpoint.model):
        raise UserError(f"--drop_masks: {checkpoint.source} has no mask head; omit it")
    if to == TRANSFORMERS:
        if drop_masks:
            args = {**checkpoint.args, "masks": False}
            checkpoint = replace(without_mask_head(checkpoint), args=args)
        write_for_transformers(checkpoint, out)
        return
    content, notes = convert(checkpoint, to, drop_masks)
    write_atomically(out, lambda file: torch.save(content, file))
    for note in notes:
        log.info(note)
    # Siamese DETR's layout has its weights under `state_dict`.
    state = content.get("model", content.get("state_dict"))
    log.info(
        "wrote %s: %d tensors in the format %s\nload it with %s",
        out,
        len(state),
        to,
        _loading(checkpoint, to, out, has_mask_head(state)),
    )


def write_for_transformers(checkpoint: Checkpoint, folder: Path) -> None:
    """Write a trained detector as a folder for transformers, and log how to load it.

    Raises:
        UserError: the file is from pre-training, or transformers does not have this detector.
    """
    if needs_finetuning(checkpoint):
        raise UserError(
            f"{checkpoint.source} has no object classes, and transformers has no place for pre-training; fine-tune it "
            "first"
        )
    given = {"resume": checkpoint.source, "eval": True, "device": "cpu"}
    settings = resolve(given, settings_from_checkpoint(checkpoint, given), FINETUNE)
    num_tensors = write_folder(checkpoint, settings, folder)
    kind = make_config(settings, infer_classes(checkpoint))["architectures"][0]
    log.info(
        "wrote %s: %d tensors in the format %s\nload it with transformers.%s.from_pretrained(%r), here with "
        "--resume %s",
        *(folder, num_tensors, TRANSFORMERS, kind, str(folder), folder),
    )


def _loading(checkpoint: Checkpoint, to: str, out: Path, masks: bool) -> str:
    if to == OURS:
        flag = "--pretrain" if needs_finetuning(checkpoint) else "--resume"
        return f"{flag} {out}; the architecture is in the file"

    text = LAYOUTS[to].usage.replace("FILE", str(out))
    flags = [flag for flag in model_flags(checkpoint) if _exists_elsewhere(flag)]
    if not masks and "--masks" in flags:  # the mask head was left out
        flags.remove("--masks")
    return f"{text}; flags of this detector: {' '.join(flags)}" if flags else text


def _exists_elsewhere(flag: str) -> bool:
    """Return True for a flag that the published codebases have too. They all spell it alike.

    None of them has live batch norm, or a choice between the two sine encodings.
    """
    name, *value = flag.split()
    if name == "--position_embedding":
        return value == ["learned"]
    return name != "--backbone_norm"


def describe_backbone(path: str, name: str, origin: str) -> list[str]:
    """Return lines on a file that contains a backbone, but no detector."""
    return [
        f"{path} contains a backbone, but no detector: {name} ({origin})",
        f"use        --backbone {name} --backbone_weights {path}",
    ]


def main(args: Namespace) -> None:
    content = read_weights(args.file)
    backbone = identify_backbone(content)
    if backbone:
        log.info("\n".join(describe_backbone(args.file, *backbone)))
        if args.to:
            raise UserError(
                f"{args.file} contains no detector, and --to converts detectors only; "
                "--backbone_weights reads this file unchanged"
            )
        return

    checkpoint = parse_checkpoint(content, args.file)
    check_parameters(checkpoint, build_model)
    log.info("\n".join(describe(checkpoint)))
    if args.to:
        write(checkpoint, args.to, args.out, args.drop_masks)


if __name__ == "__main__":
    run_script(main, parse)
