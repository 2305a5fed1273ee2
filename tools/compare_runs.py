"""Compare runs: settings that differ, epochs, AP or losses, throughput and curves.

    python tools/compare_runs.py RUN_DIR RUN_DIR ... [--output compare.png | DIR]

A run is the output folder of a training run, or any folder with a log.txt as DETR and its forks write it, or the
log.txt itself. The table is printed and written as CSV next to the plot. Runs without evaluation (pre-training) show
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

# So that `python tools/NAME.py` works from any directory.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from util.errors import UserError
from util.files import write_text
from util.logger import format_seconds, log
from util.markdown import markdown_table
from util.plots.curves import plot_curves
from util.runs.folder import SETTINGS, read_json_object
from util.runs.log import read_log
from util.runs.page import evaluations, loss_names
from util.runs.session import run_script

# Settings that say where a run is saved and how it was started, not what it trains.
IGNORED_SETTINGS = {
    "output_dir",
    "resume",
    "overwrite",
    "dry_run",
    "dist_url",
    "dist_timeout_minutes",
    "num_workers",
    "start_epoch",
    "script",
    "eval",
}
MAX_SETTINGS_IN_LEGEND = 2  # more would make the legend illegible
MAX_VALUE_LENGTH = 24  # characters, in the legend
Row = dict[str, str]  # column -> value as text


@dataclass
class ComparedRun:
    """A run as its files describe it.

    Attributes:
        name: shortest end of the path that tells the runs apart.
        path: as given.
        record: the content of args.json, empty if there is none.
        entries: the lines of log.txt, one per epoch, at least one.
    """

    name: str
    path: Path
    record: dict[str, Any]
    entries: list[dict[str, Any]]

    @property
    def settings(self) -> dict[str, Any]:
        settings = self.record.get("settings")
        if not isinstance(settings, dict):
            return {}
        return {name: value for name, value in settings.items() if name not in IGNORED_SETTINGS}


def parse(argv: list[str]) -> Namespace:
    parser = argparse.ArgumentParser("tools/compare_runs.py", description=__doc__.splitlines()[0])
    parser.add_argument(
        "runs",
        nargs="+",
        type=Path,
        metavar="RUN_DIR",
        help="output folders of runs, or log.txt files",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("compare.png"),
        metavar="FILE.png|DIR",
        help="where to write the plot and, with the suffix .csv, the table; in a folder they are compare.png and "
        "compare.csv (default: compare.png)",
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace an earlier comparison in --output (default: off)",
    )
    return parser.parse_args(argv)


def output_files(output: Path, overwrite: bool) -> tuple[Path, Path]:
    """Return the paths of (plot, table).

    Raises:
        UserError: one of them exists, or the suffix is another image format's.
    """
    if output.suffix not in ("", ".png") and not output.is_dir():
        raise UserError(
            f"--output {output}: the plot is a PNG; give a name that ends with .png, or a folder"
        )
    plot = output if output.suffix == ".png" else output / "compare.png"
    table = plot.with_suffix(".csv")
    for path in (plot, table):
        if path.exists() and not overwrite:
            raise UserError(
                f"--output: {path} exists; add --overwrite to replace it, or choose another name"
            )
    return plot, table


def read_runs(paths: Sequence[Path]) -> list[ComparedRun]:
    """Read settings and logs of the runs.

    Raises:
        UserError: a path is not a run, has no finished epoch, or is given twice.
    """
    runs = []
    for path, name in zip(paths, _names(paths), strict=True):
        record = read_json_object(_folder(path) / SETTINGS)
        if path.is_dir() and not (path / "log.txt").is_file():
            if record:
                raise UserError(f"{path} has no log.txt: its first epoch is not finished yet")
            raise UserError(f"{path} has no log.txt: it is not the output folder of a run")
        entries = read_log(path)
        if not entries:
            raise UserError(f"{path} has an empty log: no epoch is finished yet")
        runs.append(ComparedRun(name, path, record, entries))
    return runs


def _folder(path: Path) -> Path:
    return path if path.is_dir() else path.parent


def _names(paths: Sequence[Path]) -> list[str]:
    """Return the last part of each path, or as many parts as tell the runs apart."""
    parts = [_folder(path).resolve().parts for path in paths]
    for i, path in enumerate(paths):
        if parts[i] in parts[:i]:
            raise UserError(f"{path} is given twice: name each run once")
    count = 1
    while len({p[-count:] for p in parts}) < len(parts):
        count += 1
    return ["/".join(p[-count:]) for p in parts]


def differing_settings(runs: Sequence[ComparedRun]) -> dict[str, list[str]]:
    """Return setting -> its value in each run, "-" where a run has none.

    Runs without args.json do not count: nothing is known about their settings.
    """
    known = [run.settings for run in runs if run.settings]
    names = sorted({name for settings in known for name in settings})
    differing = [name for name in names if len({str(settings.get(name)) for settings in known}) > 1]
    return {name: [_format_value(run.settings.get(name)) for run in runs] for name in differing}


def _format_value(value: Any) -> str:
    return "-" if value in (None, "") else str(value)


def results(run: ComparedRun) -> Row:
    """Return epochs, AP or losses, throughput and times of a run; what its log does not have is skipped."""
    last = run.entries[-1]
    num_epochs, planned = last.get("epoch", len(run.entries) - 1) + 1, run.settings.get("epochs")
    row = {"epochs": f"{num_epochs} of {planned}" if planned else str(num_epochs)}

    evaluated = evaluations(run.entries)  # (epoch, COCO metrics) of each evaluation
    if evaluated:
        best_epoch, best = max(evaluated, key=lambda item: item[1][0])
        _, latest = evaluated[-1]
        row["best AP"] = f"{best[0]:.3f}"
        row["best epoch"] = str(best_epoch)
        row["last AP"] = f"{latest[0]:.3f}"
        row["best AP50"] = f"{max(metrics[1] for _, metrics in evaluated):.3f}"
        row["last AP50"] = f"{latest[1]:.3f}"

    losses = loss_names(run.entries)
    if evaluated:
        losses = losses[:1]  # the total; AP says the rest
    for name in losses:
        row[f"train {name}"] = f"{last[f'train_{name}']:.3f}"

    row |= _times(run)
    if last.get("n_parameters"):
        row["trainable"] = f"{last['n_parameters'] / 1e6:.1f} M"
    return row


def _times(run: ComparedRun) -> Row:
    """Return throughput and training times; published logs have none."""
    seconds = run.entries[-1].get("train_seconds")
    if not seconds:
        return {}
    num_epochs = len(run.entries)  # trained ones: fewer than the epoch's number with --start_epoch
    images = run.record.get("images")  # a number, or [training, validation]
    if isinstance(images, list) and images:
        images = images[0]

    row = {}
    if isinstance(images, int) and images:  # anything else: a damaged args.json
        row["images/s"] = f"{images * num_epochs / seconds:.1f}"
    row["time/epoch"] = format_seconds(seconds / num_epochs)
    row["training time"] = format_seconds(seconds)
    return row


def fill_missing_columns(rows: Sequence[Row]) -> list[Row]:
    """Return the rows with the same columns, "-" where a run has no value."""
    columns = list(dict.fromkeys(column for row in rows for column in row))  # unique, in order
    return [{column: row.get(column, "-") for column in columns} for row in rows]


def legend_labels(runs: Sequence[ComparedRun], differing: dict[str, list[str]]) -> list[str]:
    """Return the names of the runs, with the settings that differ if these are few and short."""
    values_are_short = all(
        len(value) <= MAX_VALUE_LENGTH for values in differing.values() for value in values
    )
    if len(differing) > MAX_SETTINGS_IN_LEGEND or not values_are_short:
        return [run.name for run in runs]

    labels = []
    for i, run in enumerate(runs):
        detail = ", ".join(f"{name} {values[i]}" for name, values in differing.items())
        labels.append(f"{run.name} ({detail})" if (detail and run.settings) else run.name)
    return labels


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """Write rows with equal columns as CSV."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def main(args: Namespace) -> None:
    plot, table = output_files(args.output, args.overwrite)
    runs = read_runs(args.runs)
    differing = differing_settings(runs)
    rows = fill_missing_columns([results(run) for run in runs])

    names = [run.name for run in runs]
    cells = [[name, *row.values()] for name, row in zip(names, rows, strict=True)]
    log.info("%s", markdown_table(["run", *rows[0]], cells))
    if differing:
        cells = [[setting, *values] for setting, values in differing.items()]
        log.info("\nsettings that differ:\n%s", markdown_table(["setting", *names], cells))
    unknown = [run.name for run in runs if not run.settings]
    if unknown and len(runs) > 1:
        log.info("\nsettings not compared (no %s): %s", SETTINGS, ", ".join(unknown))

    csv_rows = []
    for i, (name, row) in enumerate(zip(names, rows, strict=True)):
        settings = {f"--{setting}": values[i] for setting, values in differing.items()}
        csv_rows.append({"run": name, **row, **settings})
    write_csv(table, csv_rows)

    curves = loss_names(runs[0].entries)
    if any(evaluations(run.entries) for run in runs):
        curves = ("loss", "AP", "AP50")
    labels = legend_labels(runs, differing)
    plot_curves(dict(zip(labels, (run.path for run in runs), strict=True)), plot, curves)
    log.info("\ntable written to %s\nplot written to %s", table, plot)


if __name__ == "__main__":
    run_script(main, parse)
