"""Large datasets: listing of folders, and annotations in arrays."""

import gc
import json
import os
import pickle
import types
from pathlib import Path

import pytest

from datasets.images.image_folder import ImageFolder
from datasets.images.listing import list_folder
from datasets.images.packed_strings import PackedStrings
from datasets.labelled.coco_json import read_json
from datasets.labelled.coco_parser import parse_coco, read_coco
from tests.large_data import pack, touch
from util.errors import UserError

EXTENSIONS = frozenset([".png", ".jpg"])


def list_images(root: Path) -> tuple[list[str], list[str], int]:
    result = list_folder(str(root), EXTENSIONS)
    return list(result.images), list(result.tars), result.skipped


# Listing folders


def test_folder_is_listed_in_sorted_order(tmp_path: Path) -> None:
    """Image indices, and so resumed runs, depend on the order."""
    names = [
        "a-b/1.png",
        "a/2.PNG",
        "a/deep/er/3.jpg",
        "a.jpg",
        "ümläut/4.png",
        os.fsdecode(b"\xff/5.png"),
    ]
    root = touch(tmp_path / "images", *names, "notes.txt", "a/._1.png", "x.tar")
    assert list_images(root) == (sorted(names), ["x.tar"], 3)


def test_links_are_followed_but_not_in_cycles(tmp_path: Path) -> None:
    root = touch(tmp_path / "images", "a/1.png")
    (root / "linked").symlink_to(touch(tmp_path / "target", "2.png"))
    (root / "a" / "up").symlink_to(root)
    (root / "nowhere").symlink_to(tmp_path / "later")
    (root / "gone.png").symlink_to(tmp_path / "later.png")
    assert list_images(root) == (["a/1.png", "gone.png", "linked/2.png"], [], 1)


def test_hidden_folders_are_skipped(tmp_path: Path) -> None:
    """The root folder itself may be hidden."""
    root = touch(tmp_path / ".images", ".thumbnails/1.png", "a/.git/x/2.png", "a/3.png")
    (root / ".linked").symlink_to(root / "a")
    assert list_images(root) == (["a/3.png"], [], 0)


# Arrays instead of objects


def count_objects(root: object) -> int:
    """Count the Python objects that can be reached, without types, modules and functions."""
    seen, todo = set(), [root]
    while todo:
        item = todo.pop()
        if id(item) in seen or isinstance(
            item, type | types.ModuleType | types.FunctionType | types.BuiltinFunctionType
        ):
            continue
        seen.add(id(item))
        todo += gc.get_referents(item)
    return len(seen)


def coco_content(images: int, boxes: int = 7, **more: object) -> dict:
    return {
        "images": [
            {"id": i, "file_name": f"{i:012d}.jpg", "height": 48, "width": 64}
            for i in range(images)
        ],
        "annotations": [
            {
                "id": k + 1,
                "image_id": k // boxes,
                "category_id": 1 + k % 3,
                "bbox": [k % 30, 2.5, 9, 8.25],
                "iscrowd": 0,
                **more,
            }
            for k in range(images * boxes)
        ],
        "categories": [{"id": i, "name": f"class {i}"} for i in (1, 2, 3)],
    }


def test_annotations_have_no_object_per_image_or_box() -> None:
    """A dataloader worker would copy objects page by page, since each access changes their reference count."""
    small, large = (parse_coco(coco_content(images), "made") for images in (20, 2000))
    assert count_objects(small) == count_objects(large)
    assert len(pickle.dumps(large)) < 7 * 2000 * 44 + 2000 * 60, "44 bytes per box, 60 per image"
    before = count_objects(large)
    for index in range(len(large)):  # an epoch leaves nothing behind
        large.target(index, (48, 64))
    assert count_objects(large) == before


def test_folders_and_tar_files_have_no_object_per_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = []
    for images in (10, 500):
        root = touch(tmp_path / f"images{images}", *(f"a.tar/{i:04d}.png" for i in range(images)))
        folder = ImageFolder(str(root))
        shards = ImageFolder(str(pack(root, tmp_path / f"shards{images}")))
        counts.append([count_objects(folder), count_objects(shards)])
        assert len(pickle.dumps(folder)) < 400 + 30 * images
        assert len(pickle.dumps(shards)) < 1500 + 45 * images
    assert counts[0] == counts[1]


def test_packed_strings_concatenate() -> None:
    parts = [PackedStrings(strings) for strings in (["a", "", "ü"], [], ["bc"])]
    joined = PackedStrings.concatenate(["x/", "y/", ""], parts)
    assert list(joined) == ["x/a", "x/", "x/ü", "bc"]
    assert joined.digest() == PackedStrings(["x/a", "x/", "x/ü", "bc"]).digest()
    assert list(PackedStrings.concatenate([], [])) == []


# Reading annotations


@pytest.mark.parametrize(
    "polygons",
    [
        [],
        [[]],
        [[1.5, 2, 3e-5, -4], [7, 8]],
        [[[1]]],
        {"counts": [3, 4], "size": [5, 6]},
        {"counts": 'ab]"segmentation": [9]'},
        None,
        "segmentation",
    ],
)
def test_skipping_polygons_changes_nothing_else(polygons: object, tmp_path: Path) -> None:
    """They are removed from the text; keys and names that look like them stay."""
    content = coco_content(3, segmentation=polygons)
    content["categories"][0]["name"] = '"segmentation": [1, 2]'
    content["images"][0]["file_name"] = 'segmentation": [.jpg'
    for i, form in enumerate(
        ({}, {"indent": 1}, {"separators": (",", ":")}, {"ensure_ascii": False})
    ):
        (tmp_path / f"{i}.json").write_text(json.dumps(content, **form))
        read = read_json(str(tmp_path / f"{i}.json"))
        expected = [] if isinstance(polygons, list) else polygons
        assert all(annotation.pop("segmentation") == expected for annotation in read["annotations"])
        plain = coco_content(3)
        assert read == {**content, "annotations": plain["annotations"]}
    for encoding in ("utf-16", "utf-8-sig"):
        (tmp_path / "other.json").write_text(json.dumps(content), encoding=encoding)
        assert (
            read_coco(str(tmp_path / "other.json")).fingerprint()
            == parse_coco(content, "made").fingerprint()
        )


def test_error_position_is_that_in_the_file(tmp_path: Path) -> None:
    text = json.dumps(coco_content(2, segmentation=[[1, 2, 3]]))[:-1] + ", oops}"
    (tmp_path / "bad.json").write_text(text)
    with pytest.raises(UserError, match=rf"not valid JSON .*char {text.index('oops')}\)"):
        read_coco(str(tmp_path / "bad.json"))
    assert gc.isenabled()


def test_garbage_collection_is_paused_while_reading(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(coco_content(400, segmentation=[[1, 2]] * 9)))
    runs = []
    gc.callbacks.append(lambda phase, info: runs.append(phase))
    try:
        content = read_coco(str(tmp_path / "a.json"))
    finally:
        gc.callbacks.pop()
    assert len(content.labels) == 2800
    assert not runs
    assert gc.isenabled()
