"""The runs of a transfer study: which there are, what each needs, and the public command of each.

Words of commands have {data} and {study} in place of the two folders, so that a study can be moved to another machine
and go on there.
"""

import math
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tools.study.prepare import annotation_file, steps_an_epoch
from tools.study.presets import (
    DETECTOR_FLAGS,
    NONE,
    PRESETS,
    RATE_DROP,
    UNTRAINED,
    Flags,
    Preset,
    Variant,
    foreign_variant,
    pretext_flags,
    variant_of,
)
from util.errors import UserError
from util.settings.flags import FINETUNE, PRETRAIN

STORED = ("selective_search", "edge_boxes")  # methods whose boxes are searched once, before pre-training
RESULTS = {  # kind of a step -> the file that a finished one has
    "proposals": "header.json",
    "pretrain": "checkpoint.pth",
    "recall": "proposal_metrics.json",
    "finetune": "log.txt",
    "choose": "log.txt",
}
UNTRAINED_RATE = 1e-12  # one step at it leaves a model as it was initialised


@dataclass(frozen=True)
class Step:
    """A run of the study. name: its folder below the study's. words: the command without `python`. needs: names of
    other steps.
    pretrain_seed: of the pre-training that it is, evaluates or starts from."""

    name: str
    kind: str
    words: tuple[str, ...]
    needs: tuple[str, ...] = ()
    detector: str = ""
    variant: str = ""
    fraction: float | None = None
    seed: int | None = None
    pretrain_seed: int | None = None
    rate: float | None = None

    def facts(self) -> dict[str, Any]:
        """What a report needs to find it."""
        return {
            key: value for key, value in vars(self).items() if key not in ("words", "needs") and value not in ("", None)
        }


@dataclass(frozen=True)
class Options:
    """What was asked for; rates: detector -> rate of fine-tuning that was chosen for it. Others have the preset's
    first.
    """

    preset: Preset
    detectors: Sequence[str]
    variants: Sequence[Variant]
    fractions: Sequence[float]
    seeds: Sequence[int]
    pretrain_seeds: Sequence[int]
    backbone: Flags
    rates: dict[str, float] = field(default_factory=dict)
    edge_model: str = ""

    @property
    def model(self) -> Flags:
        """Flags of all models, whatever the detector."""
        return {**self.preset.model, **self.backbone}

    def rate(self, detector: str) -> float | None:
        """None: as the detector has it."""
        return self.rates.get(detector, next(iter(self.preset.rates), None))


def options_of(args: Namespace, manifest: dict[str, Any], rates: dict[str, float]) -> Options:
    """
    Raises:
        UserError: a fraction that was not prepared, or no checkpoint where one is named.
    """
    prepared = {1.0, *manifest["settings"]["fractions"]}
    for fraction in args.fractions:
        if fraction not in prepared:
            known = " ".join(f"{other:g}" for other in sorted(prepared))
            raise UserError(
                f"--fractions {fraction:g}: {args.data} has {known}; another fraction needs other data, and a "
                f"study of its own"
            )
    preset = PRESETS[args.preset]
    names = dict.fromkeys([*args.pretexts, *args.ablations])
    weights = args.backbone_weights
    if weights and Path(weights).exists():
        weights = str(Path(weights).resolve())
    backbone = {name: value for name, value in (("backbone", args.backbone), ("backbone_weights", weights)) if value}
    variants = [*(variant_of(name) for name in names), *(foreign_variant(words) for words in args.pretrained)]
    edge_model = str(Path(args.edge_model).resolve()) if args.edge_model else ""
    return Options(
        preset, args.detectors, variants, args.fractions, args.seeds, args.pretrain_seeds, backbone, rates, edge_model
    )


def make_plan(options: Options, manifest: dict[str, Any]) -> list[Step]:
    """In the order in which they shall run: all rows of the first seed, then all of the next, so that a stopped study
    is balanced.
    """
    steps: dict[str, Step] = {}
    for number, seed in enumerate(options.seeds):
        pretrain_seed = options.pretrain_seeds[number % len(options.pretrain_seeds)]
        for detector in options.detectors:
            pretrained = [variant for variant in options.variants if variant.pretext and variant.name != NONE]
            _add(steps, *_before(options, manifest, detector, pretrained, pretrain_seed))
            for fraction in options.fractions:
                for variant in options.variants:
                    _add(steps, finetune_step(options, manifest, detector, variant, fraction, seed, pretrain_seed))
    return list(steps.values())


def choice_plan(options: Options, manifest: dict[str, Any]) -> list[Step]:
    """Every row at every rate of the preset, on all labels and the first seed, evaluated on val.

    Raises:
        UserError: the preset has no rates to choose from, or the data no validation images.
    """
    if len(options.preset.rates) < 2:
        raise UserError("--choose lr: this preset has no rates to choose from; leave it out")
    if not manifest["val"]["images"]:
        raise UserError(
            "--choose lr: the data was prepared with --val_share 0, and there is nothing to choose on; leave it out"
        )
    first = replace(options, seeds=options.seeds[:1], fractions=[max(options.fractions)])
    steps = {step.name: step for step in make_plan(first, manifest) if step.kind in ("proposals", "pretrain")}
    for rate in options.preset.rates:
        for detector in options.detectors:
            for variant in options.variants:
                at_rate, name = replace(first, rates={detector: rate}), f"choose/{detector}/{variant.name}/lr{rate:g}"
                step = finetune_step(
                    at_rate, manifest, detector, variant, first.fractions[0], first.seeds[0], options.pretrain_seeds[0]
                )
                words = tuple(word.replace("test.json", "val.json").replace(step.name, name) for word in step.words)
                _add(steps, replace(step, name=name, kind="choose", words=words, rate=rate))
    return list(steps.values())


def _add(steps: dict[str, Step], *more: Step) -> None:
    for step in more:
        steps.setdefault(step.name, step)


def _before(
    options: Options, manifest: dict[str, Any], detector: str, variants: list[Variant], seed: int
) -> Iterator[Step]:
    """Stores of proposals, pre-training, and recall right after it, beside that of an untrained model and of the
    proposals.
    """
    if not variants:
        return
    for variant in variants:
        yield from _store_steps(options, variant)
    for variant in variants:
        yield pretrain_step(options, manifest, detector, variant, seed)
    yield untrained_step(options, manifest, detector, seed)
    for name in [*(variant.name for variant in variants), UNTRAINED]:
        model, what = f"pretrain/{detector}/{name}_seed{seed}", f"recall/{detector}/{name}_seed{seed}"
        yield recall_step(
            options,
            manifest,
            what,
            {"checkpoint": f"{{study}}/{model}/checkpoint.pth"},
            needs=(model,),
            detector=detector,
            variant=name,
            pretrain_seed=seed,
        )
    for method in dict.fromkeys(["random", *(_method(options, variant) for variant in variants)]):
        if method in ("random", *STORED):
            flags = {"proposals": method, **_edge_model(options, method)}
            yield recall_step(options, manifest, f"recall/proposals/{method}", flags, variant=method)


# ---------------------------------------------------------------------------------------------------------------------
# the runs


def _method(options: Options, variant: Variant) -> str:
    return pretext_flags(options.preset, variant).get("proposals", "random")


def _edge_model(options: Options, method: str) -> Flags:
    return {"edge_model": options.edge_model or None} if method == "edge_boxes" else {}


def _images(variant: Variant) -> str:
    return "{data}/labelled/true_boxes.txt" if variant.true_boxes else "{data}/unlabelled.txt"


def _store(options: Options, variant: Variant) -> str:
    """Name of the step that makes its proposals, empty where they need no store."""
    method = _method(options, variant)
    return f"proposals/{method}{'_labelled' if variant.true_boxes else ''}" if method in STORED else ""


def _store_steps(options: Options, variant: Variant) -> Iterator[Step]:
    name, method = _store(options, variant), _method(options, variant)
    if name:
        flags = {
            "images": _images(variant),
            "proposals": method,
            "output_dir": f"{{study}}/{name}",
            **_edge_model(options, method),
        }
        yield Step(name, "proposals", words_of("tools/cache_proposals.py", flags))


def pretrain_step(options: Options, manifest: dict[str, Any], detector: str, variant: Variant, seed: int) -> Step:
    """
    Raises:
        UserError: an ablation that can't be made of a config.
    """
    preset, store = options.preset, _store(options, variant)
    config = preset.configs.get((detector, variant.pretext))
    if config and (variant.times > 1 or None in variant.changes.values()):
        raise UserError(
            f"--ablations {variant.name} changes or leaves out what configs/{config}.sh sets: use another preset"
        )
    flags = {
        **preset.pretrain,
        **pretext_flags(preset, variant),
        **_edge_model(options, _method(options, variant)),
        "imagenet_path": _images(variant),
    }
    flags["cache_path"] = f"{{study}}/{store}" if store else None
    flags |= _length(preset, 0, variant.times)
    return _pretraining(
        options, manifest, detector, variant.name, variant.pretext, flags, seed, (store,) if store else ()
    )


def untrained_step(options: Options, manifest: dict[str, Any], detector: str, seed: int) -> Step:
    """A model as it is before its first step, whatever the pretext: recall needs something to compare with."""
    flags = {
        **options.preset.pretrain,
        **options.preset.pretexts["random_query_patch"],
        "imagenet_path": "{data}/unlabelled.txt",
    }
    flags |= {"fre_cnn": True, "lr": UNTRAINED_RATE, "max_iters": 1, "lr_drop_iters": 1}
    return _pretraining(options, manifest, detector, UNTRAINED, "random_query_patch", flags, seed, ())


def _pretraining(
    options: Options,
    manifest: dict[str, Any],
    detector: str,
    name: str,
    pretext: str,
    flags: Flags,
    seed: int,
    needs: tuple[str, ...],
) -> Step:
    preset, folder = options.preset, f"pretrain/{detector}/{name}_seed{seed}"
    config = preset.configs.get((detector, pretext)) if name != UNTRAINED else None
    script = f"configs/{config}.sh" if config else PRETRAIN
    first = {} if config else {"pretext": pretext, "detector": detector}
    flags = {**first, **_model(options, detector), **_shared(preset, manifest, 0, seed, folder), **flags}
    return Step(folder, "pretrain", words_of(script, flags), needs, detector, name, pretrain_seed=seed)


def finetune_step(
    options: Options,
    manifest: dict[str, Any],
    detector: str,
    variant: Variant,
    fraction: float,
    seed: int,
    pretrain_seed: int,
) -> Step:
    preset, folder = options.preset, f"finetune/{detector}/{variant.name}/{fraction:g}_seed{seed}"
    pretrained = (
        "" if variant.name == NONE or variant.checkpoint else f"pretrain/{detector}/{variant.name}_seed{pretrain_seed}"
    )
    flags = {"detector": detector, **_model(options, detector), **_length(preset, 1), "dataset_file": "custom"}
    rate = options.rate(detector)
    if rate:
        flags |= {"lr": rate, "lr_backbone": rate * preset.backbone_rate}
    flags |= {
        "train_images": "{data}/labelled",
        "train_annotations": f"{{data}}/{annotation_file(fraction)}",
        **_test_data(),
    }
    flags |= {"eval_every": _eval_every(preset, manifest, detector), **_shared(preset, manifest, 1, seed, folder)}
    flags |= preset.finetune.get(detector, {})
    flags["pretrain"] = f"{{study}}/{pretrained}/checkpoint.pth" if pretrained else variant.checkpoint or None
    return Step(
        folder,
        "finetune",
        words_of(FINETUNE, flags),
        (pretrained,) if pretrained else (),
        detector,
        variant.name,
        fraction,
        seed,
        pretrain_seed if pretrained else None,
    )


def recall_step(
    options: Options, manifest: dict[str, Any], folder: str, what: Flags, needs: tuple[str, ...] = (), **facts: Any
) -> Step:
    """Recall and precision of boxes whatever their class, on the test images. It is short, and always runs anew as a
    whole.
    """
    flags = {
        **what,
        "dataset_file": "custom",
        **_test_data(),
        **_size(options.preset, manifest),
        "batch_size": options.preset.batch[1],
        "output_dir": f"{{study}}/{folder}",
        "overwrite": True,
    }
    return Step(folder, "recall", words_of("tools/evaluate_proposals.py", flags), needs, **facts)


def _model(options: Options, detector: str) -> Flags:
    return {**DETECTOR_FLAGS[detector], **options.model, **options.preset.detectors.get(detector, {})}


def _test_data() -> Flags:
    return {"val_images": "{data}/labelled", "val_annotations": "{data}/annotations/test.json"}


def _size(preset: Preset, manifest: dict[str, Any]) -> Flags:
    return {} if preset.own_sizes else {"image_size": manifest["settings"]["image_size"]}


def _shared(preset: Preset, manifest: dict[str, Any], part: int, seed: int, folder: str) -> Flags:
    """Of pre-training (part 0) or fine-tuning (1)."""
    place = f"{{study}}/{folder}"
    return {
        **_size(preset, manifest),
        "batch_size": preset.batch[part],
        "seed": seed,
        "output_dir": place,
        "resume": "auto",
    }


def _length(preset: Preset, part: int, times: int = 1) -> Flags:
    """Steps of pre-training (part 0) or fine-tuning (1), where the preset counts images."""
    if preset.images is None:
        return {}
    steps = max(1, times * preset.images[part] // preset.batch[part])
    return {"max_iters": steps, "lr_drop_iters": max(1, round(RATE_DROP * steps))}


def _eval_every(preset: Preset, manifest: dict[str, Any], detector: str) -> int:
    """In epochs, so that there are as many evaluations as the preset says, or one an epoch."""
    steps = _length(preset, 1).get("max_iters")
    epochs = (
        math.ceil(steps / steps_an_epoch(manifest, preset.batch[1])) if steps else preset.finetune[detector]["epochs"]
    )
    return max(1, math.ceil(epochs / preset.evaluations))


def words_of(script: str, flags: Flags) -> tuple[str, ...]:
    """The words of a command: None is left out, True is a switch."""
    words = [script]
    for name, value in flags.items():
        if value is not None:
            words += (
                [f"--{name}"]
                if value is True
                else [f"--{name}", f"{value:g}" if isinstance(value, float) else str(value)]
            )
    return tuple(words)


def flags_of(words: Sequence[str]) -> dict[str, str]:
    """The inverse, for comparisons: `script` and each flag -> its value, empty for a switch."""
    flags, name = {"script": words[0]}, ""
    for word in words[1:]:
        if word.startswith("--"):
            name = word
            flags[name] = ""
        else:
            flags[name] = f"{flags[name]} {word}".strip()
    return flags


def difference(before: Sequence[str], now: Sequence[str], may_differ: Sequence[str] = ()) -> str:
    """What differs between two commands, empty where nothing does."""
    old, new = flags_of(before), flags_of(now)
    names = [name for name in {**old, **new} if old.get(name) != new.get(name) and name not in may_differ]
    return ", ".join(
        f"{name} {old.get(name, '(not given)')} then and {new.get(name, '(not given)')} now" for name in names
    )
