"""Many images: folders that are looked up once, and annotations in arrays."""

import gc
import json
import os
import pickle
import shutil
import types
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from datasets.images import image_folder
from datasets.images.image_folder import ImageFolder
from datasets.images.listing import RULE, list_folder
from datasets.images.packed_strings import PackedStrings
from datasets.labelled.annotations import parse_coco, read_coco, read_json
from tests.large_data import LONG_AGO, Counted, age, keep_cache_in, pack, touch
from tests.tiny import logged
from tools import benchmark
from util import cache
from util.errors import UserError

EXTENSIONS = frozenset([".png", ".jpg"])


@pytest.fixture(autouse=True)
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the cache."""
    return keep_cache_in(tmp_path / "user" / "predetr", monkeypatch)


def found(root: Path) -> tuple[list[str], list[str], int]:
    result = list_folder(str(root), EXTENSIONS, worth_keeping=0)
    return list(result.images), list(result.tars), result.skipped


# ---------------------------------------------------------------------------------------------------- a folder is
# looked up once


def test_a_folder_is_looked_up_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In an order that depends on the names alone, which the numbers of the images, and so resumed runs, rest on."""
    names = ["a-b/1.png", "a/2.PNG", "a/deep/er/3.jpg", "a.jpg", "ümläut/4.png", os.fsdecode(b"\xff/5.png")]
    root = touch(tmp_path / "images", *names, "notes.txt", "a/._1.png", "x.tar")
    scans = Counted(monkeypatch, os, "scandir")
    first, result = scans.of(lambda: found(root))
    later, again = scans.of(lambda: found(root))
    assert (first, later) == (7, 0)
    assert result == again == (sorted(names), ["x.tar"], 3)
    monkeypatch.setattr(image_folder, "list_folder", partial(list_folder, worth_keeping=0))
    monkeypatch.setattr(image_folder, "image_extensions", lambda: EXTENSIONS)
    with logged() as lines:
        calls, folder = scans.of(lambda: ImageFolder(str(root)))
    assert calls == 0
    assert f"{root} has not changed since it was listed" in lines
    assert [folder.name(i) for i in range(len(folder))] == result[0]
    assert scans.of(lambda: list_folder(str(root), EXTENSIONS | {".txt"}))[0] == 7, (
        "Pillow may learn to read another format"
    )


def add(root: Path) -> None:
    (root / "b" / "new.png").touch()


def remove(root: Path) -> None:
    (root / "b" / "2.png").unlink()


def rename_file(root: Path) -> None:
    (root / "b" / "2.png").rename(root / "b" / "3.png")


def rename_folder(root: Path) -> None:
    (root / "b").rename(root / "c")


def replace_folder(root: Path) -> None:
    """By one from elsewhere, with the old times on all of it."""
    shutil.rmtree(root / "b")
    touch(root.parent / "other", "4.png").rename(root / "b")
    os.utime(root, LONG_AGO)


def unpack_and_set_times_back(root: Path) -> None:
    """As tar and rsync do."""
    add(root)
    age(root)


def turn_link(root: Path) -> None:
    os.symlink(touch(root.parent / "other", "4.png"), root / "new")
    os.replace(root / "new", root / "linked")
    os.utime(root, LONG_AGO)


def add_behind_link(root: Path) -> None:
    (root.parent / "target" / "5.png").touch()


def make_target_of_link(root: Path) -> None:
    """Of a link that led nowhere, such as to a disk that was not there; nothing in the folder itself changes."""
    touch(root.parent / "later", "6.png")


@pytest.mark.parametrize(
    "change",
    [
        add,
        remove,
        rename_file,
        rename_folder,
        replace_folder,
        unpack_and_set_times_back,
        turn_link,
        add_behind_link,
        make_target_of_link,
    ],
)
def test_a_folder_that_changed_is_looked_up_anew(change, tmp_path: Path, kept: Path) -> None:
    root = touch(tmp_path / "images", "a/1.png", "b/2.png")
    touch(tmp_path / "target", "3.png")
    (root / "linked").symlink_to(tmp_path / "target")
    (root / "nowhere").symlink_to(tmp_path / "later")
    age(root)
    before = found(root)
    assert len(list(kept.iterdir())) == 1
    change(root)
    after = found(root)
    shutil.rmtree(kept)
    assert after == found(root) != before


def test_other_content_of_a_file_changes_no_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = touch(tmp_path / "images", "a/1.png")
    found(root)
    (root / "a" / "1.png").write_bytes(b"other")
    assert Counted(monkeypatch, os, "scandir").of(lambda: found(root))[0] == 0


def test_what_is_not_kept(tmp_path: Path, kept: Path) -> None:
    """A folder that changed just now could change once more within one tick of the file system's clock. What was quick
    is not worth it.
    """
    root = touch(tmp_path / "images", "a/1.png")
    list_folder(str(root), EXTENSIONS)
    os.utime(root / "a")
    found(root)
    os.utime(root / "a", (0, 0))  # as file systems have it that know no times
    found(root)
    assert not kept.exists()
    os.utime(root / "a", LONG_AGO)
    found(root)
    assert len(list(kept.iterdir())) == 1


def test_hidden_folders_are_not_looked_into(tmp_path: Path, kept: Path) -> None:
    """Nor taken from a list that an earlier version kept. What is given itself may be hidden."""
    root = touch(tmp_path / ".images", ".thumbnails/1.png", "a/.git/x/2.png", "a/3.png")
    (root / ".linked").symlink_to(root / "a")
    age(root)
    assert found(root) == (["a/3.png"], [], 0)
    arrays = cache.load_arrays("listing", str(root))
    assert int(arrays.pop("rule")) == RULE
    arrays["image_bytes"], arrays["image_ends"] = PackedStrings(
        [".thumbnails/1.png", "a/.git/x/2.png", "a/3.png"]
    ).arrays()
    cache.save_arrays("listing", str(root), arrays)
    assert found(root) == (["a/3.png"], [], 0)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[data.index(b"1.png")] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-30])


def other_kind(path: Path) -> None:
    with path.open("wb") as file:
        np.save(file, np.zeros(3))


def older(path: Path) -> None:
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    np.savez(path, **{**arrays, "format": np.array(0)})


@pytest.mark.parametrize("damage", [flip, cut, other_kind, older, lambda path: path.write_bytes(b"")])
def test_a_damaged_or_older_cache_is_made_anew(
    damage, tmp_path: Path, kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = touch(tmp_path / "images", "a/1.png")
    expected = found(root)
    (file,) = kept.iterdir()
    damage(file)
    scans = Counted(monkeypatch, os, "scandir")
    with logged() as lines:
        assert scans.of(lambda: found(root)) == (2, expected)
    assert [line for line in lines if str(file) in line and line.endswith("it is made anew")]
    assert scans.of(lambda: found(root)) == (0, expected)


def test_a_cache_that_cannot_be_written_stops_nothing(tmp_path: Path, kept: Path) -> None:
    root = touch(tmp_path / "images", "a/1.png")
    kept.parent.write_text("in the way")
    with logged() as lines:
        assert found(root) == (["a/1.png"], [], 0)
    assert any("can't be written (Not a directory)" in line for line in lines)
    assert kept.parent.read_text() == "in the way"


def test_runs_that_start_together_leave_one_whole_file(kept: Path) -> None:
    def save(number: int) -> None:
        cache.save_arrays("kind", "source", {"numbers": np.full(20_000, number)})

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(save, range(24)))
    assert len(set(cache.load_arrays("kind", "source")["numbers"].tolist())) == 1
    assert len(list(kept.iterdir())) == 1


def test_where_the_cache_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # of the fixture
    for value, expected in ((str(tmp_path), tmp_path / "predetr"), ("relative", Path.home() / ".cache" / "predetr")):
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert cache.cache_folder() == expected
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # a user without a home
    assert cache.cache_folder() is None
    cache.save_arrays("kind", "source", {})
    assert cache.load_arrays("kind", "source") is None


def test_a_deleted_folder_is_told_as_before(tmp_path: Path) -> None:
    root = touch(tmp_path / "images", "a/1.png")
    found(root)
    shutil.rmtree(root)
    with pytest.raises(UserError, match="images does not exist: give a folder of images"):
        ImageFolder(str(root))


# ---------------------------------------------------------------------------------------------------- arrays, not
# objects


def objects_in(root: object) -> int:
    """Number of Python objects that can be reached, without types, modules and functions."""
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


def annotations_of(images: int, boxes: int = 7, **more: object) -> dict:
    return {
        "images": [{"id": i, "file_name": f"{i:012d}.jpg", "height": 48, "width": 64} for i in range(images)],
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


def test_annotations_hold_no_object_for_an_image_or_box() -> None:
    """What a worker process would copy page by page, since looking at an object changes its count of references."""
    small, large = (parse_coco(annotations_of(images), "made") for images in (20, 2000))
    assert objects_in(small) == objects_in(large)
    assert len(pickle.dumps(large)) < 7 * 2000 * 44 + 2000 * 60, "44 bytes a box, 60 an image"
    before = objects_in(large)
    for index in range(len(large)):  # an epoch leaves nothing behind
        large.target(index, (48, 64))
    assert objects_in(large) == before


def test_images_of_folders_and_tar_files_hold_no_object_for_an_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = []
    for images in (10, 500):
        root = touch(tmp_path / f"images{images}", *(f"a.tar/{i:04d}.png" for i in range(images)))
        folder, inside = ImageFolder(str(root)), ImageFolder(str(pack(root, tmp_path / f"shards{images}")))
        counts.append([objects_in(folder), objects_in(inside)])
        assert len(pickle.dumps(folder)) < 400 + 30 * images
        assert len(pickle.dumps(inside)) < 1500 + 45 * images
    assert counts[0] == counts[1]


def test_packed_strings_joined() -> None:
    parts = [PackedStrings(strings) for strings in (["a", "", "ü"], [], ["bc"])]
    joined = PackedStrings.joined(["x/", "y/", ""], parts)
    assert list(joined) == ["x/a", "x/", "x/ü", "bc"]
    assert joined.digest() == PackedStrings(["x/a", "x/", "x/ü", "bc"]).digest()
    assert list(PackedStrings.joined([], [])) == []


# ---------------------------------------------------------------------------------------------------- reading
# annotations


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
def test_polygons_change_nothing_else(polygons: object, tmp_path: Path) -> None:
    """They are taken out of the text; keys and names that look like them stay."""
    content = annotations_of(3, segmentation=polygons)
    content["categories"][0]["name"] = '"segmentation": [1, 2]'
    content["images"][0]["file_name"] = 'segmentation": [.jpg'
    for i, form in enumerate(({}, {"indent": 1}, {"separators": (",", ":")}, {"ensure_ascii": False})):
        (tmp_path / f"{i}.json").write_text(json.dumps(content, **form))
        read = read_json(str(tmp_path / f"{i}.json"))
        expected = [] if isinstance(polygons, list) else polygons
        assert all(annotation.pop("segmentation") == expected for annotation in read["annotations"])
        plain = annotations_of(3)
        assert read == {**content, "annotations": plain["annotations"]}
    for encoding in ("utf-16", "utf-8-sig"):
        (tmp_path / "other.json").write_text(json.dumps(content), encoding=encoding)
        assert read_coco(str(tmp_path / "other.json")).fingerprint() == parse_coco(content, "made").fingerprint()


def test_a_message_counts_bytes_as_the_file_does(tmp_path: Path) -> None:
    text = json.dumps(annotations_of(2, segmentation=[[1, 2, 3]]))[:-1] + ", oops}"
    (tmp_path / "bad.json").write_text(text)
    with pytest.raises(UserError, match=rf"not valid JSON .*char {text.index('oops')}\)"):
        read_coco(str(tmp_path / "bad.json"))
    assert gc.isenabled()


def test_python_does_not_search_for_cycles_meanwhile(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(annotations_of(400, segmentation=[[1, 2]] * 9)))
    runs = []
    gc.callbacks.append(lambda phase, info: runs.append(phase))
    try:
        content = read_coco(str(tmp_path / "a.json"))
    finally:
        gc.callbacks.pop()
    assert len(content.labels) == 2800
    assert not runs
    assert gc.isenabled()


# ---------------------------------------------------------------------------------------------------- the benchmark


def test_the_benchmark_of_a_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # it has a cache of its own
    words = [
        "data_start",
        "--files",
        "50",
        "--annotated",
        "6",
        "--turns",
        "1",
        "--device",
        "cpu",
        "--output",
        str(tmp_path),
    ]
    before = dict(os.environ)
    benchmark.main(benchmark.parse(words))
    rows = json.loads((tmp_path / "data_start.json").read_text())["rows"]
    assert [row["contender"] for row in rows] == [
        *["first time", "later"] * 2,
        *["json.load", "read_coco", "fine-tuning"] * 2,
    ]
    assert all(row["difference"] == 0 for row in rows)
    assert dict(os.environ) == before
