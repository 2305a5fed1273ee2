"""Runs the demo: pre-trains without labels, fine-tunes with and without that pre-training, and writes a result page.

    bash tools/demo.sh [--coco_path DIR] [--output_dir DIR]

Each stage is a command that a user could type, and is printed before it runs. On a CPU with several cores, the run
without pre-training is parallel to the other two: such small models gain little from a second thread. When the demo
runs again, finished stages are reused and an interrupted one resumes.
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

import torch

from datasets.labelled.coco import coco_files
from tools.demo.scenes import DEFAULT_NUM_CLASSES
from util.errors import UserError
from util.files import write_text
from util.logger import format_seconds, log
from util.runs.folder import read_json_object
from util.runs.session import run_script
from util.settings.words import to_words

ROOT = Path(__file__).resolve().parents[2]
STAGE_FILE = "stage.json"  # suffix of a stage's record: command, seconds, whether it has finished
DEMO_FILE = "demo.json"  # marks the demo's folder; has the finished stages
# Names of the stages, and of their folders.
SCENES, PRETRAIN = "scenes", "pretrain"
FINETUNE, SCRATCH = "finetune_pretrained", "finetune_scratch"

MODEL = {
    "detector": "conditional_detr",
    "backbone": "timm:tf_efficientnet_lite0",
    "backbone_weights": "imagenet",
    "enc_layers": 1,
    "dec_layers": 3,
    "dim_feedforward": 512,
    "dropout": 0,
}


@dataclass(frozen=True, kw_only=True)
class Hyperparameters:
    """What differs between synthetic images, which have to take minutes, and a custom dataset.

    image_size is the short side in pixels; eval_every counts epochs.
    """

    image_size: int
    num_queries: int
    batch_size: int
    pretrain_epochs: int
    epochs: int
    eval_every: int


SYNTHETIC_DEFAULTS = Hyperparameters(
    image_size=192, num_queries=30, batch_size=4, pretrain_epochs=3, epochs=10, eval_every=2
)
CUSTOM_DEFAULTS = Hyperparameters(
    image_size=320, num_queries=100, batch_size=8, pretrain_epochs=10, epochs=24, eval_every=4
)
HYPERPARAMETER_HELP = {
    "image_size": "short side of the images, in pixels",
    "num_queries": "number of object queries",
    "batch_size": "images per batch",
    "pretrain_epochs": "epochs of pre-training",
    "epochs": "epochs of fine-tuning",
    "eval_every": "epochs between evaluations",
}


@dataclass(frozen=True)
class Stage:
    """One command of the demo. name: also its folder. title: for people. command: as a user would type it."""

    name: str
    title: str
    command: list[str]


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
        default=600,
        type=int,
        metavar="N",
        help="synthetic images for training, and as many unlabelled ones (default: 600)",
    )
    add(
        "--num_val",
        default=100,
        type=int,
        metavar="N",
        help="held-out synthetic images (default: 100)",
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
    """Return the stages in order: synthetic images (without `--coco_path`), pre-training, and two fine-tunings.

    Raises:
        UserError: the annotations of `--coco_path` can't be read.
    """
    hyperparameters = choose_hyperparameters(args)
    coco_path = args.coco_path or args.output_dir / SCENES
    model = to_words(
        {
            **MODEL,
            "num_queries": hyperparameters.num_queries,
            "image_size": hyperparameters.image_size,
            "batch_size": hyperparameters.batch_size,
            "num_workers": args.num_workers,
            "seed": args.seed,
            "device": args.device,
        }
    )
    pretrain = ["main.py", *model, *_pretrain_flags(args, hyperparameters, coco_path)]
    scratch = ["finetune_main.py", *model, *_finetune_flags(args, hyperparameters, coco_path)]
    checkpoint = args.output_dir / PRETRAIN / "checkpoint.pth"
    finetune = [*scratch, *to_words({"pretrain": checkpoint})]

    stages = []
    if not args.coco_path:
        stages.append(Stage(SCENES, "make synthetic images", _scenes_command(args, coco_path)))
    for name, title, command in (
        (PRETRAIN, "pre-train without labels", pretrain),
        (FINETUNE, "fine-tune the pre-trained detector", finetune),
        (SCRATCH, "fine-tune without pre-training", scratch),
    ):
        # `--resume auto` starts a new run and continues an interrupted one: the command is the same.
        folder = to_words({"output_dir": args.output_dir / name, "resume": "auto"})
        stages.append(Stage(name, title, ["python", *command, *folder]))
    return stages


def _pretrain_flags(
    args: argparse.Namespace, hyperparameters: Hyperparameters, coco_path: Path
) -> list[str]:
    # Queries are divided evenly between patches, so their number has to be a multiple of num_patches.
    num_queries = hyperparameters.num_queries
    num_patches = 10 if (num_queries % 10 == 0 and num_queries >= 100) else 5
    return to_words(
        {
            "imagenet_path": _unlabelled_images(args, coco_path),
            "num_patches": num_patches,
            "patch_size": 64,
            "feature_recon": True,
            "fre_cnn": True,
            **_schedule(hyperparameters.pretrain_epochs),
            "lr": "1e-4",
        }
    )


def _finetune_flags(
    args: argparse.Namespace, hyperparameters: Hyperparameters, coco_path: Path
) -> list[str]:
    return to_words(
        {
            "coco_path": coco_path,
            "num_classes": _num_classes(args),
            **_schedule(hyperparameters.epochs),
            "lr": "2e-4",
            "lr_backbone": "2e-4",
            "eval_every": hyperparameters.eval_every,
        }
    )


def _schedule(epochs: int) -> dict[str, int]:
    """Return a schedule that drops the learning rate after three quarters of the epochs."""
    return {"epochs": epochs, "lr_drop": max(1, round(0.75 * epochs))}


def _scenes_command(args: argparse.Namespace, folder: Path) -> list[str]:
    flags = to_words(
        {
            "output": folder,
            "num_train": args.num_train,
            "num_val": args.num_val,
            "num_unlabelled": args.num_train,
            "seed": args.seed,
        }
    )
    return ["python", "-m", "tools.demo.scenes", *flags]


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
        return DEFAULT_NUM_CLASSES + 1
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
    record = read_json_object(_record_path(folder))
    if record and overwrite:
        shutil.rmtree(folder, ignore_errors=True)
        record = {}
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
    status = run(stage.command)
    seconds = previous_seconds + time.monotonic() - started_at
    _write_record(folder, stage.command, seconds, finished=status == 0)
    if status:
        raise UserError(
            f"'{stage.title}' failed with status {status}, see above; the same command resumes it"
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
    return device == "cpu" and (os.cpu_count() or 1) > 1


def run_stages(stages: list[Stage], args: argparse.Namespace) -> list[dict]:
    """Run the stages in order, or the last one in parallel to the two before it; return them with their seconds.

    Raises:
        UserError: a stage failed.
    """

    def run(stages: list[Stage], prefix: str = "", threads: int = 0) -> list[dict]:
        done = []
        for stage in stages:
            log.info("\n%s=== %s\n$ %s", prefix, stage.title, shlex.join(stage.command))
            seconds = run_stage(
                stage,
                args.output_dir / stage.name,
                args.overwrite,
                lambda words: run_command(words, prefix, threads),
            )
            done.append({**asdict(stage), "seconds": seconds})
        return done

    if not runs_in_parallel(args.device):
        return run(stages)

    *before, pretrain, finetune, scratch = stages
    done = run(before)
    # Half of the cores for each branch, so that they do not compete for the same ones.
    threads = max(1, (os.cpu_count() or 1) // 2)
    with ThreadPoolExecutor(2) as pool:
        branches = [
            pool.submit(run, [pretrain, finetune], "[pre-trained] ", threads),
            pool.submit(run, [scratch], "[from scratch] ", threads),
        ]
        return done + branches[0].result() + branches[1].result()


def main(args: argparse.Namespace) -> None:
    stages = build_stages(args)
    prepare_output_dir(args.output_dir)
    started_at = time.monotonic()
    try:
        done = run_stages(stages, args)
    except KeyboardInterrupt:
        log.error("the same command resumes the demo")
        raise

    wall_seconds = round(time.monotonic() - started_at, 1)
    _write_json(args.output_dir / DEMO_FILE, {"stages": done, "wall_seconds": wall_seconds})
    log.info("\n=== write the result page")
    if run_command(["python", "-m", "tools.demo.page", str(args.output_dir)]):
        raise UserError("the result page could not be written, see above")


if __name__ == "__main__":
    run_script(main, get_args_parser().parse_args)
