"""The steps of a transfer study: what each needs, and the flags of its command.

Flags have {data} and {study} in place of the two folders, so that a study continues on another machine.
"""

import math
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tools.study.prepare import annotation_file
from tools.study.presets import (
    DETECTOR_FLAGS,
    PRESETS,
    Flags,
    Preset,
    Variant,
    file_variant,
    variant_of,
)
from util.errors import UserError
from util.settings import FINETUNE, PRETRAIN

STORED = (
    "selective_search",
    "edge_boxes",
)  # proposal methods whose boxes are computed once, before pre-training


@dataclass(frozen=True)
class Step:
    """One command of the study.

    name: its folder, below the study's. needs: names of the steps that come before. pretrain_seed: of the pre-training
    that it is, evaluates or starts from.
    """

    name: str
    kind: str
    script: str
    flags: Flags
    needs: tuple[str, ...] = ()
    detector: str = ""
    variant: str = ""
    fraction: float | None = None
    seed: int | None = None
    pretrain_seed: int | None = None

    def facts(self) -> dict[str, Any]:
        """What a report needs to know of it."""
        return {
            name: value
            for name, value in vars(self).items()
            if name not in ("name", "script", "flags", "needs")
        }


@dataclass(frozen=True)
class Plan:
    """What was asked for. model: flags of all models, whatever the detector. lr: of fine-tuning, None for the
    detector's default. part: `test` or `val`, the images that fine-tuning is evaluated on.
    """

    preset: Preset
    manifest: dict[str, Any]
    detectors: Sequence[str]
    variants: Sequence[Variant]
    fractions: Sequence[float]
    seeds: Sequence[int]
    pretrain_seeds: Sequence[int]
    model: Flags
    edge_model: str | None
    lr: float | None
    part: str

    def steps(self) -> list[Step]:
        """All rows of the first seed, then all of the next: a study that is stopped early is balanced."""
        steps = []
        for number, seed in enumerate(self.seeds):
            pretrain_seed = self.pretrain_seeds[number % len(self.pretrain_seeds)]
            for detector in self.detectors:
                steps += self._before_finetuning(detector, pretrain_seed)
                steps += [
                    self.finetuning(detector, variant, fraction, seed, pretrain_seed)
                    for fraction in self.fractions
                    for variant in self.variants
                ]
        return list({step.name: step for step in steps}.values())

    def _before_finetuning(self, detector: str, seed: int) -> list[Step]:
        """Proposals, pre-training, and right after it class-agnostic recall."""
        variants = [variant for variant in self.variants if variant.is_pretrained]
        pretrainings = [self.pretraining(detector, variant, seed) for variant in variants]
        proposals = [self.proposals(variant) for variant in variants if self._cache(variant)]
        return [*proposals, *pretrainings, *map(self.recall, pretrainings)]

    def _pretext(self, variant: Variant) -> Flags:
        return {**self.preset.pretexts[variant.pretext], **variant.changes}

    def _cache(self, variant: Variant) -> str:
        """Name of the step that computes its proposals; empty where pre-training makes them as it goes."""
        method = self._pretext(variant).get("proposals")
        return (
            f"proposals/{method}{'_labelled' if variant.labelled_images else ''}"
            if method in STORED
            else ""
        )

    def _search(self, variant: Variant) -> Flags:
        images = "labelled/true_boxes.txt" if variant.labelled_images else "unlabelled.txt"
        edges = self._pretext(variant).get("proposals") == "edge_boxes"
        return {"images": f"{{data}}/{images}", "edge_model": self.edge_model if edges else None}

    def proposals(self, variant: Variant) -> Step:
        name = self._cache(variant)
        flags = {
            "proposals": self._pretext(variant)["proposals"],
            "output_dir": f"{{study}}/{name}",
        }
        return Step(
            name,
            "proposals",
            "tools/cache_proposals.py",
            _given({**self._search(variant), **flags}),
        )

    def pretraining(self, detector: str, variant: Variant, seed: int) -> Step:
        """
        Raises:
            UserError: an ablation changes what a config fixes.
        """
        name, cache = f"pretrain/{detector}/{variant.name}_seed{seed}", self._cache(variant)
        config = self.preset.configs.get((detector, variant.pretext))
        if config and (variant.times > 1 or None in variant.changes.values()):
            raise UserError(
                f"--ablations {variant.name}: configs/{config}.sh fixes what it changes; use another preset"
            )
        search = self._search(variant)
        flags = {
            **({} if config else {"pretext": variant.pretext, "detector": detector}),
            **self._shared(detector, seed, name),
            **self.preset.pretrain,
            **self._pretext(variant),
            "edge_model": search["edge_model"],
            "imagenet_path": search["images"],
            "cache_path": f"{{study}}/{cache}" if cache else None,
        }
        for length in ("max_iters", "lr_drop_iters"):
            if length in flags:
                flags[length] *= variant.times
        script = f"configs/{config}.sh" if config else PRETRAIN
        needs = (cache,) if cache else ()
        return Step(
            name,
            "pretrain",
            script,
            _given(flags),
            needs,
            detector,
            variant.name,
            pretrain_seed=seed,
        )

    def recall(self, pretraining: Step) -> Step:
        """Recall and precision of the boxes whatever their class, on the test images."""
        name = pretraining.name.replace("pretrain/", "recall/", 1)
        flags = {
            "checkpoint": f"{{study}}/{pretraining.name}/checkpoint.pth",
            "dataset_file": "custom",
            **self._evaluated(),
            **self._image_size(),
            "batch_size": self.preset.finetune["batch_size"],
            "output_dir": f"{{study}}/{name}",
            "overwrite": True,
        }
        script, needs = "tools/evaluate_proposals.py", (pretraining.name,)
        return replace(
            pretraining, name=name, kind="recall", script=script, flags=flags, needs=needs
        )

    def finetuning(
        self, detector: str, variant: Variant, fraction: float, seed: int, pretrain_seed: int
    ) -> Step:
        name = f"finetune/{detector}/{variant.name}/{fraction:g}_seed{seed}"
        needs = (
            (f"pretrain/{detector}/{variant.name}_seed{pretrain_seed}",)
            if variant.is_pretrained
            else ()
        )
        flags = {
            "detector": detector,
            **self._shared(detector, seed, name),
            "dataset_file": "custom",
            "train_images": "{data}/labelled",
            "train_annotations": f"{{data}}/{annotation_file(fraction)}",
            **self._evaluated(),
            "lr": self.lr,
            "lr_backbone": self.lr and self.lr * self.preset.backbone_lr,
            **self.preset.finetune,
            **self.preset.finetune_detectors.get(detector, {}),
            "pretrain": f"{{study}}/{needs[0]}/checkpoint.pth"
            if needs
            else variant.checkpoint or None,
        }
        flags["eval_every"] = self._eval_every(flags)
        start = pretrain_seed if needs else None
        return Step(
            name,
            "finetune",
            FINETUNE,
            _given(flags),
            needs,
            detector,
            variant.name,
            fraction,
            seed,
            start,
        )

    def _shared(self, detector: str, seed: int, name: str) -> Flags:
        """Flags of pre-training and fine-tuning."""
        model = {
            **DETECTOR_FLAGS[detector],
            **self.model,
            **self.preset.detectors.get(detector, {}),
        }
        return {
            **model,
            **self._image_size(),
            "seed": seed,
            "output_dir": f"{{study}}/{name}",
            "resume": "auto",
        }

    def _evaluated(self) -> Flags:
        return {
            "val_images": "{data}/labelled",
            "val_annotations": f"{{data}}/annotations/{self.part}.json",
        }

    def _image_size(self) -> Flags:
        return (
            {}
            if self.preset.published_sizes
            else {"image_size": self.manifest["settings"]["image_size"]}
        )

    def _eval_every(self, flags: Flags) -> int:
        """Epochs between evaluations, for as many as the preset says."""
        steps_per_epoch = max(1, self.manifest["train"]["images"] // flags["batch_size"])
        epochs = (
            flags["epochs"]
            if "epochs" in flags
            else math.ceil(flags["max_iters"] / steps_per_epoch)
        )
        return max(1, math.ceil(epochs / self.preset.evaluations))


def plan_of(args: Namespace, manifest: dict[str, Any]) -> Plan:
    """
    Raises:
        UserError: a fraction or validation images that were not prepared, or no checkpoint where one is named.
    """
    prepared = {1.0, *manifest["settings"]["fractions"]}
    for fraction in args.fractions:
        if fraction not in prepared:
            known = " ".join(f"{other:g}" for other in sorted(prepared))
            raise UserError(
                f"--fractions {fraction:g}: {args.data} has {known}; prepare other data for other fractions"
            )
    if not manifest[args.evaluate_on]["images"]:
        raise UserError(
            f"--evaluate_on {args.evaluate_on}: the data was prepared with --val_share 0, without such images"
        )
    names = dict.fromkeys([*args.pretexts, *args.ablations])
    backbone = {"backbone": args.backbone, "backbone_weights": _full_path(args.backbone_weights)}
    return Plan(
        preset=PRESETS[args.preset],
        manifest=manifest,
        detectors=args.detectors,
        variants=[*map(variant_of, names), *map(file_variant, args.pretrained)],
        fractions=args.fractions,
        seeds=args.seeds,
        pretrain_seeds=args.pretrain_seeds,
        model={**PRESETS[args.preset].model, **_given(backbone)},
        edge_model=_full_path(args.edge_model),
        lr=args.lr or PRESETS[args.preset].lr,
        part=args.evaluate_on,
    )


def _full_path(text: str | None) -> str | None:
    """Of a file that is there; anything else is a name or an address."""
    return str(Path(text).resolve()) if text and Path(text).exists() else text


def _given(flags: Flags) -> Flags:
    return {name: value for name, value in flags.items() if value is not None}


def words_of(flags: Flags) -> list[str]:
    """Of a command line."""
    words = []
    for name, value in flags.items():
        text = f"{value:g}" if isinstance(value, float) else str(value)
        words += [f"--{name}"] if value is True else [f"--{name}", text]
    return words
