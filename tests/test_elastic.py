"""docs/scaling.md: torchrun restarts the processes when one dies, and `--resume auto` continues exactly."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.tiny import (
    FROZEN,
    ROOT,
    RUN_FLAGS,
    assert_same,
    assert_same_logs,
    read_checkpoint,
    read_log,
    write_coco,
)

psutil = pytest.importorskip("psutil")


@pytest.fixture(scope="module")
def coco(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_coco(tmp_path_factory.mktemp("data") / "coco", train=16, val=2)


def train_in_two_processes(
    coco: Path,
    folder: Path,
    *flags: str,
    max_restarts: int = 0,
    disturb: Callable[[list["psutil.Process"]], None] | None = None,
) -> tuple[int, str]:
    """Train two epochs of eight steps under torchrun. Return its status and output.

    disturb: called with the two processes when the checkpoint of the third step is there.
    """
    words = [*RUN_FLAGS, *FROZEN, "--coco_path", str(coco), "--batch_size", "1", "--epochs", "2",
             "--dec_layers", "1", "--save_every_steps", "3", "--log_every", "1"]  # fmt: skip
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
               "--max_restarts", str(max_restarts), str(ROOT / "finetune_main.py"), *words, *flags,
               "--output_dir", str(folder), "--resume", "auto"]  # fmt: skip
    output = folder.with_suffix(".txt")
    with output.open("w") as log:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, env=environment
        )
        try:
            if disturb is not None:
                while not (folder / "checkpoint_step_000003.pth").exists():
                    assert process.poll() is None, output.read_text()
                    time.sleep(0.02)
                children = psutil.Process(process.pid).children(recursive=True)
                disturb(
                    [child for child in children if "finetune_main.py" in " ".join(child.cmdline())]
                )
            return process.wait(timeout=1200), output.read_text()
        finally:
            if process.poll() is None:
                for child in psutil.Process(process.pid).children(recursive=True):
                    child.kill()
                process.kill()


@pytest.mark.slow
def test_killed_process_is_restarted_and_the_end_is_the_same(coco: Path, tmp_path: Path) -> None:
    """Weights, moments, random states, log and metrics equal those of a run whose processes were left alone."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert train_in_two_processes(coco, whole)[0] == 0
    status, text = train_in_two_processes(
        coco, killed, max_restarts=3, disturb=lambda ranks: ranks[-1].send_signal(signal.SIGKILL)
    )
    assert status == 0, text
    assert "continuing at epoch 1 of 2, batch" in text
    for name in ("checkpoint.pth", "checkpoint_best.pth"):
        ours, expected = read_checkpoint(killed / name), read_checkpoint(whole / name)
        assert set(ours) == set(expected)
        for entry in set(ours) - {"args", "seconds"}:
            assert_same(ours[entry], expected[entry], f"{name}/{entry}")
    assert [row["epoch"] for row in read_log(killed)] == [0, 1]
    assert_same_logs(killed, whole)
    for name in ("results.json", "metrics.json", "per_class.json"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.slow
def test_stopped_process_ends_the_run_in_one_line(coco: Path, tmp_path: Path) -> None:
    """SIGSTOP leaves the connections open: only the time limit ends the wait."""
    status, text = train_in_two_processes(
        coco,
        tmp_path / "run",
        "--dist_timeout_minutes",
        "0.5",
        disturb=lambda ranks: ranks[-1].send_signal(signal.SIGSTOP),
    )
    assert status == 1, text
    found = [line for line in text.splitlines() if line.startswith("error: rank ")]
    assert len(found) == 1, text
    assert "error: rank 0 waited " in found[0]
    assert "rank 1 did not come: epoch 1, after " in found[0]
    assert "--dist_timeout_minutes" in found[0]
    assert "Traceback" not in text.split("error: rank 0")[0]
