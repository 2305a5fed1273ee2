"""The stages of the demo: what each runs, on synthetic images or a custom dataset."""

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from datasets.labelled.coco import coco_files
from util.errors import UserError
from util.settings import usable_cores
from util.settings.words import to_words

Flags = dict[str, Any]  # without dashes, see `to_words`

# Names of the stages, and of their folders.
SCENES, PROPOSALS, FIRST, BOXES = "scenes", "proposals", "pretrain_first", "boxes"
PRETRAIN, OBJECTS = "pretrain", "pretrained_boxes"
FINETUNE, SCRATCH = "finetune_pretrained", "finetune_scratch"

MODEL = {
    "detector": "deformable_detr",
    "backbone": "timm:tf_efficientnet_lite0",
    "backbone_weights": "imagenet",
    "enc_layers": 1,
    "dec_layers": 2,
    "hidden_dim": 128,
    "dim_feedforward": 256,
    "dropout": 0,
}
# Each at the better rates for it: a pre-trained detector needs smaller steps (docs/results/regime).
LEARNING_RATES = {
    PRETRAIN: {"lr": "4e-4", "lr_backbone": "4e-4"},
    FINETUNE: {"lr": "3e-4", "lr_backbone": "1e-4"},
    SCRATCH: {"lr": "1e-3", "lr_backbone": "2e-4"},
}
RANKING = {"ss_rank": "agreement"}  # of selective search and of its cache
NUM_PROCESSES = 2  # of pre-training on a CPU with several cores


@dataclass(frozen=True, kw_only=True)
class Hyperparameters:
    """What differs between synthetic images, which have to take minutes, and a custom dataset.

    Attributes:
        image_size: short side in pixels.
        max_prop, boxes_per_image: boxes of the first and of the second pre-training.
        batch_size: of fine-tuning; pre-training has twice as many images.
        eval_every: in epochs.
    """

    image_size: int
    num_queries: int
    batch_size: int
    max_prop: int
    boxes_per_image: int
    first_epochs: int
    pretrain_epochs: int
    epochs: int
    eval_every: int


SYNTHETIC_DEFAULTS = Hyperparameters(
    image_size=128,
    num_queries=30,
    batch_size=4,
    max_prop=3,
    boxes_per_image=2,
    first_epochs=2,
    pretrain_epochs=2,
    epochs=45,
    eval_every=9,
)
CUSTOM_DEFAULTS = Hyperparameters(
    image_size=320,
    num_queries=100,
    batch_size=4,
    max_prop=10,
    boxes_per_image=5,
    first_epochs=5,
    pretrain_epochs=10,
    epochs=24,
    eval_every=4,
)
HYPERPARAMETER_HELP = {
    "image_size": "short side of the images, in pixels",
    "num_queries": "number of object queries",
    "batch_size": "images per batch; pre-training has twice as many",
    "max_prop": "boxes of selective search per image, the best ones",
    "boxes_per_image": "boxes of the first pre-trained detector per image on average, the best ones",
    "first_epochs": "epochs of pre-training on the boxes of selective search",
    "pretrain_epochs": "epochs of pre-training on the boxes that were found with it",
    "epochs": "epochs of fine-tuning",
    "eval_every": "epochs between evaluations",
}


@dataclass(frozen=True)
class Stage:
    """One command of the demo.

    Attributes:
        name: also of its folder.
        title: for people.
        command: as a user would type it.
        processes: of one machine, which share its cores.
    """

    name: str
    title: str
    command: list[str]
    processes: int = 1


def choose_hyperparameters(args: argparse.Namespace) -> Hyperparameters:
    """Return the defaults for the data, overridden by the flags that were given."""
    defaults = asdict(CUSTOM_DEFAULTS if args.coco_path else SYNTHETIC_DEFAULTS)
    given = {name: getattr(args, name) for name in defaults if getattr(args, name) is not None}
    return Hyperparameters(**{**defaults, **given})


def build_stages(args: argparse.Namespace) -> list[Stage]:
    """Return the stages in order; the last two are the fine-tunings. With `--coco_path` no synthetic images are made.

    Raises:
        UserError: the annotations of `--coco_path` can't be read.
    """
    plan = Plan(args)
    stages = [
        plan.search(),
        plan.pretrain(FIRST, "pre-train on these boxes, without labels", plan.searched_boxes()),
        plan.find(),
        plan.pretrain(PRETRAIN, "pre-train from scratch on these objects", plan.found_boxes()),
        plan.evaluate_boxes(),
        plan.finetune(
            FINETUNE, "fine-tune the pre-trained detector", {"pretrain": plan.checkpoint}
        ),
        plan.finetune(SCRATCH, "fine-tune without pre-training", {}),
    ]
    return stages if args.coco_path else [plan.draw_scenes(), *stages]


class Plan:
    """Makes the stages.

    Attributes:
        coco_path: labelled images.
        unlabelled: folder of the images to pre-train on.
        checkpoint: what the second pre-training writes.
        common: flags of all training scripts.
        model: flags of the detector, and those of `common`.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.output = args, args.output_dir
        self.hyperparameters = choose_hyperparameters(args)
        self.coco_path = args.coco_path or self.output / SCENES
        self.unlabelled = _unlabelled_images(args, self.coco_path)
        self.checkpoint = self._file(PRETRAIN, "checkpoint.pth")
        self.common: Flags = {
            "image_size": self.hyperparameters.image_size,
            # Scenes are square and small: larger copies of them would only take time.
            "max_size": None if args.coco_path else self.hyperparameters.image_size,
            "num_workers": args.num_workers,
            "device": args.device,
        }
        self.model: Flags = {
            **MODEL,
            "num_queries": self.hyperparameters.num_queries,
            "seed": args.seed,
            **self.common,
            # Starts a new run and continues an interrupted one: the command is the same.
            "resume": "auto",
        }

    def _file(self, stage: str, name: str) -> Path:
        return self.output / stage / name

    def _stage(self, name: str, title: str, script: str, flags: Flags, processes: int = 1) -> Stage:
        launcher: list[str] = []
        if processes > 1:
            launcher = ["-m", "torch.distributed.run"]
            launcher += to_words({"standalone": True, "nproc_per_node": processes})
        words = to_words({**flags, "output_dir": self.output / name})
        return Stage(name, title, ["python", *launcher, script, *words], processes)

    def draw_scenes(self) -> Stage:
        flags = {
            "output": self.coco_path,
            "num_train": self.args.num_train,
            "num_val": self.args.num_val,
            "num_unlabelled": self.args.num_unlabelled,
            "size": self.hyperparameters.image_size,
            "one_class": True,
            "no_clutter": True,
            "seed": self.args.seed,
        }
        command = ["python", "-m", "tools.demo.scenes", *to_words(flags)]
        return Stage(SCENES, "make synthetic images", command)

    def search(self) -> Stage:
        flags = {"images": self.unlabelled, "proposals": "selective_search", **RANKING}
        return self._stage(PROPOSALS, "selective search", "tools/cache_proposals.py", flags)

    def searched_boxes(self) -> Flags:
        """Return the flags of pre-training on the boxes of `search`."""
        return {
            "cache_path": self.output / PROPOSALS,
            **RANKING,
            "max_prop": self.hyperparameters.max_prop,
            **_schedule(self.hyperparameters.first_epochs),
        }

    def find(self) -> Stage:
        flags = {
            "checkpoint": self._file(FIRST, "checkpoint.pth"),
            "images": self.unlabelled,
            "snap_to": self.output / PROPOSALS,
            "boxes_per_image": self.hyperparameters.boxes_per_image,
            "boxes_only": True,
            "overwrite": True,
            "device": self.args.device,
        }
        title = "find objects with it, without labels"
        return self._stage(BOXES, title, "tools/self_training.py", flags)

    def found_boxes(self) -> Flags:
        """Return the flags of pre-training on the boxes of `find`."""
        return {
            "proposals": f"file:{self._file(BOXES, 'proposals.json')}",
            **_schedule(self.hyperparameters.pretrain_epochs),
        }

    def pretrain(self, name: str, title: str, boxes: Flags) -> Stage:
        processes = NUM_PROCESSES if runs_in_parallel(self.args.device) else 1
        flags = {
            **self.model,
            "pretext": "region_prior",
            "imagenet_path": self.unlabelled,
            "num_classes": 1,
            "batch_size": 2 * self.hyperparameters.batch_size // processes,
            **LEARNING_RATES[PRETRAIN],
            **boxes,
        }
        return self._stage(name, title, "main.py", flags, processes)

    def evaluate_boxes(self) -> Stage:
        flags = {
            "pretext": "region_prior",
            "resume": self.checkpoint,
            "coco_path": self.coco_path,
            **self.common,
            "eval": True,
            "overwrite": True,
        }
        return self._stage(OBJECTS, "compare its boxes with held-out labels", "main.py", flags)

    def finetune(self, name: str, title: str, start: Flags) -> Stage:
        flags = {
            **self.model,
            "coco_path": self.coco_path,
            "num_classes": _num_classes(self.args),
            "batch_size": self.hyperparameters.batch_size,
            **_schedule(self.hyperparameters.epochs),
            "eval_every": self.hyperparameters.eval_every,
            **LEARNING_RATES[name],
            **start,
        }
        return self._stage(name, title, "finetune_main.py", flags)


def _schedule(epochs: int) -> dict[str, int]:
    """Return a schedule that drops the learning rate after four fifths of the epochs, or before the last one."""
    return {"epochs": epochs, "lr_drop": max(1, int(0.8 * epochs))}


def _unlabelled_images(args: argparse.Namespace, coco_path: Path) -> Path:
    if args.imagenet_path:
        return args.imagenet_path
    if args.coco_path:
        image_folder, _ = coco_files(str(coco_path), "train")
        return Path(image_folder)
    return coco_path / "unlabelled"


def _num_classes(args: argparse.Namespace) -> int:
    """Return the largest category id + 1: labels are category ids, gaps included."""
    if not args.coco_path:
        return 2
    val_images, val_annotations = coco_files(str(args.coco_path), "val")
    for needed in (val_images, val_annotations):
        if not Path(needed).exists():
            raise UserError(
                f"{needed} does not exist: --coco_path needs held-out images with labels too"
            )
    path = Path(coco_files(str(args.coco_path), "train")[1])
    try:
        categories = json.loads(path.read_text(encoding="utf-8"))["categories"]
        return max(category["id"] for category in categories) + 1
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} can't be read as COCO annotations ({error!r}): correct or replace it"
        ) from error


def runs_in_parallel(device: str | None) -> bool:
    """Return whether two stages run at once: on a CPU with several cores."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return device == "cpu" and usable_cores() > 1
