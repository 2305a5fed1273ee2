"""Tells what a checkpoint or weight file is, and converts it between the published layouts and ours.

    python tools/convert_checkpoint.py FILE                               # what is it?
    python tools/convert_checkpoint.py FILE --to FORMAT --out NEW_FILE

FILE is a path or an address. Formats: `predetr` (ours; keeps everything and stores what names don't tell), `detr`
(DETR, Conditional DETR, Deformable DETR), `updetr`, `detreg`, `siamese`. `--pretrain` and `--resume` read every
published layout as it is: converting is for other code bases, and for a file that says by itself what it is. No file
runs code, none is overwritten, and names or shapes that fit no known detector are refused.
"""

import argparse
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(
    0, str(Path(__file__).resolve().parent.parent)
)  # `python tools/NAME.py` works from any directory

from models import build_model
from util.checkpoints.adoption import is_pretext
from util.checkpoints.architecture import infer_architecture, infer_detector, strip_detr_prefix
from util.checkpoints.backbone_weights import identify_backbone
from util.checkpoints.checkpoint import Checkpoint, parse_checkpoint
from util.checkpoints.classes import count_classes, infer_classification
from util.checkpoints.conversion import (
    CODEBASES,
    FORMATS,
    LAYOUTS,
    MASK_PREFIXES,
    OURS,
    convert,
    infer_codebase,
    infer_pretext,
)
from util.checkpoints.parameter_check import check_parameters
from util.checkpoints.weight_files import read_weights
from util.errors import UserError
from util.files import write_atomically
from util.logger import log
from util.runs.session import run_script
from util.settings import FINETUNE, make_parser, resolve

SIZES = ("backbone", "num_queries", "enc_layers", "dec_layers", "hidden_dim", "dim_feedforward")
PRETEXT_OF_CODEBASE = {
    "random_query_patch": "UP-DETR",
    "region_prior": "DETReg",
    "siamese": "Siamese DETR",
}


def parse(argv: list[str]) -> Namespace:
    parser = argparse.ArgumentParser(
        "tools.convert_checkpoint", description=__doc__.splitlines()[0], allow_abbrev=False
    )
    parser.add_argument("file", metavar="FILE", help="a checkpoint or weight file: path or address")
    parser.add_argument("--to", choices=FORMATS, help="layout to write")
    parser.add_argument(
        "--out", type=Path, metavar="NEW_FILE", help="where to write it; must not exist"
    )
    args = parser.parse_args(argv)
    if (args.to is None) != (args.out is None):
        parser.error(
            "--to and --out belong together: give both to convert, none to be told what the file is"
        )
    return args


# ------------------------------------------------------------------------------------------------------------ describe


def describe(checkpoint: Checkpoint) -> list[str]:
    """What the file is, one property a line."""
    state = strip_detr_prefix(checkpoint.model)
    pretext, kind = infer_pretext(checkpoint), infer_detector(state)
    certain, likely = infer_architecture(checkpoint)
    if pretext:
        stage = f"pre-training ({pretext}, the pretext of {PRETEXT_OF_CODEBASE.get(pretext, 'its own')})"
    else:
        stage = (
            "a detector to be fine-tuned" if begins_training(checkpoint) else "a trained detector"
        )
    masks = any(key.startswith(MASK_PREFIXES) for key in state)
    rows = {
        "code base": _code_base(checkpoint, kind, pretext),
        "holds": f"{stage}{', with a mask head, which this version does not use' if masks else ''}",
        "model": f"{checkpoint.num_tensors} tensors, {_unique_numbers(state):,} numbers",
        "detector": f"{kind}: {_shown(certain, SIZES)}",
        "options": _options(certain, likely),
        "classes": _classes(checkpoint),
        "flags": " ".join(model_flags(checkpoint)) or "none: the detector's defaults",
        "also in it": _rest(checkpoint),
        "checked": f"all names and shapes are those of a {kind}",
        "use": _usage(checkpoint, masks),
    }
    return [f"{name:<10} {text}" for name, text in rows.items()]


def begins_training(checkpoint: Checkpoint) -> bool:
    """Whether it knows no classes yet: a pretext, or what a converter made of one."""
    return is_pretext(checkpoint) or not count_classes(checkpoint.model, "focal")


def _usage(checkpoint: Checkpoint, masks: bool) -> str:
    path = checkpoint.source
    if masks:
        return f"python tools/convert_checkpoint.py {path} --to predetr --out NEW_FILE, which takes the detector out"
    return (
        f"python finetune_main.py --coco_path DIR "
        f"{'--pretrain' if begins_training(checkpoint) else '--eval --resume'} {path}"
    )


def _code_base(checkpoint: Checkpoint, kind: str, pretext: str | None) -> str:
    origin = infer_codebase(checkpoint)
    name = CODEBASES[origin]
    if origin == OURS and checkpoint.converted_from:
        return f"{name}, converted from {CODEBASES.get(checkpoint.converted_from, 'another code base')}"
    if origin == "siamese" and not checkpoint.siamese_pretext:
        return f"{name}, from its convert_to_detr or its fine-tuning code"
    if origin == kind and not checkpoint.args and kind != "conditional_detr":
        alike = "UP-DETR and DETReg" if kind == "detr" else "DETReg"
        return f"{name}, or {alike}, whose fine-tuned files have the same names"
    return name


def _options(certain: dict[str, Any], likely: dict[str, Any]) -> str:
    known = _shown(
        certain,
        (
            "pre_norm",
            "num_feature_levels",
            "with_box_refine",
            "two_stage",
            "nheads",
            "dilation",
            "position_embedding",
        ),
    )
    guessed = [f"probably {flag} {value}" for flag, value in likely.items()]
    unknown = [flag for flag in ("dilation", "nheads") if flag not in {**certain, **likely}]
    tail = [f"the weights can't tell: {' and '.join(unknown)}"] if unknown else []
    return "; ".join([*filter(None, [known]), *guessed, *tail])


def _shown(known: dict[str, Any], flags: tuple[str, ...]) -> str:
    return ", ".join(f"{flag} {known[flag]}" for flag in flags if flag in known)


def _classes(checkpoint: Checkpoint) -> str:
    outputs = count_classes(checkpoint.model, "focal")
    if not outputs:
        return "no class head (left out when it was converted)"
    softmax = infer_classification(checkpoint) == "softmax"
    names = list(checkpoint.class_names.values())
    known = (
        f": {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}"
        if names
        else "; without names"
    )
    return (
        f"{outputs - 1} classes and `no object`" if softmax else f"{outputs} classes (sigmoid)"
    ) + known


def model_flags(checkpoint: Checkpoint) -> list[str]:
    """The flags of the architecture that differ from the detector's defaults."""
    certain, likely = infer_architecture(checkpoint)
    known = {**likely, **certain}
    usual = resolve(
        make_parser(FINETUNE).parse_args(["--detector", known.pop("detector"), "--device", "cpu"])
    )
    differing = {
        flag: value for flag, value in known.items() if getattr(usual, flag, value) != value
    }
    return [
        f"--{flag}" if value is True else f"--{flag} {value}"
        for flag, value in differing.items()
        if value is not False
    ]


def _rest(checkpoint: Checkpoint) -> str:
    meta = checkpoint.extra.get("meta")
    meta = meta if isinstance(meta, dict) else {}
    epoch = meta.get("epoch") if checkpoint.epoch is None else checkpoint.epoch
    said = [] if epoch is None else [f"epoch {epoch}"]
    said += [f"iteration {meta['iter']}"] if "iter" in meta else []
    said += [key for key in checkpoint.to_dict() if key not in ("model", "epoch")]
    return ", ".join(said) or "nothing"


def _unique_numbers(state: dict[str, torch.Tensor]) -> int:
    """Numbers in the file; tensors that stand under several names count once."""
    return sum(
        {(value.data_ptr(), value.shape): value.numel() for value in state.values()}.values()
    )


# ------------------------------------------------------------------------------------------------------------- convert


def write(checkpoint: Checkpoint, to: str, out: Path) -> None:
    """Converts and writes, and says what was left out and how the new file is used.

    Raises:
        UserError: `out` exists, or the layout has no place for this detector.
    """
    if out.exists():
        raise UserError(f"--out {out} exists and is not overwritten: give another name")
    content, notes = convert(checkpoint, to)
    write_atomically(out, lambda file: torch.save(content, file))
    for note in notes:
        log.info(note)
    state = content.get("model", content.get("state_dict"))
    if to == OURS:
        how = f"--{'pretrain' if begins_training(checkpoint) else 'resume'} {out}; no further flags are needed"
    else:  # all code bases spell flags alike, but have neither live batch norm nor a choice between the two sine codes
        flags = " ".join(
            flag
            for flag in model_flags(checkpoint)
            if flag.split()[0] not in ("--backbone_norm", "--position_embedding")
            or flag.endswith(" learned")
        )
        how = f"{LAYOUTS[to].loading.replace('FILE', str(out))}{f'; flags of this detector: {flags}' if flags else ''}"
    log.info("wrote %s: %d tensors in the layout %s\nload it by %s", out, len(state), to, how)


def describe_backbone(path: str, name: str, origin: str) -> list[str]:
    return [
        f"{path} holds a backbone without a detector: {name} ({origin})",
        f"use        --backbone {name} --backbone_weights {path}",
    ]


def main(args: Namespace) -> None:
    content = read_weights(args.file)
    backbone = identify_backbone(content)
    if backbone:
        log.info("\n".join(describe_backbone(args.file, *backbone)))
        if args.to:
            raise UserError(
                f"{args.file} holds no detector, and --to converts detectors; --backbone_weights reads this file "
                f"as it is"
            )
        return
    checkpoint = parse_checkpoint(content, args.file)
    check_parameters(checkpoint, build_model)
    log.info("\n".join(describe(checkpoint)))
    if args.to:
        write(checkpoint, args.to, args.out)


if __name__ == "__main__":
    run_script(main, parse)
