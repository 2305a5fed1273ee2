"""What a study has so far, read from the runs' own files."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools.study.folder import read_study
from tools.study.plan import RESULTS
from util.errors import UserError
from util.runs.folder import read_record
from util.runs.log import read_log
from util.runs.page import evaluations

AP, AP50 = 0, 1  # places in COCO's numbers
Cell = tuple[str, str, float]  # detector, row, fraction


@dataclass
class Results:
    """What a study has so far. runs: cell -> seed -> folder of a finished fine-tuning; origins: cell -> seed -> seed of
    the pre-training that it started from; planned: cell -> its seeds; recalls: facts and numbers of each evaluation
    without classes; seconds: kind -> those of its finished runs; unfinished: names."""

    folder: Path
    study: dict[str, Any]
    runs: dict[Cell, dict[int, Path]]
    origins: dict[Cell, dict[int, int]]
    planned: dict[Cell, list[int]]
    recalls: list[dict[str, Any]]
    seconds: dict[str, list[float]]
    unfinished: list[str]

    def values(self, cell: Cell, number: int) -> dict[int, float]:
        """seed -> AP or AP50 in percent, after the last epoch."""
        return {
            seed: 100 * evaluations(read_log(place))[-1][1][number]
            for seed, place in sorted(self.runs.get(cell, {}).items())
        }

    def codes(self, detector: str, fraction: float) -> list[str]:
        """Versions of the code that made the runs of a table, where they say so."""
        places = [
            place
            for cell, by_seed in self.runs.items()
            if (cell[0], cell[2]) == (detector, fraction)
            for place in by_seed.values()
        ]
        return list(
            dict.fromkeys(read_record(place.with_name(f"{place.name}.json")).get("code", "unknown") for place in places)
        )

    def cells(self) -> dict[tuple[str, float], list[str]]:
        """(detector, fraction) -> rows."""
        found: dict[tuple[str, float], list[str]] = {}
        for detector, row, fraction in self.planned:
            found.setdefault((detector, fraction), []).append(row)
        return dict(sorted(found.items(), key=lambda item: (item[0][0], -item[0][1])))


def collect(folder: Path) -> Results:
    """
    Raises:
        UserError: no study there.
    """
    study = read_study(folder)
    if not study:
        raise UserError(f"{folder} is no study: give the --output_dir of `tools/transfer_study.py run`")
    results = Results(folder, study, {}, {}, {}, [], {}, [])
    for name, facts in study["steps"].items():
        record, kind = read_record(folder / f"{name}.json"), facts["kind"]
        done = record.get("finished") and (folder / name / RESULTS[kind]).is_file()
        if done:
            results.seconds.setdefault(kind, []).append(record["seconds"])
        else:
            results.unfinished.append(name)
        if kind == "finetune":
            cell = facts["detector"], facts["variant"], facts["fraction"]
            results.planned.setdefault(cell, []).append(facts["seed"])
            if done:
                results.runs.setdefault(cell, {})[facts["seed"]] = folder / name
                results.origins.setdefault(cell, {})[facts["seed"]] = facts.get("pretrain_seed", 0)
        elif kind == "recall" and done:
            results.recalls.append({**facts, **read_record(folder / name / RESULTS[kind])})
    return results
