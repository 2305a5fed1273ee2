"""tools/link_imagenet100.py: ImageNet-100, the subset that DETReg uses, as links."""

import re
import shutil
from pathlib import Path

import pytest

from datasets import build_dataset
from tests.tiny import captured_log, tiny_args, write_images
from tools import link_imagenet100
from util.errors import UserError
from util.settings import PRETRAIN

CLASSES = link_imagenet100.CLASSES.read_text().split()


def link(imagenet: Path, output_dir: Path) -> list[str]:
    with captured_log() as lines:
        link_imagenet100.main(
            link_imagenet100.parse(["--imagenet", str(imagenet), "--output_dir", str(output_dir)])
        )
    return lines


def make_imagenet(
    root: Path, parts: tuple[str, ...] = ("train", "val"), without: tuple[str, ...] = ()
) -> Path:
    for part in parts:
        for name in ("n00000001", *CLASSES):
            if f"{part}/{name}" not in without:
                (root / part / name).mkdir(parents=True)
    return root


def listing(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.glob("*/*"))


def test_class_list_has_100_sorted_ids() -> None:
    assert len(set(CLASSES)) == 100
    assert sorted(CLASSES) == CLASSES
    assert all(re.fullmatch(r"n\d{8}", name) for name in CLASSES)
    assert (CLASSES[0], CLASSES[-1]) == ("n01558993", "n13040303")


def test_100_classes_are_linked_and_pre_training_reads_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_imagenet(tmp_path / "ilsvrc")
    write_images(tmp_path / "photos")
    for name in ("n00000001", CLASSES[3]):  # one class of the subset, one that is not
        shutil.copy(tmp_path / "photos" / "000.png", tmp_path / "ilsvrc" / "train" / name)
    monkeypatch.chdir(tmp_path)  # relative paths, as in the docs: the links must work from anywhere
    link(Path("ilsvrc"), Path("ilsvrc100"))
    assert listing(tmp_path / "ilsvrc100") == sorted(
        f"{part}/{name}" for part in ("train", "val") for name in CLASSES
    )
    monkeypatch.chdir("/")
    args = tiny_args(PRETRAIN, "--dataset", "imagenet100", "--data_root", str(tmp_path))
    assert len(build_dataset("train", args)) == 1


def test_second_run_adds_missing_classes(tmp_path: Path) -> None:
    root = make_imagenet(tmp_path / "ilsvrc", without=(f"val/{CLASSES[7]}",))
    with pytest.raises(
        UserError, match=f"lacks 1 of the 200 class folders, the first is val/{CLASSES[7]}"
    ):
        link(root, tmp_path / "out")
    assert len(listing(tmp_path / "out")) == 199, "the other classes are linked"
    (root / "val" / CLASSES[7]).mkdir()
    lines = link(root, tmp_path / "out")
    assert any("1 links created, 199 existed" in line for line in lines)


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    root = make_imagenet(tmp_path / "ilsvrc", parts=("train",))
    existing = tmp_path / "out" / "train" / CLASSES[50]
    existing.mkdir(parents=True)
    (existing / "mine.png").write_bytes(b"mine")
    with pytest.raises(UserError, match=f"{CLASSES[50]} exists and is not a link"):
        link(root, tmp_path / "out")
    assert listing(tmp_path / "out") == [f"train/{CLASSES[50]}"], "no link is created before"
    assert (existing / "mine.png").read_bytes() == b"mine"

    # A link to another place, even a broken one.
    (tmp_path / "other" / "train").mkdir(parents=True)
    (tmp_path / "other" / "train" / CLASSES[0]).symlink_to(tmp_path / "gone")
    with pytest.raises(UserError, match="exists and is not a link"):
        link(root, tmp_path / "other")


def test_missing_imagenet_and_missing_val(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no folder train"):
        link(tmp_path, tmp_path / "out")
    lines = link(make_imagenet(tmp_path / "ilsvrc", parts=("train",)), tmp_path / "out")
    assert any("has no val" in line for line in lines)
    assert len(listing(tmp_path / "out")) == 100
