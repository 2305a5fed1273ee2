"""tools/kill_runs.py kills a run at random moments, and finds what is not as in the undisturbed run."""

import shutil
from pathlib import Path

import pytest
import torch

from tests.tiny import captured_log
from tools import kill_runs
from util.checkpoints.checkpoint import save_checkpoint


@pytest.mark.slow
def test_20_kills(tmp_path: Path) -> None:
    with captured_log() as lines:
        kill_runs.main(kill_runs.parse(["--kills", "20", "--output_dir", str(tmp_path / "out")]))
    assert lines[-1].startswith("20 kills in ")
    assert lines[-1].endswith(" runs that ended like the undisturbed one")
    assert [path.name for path in (tmp_path / "out").iterdir() if path.is_dir()] == ["coco"]


def test_differences_are_found(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    for name in (kill_runs.LOG, kill_runs.STEP_LOG, *kill_runs.RESULTS):
        (whole / name).write_text('{"epoch": 0, "train_seconds": 1.5}\n')
    content = {"model": {"weight": torch.zeros(2)}, "best": 0.5, "seconds": 1.0}
    for name in (*kill_runs.CHECKPOINTS, "checkpoint_step_000003.pth"):
        save_checkpoint(content, whole / name)

    def difference(change) -> str | None:
        shutil.copytree(whole, killed)
        change()
        found = kill_runs.find_difference(killed, whole)
        shutil.rmtree(killed)
        return found

    def save(**entries) -> None:
        save_checkpoint({**content, **entries}, killed / "checkpoint.pth")

    assert difference(lambda: save(seconds=2.0)) is None
    log = killed / "log.txt"
    assert difference(lambda: log.write_text('{"epoch": 0, "train_seconds": 2.5}\n')) is None
    assert difference(lambda: log.write_text('{"epoch": 1}\n')) == "log.txt differs"
    assert difference(lambda: save(best=0.4)) == "checkpoint.pth/best: 0.4 and 0.5"
    almost = {"weight": torch.tensor([0.0, 1e-45])}
    assert difference(lambda: save(model=almost)) == "checkpoint.pth/model/weight differs"
    assert difference(lambda: save(epoch=3)) == "checkpoint.pth: ['epoch'] in one of them"
    assert difference((killed / ".log.txt.tmp").touch) == ".log.txt.tmp is left"
