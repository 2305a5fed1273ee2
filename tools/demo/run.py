"""Runs the demo: pre-trains without labels, fine-tunes with and without that pre-training, and writes a result page.

    bash tools/demo.sh [--coco_path DIR] [--output_dir DIR]

Each stage is a command that a user could type, and is printed before it runs. Such small models gain little from a
second thread, so a CPU with several cores pre-trains in two processes and runs both fine-tunings at once. When the
demo runs again, finished stages are reused and an interrupted one resumes.
"""

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from datasets.labelled.coco import coco_files
from util.errors import UserError
from util.files import write_text
from util.logger import format_seconds, log
from util.runs.folder import read_json_object
from util.runs.session import run_script
from util.settings import usable_cores
from util.settings.words import to_words

Flags = dict[str, Any]  # without dashes, see `to_words`

ROOT = Path(__file__).resolve().parents[2]
STAGE_FILE = "stage.json"  # suffix of a stage's record: command, seconds, whether it has finished
DEMO_FILE = "demo.json"  # marks the demo's folder; has the finished stages
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


def _absolute(text: str) -> Path:
    """Resolve a path now: the stages run in the project's folder."""
    return Path(text).resolve()


def get_args_parser() -> argparse.ArgumentParser:
    """Return the demo's parser; flags that are not given depend on the data (`choose_hyperparameters`)."""
    parser = argparse.ArgumentParser(
        "tools/demo.sh", description="Pre-train, fine-tune, evaluate, and write a result page"
    )
    add = parser.add_argument
    add(
        "--coco_path",
        type=_absolute,
        metavar="DIR",
        help="dataset in COCO's layout (default: synthetic images, made here)",
    )
    add(
        "--imagenet_path",
        type=_absolute,
        metavar="DIR",
        help="unlabelled images to pre-train on (default: the training images, or synthetic ones)",
    )
    add(
        "--output_dir",
        default="demo_output",
        type=_absolute,
        metavar="DIR",
        help="folder for data, runs and the result page (default: demo_output)",
    )
    add(
        "--overwrite",
        action="store_true",
        help="run all stages from scratch and replace those in --output_dir (default: off)",
    )
    add("--device", help="cuda or cpu (default: cuda if available)")
    for name, meaning in HYPERPARAMETER_HELP.items():
        synthetic, custom = getattr(SYNTHETIC_DEFAULTS, name), getattr(CUSTOM_DEFAULTS, name)
        text = f"{meaning} (default: {synthetic} on synthetic images, {custom} with --coco_path)"
        add(f"--{name}", type=int, metavar="N", help=text)
    add(
        "--num_train",
        default=32,
        type=int,
        metavar="N",
        help="labelled synthetic images for training (default: 32)",
    )
    add(
        "--num_unlabelled",
        default=1500,
        type=int,
        metavar="N",
        help="unlabelled synthetic images (default: 1500)",
    )
    add(
        "--num_val",
        default=200,
        type=int,
        metavar="N",
        help="held-out synthetic images (default: 200)",
    )
    add(
        "--num_workers",
        default=1,
        type=int,
        metavar="N",
        help="dataloader workers per run (default: 1)",
    )
    add("--seed", default=1, type=int, help="random seed of images and runs (default: 1)")
    return parser


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


def prepare_output_dir(output: Path) -> None:
    """Make the demo's folder and mark it as the demo's.

    Raises:
        UserError: it exists and has other files.
    """
    is_used = output.exists() and (not output.is_dir() or any(output.iterdir()))
    if is_used and not (output / DEMO_FILE).is_file():
        raise UserError(
            f"--output_dir {output} has files that are not of the demo: choose another folder"
        )
    output.mkdir(parents=True, exist_ok=True)
    # Written at once, so that an interrupted demo recognizes its folder.
    if not (output / DEMO_FILE).exists():
        _write_json(output / DEMO_FILE, {"stages": []})


def run_stage(
    stage: Stage, folder: Path, overwrite: bool, run: Callable[[list[str]], int]
) -> float:
    """Run a stage unless it has finished; return the seconds that it took, over all attempts.

    Args:
        run: runs a command and returns its exit status.

    Raises:
        UserError: the command failed, or the folder was made with other settings and `overwrite` is not set.
    """
    if overwrite:
        shutil.rmtree(folder, ignore_errors=True)
        _record_path(folder).unlink(missing_ok=True)
    record = read_json_object(_record_path(folder))
    if record and record["command"] != stage.command:
        raise UserError(
            f"{folder} was made with other settings: add --overwrite to replace it, or choose another --output_dir"
        )
    if record and record["finished"]:
        seconds = record["seconds"]
        log.info("done before in %s (--overwrite runs it again)", format_seconds(seconds))
        return seconds

    previous_seconds = record.get("seconds", 0.0)
    started_at = time.monotonic()
    _write_record(folder, stage.command, previous_seconds, finished=False)
    status = None
    try:
        status = run(stage.command)
    finally:  # after Ctrl-C too
        seconds = previous_seconds + time.monotonic() - started_at
        _write_record(folder, stage.command, seconds, finished=status == 0)
    if status:
        raise UserError(
            f"'{stage.title}' failed with status {status}, see above; the same command, without --overwrite, resumes it"
        )
    return seconds


def _record_path(folder: Path) -> Path:
    # Next to the stage's folder and not in it: synthetic images are only written to an empty folder.
    return folder.with_name(f"{folder.name}.{STAGE_FILE}")


def _write_record(folder: Path, command: list[str], seconds: float, finished: bool) -> None:
    record = {"command": command, "seconds": round(seconds, 1), "finished": finished}
    _write_json(_record_path(folder), record)


def _write_json(path: Path, content: dict) -> None:
    write_text(path, json.dumps(content, indent=1) + "\n")


def run_command(command: list[str], prefix: str = "", threads: int = 0) -> int:
    """Run a stage's `python ...` with this Python, in the project's folder; return its exit status.

    Args:
        prefix: starts each line of output, so that two stages can run in parallel; empty: output is not changed.
        threads: OpenMP threads; 0 for OpenMP's default.
    """
    environment = dict(os.environ)
    if threads:
        environment["OMP_NUM_THREADS"] = str(threads)
    process = subprocess.Popen(
        [sys.executable, *command[1:]],
        cwd=ROOT,
        env=environment,
        # Without a pipe the stage sees the terminal, and draws its progress bar.
        stdout=subprocess.PIPE if prefix else None,
        stderr=subprocess.STDOUT if prefix else None,
        text=True,
    )
    try:
        for line in process.stdout or ():
            log.info("%s%s", prefix, line.rstrip())
        return process.wait()
    except KeyboardInterrupt:
        process.wait()  # the terminal sends Ctrl-C to it too, and it saves a checkpoint first
        raise


def runs_in_parallel(device: str | None) -> bool:
    """Return whether two stages run at once: on a CPU with several cores."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return device == "cpu" and usable_cores() > 1


def run_stages(stages: list[Stage], args: argparse.Namespace) -> list[dict]:
    """Run the stages in order, both fine-tunings at once if that is faster; return them with their seconds.

    Raises:
        UserError: a stage failed.
    """

    def run(stage: Stage, prefix: str = "", threads: int = 0) -> dict:
        log.info("\n%s=== %s\n$ %s", prefix, stage.title, shlex.join(stage.command))
        seconds = run_stage(
            stage,
            args.output_dir / stage.name,
            args.overwrite,
            lambda words: run_command(words, prefix, threads),
        )
        return {**asdict(stage), "seconds": seconds}

    if not runs_in_parallel(args.device):
        return [run(stage) for stage in stages]

    *before, finetune, scratch = stages
    cores = usable_cores()
    done = [run(stage, threads=cores // stage.processes) for stage in before]
    # Half of the cores for each, so that they do not compete for the same ones.
    threads = cores // 2
    with ThreadPoolExecutor(2) as pool:
        branches = [
            pool.submit(run, finetune, "[pre-trained] ", threads),
            pool.submit(run, scratch, "[from scratch] ", threads),
        ]
        return done + [branch.result() for branch in branches]


def wall_seconds(stages: list[dict], in_parallel: bool) -> float:
    """Return the time of all stages, of which the last two may have run at once."""
    *before, finetune, scratch = (stage["seconds"] for stage in stages)
    both = max(finetune, scratch) if in_parallel else finetune + scratch
    return round(sum(before) + both, 1)


def main(args: argparse.Namespace) -> None:
    stages = build_stages(args)
    prepare_output_dir(args.output_dir)
    try:
        done = run_stages(stages, args)
    except KeyboardInterrupt:
        log.error("the same command, without --overwrite, resumes the demo")
        raise

    content = {"stages": done, "wall_seconds": wall_seconds(done, runs_in_parallel(args.device))}
    _write_json(args.output_dir / DEMO_FILE, content)
    log.info("\n=== write the result page")
    if run_command(["python", "-m", "tools.demo.page", str(args.output_dir)]):
        raise UserError("the result page could not be written, see above")


if __name__ == "__main__":
    run_script(main, get_args_parser().parse_args)
