"""Files are written atomically: completely, or not at all."""

import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest

from tools.demo.run import _write_json
from util import files
from util.checkpoints.checkpoint import save_checkpoint
from util.errors import UserError
from util.files import read_lines, to_json, write_atomically, write_text
from util.runs.log import append_log, read_log

WRITERS = {
    "text": lambda path: write_text(path, "new"),
    "bytes": lambda path: write_atomically(path, lambda file: file.write(b"new")),
    "checkpoint": lambda path: save_checkpoint({"epoch": 2}, path),
    "demo": lambda path: _write_json(path, {"a": 1}),
}


def full(*_args, **_settings) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def fill_disk(monkeypatch: pytest.MonkeyPatch, at: str) -> None:
    if at == "write":
        opened = Path.open

        def open_full(self: Path, *args, **settings):
            file = opened(self, *args, **settings)
            return FullFile(file) if "w" in args[0] else file

        monkeypatch.setattr(Path, "open", open_full)
    else:
        monkeypatch.setattr(os, at, full)


class FullFile:
    """A file that accepts the first byte only."""

    def __init__(self, file) -> None:
        self.file = file

    def write(self, data) -> int:
        if self.file.tell():
            full()
        return self.file.write(bytes(data[:1]))

    def fileno(self) -> int:
        return self.file.fileno()

    def close(self) -> None:
        self.file.close()


@pytest.mark.parametrize("at", ["write", "fsync", "replace"])
@pytest.mark.parametrize("writer", WRITERS)
def test_a_full_disk_gives_one_line_and_keeps_the_previous_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writer: str, at: str
) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with monkeypatch.context() as patch:
        fill_disk(patch, at)
        with pytest.raises(UserError) as caught:
            WRITERS[writer](path)
    message = str(caught.value)
    assert "\n" not in message
    assert f"cannot write {path}: disk full" in message
    assert "the previous file is kept" in message
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]
    WRITERS[writer](path)
    assert path.read_bytes() != b"old"


def test_other_errors_leave_no_file(tmp_path: Path) -> None:
    def stop(file) -> None:
        file.write(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "file", stop)
    assert not list(tmp_path.iterdir())


def test_two_writers_of_one_file_at_the_same_time(tmp_path: Path) -> None:
    def write_meanwhile(file) -> None:
        write_text(tmp_path / "file", "other", shared=True)
        file.write(b"last")

    assert write_atomically(tmp_path / "file", write_meanwhile, shared=True).read_text() == "last"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_a_file_is_synced_before_it_is_renamed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    monkeypatch.setattr(
        files.os, "fsync", lambda _number: calls.append((tmp_path / "new" / "file").exists())
    )
    assert write_text(tmp_path / "new" / "file", "ü") == tmp_path / "new" / "file"
    assert calls == [False]
    assert (tmp_path / "new" / "file").read_text(encoding="utf-8") == "ü"


def test_text_with_halves_of_surrogate_pairs_is_written(tmp_path: Path) -> None:
    write_text(tmp_path / "file", "100 \ud83d, \udce9.jpg")
    assert (tmp_path / "file").read_text() == "100 \\ud83d, \\udce9.jpg"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_read_lines(encoding: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes("é\r\nb".encode(encoding))
    assert read_lines(tmp_path / "file") == ["é", "b"]


def test_a_folder_that_cannot_be_created(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "mkdir", full)
    with pytest.raises(UserError, match="disk full"):
        write_text(tmp_path / "new" / "file", "text")


def test_the_log_is_kept_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    append_log(tmp_path, {"epoch": 0})
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"log\.txt: disk full"):
        append_log(tmp_path, {"epoch": 1})
    assert [json.loads(line) for line in (tmp_path / "log.txt").read_text().splitlines()] == [
        {"epoch": 0}
    ]


def test_json_is_valid_for_strict_parsers(tmp_path: Path) -> None:
    def refuse(name: str) -> None:
        raise AssertionError(name)

    nan, infinite = float("nan"), float("inf")
    assert to_json({"a": [1.5, None, "x"]}) == json.dumps({"a": [1.5, None, "x"]})
    content = {"a": nan, "b": [infinite, 1.0, (-infinite,)], "c": {"d": np.float64("nan")}}
    read = json.loads(to_json(content, indent=1), parse_constant=refuse)
    assert read == {"a": None, "b": [None, 1.0, [None]], "c": {"d": None}}

    append_log(tmp_path, {"epoch": 0, "train_loss": nan, "test_coco_eval_bbox": [nan, 0.5]})
    json.loads((tmp_path / "log.txt").read_text(), parse_constant=refuse)
    append_log(tmp_path, {"epoch": 1, "train_loss": 2.0})  # reads the line above
    assert read_log(tmp_path) == [
        {"epoch": 0, "train_loss": None, "test_coco_eval_bbox": [-1.0, 0.5]},
        {"epoch": 1, "train_loss": 2.0},
    ]
