"""Train thousands of tiny steps in one process, and record whether its memory, open files or threads grow.

    python tools/soak.py --output_dir outputs/soak --rounds 8 --epochs 12

The run evaluates and saves after each epoch, saves within epochs in the background, and is resumed in each round, which
ends its dataloader workers and starts new ones. Another process looks at it once a second. The folder gets `soak.jsonl`
with what it saw, `soak.json` with the slopes, and the graph `soak.png`.
"""

import json
import multiprocessing
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

# So that `python tools/NAME.py` works from any directory.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from evaluation import format_metrics
from predetr import finetune
from tools.demo.scenes import write_coco
from util.errors import UserError
from util.files import make_folder, to_json, write_atomically, write_text
from util.logger import log
from util.plots.curves import figure_classes
from util.runs.log import step_entries
from util.runs.session import run_script
from util.settings import Parser
from util.settings.value_types import positive

SAMPLES, SUMMARY, GRAPH = "soak.jsonl", "soak.json", "soak.png"
MEGABYTE = 1e6
IMAGES, BATCH_SIZE, WORKERS = 100, 2, 2
STEPS_PER_EPOCH = IMAGES // BATCH_SIZE
CHILDREN = 2 * WORKERS  # of training, and of evaluation
LOG_EVERY = 5  # steps; the graph's resolution
WARM_UP = 0.2  # of the steps; caches fill, and the allocator finds its size
FLAGS: dict[str, Any] = {
    "backbone": "resnet18",
    "backbone_weights": "none",
    "backbone_norm": "frozen",
    "lr_backbone": 0,
    "hidden_dim": 32,
    "nheads": 4,
    "dim_feedforward": 64,
    "enc_layers": 1,
    "dec_layers": 2,
    "num_queries": 20,
    "image_size": 64,
    "device": "cpu",
    "batch_size": BATCH_SIZE,
    "num_workers": WORKERS,
    "ema": 0.9,
    "log_every": LOG_EVERY,
    "save_every": 10**6,  # no numbered checkpoints, which would fill the disk
    "save_every_steps": 20,
    "lr_drop": 10**6,
}


@dataclass(frozen=True)
class Sample:
    """What the process looked like at a time.

    Attributes:
        seconds: since the start.
        round: from 0. step: training steps so far.
        main, workers: resident memory in MB, of the training process and of all its dataloader workers.
        workers_own: the part of `workers` that is not shared, neither with each other nor with the training process.
            Pages that a worker only reads stay shared with the process that it was forked from.
        files, threads: of the training process.
        children: number of dataloader workers.
    """

    seconds: float
    round: int
    step: int
    main: float
    workers: float
    workers_own: float
    files: int
    threads: int
    children: int


def parse(argv: list[str]) -> Namespace:
    parser = Parser("tools/soak.py", description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", required=True, metavar="DIR", help="a new folder")
    parser.add_argument(
        "--rounds", type=positive(), default=8, metavar="N", help="starts of the run (8)"
    )
    parser.add_argument(
        "--epochs",
        type=positive(),
        default=12,
        metavar="N",
        help=f"epochs of a round, of {STEPS_PER_EPOCH} steps each (12)",
    )
    return parser.parse_args(argv)


def main(args: Namespace) -> None:
    folder = make_folder(args.output_dir)
    if (folder / SAMPLES).exists():
        raise UserError(f"--output_dir {folder} has an earlier {SAMPLES}: choose another folder")
    data = write_coco(folder / "data", num_train=IMAGES, num_val=20, size=64)
    samples = list(watch(folder, data, args.rounds, args.epochs))
    slopes = summarize(samples)
    write_text(folder / SUMMARY, to_json(slopes, indent=1) + "\n")
    draw(samples, folder / GRAPH)
    log.info(
        "%d steps in %.0f s; growth per 1000 steps after warm-up:",
        samples[-1].step,
        samples[-1].seconds,
    )
    rounds = slopes.pop("rounds")
    for name, values in slopes.items():
        log.info("%s: %+.3f, from %.1f to %.1f", name, *values.values())
    log.info("memory of the training process: %s", format_metrics(rounds))


# ----------------------------------------------------------------------------------------------------------- the run


def train(data: Path, output_dir: Path, rounds: int, epochs: int, current: Any) -> None:
    """Start and resume a run `rounds` times in this process. `current` is the shared number of the round."""
    # A spawned process would spawn its dataloader workers too; those of a script start as the system's default.
    multiprocessing.set_start_method(None, force=True)
    for number in range(rounds):
        current.value = number
        finetune(
            data,
            output_dir=output_dir,
            resume="auto",
            epochs=(number + 1) * epochs,
            **FLAGS,
        )


def watch(folder: Path, data: Path, rounds: int, epochs: int) -> Iterator[Sample]:
    """Run `train` in a process of its own; yield a sample per second, and append it to the folder's file.

    Raises:
        UserError: psutil is missing, or the process failed; it has logged why.
    """
    look = _observer()
    spawn = multiprocessing.get_context("spawn")
    current = spawn.Value("i", 0)
    process = spawn.Process(target=train, args=(data, folder / "run", rounds, epochs, current))
    process.start()
    start = time.monotonic()
    try:
        with (folder / SAMPLES).open("w", encoding="utf-8") as file:
            while process.is_alive():
                seen = look(process.pid)
                if seen is not None:
                    step = _steps(folder / "run")
                    seconds = round(time.monotonic() - start, 2)
                    sample = Sample(seconds=seconds, round=current.value, step=step, **seen)
                    file.write(json.dumps(asdict(sample)) + "\n")
                    file.flush()
                    yield sample
                process.join(1)
    finally:
        process.terminate()  # no effect once it has ended
        process.join()
    if process.exitcode:
        raise UserError(f"the run in {folder / 'run'} ended with status {process.exitcode}")


def _observer() -> Callable[[int | None], dict[str, Any] | None]:
    """Return a function from a process id to what psutil sees; None while the process starts or ends."""
    try:
        import psutil
    except ImportError:
        raise UserError(
            "tools/soak.py needs psutil: pip install psutil (in requirements-extras.txt)"
        ) from None

    def look(pid: int | None) -> dict[str, Any] | None:
        try:
            process = psutil.Process(pid)
            family = [process, *process.children(recursive=True)]
            # A process that has ended, but not been waited for, has zeros.
            if any(member.status() == psutil.STATUS_ZOMBIE for member in family):
                return None
            workers = family[1:]
            memory = [worker.memory_full_info() for worker in workers]
            return {
                "main": process.memory_info().rss / MEGABYTE,
                "workers": sum(info.rss for info in memory) / MEGABYTE,
                "workers_own": sum(info.uss for info in memory) / MEGABYTE,
                "files": process.num_fds()
                if hasattr(process, "num_fds")
                else process.num_handles(),
                "threads": process.num_threads(),
                "children": len(workers),
            }
        except psutil.Error:
            return None

    return look


def _steps(run: Path) -> int:
    entries = step_entries(run)
    return entries[-1]["epoch"] * STEPS_PER_EPOCH + entries[-1]["step"] if entries else 0


# ------------------------------------------------------------------------------------------------------------ result


def summarize(samples: Sequence[Sample]) -> dict[str, dict[str, float]]:
    """Return the growth of each quantity per 1000 steps, and its mean in the first and last fifth, after warm-up.

    Memory is compared within each round: a resumed run loads a checkpoint, and has new workers. `rounds` is the mean
    memory of the training process in each round.

    Raises:
        UserError: too few samples after warm-up.
    """
    steady = _after_warm_up(samples)
    if len(steady) < 10:
        raise UserError("the run was too short to measure: give more --epochs or --rounds")
    rounds = [sample.round for sample in steady]
    memory = {name: _growth(steady, name, rounds) for name in ("main", "workers", "workers_own")}
    whole = {name: _growth(steady, name, [0] * len(steady)) for name in ("files", "threads")}
    means = {
        f"round {number}": float(np.mean([s.main for s in steady if s.round == number]))
        for number in sorted(set(rounds))
    }
    return {**memory, **whole, "rounds": means}


def _after_warm_up(samples: Sequence[Sample]) -> list[Sample]:
    """Return the samples of each round with all workers, without its first steps."""
    found = []
    for number in sorted({sample.round for sample in samples}):
        own = [s for s in samples if s.round == number and s.children == CHILDREN]
        first, last = (own[0].step, own[-1].step) if own else (0, 0)
        found += [s for s in own if s.step > first + WARM_UP * (last - first)]
    return found


def _growth(samples: Sequence[Sample], name: str, groups: Sequence[int]) -> dict[str, float]:
    """Fit a line of one slope, and an intercept for each group, by least squares."""
    steps = np.array([sample.step for sample in samples], dtype=float)
    values = np.array([getattr(sample, name) for sample in samples], dtype=float)
    centered = [np.array(groups) == group for group in set(groups)]
    x, y = steps.copy(), values.copy()
    for members in centered:
        x[members] -= steps[members].mean()
        y[members] -= values[members].mean()
    fifth = max(len(values) // 5, 1)
    return {
        "per_1000_steps": 1000 * float(x @ y) / max(float(x @ x), 1e-9),
        "first": float(values[:fifth].mean()),
        "last": float(values[-fifth:].mean()),
    }


def draw(samples: Sequence[Sample], path: Path) -> None:
    """Draw memory, open files, threads and workers over the steps."""
    figure_class, figure_canvas = figure_classes()
    figure = figure_class(figsize=(9, 3.2), layout="constrained", dpi=100)
    figure_canvas(figure)
    memory, counts = figure.subplots(1, 2)
    steps = [sample.step for sample in samples]
    panels = {
        memory: {
            "main": "training process",
            "workers": "all dataloader workers",
            "workers_own": "not shared",
        },
        counts: {"files": "open files", "threads": "threads", "children": "dataloader workers"},
    }
    for axes, names in panels.items():
        for name, label in names.items():
            values = [getattr(sample, name) for sample in samples]
            axes.plot(steps, values, label=label, linewidth=0.8)
        axes.set_xlabel("training steps")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8, frameon=False, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1))
    memory.set_ylabel("resident memory, MB")
    write_atomically(path, lambda file: figure.savefig(file, format="png"))


if __name__ == "__main__":
    run_script(main, parse)
