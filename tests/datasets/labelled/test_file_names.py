"""File names that differ a little from those in the annotations: the only possible file is used, others are named."""

import json
import unicodedata
from pathlib import Path

import pytest

from datasets import build_dataset
from datasets.labelled.checks.split import Split
from datasets.labelled.checks.startup import run_startup_checks
from datasets.labelled.checks.table import run_checks
from datasets.labelled.file_names import match_files
from tests.tiny import captured_log, custom_dataset_flags, tiny_args, write_custom_dataset
from util.errors import UserError
from util.settings import FINETUNE

ACCENT = unicodedata.normalize("NFC", "é 1.jpg")


def write_files(folder: Path, *names: str) -> str:
    """Write empty files: only their names matter."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return str(folder)


@pytest.mark.parametrize(
    ("listed", "file"),
    [
        ("sub\\a.jpg", "sub/a.jpg"),
        (".\\sub\\a.jpg", "sub/a.jpg"),
        ("./sub//a.jpg", "sub/a.jpg"),
        ("%C3%A9%201.jpg", ACCENT),
        (ACCENT, unicodedata.normalize("NFD", ACCENT)),
        (unicodedata.normalize("NFD", ACCENT), ACCENT),
        ("a.jpg", "A.JPG"),
        ("Sub/A.jpg", "sub/a.jpg"),
        ("a.jpg ", "a.jpg"),
        ('"a.jpg"', "a.jpg"),
        ("a.jpg", "a.jpeg"),
        ("a", "a.png"),
        ("v1.2", "v1.2.png"),
        ("train/a.jpg", "a.jpg"),
        ("data\\Train\\a.jpg", "a.jpg"),
        ("C:\\data\\train\\a.jpg", "a.jpg"),
    ],
)
def test_the_only_possible_file_is_used(listed: str, file: str, tmp_path: Path) -> None:
    folder = write_files(tmp_path / "train", file, "other.jpg")
    assert match_files(["other.jpg", listed], [1], folder).files == {1: file}


@pytest.mark.parametrize(
    ("names", "missing", "files", "suggestion"),
    [
        (["../upload/4/a.jpg"], [0], ["a.jpg"], "a.jpg"),
        (["val/a.jpg"], [0], ["a.jpg"], "a.jpg"),
        (["a.jpg"], [0], ["sub/a.jpg"], "sub/a.jpg"),
        (["1a2b3c4d-a.jpg"], [0], ["a.jpg"], "a.jpg"),
        (["a.jpg"], [0], ["a.png"], "a.png"),  # may be a mask
        (["c.jpg", "C.jpg"], [1], ["c.jpg"], "c.jpg"),  # belongs to the other image
        (["C.jpg ", "C.JPG"], [0, 1], ["c.jpg"], "c.jpg"),
        (["A.jpg"], [0], ["a.jpg", "a.JPG"], "a.JPG"),
        (["a.jpg"], [0], ["b.jpg"], None),
    ],
)
def test_what_is_not_certain_is_only_suggested(
    names: list[str], missing: list[int], files: list[str], suggestion: str | None, tmp_path: Path
) -> None:
    matches = match_files(names, missing, write_files(tmp_path / "train", *files))
    assert matches.files == {}
    assert matches.suggestions.get(missing[-1]) == suggestion


def test_entries_with_the_same_name_share_a_file(tmp_path: Path) -> None:
    folder = write_files(tmp_path / "train", "a.jpg")
    assert match_files(["a.jpg ", "a.jpg "], [0, 1], folder).files == {0: "a.jpg", 1: "a.jpg"}


def test_files_of_other_images_are_not_used(tmp_path: Path) -> None:
    folder = write_files(tmp_path / "train", "a.jpg")
    assert match_files(["A.jpg"], [0], folder).files == {0: "a.jpg"}
    assert match_files(["A.jpg"], [0], folder, ["a.jpg"]).files == {}


# ------------------------------------------------------------------------------------------------------------ datasets


def rename(root: Path, name: str, change, count: int | None = None) -> None:
    """Change the first `count` file names in an annotation file."""
    content = json.loads((root / name).read_text())
    for image in content["images"][:count]:
        image["file_name"] = change(image["file_name"])
    (root / name).write_text(json.dumps(content))


def custom_args(root: Path):
    return tiny_args(FINETUNE, *custom_dataset_flags(root))


def test_differing_names_are_read_and_counted(tmp_path: Path) -> None:
    root = write_custom_dataset(tmp_path)
    args = custom_args(root)
    expected = build_dataset("train", args).annotations
    rename(root, "train.json", lambda name: name.replace("/", "\\"), count=3)

    dataset = build_dataset("train", args)
    assert list(dataset.annotations.file_names) == list(expected.file_names)
    assert dataset.fingerprint() == expected.fingerprint()
    found = [f for f in run_checks([Split("train", dataset)]) if f.kind == "file name differs"]
    assert [finding.image_id for finding in found] == expected.image_ids[:3].tolist()
    assert str(found[0]).endswith("a/000000.png, image 1, listed as 'a\\\\000000.png'")

    with captured_log() as lines:
        run_startup_checks(dataset, None, args)
    (line,) = [line for line in lines if line.startswith("file name differs: 3 (")]
    assert "listed as 'a\\\\000000.png'" in line


def test_clean_names_cost_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.labelled.coco.match_files", None)
    dataset = build_dataset("train", custom_args(write_custom_dataset(tmp_path)))
    assert dataset.annotations.image_notes == {}


def test_errors_name_the_file_that_is_there(tmp_path: Path) -> None:
    root = write_custom_dataset(tmp_path)
    args = custom_args(root)
    rename(root, "val.json", lambda name: f"upload/4/{name}", count=2)
    with pytest.raises(UserError, match=r"2 of 3 images .* did you mean 000000.png\?$"):
        build_dataset("val", args)

    rename(root, "train.json", lambda name: f"x/{Path(name).name}")
    with pytest.raises(UserError, match=r"4 of 4 .*\(image 1\): did you mean a/000000.png\?"):
        build_dataset("train", args)
    rename(root, "train.json", lambda name: f"x{Path(name).name}")
    with pytest.raises(UserError, match="from the annotations; the folder has a/000000.png, for"):
        build_dataset("train", args)
