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
from dataclasses import asdict
from pathlib import Path

from tools.demo.stages import (
    CUSTOM_DEFAULTS,
    HYPERPARAMETER_HELP,
    SYNTHETIC_DEFAULTS,
    Stage,
    build_stages,
    runs_in_parallel,
)
from util.errors import UserError
from util.files import write_text
from util.logger import format_seconds, log
from util.runs.folder import read_json_object
from util.runs.session import run_script
from util.settings import usable_cores

ROOT = Path(__file__).resolve().parents[2]
STAGE_FILE = "stage.json"  # suffix of a stage's record: command, seconds, whether it has finished
DEMO_FILE = "demo.json"  # marks the demo's folder; has the finished stages


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
