"""Comparison of runs: values come from the logs, settings are those that differ, and nothing is overwritten."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny import ROOT, captured_log
from tools import compare_runs
from util.errors import UserError


def write_run(folder: Path, entries: list[dict], **settings) -> Path:
    folder.mkdir(parents=True)
    (folder / "log.txt").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    if settings:
        record = {
            "settings": {"epochs": 3, "output_dir": str(folder), **settings},
            "images": [120, 30],
        }
        (folder / "args.json").write_text(json.dumps(record))
    return folder


def evaluated(epoch: int, ap: float, **values) -> dict:
    return {
        "epoch": epoch,
        "train_loss": 3.0 - epoch,
        "train_loss_ce": 1.0,
        "test_coco_eval_bbox": [ap, ap + 0.2] + [0.0] * 10,
        "n_parameters": 41302368,
        **values,
    }


def compare(*words: object) -> list[str]:
    with captured_log() as lines:
        compare_runs.main(compare_runs.parse([str(word) for word in words]))
    return "\n".join(lines).splitlines()


def rows(path: Path) -> dict[str, dict[str, str]]:
    with path.open(newline="") as file:
        return {row["run"]: row for row in csv.DictReader(file)}


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, Path]:
    pytest.importorskip("matplotlib")
    entries = [
        evaluated(0, 0.1, train_seconds=20),
        evaluated(1, 0.3, train_seconds=40),
        evaluated(2, 0.25, train_seconds=60),
    ]
    first = write_run(tmp_path / "first", entries, lr=1e-4, seed=1, amp="no")
    return first, write_run(
        tmp_path / "second",
        [evaluated(0, 0.2), {"epoch": 1, "train_loss": 1.0}],
        lr=1e-3,
        seed=1,
        amp="no",
    )


def test_table_has_metrics_and_differing_settings(two: tuple[Path, Path], tmp_path: Path) -> None:
    lines = compare(*two, "--output", tmp_path / "out")
    table = rows(tmp_path / "out" / "compare.csv")
    first, second = table["first"], table["second"]
    assert (first["epochs"], first["best AP"], first["best epoch"], first["last AP"]) == (
        "3 of 3",
        "0.300",
        "2",
        "0.250",
    )
    assert (first["best AP50"], first["last AP50"], first["train loss"]) == (
        "0.500",
        "0.450",
        "1.000",
    )
    assert (first["images/s"], first["time/epoch"], first["training time"], first["trainable"]) == (
        "6.0",
        "00:20",
        "01:00",
        "41.3 M",
    )
    assert (second["epochs"], second["best AP"], second["images/s"], second["training time"]) == (
        "2 of 3",
        "0.200",
        "-",
        "-",
    )
    assert (first["--lr"], second["--lr"]) == ("0.0001", "0.001")
    assert not {"--seed", "--amp", "--output_dir"} & set(first)
    text = "\n".join(lines)
    assert "| first " in text
    assert "| lr " in text
    assert (tmp_path / "out" / "compare.png").read_bytes()[:4] == b"\x89PNG"


def test_pre_training_shows_losses(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    entries = [
        {
            "epoch": 0,
            "train_loss": 9.0,
            "train_loss_ce": 2.0,
            "train_loss_ce_0": 5.0,
            "train_loss_ce_unscaled": 4.0,
            "train_loss_feature": 0.5,
        }
    ]
    run = write_run(tmp_path / "pre", entries, pretext="random_query_patch")
    compare(run, "--output", tmp_path / "x.png")
    (row,) = rows(tmp_path / "x.csv").values()
    assert {name: value for name, value in row.items() if "loss" in name} == {
        "train loss": "9.000",
        "train loss_ce": "2.000",
        "train loss_feature": "0.500",
    }
    assert not any("AP" in name for name in row)


def test_published_logs_need_no_settings(two: tuple[Path, Path], tmp_path: Path) -> None:
    """DETR publishes log.txt files with these keys and no args.json."""
    published = write_run(
        tmp_path / "published", [evaluated(i, 0.4, train_lr=1e-4, test_loss=5.0) for i in range(2)]
    )
    lines = compare(published, two[0], "--output", tmp_path / "a.png")
    assert rows(tmp_path / "a.csv")["published"]["best AP"] == "0.400"
    assert rows(tmp_path / "a.csv")["published"]["epochs"] == "2"
    assert any("settings not compared (no args.json): published" in line for line in lines)
    compare(published / "log.txt", "--output", tmp_path / "b.png")
    assert set(rows(tmp_path / "b.csv")) == {"published"}


def test_legend_shows_differing_settings(two: tuple[Path, Path], tmp_path: Path) -> None:
    runs = compare_runs.read_runs(two)
    differing = compare_runs.differing_settings(runs)
    assert compare_runs.legend_labels(runs, differing) == ["first (lr 0.0001)", "second (lr 0.001)"]
    many = {name: ["1", "2"] for name in "abc"}
    assert compare_runs.legend_labels(runs, many) == ["first", "second"]
    assert compare_runs.legend_labels(runs, {"pretrain": ["-", "x" * 30]}) == ["first", "second"]


def test_names_are_unique(tmp_path: Path) -> None:
    places = [write_run(tmp_path / name / "run", [evaluated(0, 0.1)]) for name in ("a", "b")]
    assert [run.name for run in compare_runs.read_runs(places)] == ["a/run", "b/run"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({}, "not the output folder of a run"),
        ({"args.json": '{"settings": {"lr": 1}}'}, "first epoch is not finished"),
        ({"log.txt": ""}, "empty log"),
        ({"log.txt": "no json\n{}\n"}, "line 1: not a JSON object"),
        ({"log.txt": "5\n{}\n"}, "line 1"),
        (
            {"log.txt": '{"epoch": 0}\n{"epoch": "one"}\n'},
            "line 2: epoch is 'one'; correct or remove the line",
        ),
        ({"log.txt": '{"epoch": [0]}\n'}, r"epoch is '\[0\]'"),
        ({"log.txt": '{"train_loss": "nan?"}'}, "train_loss is 'nan[?]'"),
        ({"log.txt": '{"test_coco_eval_bbox": [0.1]}'}, "test_coco_eval_bbox is"),
        ({"log.txt": '{"train_seconds": "1"}'}, "train_seconds"),
        ({"log.txt": '{"test_coco_eval_bbox": {"AP": 1}}'}, "test_coco_eval_bbox is"),
        ({"log.txt": b"\xff\xfe\x00"}, "log.txt is not a text file"),
    ],
)
def test_folders_without_a_run_are_refused(
    tmp_path: Path, content: dict[str, str | bytes], said: str
) -> None:
    folder = tmp_path / "thing"
    folder.mkdir()
    for name, text in content.items():
        (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=said) as error:
        compare(folder, "--output", tmp_path / "x.png")
    assert str(folder) in str(error.value)
    assert not (tmp_path / "x.png").exists()


@pytest.mark.parametrize(
    "record",
    [
        "{",
        "[1]",
        '{"settings": [1], "images": "many"}',
        '{"settings": 5, "images": []}',
        '{"images": [null]}',
    ],
)
def test_damaged_settings_are_ignored(record: str, tmp_path: Path) -> None:
    """The log alone is enough."""
    pytest.importorskip("matplotlib")
    run = write_run(tmp_path / "run", [evaluated(0, 0.1, train_seconds=20)])
    (run / "args.json").write_text(record)
    compare(run, "--output", tmp_path / "x.png")
    assert rows(tmp_path / "x.csv")["run"]["best AP"] == "0.100"


def test_missing_and_duplicate_folders_are_refused(two: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such log"):
        compare(tmp_path / "nowhere", "--output", tmp_path / "x.png")
    with pytest.raises(UserError, match="given twice"):
        compare(two[0], tmp_path / "second" / ".." / "first", "--output", tmp_path / "x.png")


def test_existing_files_need_overwrite(two: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "mine.csv").write_text("mine")
    with pytest.raises(UserError, match=r"mine\.csv exists.*--overwrite"):
        compare(*two, "--output", tmp_path / "mine.png")
    assert (tmp_path / "mine.csv").read_text() == "mine"
    compare(*two, "--output", tmp_path / "mine.png", "--overwrite")
    assert set(rows(tmp_path / "mine.csv")) == {"first", "second"}
    with pytest.raises(UserError, match="PNG"):
        compare(*two, "--output", tmp_path / "a.jpg")


def test_runs_as_program_from_another_folder(two: tuple[Path, Path], tmp_path: Path) -> None:
    words = [sys.executable, str(ROOT / "tools" / "compare_runs.py"), "first", "nowhere"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stdout.strip().startswith("error: nowhere")
