"""A disk that is full, read-only, or a network file system that fails: one line, and nothing of before is lost."""

import builtins
import errno
import io
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import toy_run
from tests.faults import Operations
from tests.tiny import FROZEN, captured_log, fine_tune, read_log, write_coco
from util.checkpoints.checkpoint import load_checkpoint, save_checkpoint
from util.checkpoints.newest import find_newest
from util.errors import DiskError, UserError
from util.files import append_text
from util.runs.log import step_entries
from util.runs.resuming import find_best_ap
from util.runs.session import run_script

FULL, READ_ONLY, STALE, BROKEN = errno.ENOSPC, errno.EROFS, errno.ESTALE, errno.EIO


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    toy_run.start(folder)
    return folder


def failing(root: Path, number: int, where: str, when: Callable[[], bool]) -> Operations:
    """Return operations that fail with an error number if "NAME FILE" matches `where`, and `when` is true."""

    def before(name: str, path: str) -> None:
        if re.fullmatch(where, f"{name} {os.path.basename(path)}") and when():
            raise OSError(number, os.strerror(number), path)

    return Operations(root, before)


def assert_one_line(text: str, number: int, name: str) -> None:
    assert "\n" not in text
    assert os.strerror(number) in text
    assert name in text


@pytest.mark.parametrize(
    ("where", "number", "name"),
    [
        (r"write \.checkpoint_step_000003\.pth\.tmp", FULL, "write checkpoint_step_000003.pth"),
        (r"replace checkpoint_step_000003\.pth", STALE, "write checkpoint_step_000003.pth"),
        (r"unlink checkpoint_step_000001\.pth", READ_ONLY, "remove checkpoint_step_000001.pth"),
        (r"write log_steps\.txt", FULL, "write log_steps.txt"),
        (r"open log_steps\.txt", STALE, "write log_steps.txt"),
        (r"fsync \.result\.html\.tmp", BROKEN, "write result.html"),
    ],
)
def test_training_continues_without_other_files(
    where: str, number: int, name: str, whole: Path, tmp_path: Path
) -> None:
    """Weights, moments, metrics and everything else of checkpoint.pth and log.txt are those of the undisturbed run."""
    is_training = (tmp_path / "log_steps.txt").exists
    with captured_log() as lines, failing(tmp_path, number, where, is_training).observed():
        toy_run.start(tmp_path)
    found = [line for line in lines if line.startswith("training continues, but cannot ")]
    assert found
    action, file = name.split()
    assert_one_line(found[0], number, f"cannot {action} {tmp_path / file}: ")
    for same in ("checkpoint.pth", "checkpoint_best.pth", "checkpoint0001.pth", "log.txt"):
        toy_run.assert_same_content(tmp_path / same, whole / same)
    # Each line that is there is complete.
    assert len(step_entries(tmp_path)) == len((tmp_path / "log_steps.txt").read_text().splitlines())


@pytest.mark.parametrize(
    ("where", "number", "name"),
    [
        (r"write \.checkpoint\.pth\.tmp", FULL, "checkpoint.pth"),
        (r"fsync \.checkpoint\.pth\.tmp", BROKEN, "checkpoint.pth"),
        (r"replace checkpoint\.pth", STALE, "checkpoint.pth"),
        (r"open \.checkpoint0001\.pth\.tmp", READ_ONLY, "checkpoint0001.pth"),
        (r"(link|write) \.checkpoint_best\.pth\.tmp", FULL, "checkpoint_best.pth"),
        (r"replace log\.txt", STALE, "log.txt"),
        (r"write \.results\.json\.tmp", FULL, "results.json"),
    ],
)
def test_run_ends_in_one_line_and_continues_later(
    where: str, number: int, name: str, whole: Path, tmp_path: Path
) -> None:
    """The error comes after the first epoch. All files are as before it, and the disk works again afterwards."""
    toy_run.start(tmp_path, "--epochs", "1")
    before: dict[Path, bytes] = {}

    def is_failing() -> bool:
        before.update({path: path.read_bytes() for path in tmp_path.glob("checkpoint*")})
        return True

    with (
        failing(tmp_path, number, where, is_failing).observed(),
        pytest.raises(UserError) as caught,
    ):
        toy_run.start(tmp_path)
    assert_one_line(str(caught.value), number, f"cannot write {tmp_path / name}: ")
    assert {tmp_path / "checkpoint.pth", tmp_path / "checkpoint_best.pth"} <= set(before)
    for path, content in before.items():
        assert path.read_bytes() == content, path.name
        load_checkpoint(path)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]

    toy_run.start(tmp_path)
    for same in ("checkpoint.pth", "checkpoint_best.pth", "checkpoint0001.pth", "log.txt"):
        toy_run.assert_same_content(tmp_path / same, whole / same)


def test_evaluation_files_on_a_full_disk(tmp_path: Path) -> None:
    """Training continues without files of the evaluation and pictures; log.txt has the metrics."""
    coco, run = write_coco(tmp_path / "coco"), tmp_path / "run"
    flags = ("--coco_path", coco, "--output_dir", run, *FROZEN, "--dec_layers", 1)
    is_trained = (run / "checkpoint.pth").exists
    names = r"write \.(results\.json|result\.html)\.tmp"
    with captured_log() as lines, failing(run, FULL, names, is_trained).observed():
        fine_tune(*flags, "--epochs", 1)
    found = [line for line in lines if line.startswith("training continues, but cannot write ")]
    (line,) = found
    assert_one_line(line, FULL, f"cannot write {run}/results.json: disk full")
    assert any(line.startswith(f"no result.html: cannot write {run}/result.html") for line in lines)
    assert len(read_log(run)[0]["test_coco_eval_bbox"]) == 12

    where = r"write \.results\.json\.tmp"
    checkpoint = run / "checkpoint.pth"
    with (
        failing(run, FULL, where, lambda: True).observed(),
        pytest.raises(UserError, match="disk full"),
    ):
        fine_tune(*flags, "--eval", "--resume", checkpoint)  # nothing else to wait for


# ------------------------------------------------------------------------------------------------------------ reading


def write_checkpoints(folder: Path, *steps: int, **settings: str) -> None:
    for step in steps:
        entries = {
            "model": {"weight": toy_run.Toy().backbone.detach()},
            "args": settings,
            "step": step,
        }
        save_checkpoint(entries, folder / f"checkpoint_step_{step:06d}.pth")


def refuse_to_open(monkeypatch: pytest.MonkeyPatch, name: str, number: int) -> None:
    opened = builtins.open

    def open_failing(path, *args, **settings):
        if str(path).endswith(name):
            raise OSError(number, os.strerror(number), str(path))
        return opened(path, *args, **settings)

    monkeypatch.setattr(builtins, "open", open_failing)
    monkeypatch.setattr(io, "open", open_failing)


@pytest.mark.parametrize("number", [STALE, BROKEN, errno.EACCES])
def test_resume_auto_does_not_skip_what_can_not_be_read_now(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training from the older file would remove the newer one, which may be intact."""
    write_checkpoints(tmp_path, 1, 2)
    with monkeypatch.context() as patch:
        refuse_to_open(patch, "checkpoint_step_000002.pth", number)
        with pytest.raises(DiskError) as caught:
            find_newest(tmp_path)
    assert_one_line(
        str(caught.value), number, f"cannot read {tmp_path / 'checkpoint_step_000002.pth'}"
    )
    assert find_newest(tmp_path) == tmp_path / "checkpoint_step_000002.pth"


def test_folder_that_can_not_be_listed_is_not_empty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_checkpoints(tmp_path, 1)

    def refuse(path="."):
        raise OSError(STALE, os.strerror(STALE), str(path))

    monkeypatch.setattr(os, "listdir", refuse)
    with pytest.raises(DiskError, match="cannot list .*check the disk or the network file system"):
        find_newest(tmp_path)


def test_best_checkpoint_that_can_not_be_read_is_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_checkpoint({"best": 0.5}, tmp_path / "checkpoint_best.pth")
    assert find_best_ap(tmp_path, 0.1, None, val_changed=False) == 0.5
    refuse_to_open(monkeypatch, "checkpoint_best.pth", STALE)
    with pytest.raises(DiskError, match="cannot read"):
        find_best_ap(tmp_path, 0.1, None, val_changed=False)


def test_resume_auto_skips_checkpoints_of_another_run(tmp_path: Path) -> None:
    write_checkpoints(tmp_path, 1, detector="detr")
    write_checkpoints(tmp_path, 2, detector="deformable_detr")
    (tmp_path / "checkpoint_step_000003.pth").write_bytes(b"")
    with captured_log() as lines:
        found = find_newest(tmp_path, {"detector": "detr", "epochs": 3})
    assert found == tmp_path / "checkpoint_step_000001.pth"
    (line,) = lines
    assert (
        "takes checkpoint_step_000001.pth and skipped checkpoint_step_000003.pth (is empty;" in line
    )
    assert (
        "000002.pth (is of another run: --detector deformable_detr, and detr in args.json)" in line
    )
    assert find_newest(tmp_path) == tmp_path / "checkpoint_step_000002.pth"  # without an args.json


def test_failed_append_leaves_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "log"
    append_text(path, "one\n")
    with (
        failing(tmp_path, FULL, "write log", lambda: True).observed(),
        pytest.raises(UserError, match="disk full"),
    ):
        append_text(path, "two and half of it\n")
    append_text(path, "three\n")
    assert path.read_text() == "one\nthree\n"


def test_errors_of_the_disk_are_one_line_anywhere(capsys: pytest.CaptureFixture) -> None:
    def main(error: OSError) -> None:
        raise error

    with captured_log() as lines, pytest.raises(SystemExit) as left:
        run_script(main, lambda _: OSError(STALE, os.strerror(STALE), "/data/image.jpg"), [])
    assert left.value.code == 1
    assert_one_line(lines[-1], STALE, "error: cannot use /data/image.jpg: ")
    with pytest.raises(FileNotFoundError):  # an error of this code keeps its traceback
        run_script(main, lambda _: FileNotFoundError(errno.ENOENT, "No such file", "x"), [])
