"""util/runs/log.py: the step log."""

import json
from pathlib import Path

from util.runs.log import STEP_LOG, append_step, trim_step_log


def steps(folder: Path) -> list[tuple[int, int]]:
    lines = [json.loads(line) for line in (folder / STEP_LOG).read_text().splitlines()]
    return [(line["epoch"], line["step"]) for line in lines]


def test_resumed_run_repeats_no_step(tmp_path: Path) -> None:
    trim_step_log(tmp_path, 0, 0)
    assert not list(tmp_path.iterdir())
    append_step(None, {"epoch": 0, "step": 1})
    for epoch, step in [(0, 2), (0, 4), (1, 2), (1, 4)]:
        append_step(tmp_path, {"epoch": epoch, "step": step, "loss": 1.0})
    with (tmp_path / STEP_LOG).open("a") as file:
        file.write('{"epoch": 1, "st')  # the run was killed

    trim_step_log(tmp_path, 1, 2)
    assert steps(tmp_path) == [(0, 2), (0, 4), (1, 2)]
    append_step(tmp_path, {"epoch": 1, "step": 4})
    trim_step_log(tmp_path, 1, 0)  # the epoch starts over
    assert steps(tmp_path) == [(0, 2), (0, 4)]
    trim_step_log(tmp_path, 2, 0)
    assert steps(tmp_path) == [(0, 2), (0, 4)]
