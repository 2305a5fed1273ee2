"""What a run's folder already has when training starts in it: the data of its checkpoints, the best one, and log lines.

Nothing of an earlier start is lost without a word: a better checkpoint stays, and what can't stay is kept under another
name.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from util.checkpoints.checkpoint import BEST, Checkpoint, read_entries
from util.files import disk_errors, write_text
from util.logger import log
from util.runs.folder import SETTINGS, read_json_object
from util.runs.log import LOG, UNDEFINED, log_entries, write_log

NO_AP = UNDEFINED


# ---------------------------------------------------------------------------------------------------------------- data


def changed_data(checkpoint: Checkpoint, now: Any) -> list[str]:
    """Return which data differ from those that a checkpoint was trained on, and log their fingerprints.

    Args:
        now: fingerprint of the data, or one each for "train" and "val".

    Returns:
        Some of "train" and "val"; [] if nothing changed, or if nothing is known about the checkpoint's data.
    """
    # Checkpoints of earlier versions have no fingerprint. The settings next to them do.
    settings_file = Path(checkpoint.source).parent / SETTINGS
    before = checkpoint.data_fingerprint or read_json_object(settings_file).get("data")
    if not before or not now:
        return []
    was, current = _by_split(before), _by_split(now)
    changed = [name for name in current if name in was and was[name] != current[name]]
    if changed:
        kind = {"train": "training data", "val": "validation data"}
        log.warning(
            "the %s changed since the checkpoint was saved (%s then, %s now): %s",
            " and the ".join(kind[name] for name in changed),
            ", ".join(str(was[name]) for name in changed),
            ", ".join(str(current[name]) for name in changed),
            "the best AP is reset" if "val" in changed else "the best AP is kept",
        )
    return changed


def _by_split(fingerprints: Any) -> dict[str, Any]:
    return dict(fingerprints) if isinstance(fingerprints, Mapping) else {"train": fingerprints}


# ---------------------------------------------------------------------------------------------------------------- best


def find_best_ap(folder: Path, stored: float, data: Any, val_changed: bool) -> float:
    """Return the AP that an epoch must exceed to become the best checkpoint of a folder.

    It is the AP of the folder's best checkpoint, also if training goes back to an earlier epoch. One of other
    validation data is kept under another name. Without one, as in the new folder of a branch, the best AP is reset.

    Args:
        stored: best AP in the checkpoint that is resumed, -1 without one.
        data: fingerprints of this start's data.
        val_changed: the validation data are not those of that checkpoint.
    """
    path = folder / BEST
    best = read_entries(path)
    if best is None:
        if stored > NO_AP and not val_changed:
            log.info(
                "no %s in %s: the best AP is reset (%.3f in the resumed checkpoint)",
                BEST,
                folder,
                stored,
            )
        return NO_AP

    known, now = _by_split(best.get("data_fingerprint")).get("val"), _by_split(data).get("val")
    is_other_data = known != now if (known and now) else val_changed
    if is_other_data:
        with disk_errors("rename", path):
            kept = path.rename(_unused_path(path))
        log.warning("%s is of other validation data: it is kept as %s", path, kept.name)
        return NO_AP
    ap = best.get("best")
    return float(ap) if isinstance(ap, int | float) else stored


# ----------------------------------------------------------------------------------------------------------------- log


def warn_if_going_back(folder: Path, epoch: int) -> None:
    """Warn before training starts that the folder has later epochs than the checkpoint.

    epoch: the next one to train, from 0.
    """
    later = [entry["epoch"] for entry in log_entries(folder) if entry["epoch"] >= epoch]
    if not later:
        return
    best = f"; {BEST} stays until an epoch is better" if (folder / BEST).exists() else ""
    log.warning(
        "%s has finished epoch %d, and training goes back to epoch %d: the log so far is kept as %s, checkpoints of "
        "the same epochs are replaced%s; choose another --output_dir to keep all",
        folder,
        max(later) + 1,
        epoch + 1,
        _unused_path(folder / LOG).name,
        best,
    )


def keep_replaced_log(folder: Path, epoch: int) -> None:
    """Before the first checkpoint after going back: keep the log under another name, and remove its later epochs.

    epoch: the first one of which log.txt must have no line.
    """
    entries = log_entries(folder)
    if any(entry["epoch"] >= epoch for entry in entries):
        path = folder / LOG
        write_text(_unused_path(path), path.read_text(encoding="utf-8"))
        write_log(folder, [entry for entry in entries if entry["epoch"] < epoch])


def _unused_path(path: Path) -> Path:
    """Return `log_old_1.txt` for `log.txt`, or the first number that is not used yet."""
    number = 1
    while True:
        candidate = path.with_name(f"{path.stem}_old_{number}{path.suffix}")
        if not candidate.exists():
            return candidate
        number += 1
