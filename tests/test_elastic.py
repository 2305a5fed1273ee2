"""docs/scaling.md: torchrun restarts the processes when one dies, and `--resume auto` continues."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.tiny import FROZEN, ROOT, RUN_FLAGS, read_log, write_coco


@pytest.mark.slow
def test_killed_process_is_restarted_and_the_run_continues(tmp_path: Path) -> None:
    psutil = pytest.importorskip("psutil")
    coco = write_coco(tmp_path / "coco", train=40, val=2)
    run = tmp_path / "run"
    words = [*RUN_FLAGS, *FROZEN, "--coco_path", str(coco), "--batch_size", "1", "--epochs", "3"]
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "1:2", "--nproc_per_node", "2",
               "--max_restarts", "3", "--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0",
               str(ROOT / "finetune_main.py"), *words, "--output_dir", str(run), "--resume", "auto"]  # fmt: skip
    with (tmp_path / "log.txt").open("w") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
        try:
            while not (run / "checkpoint.pth").exists():
                assert process.poll() is None, (tmp_path / "log.txt").read_text()
                time.sleep(0.02)
            ranks = [
                child
                for child in psutil.Process(process.pid).children(recursive=True)
                if "finetune_main.py" in " ".join(child.cmdline())
            ]
            ranks[-1].send_signal(signal.SIGKILL)
            assert process.wait(timeout=400) == 0
        finally:
            process.kill()
    text = (tmp_path / "log.txt").read_text()
    assert "continuing at epoch" in text
    assert [row["epoch"] for row in read_log(run)] == [0, 1, 2]
