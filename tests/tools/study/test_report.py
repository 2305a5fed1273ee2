"""The report of a transfer study, on made-up results: statistics by hand, tables, findings, the user's own text."""

import re
from pathlib import Path

import pandas as pd
import pytest

from tests.study_cases import fake_study, study
from tools.study.results import paired_difference, read_evaluations, read_steps, read_study
from util.errors import UserError


def series(values: dict[int, float]) -> pd.Series:
    return pd.Series(values, dtype=float)


# ---------------------------------------------------------------------------------------------------------- statistics


def test_paired_difference_by_hand() -> None:
    """Differences 1, 2, 3: standard deviation 1, t with two degrees of freedom 4.302653; seed 9 has no partner."""
    found = paired_difference(
        series({1: 11, 2: 22, 3: 33, 9: 0}), series({1: 10, 2: 20, 3: 30, 8: 5})
    )
    assert (found.mean, found.count) == (2.0, 3)
    assert found.half_width == pytest.approx(4.302653 / 3**0.5, rel=1e-6)
    assert (str(found), found.verdict) == ("+2.0 ± 2.5", "no difference shown")
    higher = paired_difference(series({1: 5, 2: 6.1}), series({1: 1, 2: 2}))
    assert (str(higher), higher.verdict) == ("+4.0 ± 0.6", "higher")
    lower = paired_difference(series({1: 1, 2: 2}), series({1: 5, 2: 6.1}))
    assert (str(lower), lower.verdict) == ("-4.0 ± 0.6", "lower")
    one = paired_difference(series({1: 1}), series({1: 1.04}))
    assert (str(one), one.verdict) == ("+0.0", "one seed only")
    none = paired_difference(series({1: 1}), series({2: 1}))
    assert (str(none), none.verdict) == ("-", "not measured")


def test_fine_tunings_of_one_pre_training_are_averaged_first() -> None:
    """Differences 1, 3 from one pre-training and 5, 7 from another: means 2 and 6, standard deviation 8 ** 0.5, t with
    one degree of freedom 12.7062.
    """
    values, baseline = series({1: 1, 2: 5, 3: 3, 4: 7}), series(dict.fromkeys(range(1, 5), 0))
    found = paired_difference(values, baseline, series({1: 1, 2: 2, 3: 1, 4: 2}))
    assert (found.mean, found.count, found.unit) == (4.0, 2, "pre-trainings")
    assert found.half_width == pytest.approx(12.7062047 * 2, rel=1e-6)
    assert found.verdict == "no difference shown"
    for pretrain_seeds in ({}, dict.fromkeys(range(1, 5), 1), {seed: seed for seed in range(1, 5)}):
        assert paired_difference(values, baseline, series(pretrain_seeds)) == paired_difference(
            values, baseline
        )


# -------------------------------------------------------------------------------------------------------------- report


def report(folder: Path) -> str:
    study("report", folder)
    return (folder / "transfer.md").read_text()


def test_findings_come_before_tables(tmp_path: Path) -> None:
    """Differences in percent: siamese 2 and 4, region_prior -4 and -4.1, random_query_patch 1 and -1."""
    rows = {
        "none": (0.1, 0.2),
        "siamese": (0.12, 0.24),
        "region_prior": (0.06, 0.159),
        "random_query_patch": (0.11, 0.19),
    }
    aps = {
        (row, seed): ap for row, values in rows.items() for seed, ap in enumerate(values, start=1)
    }
    page = report(
        fake_study(tmp_path / "out", {**aps, ("siamese-random", 1): None, ("mine", 1): 0.3})
    )
    title = "conditional_detr, 10 % of the labels"
    finding = next(line for line in page.splitlines() if line.startswith(f"- {title}"))
    assert finding == (
        f"- {title}: lower: `region_prior` (-4.0 ± 0.6, 2 seeds); "
        "no difference shown: `siamese` (+3.0 ± 12.7, 2 seeds), `random_query_patch` (+0.0 ± 12.7, 2 seeds); "
        "not measured: `siamese-random` (-); one seed only: `mine` (+20.0)"
    )
    assert page.index(finding) < page.index(f"## {title}")
    assert "**Not finished: 1 of 10 runs are left.**" in page
    table = [
        re.split(r" *\| *", line)[1:-1]
        for line in page.splitlines()
        if line.startswith("| siamese ")
    ]
    assert table == [
        [
            "siamese",
            "18.0 ± 8.5",
            "36.0 ± 17.0",
            "+3.0 ± 12.7",
            "+6.0 ± 25.4",
            "1 (1): 12.0, 2 (1): 24.0",
        ]
    ]
    assert re.search(
        r"\| none +\| 15\.0 ± 7\.1 \| 30\.0 ± 14\.1 \| +\| +\| 1: 10\.0, 2: 20\.0", page
    )
    assert "1 (1): -" in page, "a run that has not finished"


def test_an_ablation_is_compared_with_its_pretext(tmp_path: Path) -> None:
    """The row with ground-truth boxes is also compared with proposals on the same images."""
    rows = {
        "none": 0.1,
        "region_prior": 0.12,
        "region_prior-labelled_images": 0.13,
        "region_prior-true_boxes": 0.15,
    }
    aps = {(row, seed): ap for row, ap in rows.items() for seed in (1, 2)}
    page = report(fake_study(tmp_path / "out", aps))
    cells = [
        re.split(r" *\| *", line)[1:-1]
        for line in page.splitlines()
        if line.startswith("| region_prior-true")
    ]
    assert [
        (against, *found) for _, _, against, *found in (row for row in cells if len(row) == 5)
    ] == [
        ("region_prior", "+3.0 ± 0.0", "higher"),
        ("region_prior-labelled_images", "+2.0 ± 0.0", "higher"),
    ]


def test_the_report_names_pre_trainings_and_code_versions(tmp_path: Path) -> None:
    aps = {(row, seed): 0.1 for row in ("none", "siamese") for seed in (1, 2, 12)}
    assert "1 (1): 10.0, 2 (1): 10.0, 12 (2): 10.0" in report(fake_study(tmp_path / "one", aps))
    assert "versions of the code" not in report(tmp_path / "one")
    page = report(fake_study(tmp_path / "two", aps, codes=("aaa", "bbb")))
    assert "made with 2 versions of the code: aaa, bbb" in page


def test_the_users_text_survives_a_new_report(tmp_path: Path) -> None:
    folder = fake_study(tmp_path / "out", {("none", 1): 0.1})
    report(folder)
    (folder / "transfer.notes.md").write_text("## Mine\n\n- It is so.\n")
    page = report(folder)
    assert "\n\n## Mine\n\n- It is so.\n\n## conditional_detr" in page
    assert page == report(folder)
    other = tmp_path / "mine.md"
    other.write_text("# Transfer study\n\nmine")
    with pytest.raises(UserError, match="exists and is not a report of this tool"):
        study("report", folder, output=other)
    assert other.read_text() == "# Transfer study\n\nmine"
    with pytest.raises(UserError, match="has no study"):
        study("report", tmp_path)


def test_every_evaluation_is_in_the_csv_file(tmp_path: Path) -> None:
    folder = fake_study(
        tmp_path / "out", {("none", 2): 0.1, ("none", 1): 0.3, ("siamese", 1): None}
    )
    report(folder)
    lines = (folder / "transfer.csv").read_text().splitlines()
    assert lines[0].startswith("detector,row,fraction,seed,pretrain_seed,epoch,AP,AP50,")
    assert lines[1:] == [
        f"conditional_detr,none,0.1,{seed},,{epoch},{ap},{2 * ap}{',0' * 10},,,,"
        for seed, final in ((1, 0.3), (2, 0.1))
        for epoch, ap in ((1, final / 2), (2, final))
    ]
    found = read_evaluations(folder, read_steps(folder, read_study(folder)))
    assert found["AP"].tolist() == [0.15, 0.3, 0.05, 0.1]


def test_curves_are_next_to_the_report(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    folder = fake_study(tmp_path / "out", {("none", 1): 0.1, ("none", 2): 0.2, ("siamese", 1): 0.2})
    study("report", folder, output=tmp_path / "page" / "x.md")
    assert (tmp_path / "page" / "x_curves" / "conditional_detr_0.1.png").read_bytes()[
        :4
    ] == b"\x89PNG"
    assert "(x_curves/conditional_detr_0.1.png)" in (tmp_path / "page" / "x.md").read_text()
