"""The steps of a transfer study: what each needs, and the flags of its command.

Flags contain {data} and {study} instead of the two folders, so that a study can continue on another machine.
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
    checkpoint_variant,
    get_variant,
)
from util.errors import UserError
from util.settings import FINETUNE, PRETRAIN

# Slow proposal methods whose boxes depend on the image alone: they are cached before pre-training.
CACHED_METHODS = ("selective_search", "edge_boxes")


@dataclass(frozen=True, kw_only=True)
class Step:
    """One command of the study.

    Attributes:
        name: its folder, below the study's.
        kind: "proposals", "pretrain", "recall" or "finetune".
        script: the script or config to run, relative to the project.
        flags: of the command.
        needs: names of the steps that have to finish first.
        detector, variant, fraction, seed: the cell of the tables that it belongs to, where it has one.
        pretrain_seed: of the pre-training that it is, evaluates or starts from.
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

    def metadata(self) -> dict[str, Any]:
        """Return what study.json keeps of it for the report."""
        skipped = ("name", "script", "flags", "needs")
        return {name: value for name, value in vars(self).items() if name not in skipped}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a call asks for, and the steps that follow from it.

    Attributes:
        preset: model size, steps and learning rates.
        manifest: of the prepared data.
        variants: the rows of the tables.
        fractions: of the labels.
        seeds, pretrain_seeds: of fine-tuning and of pre-training.
        model: flags of all models, for any detector.
        edge_model: file for EdgeBoxes, None for image gradients.
        lr: of fine-tuning, None for the detector's default.
        eval_split: "test" or "val", the images that fine-tuning is evaluated on.
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
    eval_split: str

    def steps(self) -> list[Step]:
        """Return all steps, seed by seed: a study that is stopped early has all rows of its first seeds."""
        steps = []
        for i, seed in enumerate(self.seeds):
            pretrain_seed = self.pretrain_seeds[i % len(self.pretrain_seeds)]
            for detector in self.detectors:
                steps += self._pretraining_steps(detector, pretrain_seed)
                steps += [
                    self.finetuning(detector, variant, fraction, seed, pretrain_seed)
                    for fraction in self.fractions
                    for variant in self.variants
                ]

        # Seeds and detectors share proposals and pre-trainings; the first occurrence counts.
        return list({step.name: step for step in steps}.values())

    def _pretraining_steps(self, detector: str, seed: int) -> list[Step]:
        """Return proposals, pre-trainings, and the class-agnostic recall right after them."""
        variants = [variant for variant in self.variants if variant.is_pretrained]
        pretrainings = [self.pretraining(detector, variant, seed) for variant in variants]
        proposals = [
            self.proposals(variant) for variant in variants if self._proposal_cache(variant)
        ]
        return [*proposals, *pretrainings, *map(self.recall, pretrainings)]

    def _pretext_flags(self, variant: Variant) -> Flags:
        return {**self.preset.pretexts[variant.pretext], **variant.changes}

    def _proposal_cache(self, variant: Variant) -> str:
        """Return the name of the step that caches its proposals; empty if there is none."""
        method = self._pretext_flags(variant).get("proposals")
        if method not in CACHED_METHODS:
            return ""
        suffix = "_labelled" if variant.labelled_images else ""
        return f"proposals/{method}{suffix}"

    def _search_flags(self, variant: Variant) -> Flags:
        images = "labelled/true_boxes.txt" if variant.labelled_images else "unlabelled.txt"
        uses_edges = self._pretext_flags(variant).get("proposals") == "edge_boxes"
        return {
            "images": f"{{data}}/{images}",
            "edge_model": self.edge_model if uses_edges else None,
        }

    def proposals(self, variant: Variant) -> Step:
        """Return the step that caches a variant's proposals."""
        name = self._proposal_cache(variant)
        flags = {
            **self._search_flags(variant),
            "proposals": self._pretext_flags(variant)["proposals"],
            "output_dir": f"{{study}}/{name}",
        }
        return Step(
            name=name,
            kind="proposals",
            script="tools/cache_proposals.py",
            flags=_drop_none(flags),
        )

    def pretraining(self, detector: str, variant: Variant, seed: int) -> Step:
        """Return the step that pre-trains a detector, by a config if the preset names one.

        Raises:
            UserError: an ablation changes what the config fixes.
        """
        name = f"pretrain/{detector}/{variant.name}_seed{seed}"
        cache = self._proposal_cache(variant)
        config = self.preset.configs.get((detector, variant.pretext))
        # A config's flags can be overridden but not removed, and it sets its own schedule.
        if config and (variant.step_factor > 1 or None in variant.changes.values()):
            raise UserError(
                f"--ablations {variant.name}: configs/{config}.sh fixes what it changes; use another preset"
            )

        search = self._search_flags(variant)
        flags = {
            # A config names its pretext and detector itself.
            **({} if config else {"pretext": variant.pretext, "detector": detector}),
            **self._common_flags(detector, seed, name),
            **self.preset.pretrain,
            **self._pretext_flags(variant),
            "edge_model": search["edge_model"],
            "imagenet_path": search["images"],
            "cache_path": f"{{study}}/{cache}" if cache else None,
        }
        # The learning rate drops at the same fraction of a longer schedule.
        for length in ("max_iters", "lr_drop_iters"):
            if length in flags:
                flags[length] *= variant.step_factor

        return Step(
            name=name,
            kind="pretrain",
            script=f"configs/{config}.sh" if config else PRETRAIN,
            flags=_drop_none(flags),
            needs=(cache,) if cache else (),
            detector=detector,
            variant=variant.name,
            pretrain_seed=seed,
        )

    def recall(self, pretraining: Step) -> Step:
        """Return the step that measures class-agnostic recall and precision of a pre-trained detector."""
        name = pretraining.name.replace("pretrain/", "recall/", 1)
        flags = {
            "checkpoint": f"{{study}}/{pretraining.name}/checkpoint.pth",
            "dataset_file": "custom",
            **self._eval_flags(),
            **self._image_size_flags(),
            "batch_size": self.preset.finetune["batch_size"],
            "output_dir": f"{{study}}/{name}",
            # It has no checkpoint to resume from: an interrupted evaluation starts from scratch.
            "overwrite": True,
        }
        return replace(
            pretraining,
            name=name,
            kind="recall",
            script="tools/evaluate_proposals.py",
            flags=flags,
            needs=(pretraining.name,),
        )

    def finetuning(
        self, detector: str, variant: Variant, fraction: float, seed: int, pretrain_seed: int
    ) -> Step:
        """Return the step that fine-tunes a detector; variants differ in the checkpoint it starts from."""
        name = f"finetune/{detector}/{variant.name}/{fraction:g}_seed{seed}"
        needs: tuple[str, ...] = ()
        checkpoint = variant.checkpoint or None
        if variant.is_pretrained:
            needs = (f"pretrain/{detector}/{variant.name}_seed{pretrain_seed}",)
            checkpoint = f"{{study}}/{needs[0]}/checkpoint.pth"

        flags = {
            "detector": detector,
            **self._common_flags(detector, seed, name),
            "dataset_file": "custom",
            "train_images": "{data}/labelled",
            "train_annotations": f"{{data}}/{annotation_file(fraction)}",
            **self._eval_flags(),
            # Without a learning rate of the study, both are the detector's defaults.
            "lr": self.lr,
            "lr_backbone": self.lr and self.lr * self.preset.backbone_lr,
            **self.preset.finetune,
            **self.preset.finetune_detectors.get(detector, {}),
            "pretrain": checkpoint,
        }
        flags["eval_every"] = self._eval_every(flags)

        return Step(
            name=name,
            kind="finetune",
            script=FINETUNE,
            flags=_drop_none(flags),
            needs=needs,
            detector=detector,
            variant=variant.name,
            fraction=fraction,
            seed=seed,
            pretrain_seed=pretrain_seed if needs else None,
        )

    def _common_flags(self, detector: str, seed: int, name: str) -> Flags:
        """Return the flags of pre-training and fine-tuning."""
        return {
            **DETECTOR_FLAGS[detector],
            **self.model,
            **self.preset.detectors.get(detector, {}),
            **self._image_size_flags(),
            "seed": seed,
            "output_dir": f"{{study}}/{name}",
            "resume": "auto",
        }

    def _eval_flags(self) -> Flags:
        return {
            "val_images": "{data}/labelled",
            "val_annotations": f"{{data}}/annotations/{self.eval_split}.json",
        }

    def _image_size_flags(self) -> Flags:
        if self.preset.published_sizes:  # the default of --image_size
            return {}
        return {"image_size": self.manifest["settings"]["image_size"]}

    def _eval_every(self, flags: Flags) -> int:
        """Return the number of epochs between evaluations, for as many as the preset says."""
        if "epochs" in flags:
            epochs = flags["epochs"]
        else:
            steps_per_epoch = max(1, self.manifest["train"]["images"] // flags["batch_size"])
            epochs = math.ceil(flags["max_iters"] / steps_per_epoch)
        return max(1, math.ceil(epochs / self.preset.evaluations))


def build_plan(args: Namespace, manifest: dict[str, Any]) -> Plan:
    """Build the plan of a `run` command.

    Raises:
        UserError: a fraction or split was not prepared, an ablation changes nothing, or a checkpoint of `--pretrained`
            does not exist.
    """
    _check_prepared(args, manifest)
    preset = PRESETS[args.preset]
    backbone = {
        "backbone": args.backbone,
        "backbone_weights": _resolve_if_exists(args.backbone_weights),
    }
    names = dict.fromkeys([*args.pretexts, *args.ablations])  # without duplicates, in order
    for row in map(get_variant, args.ablations):
        if not changes_something(row, preset):
            raise UserError(
                f"--ablations {row.name}: that is what --preset {args.preset} does; choose --pretexts {row.pretext}"
            )

    return Plan(
        preset=preset,
        manifest=manifest,
        detectors=args.detectors,
        variants=[*map(get_variant, names), *map(checkpoint_variant, args.pretrained)],
        fractions=args.fractions,
        seeds=args.seeds,
        pretrain_seeds=args.pretrain_seeds,
        model={**preset.model, **_drop_none(backbone)},
        edge_model=_resolve_if_exists(args.edge_model),
        lr=args.lr or preset.lr,
        eval_split=args.evaluate_on,
    )


def changes_something(variant: Variant, preset: Preset) -> bool:
    """Return whether pre-training of this row differs from that of its pretext task."""
    if variant.labelled_images or variant.step_factor > 1:
        return True
    flags = preset.pretexts[variant.pretext]
    # A preset without this flag leaves it to a config.
    return any(name not in flags or flags[name] != value for name, value in variant.changes.items())


def _check_prepared(args: Namespace, manifest: dict[str, Any]) -> None:
    prepared = {1.0, *manifest["settings"]["fractions"]}
    for fraction in args.fractions:
        if fraction not in prepared:
            known = " ".join(f"{other:g}" for other in sorted(prepared))
            raise UserError(
                f"--fractions {fraction:g}: {args.data} has {known}; prepare other data for other fractions"
            )

    if not manifest[args.evaluate_on]["images"]:
        raise UserError(
            f"--evaluate_on {args.evaluate_on}: {args.data} was prepared with --val_share 0 and has no such "
            "images; prepare other data with a larger one"
        )


def _resolve_if_exists(text: str | None) -> str | None:
    """Return the absolute path of an existing file; names and URLs stay unchanged."""
    return str(Path(text).resolve()) if text and Path(text).exists() else text


def _drop_none(flags: Flags) -> Flags:
    return {name: value for name, value in flags.items() if value is not None}
