"""Compares runs: the settings that differ, epochs done, results, speed and curves.

    python tools/compare_runs.py RUN_DIR RUN_DIR ... [--output compare.png | DIR]

A run is the output folder of a training run, or any folder with a log.txt as DETR and its forks write it, or such a
file itself. The table is printed, and written as CSV beside the plot. Runs without evaluation (pre-training) show
losses.
"""

import argparse
import csv
import io
import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(
    0, str(Path(__file__).resolve().parent.parent)
)  # `python tools/NAME.py` works from any directory

from util.errors import UserError
from util.files import write_text
from util.logger import format_seconds, log
from util.markdown import markdown_table
from util.plots.curves import plot_curves
from util.runs.folder import SETTINGS, read_json_object
from util.runs.log import read_log
from util.runs.page import evaluations, loss_names
from util.runs.session import run_script

# Settings that say where a run is and how it was started, not what it trains.
IGNORED_SETTINGS = {
    "output_dir",
    "resume",
    "overwrite",
    "dry_run",
    "dist_url",
    "num_workers",
    "start_epoch",
    "script",
    "eval",
}
MAX_SETTINGS_IN_LEGEND = 2  # settings; more would make the legend illegible
MAX_VALUE_LENGTH = 24  # characters
Row = dict[str, str]


@dataclass
class ComparedRun:
    """record: args.json, empty if there is none. entries: the lines of the log, at least one."""

    name: str
    path: Path
    record: dict[str, Any]
    entries: list[dict[str, Any]]

    @property
    def settings(self) -> dict[str, Any]:
        settings = self.record.get("settings")
        return (
            {name: value for name, value in settings.items() if name not in IGNORED_SETTINGS}
            if isinstance(settings, dict)
            else {}
        )


def parse(argv: list[str]) -> Namespace:
    parser = argparse.ArgumentParser("tools/compare_runs.py", description=__doc__.splitlines()[0])
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN_DIR", help="output folder of a run, or a log.txt"
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("compare.png"),
        metavar="FILE.png|DIR",
        help="the plot, with the table beside it as .csv; in a folder both are named compare (compare.png)",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace an earlier comparison there"
    )
    return parser.parse_args(argv)


def output_files(output: Path, overwrite: bool) -> tuple[Path, Path]:
    """The paths of (plot, table).

    Raises:
        UserError: one of them exists, or the suffix is that of another image format.
    """
    plot = output if output.suffix == ".png" else output / "compare.png"
    if output.suffix not in ("", ".png") and not output.is_dir():
        raise UserError(
            f"--output {output}: the plot is a PNG; give a name that ends with .png, or a folder"
        )
    table = plot.with_suffix(".csv")
    for path in (plot, table):
        if path.exists() and not overwrite:
            raise UserError(
                f"--output: {path} exists; add --overwrite to replace it, or choose another name"
            )
    return plot, table


def read_runs(paths: Sequence[Path]) -> list[ComparedRun]:
    """
    Raises:
        UserError: a path is no run, has no finished epoch, or is given twice.
    """
    folders = [path if path.is_dir() else path.parent for path in paths]
    runs = []
    for path, folder, name in zip(paths, folders, _names(paths), strict=True):
        record = read_json_object(folder / SETTINGS)
        if path.is_dir() and not (path / "log.txt").is_file():
            begun = (
                "its first epoch is not finished yet"
                if record
                else "it is not the output folder of a run"
            )
            raise UserError(f"{path} has no log.txt: {begun}")
        entries = read_log(path)
        if not entries:
            raise UserError(f"{path} has an empty log: no epoch is finished yet")
        runs.append(ComparedRun(name, path, record, entries))
    return runs


def _names(paths: Sequence[Path]) -> list[str]:
    """The last part of each path, or as many parts as tell them apart."""
    parts = [(path if path.is_dir() else path.parent).resolve().parts for path in paths]
    if len(set(parts)) < len(parts):
        twice = next(path for i, path in enumerate(paths) if parts[i] in parts[:i])
        raise UserError(f"{twice} is given twice: name each run once")
    count = next(
        n for n in range(1, max(map(len, parts)) + 1) if len({p[-n:] for p in parts}) == len(parts)
    )
    return ["/".join(p[-count:]) for p in parts]


def differing_settings(runs: Sequence[ComparedRun]) -> dict[str, list[str]]:
    """setting -> its value in each run, "-" where a run has none. Runs without args.json are not compared."""
    known = [run.settings for run in runs if run.settings]
    names = sorted({name for settings in known for name in settings})
    differing = [name for name in names if len({str(settings.get(name)) for settings in known}) > 1]
    return {name: [_format_value(run.settings.get(name)) for run in runs] for name in differing}


def _format_value(value: Any) -> str:
    return "-" if value in (None, "") else str(value)


def results(run: ComparedRun) -> Row:
    """Epochs, AP or losses, speed and time, each as text; what is not in the log is skipped."""
    last = run.entries[-1]
    done, planned = last.get("epoch", len(run.entries) - 1) + 1, run.settings.get("epochs")
    row = {"epochs": f"{done} of {planned}" if planned else str(done)}
    evaluated = evaluations(run.entries)
    if evaluated:
        best = max(evaluated, key=lambda item: item[1][0])
        best50 = max(stats[1] for _, stats in evaluated)
        row |= {
            "best AP": f"{best[1][0]:.3f}",
            "best epoch": str(best[0]),
            "last AP": f"{evaluated[-1][1][0]:.3f}",
            "best AP50": f"{best50:.3f}",
            "last AP50": f"{evaluated[-1][1][1]:.3f}",
        }
    names = loss_names(run.entries)
    row |= {
        f"train {name}": f"{last[f'train_{name}']:.3f}"
        for name in (names[:1] if evaluated else names)
    }
    seconds, images = last.get("train_seconds"), run.record.get("images")
    if seconds:
        images = images[0] if isinstance(images, list) and images else images
        images = images if isinstance(images, int) else None  # a damaged args.json
        trained = len(run.entries)  # fewer than `done` where the run began with --start_epoch
        row |= {"images/s": f"{images * trained / seconds:.1f}"} if images else {}
        row |= {
            "time/epoch": format_seconds(seconds / trained),
            "training time": format_seconds(seconds),
        }
    if last.get("n_parameters"):
        row["trainable"] = f"{last['n_parameters'] / 1e6:.1f} M"
    return row


def fill_missing_columns(rows: Sequence[Row]) -> list[Row]:
    """The rows with the same columns, "-" where a run has no value."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    return [{column: row.get(column, "-") for column in columns} for row in rows]


def legend_labels(runs: Sequence[ComparedRun], differing: dict[str, list[str]]) -> list[str]:
    """The names of the runs in the legend, with the settings that differ if these are few and short."""
    few = len(differing) <= MAX_SETTINGS_IN_LEGEND and all(
        len(value) <= MAX_VALUE_LENGTH for values in differing.values() for value in values
    )
    if not few:
        return [run.name for run in runs]
    details = [
        ", ".join(f"{name} {values[i]}" for name, values in differing.items())
        for i in range(len(runs))
    ]
    return [
        f"{run.name} ({detail})" if detail and run.settings else run.name
        for run, detail in zip(runs, details, strict=True)
    ]


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def main(args: Namespace) -> None:
    plot, table = output_files(args.output, args.overwrite)
    runs = read_runs(args.runs)
    differing, rows = differing_settings(runs), fill_missing_columns([results(run) for run in runs])
    log.info(
        "%s",
        markdown_table(
            ["run", *rows[0]],
            [[run.name, *row.values()] for run, row in zip(runs, rows, strict=True)],
        ),
    )
    if differing:
        log.info(
            "\nsettings that differ:\n%s",
            markdown_table(
                ["setting", *(run.name for run in runs)], [[k, *v] for k, v in differing.items()]
            ),
        )
    silent = [run.name for run in runs if not run.settings]
    if silent and len(runs) > 1:
        log.info(
            "\nwithout %s, so their settings are not compared: %s", SETTINGS, ", ".join(silent)
        )
    settings = [
        {f"--{name}": values[i] for name, values in differing.items()} for i in range(len(runs))
    ]
    write_csv(
        table,
        [
            {"run": run.name, **row, **extra}
            for run, row, extra in zip(runs, rows, settings, strict=True)
        ],
    )
    trained = (
        ("loss", "AP", "AP50")
        if any(evaluations(run.entries) for run in runs)
        else loss_names(runs[0].entries)
    )
    plot_curves(
        dict(zip(legend_labels(runs, differing), (run.path for run in runs), strict=True)),
        plot,
        trained,
    )
    log.info("\n%s\n%s", table, plot)


if __name__ == "__main__":
    run_script(main, parse)
