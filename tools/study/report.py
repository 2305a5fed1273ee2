"""The page of a study: tables over seeds, paired differences, curves, and how it was made."""

import csv
import io
from pathlib import Path

from tools.study import pictures
from tools.study.results import AP, Results, collect
from tools.study.text import END_OF_WORDS, TITLE, WORDS, all_parts, words_of_person
from util.errors import UserError
from util.files import write_text
from util.logger import log
from util.plots.curves import BBOX_STATS
from util.runs.log import read_log
from util.runs.page import evaluations

STATS = (*(name.replace(" ", "_") for name in BBOX_STATS), "AR1", "AR10", "AR100", "AR_small", "AR_medium", "AR_large")
LOSSES = ("test_loss", "test_loss_ce", "test_loss_bbox", "test_loss_giou")  # weighted: of all layers, then of the last


def write_report(folder: Path, output: Path, picture_folder: Path) -> Path:
    """Tables, curves and a CSV file of all numbers beside `output`, a page of predictions for each detector and
    fraction in `picture_folder`; returns `output`.

    What a person wrote between the marks of an earlier page in its place is kept.

    Raises:
        UserError: `folder` is no study, or `output` is there and not such a page, or one whose marks are broken.
    """
    results = collect(folder)
    words = words_before(output)
    drawn = draw_all_curves(results, output.parent / f"{output.stem}_curves")
    write_text(output, "\n\n".join(all_parts(results, drawn, output.parent, words)) + "\n")
    log.info("%s", output)
    write_text(output.with_suffix(".csv"), all_numbers(results))
    draw_all_predictions(results, picture_folder)
    return output


def words_before(output: Path) -> str:
    """What a person wrote into the page that is there."""
    if not output.exists():
        return ""
    page = output.read_text(encoding="utf-8", errors="replace")
    if not page.startswith(TITLE):
        raise UserError(f"--output {output} is there and is not the page of a study: choose another name")
    try:
        return words_of_person(page)
    except ValueError as error:
        raise UserError(
            f"--output {output}: {error}; bring back '{WORDS}' and '{END_OF_WORDS}' around your words, or choose "
            "another name"
        ) from error


def all_numbers(results: Results) -> str:
    """Every evaluation of every finished fine-tuning as a line of CSV: for one's own statistics and plots."""
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["detector", "row", "fraction", "seed", "pretrain_seed", "epoch", *STATS, *LOSSES])
    for (detector, row, fraction), places in sorted(results.runs.items()):
        for seed, place in sorted(places.items()):
            entries = [entry for entry in read_log(place) if entry.get("test_coco_eval_bbox")]
            for (epoch, stats), entry in zip(evaluations(entries), entries, strict=True):
                origin = results.origins[detector, row, fraction][seed] or ""
                writer.writerow(
                    [detector, row, fraction, seed, origin, epoch, *stats, *(entry.get(name, "") for name in LOSSES)]
                )
    return table.getvalue()


def draw_all_curves(results: Results, folder: Path) -> dict[tuple[str, float], Path]:
    """(detector, fraction) -> PNG; what can't be drawn is said."""
    drawn = {}
    for (detector, fraction), rows in results.cells().items():
        curves = {}
        for row in rows:
            runs = results.runs.get((detector, row, fraction), {})
            if runs:
                curves[row] = [
                    [(epoch, 100 * stats[AP]) for epoch, stats in evaluations(read_log(place))]
                    for place in runs.values()
                ]
        if curves:
            path = folder / f"{detector}_{fraction:g}.png"
            try:
                drawn[detector, fraction] = pictures.draw_curves(
                    curves, path, f"{detector}, {100 * fraction:g} % of the labels"
                )
            except UserError as error:
                log.warning("no curves: %s", error)
                return {}
    return drawn


def draw_all_predictions(results: Results, folder: Path) -> None:
    """One page for each detector and fraction, of the first seed that every row has. Needs the study's data where it
    was prepared.
    """
    data = Path(results.study["data_folder"])
    if not (data / "annotations" / "test.json").is_file():
        log.warning("no pages of predictions: the study's data is not in %s any more", data)
        return
    for (detector, fraction), rows in results.cells().items():
        runs = {row: results.runs[detector, row, fraction] for row in rows if (detector, row, fraction) in results.runs}
        seeds = sorted(set.intersection(*(set(by_seed) for by_seed in runs.values()))) if runs else []
        if seeds:
            path = folder / f"predictions_{detector}_{fraction:g}.png"
            log.info("%s", pictures.draw_predictions({row: runs[row][seeds[0]] for row in runs}, data, path))
