"""An end-to-end demo: pre-train without labels, fine-tune with and without that pre-training, write a page of results.

    bash tools/demo.sh [--coco_path DIR] [--output_dir DIR]

The stages are commands as a user would type them, and printed before they run. On a CPU with several cores the run
without pre-training runs in parallel with the other two: small models gain little from a second thread. When the demo
runs again, a finished stage is reused and an interrupted one resumes.
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
from util.runs.folder import read_record
from util.runs.session import run_script

ROOT = Path(__file__).resolve().parents[2]
STAGE_FILE = "stage.json"  # beside the folder of each stage: its command, its seconds, whether it is finished
MARKER = "demo.json"  # in the demo's folder: it belongs to the demo
SCENES, PRETRAIN, FINETUNE, SCRATCH = (
    "scenes",
    "pretrain",
    "finetune_pretrained",
    "finetune_scratch",
)

MODEL = {
    "detector": "conditional_detr",
    "backbone": "timm:tf_efficientnet_lite0",
    "backbone_weights": "imagenet",
    "enc_layers": 1,
    "dec_layers": 3,
    "dim_feedforward": 512,
    "dropout": 0,
}


@dataclass(frozen=True)
class Budget:
    """What differs between the sample scenes, which must take minutes, and real data."""

    image_size: int
    num_queries: int
    batch_size: int
    pretrain_epochs: int
    epochs: int
    eval_every: int


ON_SCENES = Budget(
    image_size=192, num_queries=30, batch_size=4, pretrain_epochs=3, epochs=10, eval_every=2
)
ON_REAL_DATA = Budget(
    image_size=320, num_queries=100, batch_size=8, pretrain_epochs=10, epochs=24, eval_every=4
)


@dataclass(frozen=True)
class Stage:
    """name: its folder too; title: for people; command: what a user would type."""

    name: str
    title: str
    command: list[str]


def _absolute(text: str) -> Path:
    """The demo's commands run in the project's folder."""
    return Path(text).resolve()


def get_args_parser() -> argparse.ArgumentParser:
    """The flags of the demo; those of size and length default to `ON_SCENES` or `ON_REAL_DATA`."""
    parser = argparse.ArgumentParser(
        "tools/demo.sh", description="Pre-train, fine-tune, evaluate; one page at the end"
    )
    parser.add_argument(
        "--coco_path",
        type=_absolute,
        help="data in the layout of COCO (default: sample scenes, made here)",
    )
    parser.add_argument(
        "--imagenet_path",
        type=_absolute,
        help="unlabelled images for pre-training (the training images)",
    )
    parser.add_argument("--output_dir", default="demo_output", type=_absolute)
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="run all stages from scratch; replaces those of an earlier demo there",
    )
    parser.add_argument("--device", help="cuda or cpu (cuda where there is one)")
    for name in asdict(ON_SCENES):
        text = f"{getattr(ON_SCENES, name)} on scenes, {getattr(ON_REAL_DATA, name)} on real data"
        parser.add_argument(f"--{name}", type=int, help=text)
    parser.add_argument(
        "--num_train",
        default=600,
        type=int,
        help="sample scenes for training, and as many unlabelled",
    )
    parser.add_argument("--num_val", default=100, type=int, help="held-out sample scenes")
    parser.add_argument("--num_workers", default=1, type=int, help="dataloader workers per run")
    parser.add_argument("--seed", default=1, type=int)
    return parser


def budget_from(args: argparse.Namespace) -> Budget:
    """The preset with what was given on the command line."""
    preset = asdict(ON_REAL_DATA if args.coco_path else ON_SCENES)
    given = {name: getattr(args, name) for name in preset if getattr(args, name) is not None}
    return Budget(**{**preset, **given})


def make_stages(args: argparse.Namespace) -> list[Stage]:
    """The commands, in order."""
    budget, output = budget_from(args), args.output_dir
    coco_path = args.coco_path or output / SCENES
    model = _flags(**MODEL, num_queries=budget.num_queries, image_size=budget.image_size)
    model += _flags(
        batch_size=budget.batch_size,
        num_workers=args.num_workers,
        seed=args.seed,
        device=args.device,
    )
    patches = 10 if budget.num_queries % 10 == 0 and budget.num_queries >= 100 else 5
    pretrain = [
        "main.py",
        *model,
        *_flags(imagenet_path=_unlabelled(args, coco_path), num_patches=patches),
    ]
    pretrain += _flags(
        patch_size=64,
        feature_recon=True,
        fre_cnn=True,
        **_schedule(budget.pretrain_epochs),
        lr="1e-4",
    )
    finetune = [
        "finetune_main.py",
        *model,
        *_flags(coco_path=coco_path, num_classes=_num_classes(args)),
    ]
    finetune += _flags(
        **_schedule(budget.epochs), lr="2e-4", lr_backbone="2e-4", eval_every=budget.eval_every
    )
    from_pretrained = [*finetune, *_flags(pretrain=output / PRETRAIN / "checkpoint.pth")]
    stages = (
        []
        if args.coco_path
        else [Stage(SCENES, "make sample scenes", _scenes_command(args, coco_path))]
    )
    for name, title, command in (
        (PRETRAIN, "pre-train without labels", pretrain),
        (FINETUNE, "fine-tune the pre-trained detector", from_pretrained),
        (SCRATCH, "the same without pre-training", finetune),
    ):
        stages.append(
            Stage(
                name, title, ["python", *command, *_flags(output_dir=output / name, resume="auto")]
            )
        )
    return stages


def _flags(**values: object) -> list[str]:
    """`epochs=3` -> `--epochs 3`, True -> the flag alone; None is skipped."""
    words = []
    for name, value in values.items():
        if value is not None:
            words += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return words


def _schedule(epochs: int) -> dict[str, int]:
    return {"epochs": epochs, "lr_drop": max(1, round(0.75 * epochs))}


def _scenes_command(args: argparse.Namespace, folder: Path) -> list[str]:
    counts = {
        "num_train": args.num_train,
        "num_val": args.num_val,
        "num_unlabelled": args.num_train,
    }
    return ["python", "-m", "tools.demo.scenes", *_flags(output=folder, **counts, seed=args.seed)]


def _unlabelled(args: argparse.Namespace, coco_path: Path) -> Path:
    if args.imagenet_path:
        return args.imagenet_path
    return (
        Path(coco_files(str(coco_path), "train")[0]) if args.coco_path else coco_path / "unlabelled"
    )


def _num_classes(args: argparse.Namespace) -> int:
    """The largest category id + 1, as the detectors count."""
    if not args.coco_path:
        return DEFAULT_NUM_CLASSES + 1
    path = Path(coco_files(str(args.coco_path), "train")[1])
    try:
        return (
            max(
                category["id"]
                for category in json.loads(path.read_text(encoding="utf-8"))["categories"]
            )
            + 1
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} can't be read as an annotation file of COCO ({error!r})"
        ) from error


def claim_folder(output: Path) -> None:
    """Makes the demo's folder.

    Raises:
        UserError: it holds something else.
    """
    if (
        output.exists()
        and (not output.is_dir() or any(output.iterdir()))
        and not (output / MARKER).is_file()
    ):
        raise UserError(
            f"--output_dir {output} holds files that are not of the demo: choose another folder"
        )
    output.mkdir(parents=True, exist_ok=True)
    if not (output / MARKER).exists():
        _write_json(output / MARKER, {"stages": []})


def run_stage(
    stage: Stage, folder: Path, overwrite: bool, run: Callable[[list[str]], int]
) -> float:
    """Runs a stage unless it is finished; returns the seconds that it took, over all attempts.

    Raises:
        UserError: the command failed, or the folder is of a stage with other settings and `overwrite` is not given.
    """
    record = read_record(_record_path(folder))
    if record and overwrite:
        shutil.rmtree(folder, ignore_errors=True)
        record = {}
    if record and record["command"] != stage.command:
        raise UserError(
            f"{folder} was made with other settings: add --overwrite to replace it, or choose another --output_dir"
        )
    if record and record["finished"]:
        log.info(
            "already done in %s, reused (--overwrite runs it again)",
            format_seconds(record["seconds"]),
        )
        return record["seconds"]
    before, began = record["seconds"] if record else 0.0, time.monotonic()
    _write_record(folder, stage.command, before, finished=False)
    status = run(stage.command)
    seconds = before + time.monotonic() - began
    _write_record(folder, stage.command, seconds, finished=status == 0)
    if status:
        raise UserError(
            f"'{stage.title}' failed with status {status}, see above; the same command resumes it"
        )
    return seconds


def _record_path(folder: Path) -> Path:
    # Beside the stage's folder: the scenes' one has to be empty before they are written.
    return folder.with_name(f"{folder.name}.{STAGE_FILE}")


def _write_record(folder: Path, command: list[str], seconds: float, finished: bool) -> None:
    _write_json(
        _record_path(folder),
        {"command": command, "seconds": round(seconds, 1), "finished": finished},
    )


def _write_json(path: Path, content: dict) -> None:
    write_text(path, json.dumps(content, indent=1) + "\n")


def run_command(command: list[str], prefix: str = "", threads: int = 0) -> int:
    """Runs `python ...` of a stage with this Python, in the project's folder; returns its exit status.

    With a `prefix` every line of output begins with it, so that two stages can run in parallel; `threads` limits each.
    """
    environment = {**os.environ, **({"OMP_NUM_THREADS": str(threads)} if threads else {})}
    pipe = subprocess.PIPE if prefix else None
    error = subprocess.STDOUT if prefix else None
    process = subprocess.Popen(
        [sys.executable, *command[1:]],
        cwd=ROOT,
        env=environment,
        stdout=pipe,
        stderr=error,
        text=True,
    )
    try:
        for line in process.stdout or ():
            log.info("%s%s", prefix, line.rstrip())
        return process.wait()
    except KeyboardInterrupt:
        process.wait()  # Ctrl-C reaches it too: it saves its checkpoint first
        raise


def runs_in_parallel(device: str | None) -> bool:
    """Whether two stages share the machine: on a CPU with several cores."""
    return (device or ("cuda" if torch.cuda.is_available() else "cpu")) == "cpu" and (
        os.cpu_count() or 1
    ) > 1


def run_all(stages: list[Stage], args: argparse.Namespace) -> list[dict]:
    """Runs the stages in order, or the last in parallel with the two before it; returns them with their seconds.

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
    threads = max(1, (os.cpu_count() or 1) // 2)
    with ThreadPoolExecutor(2) as pool:
        branches = [
            pool.submit(run, [pretrain, finetune], "[pre-trained] ", threads),
            pool.submit(run, [scratch], "[from scratch] ", threads),
        ]
        return done + branches[0].result() + branches[1].result()


def main(args: argparse.Namespace) -> None:
    stages = make_stages(args)
    claim_folder(args.output_dir)
    began = time.monotonic()
    try:
        done = run_all(stages, args)
    except KeyboardInterrupt:
        log.error("the same command resumes the demo")
        raise
    _write_json(
        args.output_dir / MARKER,
        {"stages": done, "wall_seconds": round(time.monotonic() - began, 1)},
    )
    log.info("\n=== write the result page")
    if run_command(["python", "-m", "tools.demo.page", str(args.output_dir)]):
        raise UserError("the result page could not be written, see above")


if __name__ == "__main__":
    run_script(main, get_args_parser().parse_args)
