"""A run's folder when training starts in it again: the best checkpoint and the log of an earlier start are not lost."""

import json
from pathlib import Path

import pytest
import torch

from tests.tiny import captured_log, read_log
from util.checkpoints.checkpoint import BEST, Checkpoint, save_checkpoint
from util.runs.folder import SETTINGS
from util.runs.log import write_log
from util.runs.resuming import changed_data, find_best_ap, keep_replaced_log, warn_if_going_back

DATA = {"train": "12 images, a", "val": "5 images, b"}
OTHER_VAL = {**DATA, "val": "5 images, c"}


def save_best(folder: Path, ap: float, data: dict[str, str] | None = None) -> Path:
    weights = {"weight": torch.zeros(1)}
    checkpoint = Checkpoint(model=weights, best=ap, data_fingerprint=data)
    save_checkpoint(checkpoint, folder / BEST)
    return folder / BEST


# ---------------------------------------------------------------------------------------------------------------- best


@pytest.mark.parametrize("stored", [-1.0, 0.1, 0.4])
def test_best_checkpoint_of_the_folder_decides(stored: float, tmp_path: Path) -> None:
    """Going back must not replace it by a worse one, and a link that was not made in time is made up for."""
    save_best(tmp_path, 0.3, DATA)
    assert find_best_ap(tmp_path, stored, DATA, False) == 0.3
    changed_train = {**DATA, "train": "9 images, d"}
    assert find_best_ap(tmp_path, stored, changed_train, False) == 0.3


def test_best_is_reset_in_a_new_folder(tmp_path: Path) -> None:
    with captured_log() as lines:
        assert find_best_ap(tmp_path, 0.3, DATA, False) == -1
    assert "the best AP is reset (0.300 in the resumed checkpoint)" in lines[0]
    with captured_log() as lines:
        assert find_best_ap(tmp_path, -1, DATA, False) == -1
    assert not lines


@pytest.mark.parametrize("fingerprint", [DATA, None])
def test_best_checkpoint_of_other_validation_data_is_kept_under_another_name(
    fingerprint: dict[str, str] | None, tmp_path: Path
) -> None:
    """Also one of an earlier version, without a fingerprint of its own."""
    for number in (1, 2):
        content = save_best(tmp_path, 0.3, fingerprint).read_bytes()
        with captured_log() as lines:
            assert find_best_ap(tmp_path, 0.3, OTHER_VAL, True) == -1
        kept = tmp_path / f"checkpoint_best_old_{number}.pth"
        assert f"is of other validation data: it is kept as {kept.name}" in lines[0]
        assert kept.read_bytes() == content
        assert not (tmp_path / BEST).exists()


def test_damaged_best_checkpoint_can_be_replaced(tmp_path: Path) -> None:
    (tmp_path / BEST).write_bytes(b"half")
    assert find_best_ap(tmp_path, 0.3, DATA, False) == -1


# ---------------------------------------------------------------------------------------------------------------- data


def test_changed_data_are_reported_with_both_fingerprints(tmp_path: Path) -> None:
    checkpoint = Checkpoint(model={}, data_fingerprint=DATA, source=str(tmp_path / "latest.pth"))
    with captured_log() as lines:
        assert changed_data(checkpoint, DATA) == []
    assert not lines
    with captured_log() as lines:
        assert changed_data(checkpoint, OTHER_VAL) == ["val"]
    assert lines == [
        "the validation data changed since the checkpoint was saved (5 images, b then, 5 images, c now): "
        "the best AP is reset"
    ]
    pretext = Checkpoint(model={}, data_fingerprint="4 images, e")
    assert changed_data(pretext, "4 images, f") == ["train"]


def test_data_of_older_checkpoints_are_in_the_settings_next_to_them(tmp_path: Path) -> None:
    checkpoint = Checkpoint(model={}, source=str(tmp_path / "checkpoint.pth"))
    assert changed_data(checkpoint, DATA) == []  # nothing is known
    (tmp_path / SETTINGS).write_text(json.dumps({"data": DATA}))
    assert changed_data(checkpoint, OTHER_VAL) == ["val"]


def test_checkpoint_stores_the_fingerprint() -> None:
    stored = Checkpoint(model={}, data_fingerprint=DATA).to_dict()
    assert Checkpoint.from_dict(stored).data_fingerprint == DATA
    assert Checkpoint.from_dict({"model": {}}).data_fingerprint is None


# ----------------------------------------------------------------------------------------------------------------- log


def test_going_back_keeps_the_replaced_log(tmp_path: Path) -> None:
    lines_before = [{"epoch": epoch, "train_loss": 5.0 - epoch} for epoch in range(5)]
    write_log(tmp_path, lines_before)
    with captured_log() as lines:
        warn_if_going_back(tmp_path, 5)  # the usual resume
        keep_replaced_log(tmp_path, 5)
    assert not lines
    assert [path.name for path in tmp_path.iterdir()] == ["log.txt"]

    with captured_log() as lines:
        warn_if_going_back(tmp_path, 2)
    assert "has finished epoch 5, and training goes back to epoch 3" in lines[0]
    assert "kept as log_old_1.txt" in lines[0]
    assert read_log(tmp_path) == lines_before  # until there is a checkpoint of the new epochs
    keep_replaced_log(tmp_path, 2)
    kept = [json.loads(line) for line in (tmp_path / "log_old_1.txt").read_text().splitlines()]
    assert kept == lines_before
    assert read_log(tmp_path) == lines_before[:2]
