"""The folder of a study: what study.json says, the rates that were chosen, and who may work on it."""

import contextlib
import json
import platform
import sys
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from tools.study.plan import Options, Step
from tools.study.prepare import shown_command
from util.errors import UserError
from util.files import write_text
from util.logger import log
from util.runs.folder import environment, read_record
from util.runs.log import read_log
from util.runs.page import evaluations

STUDY = "study.json"


def read_study(folder: Path) -> dict[str, Any]:
    return read_record(folder / STUDY)


def check_study(study: dict[str, Any], args: Namespace, manifest: dict[str, Any]) -> None:
    """
    Raises:
        UserError: the folder holds another study, or something else.
    """
    if not study:
        if args.output_dir.is_dir() and any(path.name != ".lock" for path in args.output_dir.iterdir()):
            raise UserError(
                f"--output_dir {args.output_dir} holds something that is not of a study: choose another folder"
            )
        return
    if study["data"]["sha256"] != manifest["sha256"]:
        raise UserError(
            f"--output_dir {args.output_dir} was made with other data than --data {args.data}: choose another folder"
        )
    if study["preset"] != args.preset:
        raise UserError(
            f"--output_dir {args.output_dir} was made with --preset {study['preset']}, now it is {args.preset}: "
            "choose another folder"
        )


def begin_study(
    args: Namespace, options: Options, study: dict[str, Any], manifest: dict[str, Any], steps: list[Step]
) -> None:
    planned = {**study.get("steps", {}), **{step.name: step.facts() for step in steps}}
    start = {
        **environment(),
        "command": shown_command(sys.argv),
        "jobs": args.jobs,
        "machine": processor(),
        "cores": args.cores,
    }
    facts = {name: getattr(options.preset, name) for name in ("title", "batch", "images", "pretrain", "backbone_rate")}
    facts["model"] = options.model
    record = {
        **study,
        "preset": args.preset,
        "preset_settings": facts,
        "data": manifest,
        "data_folder": str(args.data.resolve()),
        "steps": planned,
        "starts": [*study.get("starts", []), start],
    }
    write_text(args.output_dir / STUDY, json.dumps(record, indent=1) + "\n")


def processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.machine()


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[BinaryIO]:
    """One process works on a study. The runs inherit the lock: while one of a killed tool is left, nobody starts a
    second one beside it.

    Raises:
        UserError: somebody holds it.
    """
    with (folder / ".lock").open("ab") as file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:  # Windows
            pass
        except OSError as error:
            raise UserError(
                f"--output_dir {folder}: another process works on this study; wait for it or end it"
            ) from error
        yield file


# ----------------------------------------------------------------------------------------------------------------
# chosen rates


def chosen_rates(study: dict[str, Any]) -> dict[str, float]:
    """detector -> rate, of those that were tried."""
    return {detector: choice["lr"] for detector, choice in study.get("choices", {}).items()}


def warn_of_choices(options: Options, study: dict[str, Any]) -> None:
    """A rate was chosen with the rows of that call, and holds for all."""
    for detector, choice in study.get("choices", {}).items():
        others = [variant.name for variant in options.variants if variant.name not in choice["val_AP"]]
        if detector in options.detectors and others:
            log.warning("the rate of %s was chosen without %s", detector, ", ".join(others))


def best_rates(folder: Path, steps: list[Step]) -> dict[str, dict[str, Any]]:
    """For each detector the rate with the best mean AP on val over all rows, and the table that it is from."""
    tables: dict[str, dict[str, dict[str, float]]] = {}
    for step in steps:
        if step.kind == "choose":
            ap = evaluations(read_log(folder / step.name))[-1][1][0]
            tables.setdefault(step.detector, {}).setdefault(step.variant, {})[f"{step.rate:g}"] = round(100 * ap, 2)
    choices = {}
    for detector, table in tables.items():
        best = max(next(iter(table.values())), key=lambda rate: sum(row[rate] for row in table.values()))
        choices[detector] = {"lr": float(best), "val_AP": table}
        log.info("--choose lr: %s has the best mean AP on val for %s: %s", best, detector, json.dumps(table))
    return choices


def keep_choices(folder: Path, choices: dict[str, dict[str, Any]]) -> None:
    """Every row then learns at them, in later calls too."""
    study = read_study(folder)
    write_text(
        folder / STUDY, json.dumps({**study, "choices": {**study.get("choices", {}), **choices}}, indent=1) + "\n"
    )
