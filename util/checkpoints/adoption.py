"""Settings that a run adopts from its checkpoint: the architecture and, on a resume, all other settings."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from util.checkpoints.architecture import DEFAULT_NHEADS, infer_architecture
from util.checkpoints.checkpoint import Checkpoint
from util.checkpoints.classes import count_classes, infer_classification
from util.errors import UserError
from util.logger import log
from util.settings import FINETUNE, PRETRAIN, Flag, checked_flags, flags_of
from util.settings.registry import DETECTORS, PRETEXTS
from util.settings.table import names_where

MAX_TEXT = 4096  # characters of a setting; the longest path of Linux


def pretext_prefixes() -> tuple[str, ...]:
    """Return the name prefixes of all pretext parameters, which fine-tuning drops."""
    return tuple(prefix for entry in PRETEXTS.values() for prefix in entry.parameter_prefixes)


def is_pretext(checkpoint: Checkpoint) -> bool:
    """Return True for a checkpoint of label-free pre-training, from this project or a published codebase."""
    has_pretext_weights = any(key.startswith(pretext_prefixes()) for key in checkpoint.model)
    # region_prior without --object_embedding_loss adds no parameters: only the settings tell.
    return has_pretext_weights or bool(checkpoint.args.get("pretext"))


def strip_pretext(checkpoint: Checkpoint) -> Checkpoint:
    """Return the checkpoint without pretext parameters: the detector with its class head."""
    prefixes = pretext_prefixes()
    model = {key: value for key, value in checkpoint.model.items() if not key.startswith(prefixes)}
    return dataclasses.replace(checkpoint, model=model)


def settings_from_checkpoint(
    checkpoint: Checkpoint, given: Mapping[str, Any], script: str = FINETUNE
) -> dict[str, Any]:
    """Return the settings that `script` adopts from a checkpoint, for the argument `adopted` of `resolve`.

    Args:
        given: the flags given by the user, by name. They win over the checkpoint where they may differ from it. With
            `resume` among them, the settings of the checkpoint's run are adopted too.

    Raises:
        UserError: the script can't use this kind of checkpoint, or a given flag contradicts it.
    """
    resume = bool(given.get("resume"))
    # A detector that stays frozen is used as it is, too.
    is_unchanged = resume or bool(given.get("frozen_weights"))
    adopted, messages = adopt_architecture(checkpoint, given, script, is_unchanged=is_unchanged)
    for message in messages:
        log.info(message)
    if is_unchanged:
        _warn_unknown_dilation(checkpoint, {**adopted, **given})

    if resume and script == PRETRAIN:
        adopted.update(_adopt_pretext(checkpoint, given))
    # Needs the detector, which is among the adopted settings unless it was given.
    _check_kind({**adopted, **given}, checkpoint, script)
    if is_unchanged and not _is_class_agnostic_eval(given, script):
        adopted.update(_adopt_num_classes(checkpoint, given))
    if resume:
        adopted.update(adopt_settings(checkpoint, given, script))
    _check_values(adopted, checkpoint.source, script)
    return adopted


def _check_values(adopted: Mapping[str, Any], source: str, script: str) -> None:
    """Check that the command line could have given these values: a file may have stored anything.

    Raises:
        UserError: one of them is of another type, or out of range.
    """
    for name, value in adopted.items():
        if name in flags_of(script) and not _is_value(name, value, script):
            raise UserError(
                f"{source} was saved with --{name} {repr(value)[:60]}, which is no value of that flag: give --{name}, "
                "or choose another file"
            )


def _is_value(name: str, value: Any, script: str) -> bool:
    """Return whether this is the flag's default, or what the command line gives for the value's own text."""
    default = flags_of(script)[name].general_default()
    if type(value) is type(default) and value == default:
        return True  # such as 0 for "never", which can't be typed
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # published files have 300.0 epochs
    if isinstance(value, tuple):
        value = list(value)
    if isinstance(value, str) and (len(value) > MAX_TEXT or any(end in value for end in "\n\r\0")):
        return False
    try:
        return checked_flags(script, {name: value}).get(name) == value
    except UserError:
        return False


def _warn_unknown_dilation(checkpoint: Checkpoint, known: Mapping[str, Any]) -> None:
    """Warn if nothing tells whether a ResNet was dilated: a DC5 model then has lower AP, without an error."""
    has_bottlenecks = known.get("backbone") in ("resnet50", "resnet101", "resnet152")
    is_known = "dilation" in known or "dilation" in checkpoint.args
    if has_bottlenecks and not is_known and not is_pretext(checkpoint):
        log.warning(
            "%s: neither settings nor weights tell whether this is a DC5 model, so it is taken for one without "
            "dilation; if it is DC5, add --dilation, or put dc5 into the file's name",
            checkpoint.source,
        )


def _adopt_num_classes(checkpoint: Checkpoint, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return `num_classes` from the class head of a model that is used as it is.

    Raises:
        UserError: a given `num_classes` contradicts it.
    """
    classification = given.get("classification") or infer_classification(checkpoint)
    num_classes = count_classes(checkpoint.model, classification)
    if not num_classes:
        return {}
    wanted = given.get("num_classes", num_classes)
    if wanted != num_classes:
        raise UserError(
            f"--num_classes {wanted} contradicts {checkpoint.source}, whose class head has {num_classes} classes; omit "
            "--num_classes, or train other classes with --pretrain"
        )
    return {"num_classes": num_classes}


def _adopt_pretext(checkpoint: Checkpoint, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the pretext of a published file, and which of its parts it has, for flags that were not given.

    A checkpoint of this project stores them, see `adopt_settings`.
    """
    if checkpoint.args.get("pretext"):
        return {}

    def has(prefix: str) -> bool:
        return any(key.startswith(prefix) for key in checkpoint.model)

    found: dict[str, Any] = {}
    if has("enc_head."):
        found = {"pretext": "siamese"}
        if not has("feature_align."):
            found["feature_loss_coef"] = 0.0
    elif has("patch2query."):
        found = {"pretext": "random_query_patch", "feature_recon": has("feature_align.")}
        num_patches = checkpoint.args.get("num_patches")
        if isinstance(num_patches, int):
            found["num_patches"] = num_patches
    elif has("feature_embed."):
        found = {"pretext": "region_prior", "object_embedding_loss": True}
        head = checkpoint.args.get("obj_embedding_head")
        if flags_of(PRETRAIN)["obj_embedding_head"].is_choice(head):
            found["obj_embedding_head"] = head
    if given.get("pretext", found.get("pretext")) != found.get("pretext"):
        return {}
    adopted = {name: value for name, value in found.items() if name not in given}
    if adopted:
        flags = ", ".join(f"--{name} {_format_value(value)}" for name, value in adopted.items())
        log.info("adopted from %s: %s", checkpoint.source, flags)
    return adopted


def _check_kind(known: Mapping[str, Any], checkpoint: Checkpoint, script: str) -> None:
    """Check that the detector can be built and that `script` can resume this kind of checkpoint."""
    detector, source = known.get("detector", "detr"), checkpoint.source
    if detector not in DETECTORS:
        raise UserError(
            f"{source} contains the detector {detector}, which this version does not have "
            f"({', '.join(DETECTORS)}); choose another file"
        )
    if known.get("frozen_weights") and not known.get("resume") and is_pretext(checkpoint):
        raise UserError(
            f"--frozen_weights {source} is from pre-training and has no object classes; fine-tune it first, or train "
            "detector and masks together with --pretrain and --masks"
        )
    if not known.get("resume"):
        return

    if script == FINETUNE and is_pretext(checkpoint):
        raise UserError(
            f"{source} is from pre-training and has no object classes; pass it as --pretrain to {FINETUNE}"
        )
    if _is_class_agnostic_eval(known, script):
        return  # class-agnostic AP needs boxes and scores only, so any detector will do
    if script == PRETRAIN and not is_pretext(checkpoint):
        raise UserError(
            f"{source} contains a detector without a pretext; {PRETRAIN} can only resume its own checkpoints. To draw "
            "what a detector finds: tools/predict.py"
        )
    if script == PRETRAIN:
        _check_pretext(known.get("pretext"), checkpoint)


def _is_class_agnostic_eval(known: Mapping[str, Any], script: str) -> bool:
    return script == PRETRAIN and bool(known.get("eval") or known.get("viz"))


def _check_pretext(given: str | None, checkpoint: Checkpoint) -> None:
    """Check `--pretext` against the parameter names: a published file stores no pretext in its settings."""
    default = "random_query_patch"  # of main.py
    pretext = given or checkpoint.args.get("pretext") or default
    matching = [
        name
        for name, entry in PRETEXTS.items()
        if any(key.startswith(entry.parameter_prefixes) for key in checkpoint.model)
    ]
    if matching and pretext not in matching:
        raise UserError(
            f"{checkpoint.source} was not pre-trained with --pretext {pretext}; add --pretext {matching[0]}"
        )


def adopt_architecture(
    checkpoint: Checkpoint,
    given: Mapping[str, Any],
    script: str = FINETUNE,
    is_unchanged: bool = False,
) -> tuple[dict[str, Any], list[str]]:
    """Return the architecture of a checkpoint, for the flags of `script` that were not given, and lines for the log.

    Args:
        is_unchanged: True for a detector that is resumed, evaluated or frozen. Otherwise a given `num_queries` may
            differ from the checkpoint (`load_pretrained` tiles or truncates the query embeddings), and its mask head is
            used only with `--masks`.

    Raises:
        UserError: the file contains no detector, or another given flag contradicts it.
    """
    source, known = checkpoint.source, flags_of(script)
    certain, likely = infer_architecture(checkpoint, given.get("nheads", DEFAULT_NHEADS))
    if certain.get("detector") is None:
        raise UserError(no_detector_message(checkpoint.model, source))

    adopted, messages = {}, []
    for name, value in {**certain, **likely}.items():
        if name not in known or given.get(name) == value:
            continue
        if name == "masks" and not is_unchanged:
            continue
        if name not in given:
            adopted[name] = value
        elif name == "num_queries" and not is_unchanged:
            change = "tiled" if given[name] > value else "truncated"
            messages.append(
                f"--num_queries {given[name]}: the {value} query embeddings of {source} are {change}"
            )
        elif name in certain:
            raise UserError(
                f"--{name} {_format_value(given[name])} contradicts {source}, which was trained with --{name} "
                f"{_format_value(value)}; omit --{name} or choose another file"
            )
        # A given flag that differs from a `likely` value wins: the file does not prove that value.

    if adopted:
        flags = ", ".join(f"--{name} {_format_value(value)}" for name, value in adopted.items())
        messages.insert(0, f"adopted from {source}: {flags}")
    return adopted, messages


def adopt_settings(checkpoint: Checkpoint, given: Mapping[str, Any], script: str) -> dict[str, Any]:
    """Return the settings that a resumed run adopts in addition to the architecture.

    Checkpoints of this project give all settings to the script that wrote them. Published checkpoints give those flags
    that mean the same here (`Flag.published`).
    """
    stored = checkpoint.args
    if script == FINETUNE and "script" not in stored:
        stored = _published_settings(stored, given)
    elif stored.get("script") != script:
        return {}  # such as main.py --eval with a fine-tuned detector

    skipped = set(given) | names_where(lambda flag: flag.per_launch)
    other_data = "dataset_file" in given and stored.get("dataset_file") != given["dataset_file"]
    if other_data or _is_class_agnostic_eval(given, script):
        # Paths and splits of one dataset mean nothing for another one.
        skipped |= {"dataset_file"} | names_where(lambda flag: flag.data_specific)
    if "lr_drop" in given:
        skipped.add("lr_drop_epochs")  # otherwise the stored drop epochs would override it

    flags = {name: flag for name, flag in flags_of(script).items() if name not in skipped}
    adopted = {name: value for name, value in stored.items() if name in flags and value is not None}
    return _drop_removed_choices(adopted, flags, checkpoint.source)


def _published_settings(stored: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    # With --max_iters the schedule counts iterations: stored numbers of epochs mean nothing to it.
    skipped = ("epochs", "lr_drop") if "max_iters" in given else ()
    names = names_where(lambda flag: flag.published)
    return {name: stored[name] for name in names if name in stored and name not in skipped}


def _drop_removed_choices(
    adopted: dict[str, Any], flags: Mapping[str, Flag], source: str
) -> dict[str, Any]:
    """Drop stored values that are no longer choices of their flag, with a warning for each."""
    removed = {name for name, value in adopted.items() if not flags[name].is_choice(value)}
    for name in sorted(removed):
        log.warning(
            "%s: --%s %s is no longer a choice; using the default", source, name, adopted[name]
        )
    return {name: value for name, value in adopted.items() if name not in removed}


def no_detector_message(state: Mapping[str, Tensor], source: str) -> str:
    """Return the error message for a file without a detector."""
    if any(key.endswith(("conv1.weight", "conv_stem.weight")) for key in state):
        return (
            f"{source} contains a backbone, but no detector; pass it as --backbone_weights {source}"
        )
    names = ", ".join(list(state)[:3])
    return (
        f"{source} contains no detector of the DETR family ({len(state)} tensors, the first are {names}); "
        "choose another file"
    )


def _format_value(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return str(value)
