"""Learning from a part of the labelled images: which ones, and that a run says so."""

import json
from pathlib import Path

import numpy as np
import pytest

from datasets import build_dataset, build_labelled
from datasets.labelled.subsets import sample_image_ids, subset_record
from tests.tiny import (
    FROZEN,
    custom_dataset_flags,
    fine_tune,
    tiny_args,
    write_coco,
    write_custom_dataset,
    write_voc,
)
from tools import make_split
from util.errors import UserError
from util.settings import FINETUNE


@pytest.fixture(scope="module")
def coco(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_coco(tmp_path_factory.mktemp("data") / "coco", train=12)


def test_the_published_drawing() -> None:
    """numpy's default_rng(seed).choice of the sorted ids, of a rounded number, without replacement."""
    ids = np.random.RandomState(0).permutation(117266)[:5000]
    expected = sorted(
        np.random.default_rng(42)
        .choice(sorted(ids.tolist()), round(5000 * 0.01), replace=False)
        .tolist()
    )
    assert sample_image_ids(ids, 0.01, 42).tolist() == expected
    assert sample_image_ids(ids, 0.01, 43).tolist() != expected
    assert sample_image_ids(np.arange(1000), 0.01, 42).tolist() == [
        85,
        88,
        94,
        201,
        430,
        436,
        649,
        695,
        767,
        855,
    ], "numpy draws otherwise now"
    assert len(sample_image_ids(np.arange(118287), 0.01, 42)) == 1183
    assert sample_image_ids(np.arange(10), 1, 1).tolist() == list(range(10))


def test_only_training_is_reduced_and_the_fingerprint_says_it(coco: Path) -> None:
    whole, part, again, other = (
        build_dataset("train", tiny_args(FINETUNE, "--coco_path", str(coco), *flags))
        for flags in (
            (),
            ("--filter_pct", ".5"),
            ("--filter_pct", "0.5"),
            ("--filter_pct", ".5", "--seed", "7"),
        )
    )
    assert (len(whole), len(part), len(other)) == (12, 6, 6)
    assert (
        part.annotations.image_ids.tolist()
        == sample_image_ids(whole.annotations.image_ids, 0.5, 42).tolist()
    )
    assert part.fingerprint() == again.fingerprint()
    assert part.fingerprint().startswith("0.5 by seed 42 of 12 images, 6 images, ")
    assert len({whole.fingerprint(), part.fingerprint(), other.fingerprint()}) == 3
    assert (
        len(
            build_dataset(
                "val", tiny_args(FINETUNE, "--coco_path", str(coco), "--filter_pct", ".5")
            )
        )
        == 3
    )
    assert (
        len(
            build_dataset(
                "train", tiny_args(FINETUNE, "--coco_path", str(coco), "--filter_pct", "-1")
            )
        )
        == 12
    )


def test_every_kind_of_data(tmp_path: Path) -> None:
    voc, own = write_voc(tmp_path / "voc"), write_custom_dataset(tmp_path / "own")
    for flags, count in (
        (("--dataset_file", "voc", "--voc_path", str(voc)), 2),
        (custom_dataset_flags(own), 2),
    ):
        train, val = build_labelled(tiny_args(FINETUNE, *flags, "--filter_pct", "0.4"))
        assert (len(train), len(val)) == (count, 3)


def test_files_of_splits(coco: Path, tmp_path: Path) -> None:
    flags = [
        "--coco_path",
        str(coco),
        "--filter_pct",
        "0.25",
        "0.5",
        "--seeds",
        "1",
        "42",
        "--output_dir",
        str(tmp_path / "splits"),
    ]
    make_split.main(make_split.parse(flags))
    written = {path.name for path in (tmp_path / "splits").iterdir()}
    assert written == {f"{part}_seed{seed}.json" for part in (0.25, 0.5) for seed in (1, 42)}
    chosen = tmp_path / "splits" / "0.5_seed42.json"
    by_file = build_dataset(
        "train", tiny_args(FINETUNE, "--coco_path", str(coco), "--split_file", str(chosen))
    )
    by_seed = build_dataset(
        "train", tiny_args(FINETUNE, "--coco_path", str(coco), "--filter_pct", "0.5")
    )
    assert (
        by_file.annotations.image_ids.tolist()
        == by_seed.annotations.image_ids.tolist()
        == json.loads(chosen.read_text())["ids"]
    )
    with pytest.raises(UserError, match="exists and is not overwritten"):
        make_split.main(make_split.parse(flags))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "can't be read as JSON"),
        ("1 2 3", "can't be read as JSON"),
        ("{}", "holds no list of image ids"),
        ("[]", "holds no list"),
        ('["a"]', "holds no list of image ids"),
        ('{"ids": [1, 777]}', "1 of 2 images are not in .*the first has id 777"),
    ],
)
def test_bad_files_of_splits_are_refused(
    content: str | None, said: str, coco: Path, tmp_path: Path
) -> None:
    path = tmp_path / "split.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=said):
        build_dataset(
            "train", tiny_args(FINETUNE, "--coco_path", str(coco), "--split_file", str(path))
        )


def test_bad_shares_are_refused(coco: Path, capsys: pytest.CaptureFixture) -> None:
    for text in ("0", "10", "-0.5", "nan"):
        with pytest.raises(SystemExit):
            tiny_args(FINETUNE, "--filter_pct", text)
        assert "10 % is 0.1" in capsys.readouterr().err
    with pytest.raises(UserError, match="of 12 images is none"):
        build_dataset(
            "train", tiny_args(FINETUNE, "--coco_path", str(coco), "--filter_pct", "0.01")
        )
    with pytest.raises(UserError, match="--split_file x and --filter_pct 0.1"):
        tiny_args(FINETUNE, "--split_file", "x", "--filter_pct", "0.1")


def test_a_run_keeps_its_images(coco: Path, tmp_path: Path) -> None:
    """Another run takes the same by --split_file, and one that goes on draws them again by its own seed."""
    first, second = tmp_path / "first", tmp_path / "second"
    fine_tune(
        "--coco_path",
        coco,
        "--filter_pct",
        "0.5",
        "--seed",
        "3",
        "--epochs",
        1,
        "--eval_every",
        9,
        "--output_dir",
        first,
        *FROZEN,
    )
    kept = json.loads((first / "subset.json").read_text())
    assert (kept["filter_pct"], kept["seed"]) == (0.5, 3)
    assert kept["ids"] == sample_image_ids(np.arange(1, 13), 0.5, 3).tolist()
    assert json.loads((first / "args.json").read_text())["data"]["train"].startswith(
        "0.5 by seed 3 of 12 images"
    )
    fine_tune(
        "--coco_path",
        coco,
        "--split_file",
        first / "subset.json",
        "--epochs",
        1,
        "--output_dir",
        second,
        *FROZEN,
        "--dry_run",
    )
    args = tiny_args(
        FINETUNE,
        "--coco_path",
        str(coco),
        "--split_file",
        str(first / "subset.json"),
        "--seed",
        "8",
    )
    again = subset_record(build_dataset("train", args).annotations, args)
    assert {**kept, "drawn": again["drawn"]} == again, (
        "share and seed are those of the drawing, not of the run"
    )
    (tmp_path / "list.json").write_text("[2, 3]")
    args = tiny_args(
        FINETUNE, "--coco_path", str(coco), "--split_file", str(tmp_path / "list.json")
    )
    plain = subset_record(build_dataset("train", args).annotations, args)
    assert (plain["ids"], plain["filter_pct"], plain["seed"]) == ([2, 3], None, None)
    fine_tune("--resume", "auto", "--output_dir", first, "--epochs", 2)
    assert json.loads((first / "subset.json").read_text()) == kept
