"""Synthetic images: exact masks and boxes, a function of seed and index, folders that are never overwritten."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from tools.demo import scenes
from tools.demo.scenes import CLASS_NAMES, SOURCE_PHOTOS, SPLITS, make_scene, write_coco
from tools.demo.shapes import OUTLINES, rasterize
from util.errors import UserError

pytest.importorskip("skimage")
ROOT = Path(__file__).resolve().parents[3]


def same(a, b) -> bool:
    return all(x.shape == y.shape and (x == y).all() for x, y in zip(a, b, strict=True))


def test_shapes_and_dtypes_of_a_scene() -> None:
    for index in range(20):
        image, boxes, labels, masks = make_scene(3, index, 96, "train")
        count = len(labels)
        assert 1 <= count <= 4
        assert image.shape == (96, 96, 3)
        assert (image.dtype, boxes.dtype, labels.dtype, masks.dtype) == (
            np.uint8,
            np.float32,
            np.int64,
            bool,
        )
        assert boxes.shape == (count, 4)
        assert masks.shape == (count, 96, 96)
        assert labels.min() >= 1
        assert labels.max() <= 4


def test_a_scene_is_a_function_of_seed_split_and_index() -> None:
    first = make_scene(1, 5, 64, "train")
    for other in (
        (1, 6, 64, "train"),
        (2, 5, 64, "train"),
        (1, 5, 64, "val"),
        (1, 5, 64, "unlabelled"),
    ):
        assert not same(first[:1], make_scene(*other)[:1]), other
    assert same(first, make_scene(1, 5, 64, "train"))


def test_boxes_enclose_masks_exactly_and_masks_are_disjoint() -> None:
    for index in range(30):
        _, boxes, _, masks = make_scene(7, index, 96, "val")
        assert masks.sum(0).max() <= 1
        for box, mask in zip(boxes, masks, strict=True):
            rows, columns = np.nonzero(mask)
            assert box.tolist() == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]


def test_masks_cover_pixels_of_the_object(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a black background, white surfaces and no clutter, the masks cover the white pixels up to the soft edge."""

    def plain(rng, photos, height, width, scale, tint):
        # Surfaces are smaller crops than backgrounds.
        return np.full((height, width, 3), 255.0 if scale[1] < 0.5 else 0.0, np.float32)

    monkeypatch.setattr(scenes, "_photo_crop", plain)
    for index in range(10):
        image, _, _, masks = make_scene(1, index, 96, "train", clutter=False)
        white = image[..., 0] >= 128
        assert (white == masks.any(0)).mean() > 0.995
        assert masks.any(0).sum() > 0


def test_one_class_has_the_same_pixels_and_boxes(tmp_path: Path) -> None:
    folder, other = tmp_path / "one", tmp_path / "four"
    write_coco(folder, num_train=4, num_val=1, size=64, clutter=False, one_class=True)
    write_coco(other, num_train=4, num_val=1, size=64, clutter=False)
    one, four = (
        json.loads((path / "annotations" / "instances_train2017.json").read_text())
        for path in (folder, other)
    )
    assert [(c["id"], c["name"]) for c in one["categories"]] == [(1, "shape")]
    assert {box["category_id"] for box in one["annotations"]} == {1}
    assert [box["bbox"] for box in one["annotations"]] == [
        box["bbox"] for box in four["annotations"]
    ]
    image = "train2017/000000000002.jpg"
    assert (folder / image).read_bytes() == (other / image).read_bytes()
    with pytest.raises(UserError, match="images with other settings"):
        write_coco(folder, num_train=4, num_val=1, size=64, clutter=False)


def test_objects_vary_and_occlude_each_other() -> None:
    drawn = [make_scene(1, index, 96, "train") for index in range(150)]
    labels = np.concatenate([scene[2] for scene in drawn])
    sides = np.concatenate([(scene[1][:, 2:] - scene[1][:, :2]).max(1) for scene in drawn]) / 96
    assert np.bincount(labels, minlength=5)[1:].min() > len(labels) / 8
    assert sides.min() < 0.3
    assert sides.max() > 0.55
    filling = [
        mask.sum() / ((box[2] - box[0]) * (box[3] - box[1]))
        for _, boxes, names, masks in drawn
        for box, label, mask in zip(boxes, names, masks, strict=True)
        if label == 1
    ]
    # A whole disc fills pi/4 of its box, an occluded one less.
    assert np.median(filling) == pytest.approx(np.pi / 4, abs=0.05)
    assert min(filling) < 0.6


def test_held_out_images_use_other_photos(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not set(SOURCE_PHOTOS["train"]) & set(SOURCE_PHOTOS["val"])
    assert {split: group for split, (_, group) in SPLITS.items()} == {
        "train": "train",
        "val": "val",
        "unlabelled": "train",
    }
    groups = []
    original = scenes._load_photos
    monkeypatch.setattr(
        scenes, "_load_photos", lambda group: groups.append(group) or original(group)
    )
    for split in SPLITS:
        make_scene(1, 0, 64, split)
    assert groups == ["train", "val", "train"]


def test_all_photos_have_a_free_license() -> None:
    for statements in SOURCE_PHOTOS.values():
        assert all(text.startswith(("CC0", "public domain")) for text in statements.values())


def test_every_class_has_its_own_outline() -> None:
    assert set(OUTLINES) == set(CLASS_NAMES)
    drawn = {
        name: rasterize(outline(np.random.default_rng(0)), 40) for name, outline in OUTLINES.items()
    }
    for alpha in drawn.values():
        assert max(alpha.shape) == 40
        assert alpha.max() == 1
    middles = {
        name: alpha[alpha.shape[0] // 2, alpha.shape[1] // 2] for name, alpha in drawn.items()
    }
    assert middles["ring"] == 0
    assert middles["disc"] == middles["star"] == middles["triangle"] == 1


@pytest.mark.parametrize(
    "arguments",
    [(1, 0, 64, "test"), (1, 0, 16, "train"), (1, 0, 64, "train", 0), (1, 0, 64, "train", 9)],
)
def test_invalid_arguments_are_refused(arguments: tuple) -> None:
    with pytest.raises(ValueError):
        make_scene(*arguments)


def test_written_files_are_in_coco_layout(tmp_path: Path) -> None:
    folder = write_coco(
        tmp_path / "scenes", num_train=3, num_val=2, num_unlabelled=1, size=64, seed=5
    )
    assert len(list((folder / "unlabelled").iterdir())) == 1
    for name, split, count in (("train2017", "train", 3), ("val2017", "val", 2)):
        coco = COCO(folder / "annotations" / f"instances_{name}.json")
        assert {c["id"]: c["name"] for c in coco.cats.values()} == dict(
            enumerate(CLASS_NAMES[:4], start=1)
        )
        assert len(coco.imgs) == count == len(list((folder / name).iterdir()))
        for image_id, record in coco.imgs.items():
            image, boxes, labels, masks = make_scene(5, image_id - 1, 64, split)
            with Image.open(folder / name / record["file_name"]) as file:
                assert np.abs(np.asarray(file).astype(int) - image).mean() < 5  # JPEG
            annotations = coco.imgToAnns[image_id]
            assert [a["category_id"] for a in annotations] == labels.tolist()
            for annotation, box, mask in zip(annotations, boxes, masks, strict=True):
                x, y, width, height = annotation["bbox"]
                assert [x, y, x + width, y + height] == box.tolist()
                assert annotation["area"] == mask.sum()
                assert annotation["iscrowd"] == 0
                assert (coco.annToMask(annotation) == mask).all()


def test_a_folder_with_the_same_scenes_is_left_alone(tmp_path: Path) -> None:
    folder = write_coco(tmp_path / "scenes", 2, 1, size=64)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    write_coco(folder, 2, 1, size=64)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    assert [path.name for path in tmp_path.iterdir()] == ["scenes"]


def test_other_settings_need_overwrite(tmp_path: Path) -> None:
    folder = write_coco(tmp_path / "scenes", 2, 1, size=64)
    with pytest.raises(UserError, match="other settings.*--overwrite"):
        write_coco(folder, 3, 1, size=64)
    assert len(list((folder / "train2017").iterdir())) == 2
    write_coco(folder, 3, 1, size=64, overwrite=True)
    assert len(list((folder / "train2017").iterdir())) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["scenes"]


def test_an_incomplete_folder_is_refused(tmp_path: Path) -> None:
    folder = write_coco(tmp_path / "scenes", 2, 1, size=64)
    next((folder / "train2017").iterdir()).unlink()
    with pytest.raises(UserError, match="only a part"):
        write_coco(folder, 2, 1, size=64)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_with_other_files_is_never_touched(tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(UserError, match="no synthetic images"):
        write_coco(tmp_path, 1, 1, size=64, overwrite=overwrite)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_failed_run_leaves_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(scenes, "_annotation", fail)
    with pytest.raises(OSError, match="disk full"):
        write_coco(tmp_path / "scenes", 1, 1, size=64)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_one_line_of_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_args, **_settings) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(SystemExit) as stopped:
        scenes.main(
            [
                "--output",
                str(tmp_path / "scenes"),
                "--num_train",
                "1",
                "--num_val",
                "1",
                "--size",
                "64",
            ]
        )
    message = str(stopped.value.code)
    assert (
        message
        == f"error: cannot write {tmp_path / 'scenes'}: No space left on device; make room or choose another --output"
    )
    assert not list(tmp_path.iterdir())


def test_command_line_in_its_own_process(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "tools.demo.scenes",
        "--num_train",
        "2",
        "--num_val",
        "1",
        "--seed",
        "4",
    ]
    command += ["--num_unlabelled", "0", "--size", "64", "--output"]
    done = subprocess.run([*command, tmp_path / "there"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    here = write_coco(tmp_path / "here", 2, 1, size=64, seed=4)
    files = [path.relative_to(here) for path in here.rglob("*") if path.is_file()]
    assert len(files) == 6
    for file in files:
        assert (here / file).read_bytes() == (tmp_path / "there" / file).read_bytes(), file
    refused = subprocess.run(
        [*command, ROOT / "datasets"], cwd=ROOT, capture_output=True, text=True
    )
    assert refused.returncode == 1
    assert refused.stderr.startswith("error: ")
    assert len(refused.stderr.splitlines()) == 1


def test_error_names_the_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scenes.importlib.util, "find_spec", lambda name: None)
    scenes._load_photos.cache_clear()
    with pytest.raises(UserError, match="pip install scikit-image"):
        make_scene(1, 0, 64, "train")
