"""What a run takes over from the checkpoint that it starts from: the architecture, and on a resume its settings."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from util.checkpoints.architecture import architecture
from util.checkpoints.checkpoint import Checkpoint
from util.errors import UserError
from util.logger import log
from util.settings import FINETUNE, PRETRAIN, flags_of
from util.settings.registry import DETECTORS, PRETEXTS
from util.settings.table import names_where


def pretext_parts() -> tuple[str, ...]:
    """What the names of those parameters begin with that fine-tuning drops."""
    return sum((entry.parts for entry in PRETEXTS.values()), ())


def is_pretext(checkpoint: Checkpoint) -> bool:
    """True for a checkpoint of pre-training without labels: ours or UP-DETR's, DETReg's, Siamese DETR's."""
    named = any(key.startswith(pretext_parts()) for key in checkpoint.model)
    return named or bool(checkpoint.args.get("pretext"))


def without_pretext(checkpoint: Checkpoint) -> Checkpoint:
    """The detector alone, with its class head."""
    model = {
        key: value for key, value in checkpoint.model.items() if not key.startswith(pretext_parts())
    }
    return dataclasses.replace(checkpoint, model=model)


def adopt(
    checkpoint: Checkpoint, given: Mapping[str, Any], script: str = FINETUNE
) -> dict[str, Any]:
    """What a checkpoint says of flags that were not given: for `resolve`, as `adopted`. With `resume` among the given
    flags also the settings of its run.

    Raises:
        UserError: the file is not of a kind that the script can use, or a given flag contradicts it.
    """
    resume = bool(given.get("resume"))
    adopted, lines = adopt_architecture(checkpoint, given, script, same_queries=resume)
    for line in lines:
        log.info(line)
    _check_kind({**adopted, **given}, checkpoint, script)
    return {**adopted, **adopt_settings(checkpoint, given, script)} if resume else adopted


def _check_kind(known: Mapping[str, Any], checkpoint: Checkpoint, script: str) -> None:
    """A run that is resumed must be of the kind that the script runs; every detector of a file must be one that can be
    built.
    """
    detector, source = known.get("detector", "detr"), checkpoint.source
    if detector not in DETECTORS:
        raise UserError(
            f"{source} holds {detector}, which this version does not build ({', '.join(DETECTORS)})"
        )
    if not known.get("resume"):
        return
    if script == FINETUNE and is_pretext(checkpoint):
        raise UserError(
            f"{source} is from pre-training and knows no classes: give it as --pretrain to {FINETUNE}"
        )
    if _evaluates_pretext(known, script):
        return  # any detector has boxes, whatever it was trained by
    if script == PRETRAIN and not is_pretext(checkpoint):
        raise UserError(
            f"{source} holds a detector without a pretext; {PRETRAIN} can resume only its own checkpoints"
        )
    if script == PRETRAIN:
        _check_pretext(known.get("pretext"), checkpoint)


def _evaluates_pretext(known: Mapping[str, Any], script: str) -> bool:
    return script == PRETRAIN and bool(known.get("eval") or known.get("viz"))


def _check_pretext(given: str | None, checkpoint: Checkpoint) -> None:
    """A published file does not say which pretext it is of, but the names in it do."""
    pretext = given or checkpoint.args.get("pretext") or "random_query_patch"
    able = [
        name
        for name, entry in PRETEXTS.items()
        if any(key.startswith(entry.parts) for key in checkpoint.model)
    ]
    if able and pretext not in able:
        raise UserError(
            f"{checkpoint.source} is not of --pretext {pretext}: add --pretext {able[0]}"
        )


def adopt_architecture(
    checkpoint: Checkpoint,
    given: Mapping[str, Any],
    script: str = FINETUNE,
    same_queries: bool = False,
) -> tuple[dict[str, Any], list[str]]:
    """The architecture of the checkpoint by flag name, for flags of `script` that were not given, and lines for the
    log.

    A given `num_queries` may differ (`load_pretrained` tiles or cuts the embeddings), except with `same_queries`, for a
    run that is resumed or evaluated.

    Raises:
        UserError: there is no detector in the file, or any other given flag contradicts it.
    """
    source, known = checkpoint.source, flags_of(script)
    certain, likely = architecture(checkpoint, *([given["nheads"]] if "nheads" in given else []))
    if certain.get("detector") is None:
        raise UserError(no_detector(checkpoint.model, source))
    adopted, lines = {}, []
    for name, value in {**certain, **likely}.items():
        if name not in known or given.get(name) == value:
            continue
        if name not in given:
            adopted[name] = value
        elif name == "num_queries" and not same_queries:
            change = "tiled" if given[name] > value else "cut"
            lines.append(
                f"--num_queries {given[name]}: the {value} query embeddings of {source} are {change}"
            )
        elif name in certain:
            raise UserError(
                f"--{name} {_shown(given[name])} contradicts {source}, which was trained with --{name} "
                f"{_shown(value)}; omit --{name} or choose another file"
            )
    if adopted:
        shown = ", ".join(f"--{name} {_shown(value)}" for name, value in adopted.items())
        lines.insert(0, f"as in {source}: {shown}")
    return adopted, lines


def adopt_settings(checkpoint: Checkpoint, given: Mapping[str, Any], script: str) -> dict[str, Any]:
    """What a resumed run takes over besides the architecture: all settings of our own checkpoints of the same script,
    those of training of published ones, whose other settings have other meanings.
    """
    stored = checkpoint.args
    if script == FINETUNE and "script" not in stored:
        published = names_where(lambda flag: flag.published)
        counted = ("epochs", "lr_drop") if "max_iters" in given else ()
        stored = {
            name: stored[name] for name in published if name in stored and name not in counted
        }
    elif stored.get("script") != script:
        return {}
    skipped = set(given) | names_where(lambda flag: flag.session)
    other_data = "dataset_file" in given and stored.get("dataset_file") != given["dataset_file"]
    if other_data or _evaluates_pretext(given, script):
        skipped |= {"dataset_file"} | names_where(lambda flag: flag.data)
    if "lr_drop" in given:
        skipped.add("lr_drop_epochs")
    flags = {name: flag for name, flag in flags_of(script).items() if name not in skipped}
    adopted = {name: value for name, value in stored.items() if name in flags and value is not None}
    gone = {name for name, value in adopted.items() if not flags[name].is_choice(value)}
    for name in sorted(gone):
        log.warning(
            "%s: --%s %s is no longer a choice; its default is used",
            checkpoint.source,
            name,
            adopted[name],
        )
    return {name: value for name, value in adopted.items() if name not in gone}


def no_detector(state: Mapping[str, Tensor], source: str) -> str:
    """The message for a file without a detector."""
    if any(key.endswith(("conv1.weight", "conv_stem.weight")) for key in state):
        return (
            f"{source} holds a backbone without a detector; give it as --backbone_weights {source}"
        )
    names = ", ".join(list(state)[:3])
    return (
        f"{source} holds no detector of this family ({len(state)} tensors, the first are {names}); "
        "choose another file"
    )


def _shown(value: Any) -> str:
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else str(value)
