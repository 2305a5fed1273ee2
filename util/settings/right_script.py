"""Recognize a command of `finetune_main.py` that was typed to `main.py`, and suggest the command to use.

DETR, Conditional DETR and Deformable DETR train with a `main.py`, UP-DETR pre-trains with one, and DETReg does both.
The flags tell which is meant, and often which detector. A suggested command is checked before it is shown.
"""

import itertools
import os
import shlex
from collections.abc import Iterator, Sequence
from typing import NoReturn

from util.errors import UserError
from util.settings.parser import HELP_FLAGS, LOCAL_RANK_FLAGS, Parser, make_parser, spellings
from util.settings.registry import DATASETS, DETECTORS, PRETEXTS
from util.settings.resolving import resolve
from util.settings.table import FINETUNE, PRETRAIN, UNSUPPORTED_FLAGS
from util.slurm import slurm_tasks

FINETUNE_ONLY_FLAGS = ("--eval", "--masks", "--frozen_weights", "--frozen_weigths")
LABELLED_DATASETS = ("coco", "voc", "airbus")  # DETReg's names of labelled datasets
LABELLED_PATHS = ("--coco_path", "--root_path", "--voc_path", "--airbus_path")
# Flags that only some detectors have in the published code, in the order in which they decide.
DEFORMABLE_FLAGS = {
    *(f"--{name}" for name in DETECTORS["deformable_detr"].flags),
    *("--lr_backbone_names", "--lr_linear_proj_names", "--lr_linear_proj_mult", "--sgd"),
    *("--dataset", "--cache_mode"),  # DETReg's default is Deformable DETR
}
CONDITIONAL_FLAGS = {"--root_path", "--split"}  # Siamese DETR fine-tunes Conditional DETR
DETR_FLAGS = {"--eos_coef", "--pre_norm"}
FOCAL_FLAGS = {"--cls_loss_coef", "--focal_alpha"}  # of Conditional and Deformable DETR
# All three have these flags, and only DETR's code runs with them.
MASK_FLAGS = {"--masks", "--coco_panoptic_path", "--frozen_weights", "--frozen_weigths"}


def check_right_script(argv: Sequence[str]) -> None:
    """Refuse to pre-train with flags that only make sense for `finetune_main.py`, and print the command to use.

    Raises:
        UserError: `--eval`, `--masks` or `--frozen_weights`, or labelled data (LABELLED_PATHS, `--dataset_file voc`,
            `--dataset voc`), without a flag that tells the pretext.
    """
    groups = _group(argv)
    flags = set(groups)
    if HELP_FLAGS & set(argv):
        return
    pretext_given = bool(flags & {"--pretext", *_pretext_flags()}) or _names_unlabelled(groups)
    reason = _reason(argv, flags, pretext_given)
    if reason is None:
        return

    message = f"{reason}: {PRETRAIN} pre-trains without labels; nothing was started. "
    pretext = f"--pretext {'region_prior' if '--dataset' in flags else 'random_query_patch'}"
    if "--eval" in flags and "--imagenet_path" in flags:
        missing = {"--coco_path": "COCO", "--resume": "PATH"}
        added = "".join(f" {flag} {value}" for flag, value in missing.items() if flag not in flags)
        raise UserError(
            f"{message}To evaluate a pre-trained model by class-agnostic AP on COCO's validation images, add: "
            f"{pretext}{added}"
        )
    suggestion, lines = _suggestion(groups)
    if reason.endswith("--pretext") and not refusal([*argv, *pretext.split()], PRETRAIN):
        use = "draw the boxes of a pre-trained model" if "--viz" in flags else "pre-train"
        lines.append(f"To {use} on the images of that folder, add: {pretext}")
    raise UserError(message + suggestion, "\n".join(lines))


def _names_unlabelled(groups: dict[str, list[str]]) -> bool:
    """Whether DETReg's `--dataset` names images without labels, which means its pretext."""
    name = groups.get("--dataset", [""])[-1].removeprefix("--dataset=")
    return name not in ("", *LABELLED_DATASETS)


def _pretext_flags() -> set[str]:
    """Return the flags that only pretexts read, with dashes."""
    return {f"--{name}" for entry in PRETEXTS.values() for name in entry.flags}


def _reason(argv: Sequence[str], flags: set[str], pretext_given: bool) -> str | None:
    """Return what does not belong into `main.py`, or None."""
    for flag in FINETUNE_ONLY_FLAGS:
        # With a pretext, --eval evaluates a pre-trained model and labelled data serves as unlabelled images.
        if flag in flags and not (flag == "--eval" and pretext_given):
            return flag
    if pretext_given:
        return None
    named = [("--dataset", name) for name in LABELLED_DATASETS]
    if "--imagenet_path" not in flags:
        for flag in LABELLED_PATHS:
            if flag in flags:
                return f"{flag} without --pretext"
        # The images of `custom` may be a folder without labels.
        named += [("--dataset_file", name) for name in DATASETS if name != "custom"]
    for flag, name in named:
        if f"{flag}={name}" in argv or (flag, name) in itertools.pairwise(argv):
            return f"{flag} {name} without --pretext"
    return None


def _group(argv: Sequence[str]) -> dict[str, list[str]]:
    """Return flag -> its words, with its values. A flag that is given twice has the words of both."""
    groups: dict[str, list[str]] = {}
    flag = ""
    for word in argv:
        if word.startswith("--"):
            flag = word.split("=")[0]
        groups.setdefault(flag, []).append(word)
    return groups


def _suggestion(groups: dict[str, list[str]]) -> tuple[str, list[str]]:
    """Return a sentence, and lines below it: the commands to use and what they leave out."""
    known = spellings(FINETUNE) - set(UNSUPPORTED_FLAGS)
    kept = [word for flag, words in groups.items() if flag in known for word in words]
    left_out = [
        shlex.join(words) + _why(flag)
        for flag, words in groups.items()
        if flag not in known and flag not in LOCAL_RANK_FLAGS
    ]
    commands, reason = [], ""
    for words in _candidates(kept, groups):
        reason = refusal(words, FINETUNE)
        if not reason:
            commands.append(f"  {_launcher()} {FINETUNE} {shlex.join(words)}")

    if not commands:
        answer = f"With these flags it would answer: {reason}"
        return f"{FINETUNE} trains and evaluates with labels. {answer}", []
    text = "To train or evaluate with labels:"
    if len(commands) > 1:
        text = (
            "To train or evaluate with labels, choose the detector whose code this command is from:"
        )
    if left_out:
        commands.append(f"Left out, because {FINETUNE} does not have it: {', '.join(left_out)}")
    return text, commands


def _why(flag: str) -> str:
    """Return why a flag is left out, or which one may be meant: the published parsers accept abbreviations."""
    if flag in UNSUPPORTED_FLAGS:
        return f" ({UNSUPPORTED_FLAGS[flag][1]})"
    longer = sorted(name for name in spellings(FINETUNE) if name.startswith(flag))
    return f" (did you mean {' or '.join(longer)}?)" if longer and flag.startswith("--") else ""


def _launcher() -> str:
    """Return the words before the script that start as many processes as this command did."""
    tasks = slurm_tasks()
    if tasks > 1:
        # tools/run_dist_slurm.sh exports its own srun command in LAUNCH, with partition and GPUs.
        return os.environ.get("LAUNCH") or f"srun --ntasks {tasks} python"
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # set by torchrun
    return "python" if processes == 1 else f"torchrun --nproc_per_node {processes}"


def _candidates(words: list[str], groups: dict[str, list[str]]) -> Iterator[list[str]]:
    """Yield the command, once for each detector that it may be from."""
    if _names_detector(groups):
        yield words
        return
    for detector in _possible_detectors(set(groups)):
        yield ["--detector", detector, *words]


def _names_detector(groups: dict[str, list[str]]) -> bool:
    """Whether a flag names the detector, or a checkpoint contains it."""
    if {"--detector", "--model"} & set(groups):
        return True
    flags = ("--resume", "--pretrain", "--frozen_weights", "--frozen_weigths")
    # As published, an empty path means no checkpoint.
    values = {groups[flag][-1].removeprefix(f"{flag}=") for flag in flags if flag in groups}
    return bool(values - {"", "auto"})


def _possible_detectors(flags: set[str]) -> Sequence[str]:
    for own, detectors in (
        (DEFORMABLE_FLAGS, ["deformable_detr"]),
        (CONDITIONAL_FLAGS, ["conditional_detr"]),
        (DETR_FLAGS, ["detr"]),
        (FOCAL_FLAGS, ["conditional_detr", "deformable_detr"]),
        (MASK_FLAGS, ["detr"]),
    ):
        if flags & own:
            return detectors
    return list(DETECTORS)


class _CheckingParser(Parser):
    """Raises what `Parser` prints before it exits."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def refusal(words: Sequence[str], script: str) -> str:
    """Return why a script would refuse these flags, or nothing."""
    # The detector of a checkpoint is not known here: one that accepts the flags is enough.
    groups = _group(words)
    guesses = _names_detector(groups) and {"--detector", "--model"}.isdisjoint(groups)
    message = ""
    for extra in [["--detector", name] for name in DETECTORS] if guesses else [[]]:
        try:
            parser = _CheckingParser(script, parents=[make_parser(script)], add_help=False)
            settings = resolve(parser.parse_args([*words, *extra]))
            if not settings.pre_norm or settings.detector == "detr":
                return ""
            message = message or f"--pre_norm: {settings.detector} is post-norm only"
        except UserError as error:
            message = message or str(error)
    return message
