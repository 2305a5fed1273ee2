"""Training on a part of the labelled images: which ones are selected, and what a run records."""

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


def test_published_draw() -> None:
    """NumPy's default_rng(seed).choice of the sorted ids: a rounded number of them, without replacement."""
    ids = np.random.RandomState(0).permutation(117266)[:5000]
    rng = np.random.default_rng(42)
    expected = rng.choice(sorted(ids.tolist()), round(5000 * 0.01), replace=False)
    expected = sorted(expected.tolist())
    assert sample_image_ids(ids, 0.01, 42).tolist() == expected
    assert sample_image_ids(ids, 0.01, 43).tolist() != expected
    known = [85, 88, 94, 201, 430, 436, 649, 695, 767, 855]
    assert sample_image_ids(np.arange(1000), 0.01, 42).tolist() == known, "NumPy's draws changed"
    assert len(sample_image_ids(np.arange(118287), 0.01, 42)) == 1183
    assert sample_image_ids(np.arange(10), 1, 1).tolist() == list(range(10))


def coco_args(root: Path, *flags: str):
    return tiny_args(FINETUNE, "--coco_path", str(root), *flags)


def test_only_training_images_are_reduced(coco: Path) -> None:
    """The fingerprint of the training set states the draw."""
    whole = build_dataset("train", coco_args(coco))
    part = build_dataset("train", coco_args(coco, "--filter_pct", ".5"))
    again = build_dataset("train", coco_args(coco, "--filter_pct", "0.5"))
    other = build_dataset("train", coco_args(coco, "--filter_pct", ".5", "--seed", "7"))
    assert (len(whole), len(part), len(other)) == (12, 6, 6)
    expected = sample_image_ids(whole.annotations.image_ids, 0.5, 42)
    assert part.annotations.image_ids.tolist() == expected.tolist()
    assert part.fingerprint() == again.fingerprint()
    assert part.fingerprint().startswith("0.5 by seed 42 of 12 images, 6 images, ")
    assert len({whole.fingerprint(), part.fingerprint(), other.fingerprint()}) == 3
    assert len(build_dataset("val", coco_args(coco, "--filter_pct", ".5"))) == 3
    assert len(build_dataset("train", coco_args(coco, "--filter_pct", "-1"))) == 12


def test_voc_and_custom_datasets(tmp_path: Path) -> None:
    voc, custom = write_voc(tmp_path / "voc"), write_custom_dataset(tmp_path / "custom")
    for flags in (
        ("--dataset_file", "voc", "--voc_path", str(voc)),
        custom_dataset_flags(custom),
    ):
        train, val = build_labelled(tiny_args(FINETUNE, *flags, "--filter_pct", "0.4"))
        assert (len(train), len(val)) == (2, 3)


def test_split_files(coco: Path, tmp_path: Path) -> None:
    flags = ["--coco_path", str(coco), "--output_dir", str(tmp_path / "splits")]
    flags += ["--filter_pct", "0.25", "0.5", "--seeds", "1", "42"]
    make_split.main(make_split.parse(flags))
    written = {path.name for path in (tmp_path / "splits").iterdir()}
    assert written == {f"{part}_seed{seed}.json" for part in (0.25, 0.5) for seed in (1, 42)}

    path = tmp_path / "splits" / "0.5_seed42.json"
    from_file = build_dataset("train", coco_args(coco, "--split_file", str(path)))
    from_seed = build_dataset("train", coco_args(coco, "--filter_pct", "0.5"))
    ids = json.loads(path.read_text())["ids"]
    assert from_file.annotations.image_ids.tolist() == ids
    assert from_seed.annotations.image_ids.tolist() == ids
    with pytest.raises(UserError, match="exists and is not overwritten"):
        make_split.main(make_split.parse(flags))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "can't be read as JSON"),
        ("1 2 3", "can't be read as JSON"),
        ("{}", "has no list of image ids"),
        ("[]", "has no list"),
        ('["a"]', "has no list of image ids"),
        ('{"ids": [1, 777]}', "1 of 2 images are not in .*the first has id 777"),
    ],
)
def test_bad_split_file_raises(
    content: str | None, message: str, coco: Path, tmp_path: Path
) -> None:
    path = tmp_path / "split.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=message):
        build_dataset("train", coco_args(coco, "--split_file", str(path)))


def test_bad_fraction_raises(coco: Path, capsys: pytest.CaptureFixture) -> None:
    for text in ("0", "10", "-0.5", "nan"):
        with pytest.raises(SystemExit):
            tiny_args(FINETUNE, "--filter_pct", text)
        assert "10 % is 0.1" in capsys.readouterr().err
    with pytest.raises(UserError, match="of 12 images is none"):
        build_dataset("train", coco_args(coco, "--filter_pct", "0.01"))
    with pytest.raises(UserError, match="--split_file x and --filter_pct 0.1"):
        tiny_args(FINETUNE, "--split_file", "x", "--filter_pct", "0.1")


def test_run_saves_its_images(coco: Path, tmp_path: Path) -> None:
    """Another run can use the same images with --split_file. A resumed run draws the same images again."""
    first, second = tmp_path / "first", tmp_path / "second"
    data = ("--coco_path", coco)
    fine_tune(
        *data,
        *("--filter_pct", "0.5", "--seed", "3"),
        *("--epochs", 1, "--eval_every", 9, "--output_dir", first, *FROZEN),
    )
    saved = json.loads((first / "subset.json").read_text())
    assert (saved["filter_pct"], saved["seed"]) == (0.5, 3)
    assert saved["ids"] == sample_image_ids(np.arange(1, 13), 0.5, 3).tolist()
    recorded = json.loads((first / "args.json").read_text())["data"]["train"]
    assert recorded.startswith("0.5 by seed 3 of 12 images")

    split = ("--split_file", first / "subset.json")
    fine_tune(*data, *split, "--epochs", 1, "--output_dir", second, *FROZEN, "--dry_run")
    args = coco_args(coco, *map(str, split), "--seed", "8")
    again = subset_record(build_dataset("train", args).annotations, args)
    assert {**saved, "drawn": again["drawn"]} == again, (
        "fraction and seed are those of the draw, not of the run"
    )

    (tmp_path / "list.json").write_text("[2, 3]")
    args = coco_args(coco, "--split_file", str(tmp_path / "list.json"))
    plain = subset_record(build_dataset("train", args).annotations, args)
    assert (plain["ids"], plain["filter_pct"], plain["seed"]) == ([2, 3], None, None)

    fine_tune("--resume", "auto", "--output_dir", first, "--epochs", 2)
    assert json.loads((first / "subset.json").read_text()) == saved
