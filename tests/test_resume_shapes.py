"""Whole runs that stop in mid-epoch and continue with other processes, batch sizes and workers."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests import toy_run
from tests.tiny import FROZEN, ROOT, RUN_FLAGS, captured_log, read_checkpoint, read_log, write_coco
from tests.two_processes import free_port
from util.runs.log import step_entries

IMAGES = 24
STOPPED = 143  # exit status


@pytest.fixture(scope="module")
def coco(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_coco(tmp_path_factory.mktemp("data") / "coco", train=IMAGES, val=2)


def start(
    coco: Path, folder: Path, *flags: object, processes: int = 1, stop_after: int = 0
) -> list[dict]:
    """Start or resume the run of `folder` in so many gloo processes. Return what all ranks saw in this start."""
    seen = folder / f"start{len(list(folder.glob('start*')))}"
    seen.mkdir(parents=True)
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
        launcher += ["--master_port", str(free_port())]
    words = [
        str(ROOT / "tests" / "recorded_run.py"), seen, stop_after, *RUN_FLAGS, *FROZEN,
        "--coco_path", coco, "--epochs", 2, "--eval_every", 9, "--resume", "auto",
        "--output_dir", folder / "run", *flags,
    ]  # fmt: skip
    done = subprocess.run(
        [*launcher, *map(str, words)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=900,
    )
    if processes == 1:
        assert done.returncode == (STOPPED if stop_after else 0), done.stdout
    # torchrun has a status of its own for processes that stopped.
    assert ("continue with --resume auto" in done.stdout) == bool(stop_after), done.stdout
    lines = [path.read_text().splitlines() for path in sorted(seen.glob("rank_*.txt"))]
    assert len(lines) == processes
    return [json.loads(line) for line in sum(lines, [])]


def images_of(batches: list[dict], epoch: int) -> list[int]:
    return [image for batch in batches if batch["epoch"] == epoch for image in batch["images"]]


# (processes, batch size, batches until the stop) of each start; 0: to the end. All of them divide 24 images.
SHAPES = {
    "two processes, then one": [(2, 2, 3), (1, 2, 0)],
    "one process, then two": [(1, 3, 4), (2, 2, 0)],
    "another batch size": [(1, 2, 6), (1, 4, 0)],
    "three shapes": [(2, 2, 2), (1, 1, 4), (2, 3, 0)],
}


@pytest.mark.slow
@pytest.mark.parametrize("flags", [(), ("--bucket_aspect",)], ids=["", "bucket_aspect"])
@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
def test_each_image_is_seen_once_per_epoch(
    shapes: list[tuple[int, int, int]], flags: tuple[str, ...], coco: Path, tmp_path: Path
) -> None:
    starts = [
        start(
            coco, tmp_path, *flags, "--batch_size", size, processes=processes, stop_after=stop_after
        )
        for processes, size, stop_after in shapes
    ]
    for batches, (processes, size, stop_after) in zip(starts[:-1], shapes[:-1], strict=True):
        assert len(images_of(batches, 0)) == processes * size * stop_after
        assert not images_of(batches, 1)
    for epoch in (0, 1):
        counts = Counter(images_of(sum(starts, []), epoch))
        assert len(counts) == IMAGES
        assert set(counts.values()) == {1}

    checkpoint = read_checkpoint(tmp_path / "run" / "checkpoint.pth")
    last = shapes[-1][0] * shapes[-1][1]
    before = sum(stop_after for *_, stop_after in shapes)
    left = IMAGES - sum(processes * size * stop for processes, size, stop in shapes)
    assert checkpoint["step"] == before + (left + IMAGES) // last
    assert [row["epoch"] for row in read_log(tmp_path / "run")] == [0, 1]


@pytest.mark.slow
def test_incomplete_batches_at_the_end_are_dropped_and_no_image_comes_twice(
    coco: Path, tmp_path: Path
) -> None:
    """With accumulation, and a batch size that does not divide what is left: 14 of 16 images."""
    flags = ("--accumulate", 2, "--batch_size")
    first = start(coco, tmp_path, *flags, 2, processes=2, stop_after=2)
    second = start(coco, tmp_path, *flags, 7)
    seen = Counter(images_of(first + second, 0))
    assert len(images_of(first, 0)) == 8
    assert len(seen) == 8 + 14
    assert set(seen.values()) == {1}
    assert len(set(images_of(second, 1))) == 21


@pytest.mark.slow
def test_another_number_of_workers_gives_the_same_samples(coco: Path, tmp_path: Path) -> None:
    """Bit for bit, and so the same weights."""
    flags = ("--batch_size", 3, "--num_workers")
    whole = start(coco, tmp_path / "whole", *flags, 2)
    first = start(coco, tmp_path / "stopped", *flags, 3, stop_after=5)
    rest = start(coco, tmp_path / "stopped", *flags, 1)
    assert first + rest == whole
    assert len(whole) == 2 * IMAGES // 3
    ours, expected = (
        read_checkpoint(tmp_path / name / "run" / "checkpoint.pth")["model"]
        for name in ("stopped", "whole")
    )
    assert all((ours[name] == expected[name]).all() for name in expected)


@pytest.mark.parametrize(
    ("more", "expected", "steps_left"),
    [((), [], 3), (("--seed", "7"), ["--seed changed: the epoch starts over"], 4)],
)
def test_another_order_of_images_starts_the_epoch_over(
    more: tuple[str, ...], expected: list[str], steps_left: int, tmp_path: Path
) -> None:
    """A batch number of another order would repeat some images of the epoch and leave out others."""
    toy_run.start(tmp_path)  # three epochs of two steps
    resume = str(tmp_path / "checkpoint_step_000003.pth")
    with captured_log() as lines:
        run = toy_run.start(tmp_path, *more, resume=resume)
    assert [line for line in lines if "starts over" in line] == expected
    steps = [(entry["epoch"], entry["step"]) for entry in step_entries(tmp_path)]
    assert steps == [(0, 1), (0, 2), (1, 1), (1, 2), (2, 1), (2, 2)]
    assert run.step == 3 + steps_left
