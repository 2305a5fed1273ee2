"""tools/soak.py: a long run whose memory, files, threads and workers are watched."""

import json
from pathlib import Path

import numpy as np
import pytest

from tools import soak
from util.errors import UserError


def samples(rounds: int = 3, per_round: int = 100, **slopes: float) -> list[soak.Sample]:
    """Samples of 20 steps each. Values grow by their slope per 1000 steps; each round has new workers."""
    found = []
    for step in range(0, 20 * rounds * per_round, 20):
        number, in_round = divmod(step, 20 * per_round)
        own = 1 if in_round == 0 else soak.CHILDREN
        found.append(
            soak.Sample(
                seconds=step,
                round=number,
                step=step,
                main=500 + slopes.get("main", 0) * step / 1000,
                workers=300 + 50 * number + slopes.get("workers", 0) * in_round / 1000,
                workers_own=60,
                files=40,
                threads=7,
                children=own,
            )
        )
    return found


def test_growth_is_the_slope_after_warm_up() -> None:
    found = soak.summarize(samples(main=2.5, workers=4))
    assert found["main"]["per_1000_steps"] == pytest.approx(2.5)
    assert found["workers"]["per_1000_steps"] == pytest.approx(4)  # within each round
    for name in ("workers_own", "files", "threads"):
        assert found[name]["per_1000_steps"] == pytest.approx(0)
        assert found[name]["first"] == found[name]["last"]
    assert list(found["rounds"]) == ["round 0", "round 1", "round 2"]
    assert found["rounds"]["round 2"] - found["rounds"]["round 1"] == pytest.approx(2.5 * 2)
    with pytest.raises(UserError, match="too short"):
        soak.summarize(samples(rounds=1, per_round=8))


@pytest.mark.slow
def test_files_threads_and_workers_do_not_pile_up(tmp_path: Path) -> None:
    """Three starts in one process, of 100 steps with evaluations and saves each."""
    pytest.importorskip("psutil", reason="psutil is not installed")
    pytest.importorskip("skimage", reason="scikit-image is not installed")
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    soak.main(soak.parse(["--output_dir", str(tmp_path), "--rounds", "3", "--epochs", "2"]))
    lines = (tmp_path / soak.SAMPLES).read_text().splitlines()
    found = [soak.Sample(**json.loads(line)) for line in lines]
    assert found[-1].round == 2
    assert found[-1].step > 2.5 * 2 * soak.STEPS_PER_EPOCH  # one sample per second
    assert max(sample.children for sample in found) == soak.CHILDREN

    def steady(number: int) -> list[soak.Sample]:
        return [s for s in found if s.round == number and s.children == soak.CHILDREN]

    for name in ("files", "threads"):
        # The least: a file that is being written is open for a moment, and its thread lives as long.
        first, last = (min(getattr(s, name) for s in steady(number)) for number in (1, 2))
        assert first == last, name
    memory = [sample.main for sample in steady(2)]
    half = len(memory) // 2
    assert abs(np.mean(memory[half:]) - np.mean(memory[:half])) < 20  # MB
    assert (tmp_path / soak.GRAPH).read_bytes().startswith(b"\x89PNG")
    assert set(json.loads((tmp_path / soak.SUMMARY).read_text())) >= {"main", "workers", "files"}
