"""tools/check_dataset.py: finds each planted fault, with file and ids, and nothing else; exit status; reports."""

import csv
import json
import shutil
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from datasets.images.image_info import inspect_image
from datasets.images.packed_strings import PackedStrings
from datasets.labelled.annotations import Annotations
from datasets.labelled.checks.shared_images import is_same_file
from datasets.labelled.checks.startup import run_startup_checks
from datasets.labelled.checks.table import KINDS
from datasets.labelled.coco import CocoDetection
from tests.datasets.labelled.test_coco_panoptic import (
    CAR,
    PERSON,
    draw_ids,
    write_panoptic,
    write_png,
)
from tests.tiny import captured_log, draw, fine_tune, write_coco, write_images
from tools import check_dataset
from util.logger import log
from util.runs.session import run_script
from util.settings import resolve

TRAIN, VAL = "train2017", "val2017"


@pytest.fixture(autouse=True)
def _restore_logger():
    """`run_script` sends the log to standard output; other tests read it through the parent logger."""
    handlers, propagate = list(log.handlers), log.propagate
    yield
    log.handlers[:], log.propagate = handlers, propagate


def check(*words: object) -> tuple[int, list[str]]:
    """Run the tool in this process and return (exit status, log lines)."""
    with captured_log() as lines:
        try:
            run_script(
                check_dataset.main,
                check_dataset.parse,
                [str(word) for word in ("--num_workers", 0, *words)],
            )
        except SystemExit as error:
            return error.code, lines
    return 0, lines


def problems(folder: Path) -> set[tuple[str, str, str, str]]:
    """Return (kind, split, file name, "image id/annotation id") of each line of problems.csv."""
    with (folder / "problems.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return {
        (
            row["kind"],
            row["split"],
            Path(row["file"]).name,
            f"{row['image_id']}/{row['annotation_id']}",
        )
        for row in rows
    }


def edit(root: Path, split: str, change) -> None:
    """Apply `change` to the content of an annotation file."""
    file = root / "annotations" / f"instances_{split}.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def test_clean_dataset(tmp_path: Path) -> None:
    root = write_coco(tmp_path / "coco", empty=(2,))
    status, lines = check("--coco_path", root, "--output_dir", tmp_path / "out")
    assert status == 0
    assert any(
        line.endswith("4 train images, 3 val images: 0 problems, 0 warnings") for line in lines
    )
    assert problems(tmp_path / "out") == {("no objects", "train", "000002.png", "3/")}
    summary = json.loads((tmp_path / "out" / "check.json").read_text())
    assert summary["found"] == {"no objects": {"train": 1}}
    train = summary["train"]
    content = json.loads((root / "annotations" / f"instances_{TRAIN}.json").read_text())
    red = [annotation for annotation in content["annotations"] if annotation["category_id"] == 1]
    assert train["classes"]["red"] == {
        "images": len({annotation["image_id"] for annotation in red}),
        "boxes": len(red),
    }
    assert (train["images"], train["readable"]) == (4, 4)
    assert train["boxes"] == len(content["annotations"])
    with Image.open(tmp_path / "out" / "dataset.png") as plots:
        assert min(plots.size) > 400


def plant_faults(root: Path) -> None:
    """Add one fault of each kind to a dataset of 12 training and 5 validation images."""
    images = root / TRAIN

    def change(content: dict) -> None:
        def annotate(image: int, bbox: list, category: int = 1) -> None:
            annotation_id = 900 + len(content["annotations"])
            content["annotations"].append(
                {"id": annotation_id, "image_id": image, "bbox": bbox, "category_id": category}
            )

        content["annotations"] = []
        for image in range(1, 13):
            annotate(image, [5, 5, 20 + image, 20])
        annotate(1, [5, 5, 0, 9])  # id 912: no area
        annotate(1, [5, 5, float("nan"), 9])  # not finite
        annotate(1, [500, 5, 9, 9])  # outside
        annotate(1, [50, 5, 90, 9])  # id 915: partly outside
        annotate(77, [5, 5, 9, 9])  # image not listed
        annotate(2, [5, 5, 9, 9], category=50)  # category not listed
        annotate(2, [5, 5, 9, 9], category=120)  # and out of range
        annotate(2, [5, 5, 22, 20])  # id 919: the first box of image 2 again
        for i in range(21):
            annotate(3, [1 + i, 1, 5, 5])
        content["images"][3]["file_name"] = "gone.png"
        content["images"][4]["height"] += 1
        content["images"][11]["file_name"] = content["images"][10]["file_name"]
        content["images"][11].update(
            height=content["images"][10]["height"], width=content["images"][10]["width"]
        )

    edit(root, TRAIN, change)
    (images / "000005.png").write_text("text")
    whole = (images / "000006.png").read_bytes()
    (images / "000006.png").write_bytes(whole[: len(whole) // 2])
    with Image.open(images / "000008.png") as picture:
        exif = Image.Exif()
        exif[0x0112] = 3  # half a turn, which the size does not tell
        picture.save(images / "000008.png", "JPEG", exif=exif)
    shutil.copy(images / "000000.png", images / "000009.png")
    edit(
        root,
        TRAIN,
        lambda content: content["images"][9].update(
            {k: content["images"][0][k] for k in ("height", "width")}
        ),
    )
    Image.fromarray(draw(1, 9, 40)[0]).save(images / "000007.png")
    edit(root, TRAIN, lambda content: content["images"][7].update(height=9, width=40))
    # The same pixels in another file.
    Image.open(images / "000001.png").save(root / VAL / "000002.png", compress_level=0)
    edit(root, VAL, lambda content: content["images"][2].update({"height": 66, "width": 64}))
    edit(root, VAL, lambda content: content["categories"][0].update(name="violet"))


FOUND_IN_TRAIN = {
    ("box without area", "000000.png", "1/912"),
    ("box not finite", "000000.png", "1/913"),
    ("box outside image", "000000.png", "1/914"),
    ("box partly outside", "000000.png", "1/915"),
    ("image not listed", f"instances_{TRAIN}.json", "77/916"),
    ("category not listed", "000001.png", "2/917"),
    ("category not listed", "000001.png", "2/918"),
    ("category out of range", "000001.png", "2/"),
    ("box twice", "000001.png", "2/"),
    ("more objects than queries", "000002.png", "3/"),
    ("image absent", "gone.png", "4/"),
    ("size differs", "000004.png", "5/"),
    ("image unreadable", "000005.png", "6/"),
    ("image unreadable", "000006.png", "7/"),
    ("box partly outside", "000007.png", "8/907"),
    ("rotated by EXIF", "000008.png", "9/"),
    ("duplicate image", "000009.png", "10/"),
    ("duplicate image", "000010.png", "12/"),
    ("file name twice", "000010.png", "12/"),
    ("category without boxes", f"instances_{TRAIN}.json", "/"),
}


def test_finds_each_planted_fault_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = write_coco(tmp_path / "coco", train=12, val=5)
    plant_faults(root)
    started = []

    class CountingPool(check_dataset.ProcessPoolExecutor):
        def __init__(self, num_workers: int, **options) -> None:
            started.append(num_workers)
            super().__init__(num_workers, **options)

    monkeypatch.setattr(check_dataset, "CHUNK", 5)
    monkeypatch.setattr(check_dataset, "ProcessPoolExecutor", CountingPool)
    status, lines = check(
        "--coco_path",
        root,
        "--output_dir",
        tmp_path / "out",
        "--num_queries",
        20,
        "--num_workers",
        100,
    )
    assert status == 1
    assert started == [2, 1], "no more workers than chunks of files"
    found = problems(tmp_path / "out")
    assert {
        (kind, file, ids) for kind, split, file, ids in found if split == "train"
    } == FOUND_IN_TRAIN
    in_val = {(kind, file) for kind, split, file, _ in found if split == "val"}
    assert {("shared image", "000002.png"), ("classes differ", f"instances_{VAL}.json")} <= in_val
    assert {kind for kind, _ in in_val} <= {"shared image", "classes differ", "box partly outside"}
    table = "\n".join(lines)
    for kind in {kind for kind, *_ in found}:
        assert KINDS[kind].meaning in table
    assert "11 train images, 5 val images: 13 problems, 9 warnings" in table


def test_dataset_that_training_refuses_is_checked(tmp_path: Path) -> None:
    """Missing validation images would stop an evaluation. With a truncated file the other split is still checked."""
    root = write_coco(tmp_path / "coco")
    (root / VAL / "000001.png").unlink()
    status, _ = check("--coco_path", root, "--output_dir", tmp_path / "a")
    assert status == 1
    assert problems(tmp_path / "a") == {("image absent", "val", "000001.png", "502/")}
    file = root / "annotations" / f"instances_{TRAIN}.json"
    file.write_text(file.read_text()[:500])
    status, lines = check("--coco_path", root, "--output_dir", tmp_path / "b")
    assert status == 1
    assert {row[:2] for row in problems(tmp_path / "b")} == {
        ("unusable", "train"),
        ("image absent", "val"),
    }
    assert any("is not valid JSON" in line and "2 val images: 2 problems" in line for line in lines)


def test_unlabelled_images(tmp_path: Path) -> None:
    images = write_images(tmp_path / "photos")
    assert check("--imagenet_path", images)[0] == 0
    (images / "bad.jpg").write_text("text")
    shutil.copy(images / "000.png", images / "copy.png")
    status, _ = check("--imagenet_path", images, "--output_dir", tmp_path / "out")
    assert status == 1
    assert problems(tmp_path / "out") == {
        ("image unreadable", "train", "bad.jpg", "/"),
        ("duplicate image", "train", "copy.png", "/"),
    }
    assert (tmp_path / "out" / "dataset.png").exists()


def test_custom_dataset(tmp_path: Path) -> None:
    """One split is enough; category ids may be large."""
    root = write_coco(tmp_path / "coco")
    file = root / "annotations" / f"instances_{TRAIN}.json"

    def large_ids(content: dict) -> None:
        for key, records in (
            ("id", content["categories"]),
            ("category_id", content["annotations"]),
        ):
            for record in records:
                record[key] += 5000

    edit(root, TRAIN, large_ids)
    flags = [
        "--dataset_file",
        "custom",
        "--train_images",
        root / TRAIN,
        "--train_annotations",
        file,
    ]
    assert check(*flags)[0] == 0
    edit(root, TRAIN, lambda content: content["annotations"][0].update(category_id=7))
    status, _ = check(*flags, "--output_dir", tmp_path / "out")
    assert status == 1
    assert problems(tmp_path / "out") == {("category not listed", "train", "000000.png", "1/1")}


def test_reports_are_not_overwritten(tmp_path: Path) -> None:
    images = write_images(tmp_path / "photos")
    out = tmp_path / "out"
    out.mkdir()
    (out / "problems.csv").write_text("mine")
    status, lines = check("--imagenet_path", images, "--output_dir", out)
    assert status == 1
    assert lines == [
        f"error: --output_dir {out} already has problems.csv: choose another folder, or add --overwrite"
    ]
    assert (out / "problems.csv").read_text() == "mine"
    assert check("--imagenet_path", images, "--output_dir", out, "--overwrite")[0] == 0
    assert (out / "problems.csv").read_text().startswith("severity,kind")


def test_flags(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert check("--coco_pth", tmp_path)[0] == 2
    assert "did you mean --coco_path?" in capsys.readouterr().err
    status, lines = check("--coco_path", tmp_path / "none")
    assert status == 1
    assert any("none is not a folder" in line for line in lines)


def test_digest_depends_on_pixels_and_shape(tmp_path: Path) -> None:
    """It does not depend on the file format. Equal bytes in another shape are another image."""
    pixels = draw(1, 40, 60)[0]
    Image.fromarray(pixels).save(tmp_path / "a.png")
    Image.fromarray(pixels).save(tmp_path / "a.bmp")
    Image.fromarray(pixels.reshape(60, 40, 3)).save(tmp_path / "b.png")
    a, same, other = (inspect_image(str(tmp_path / name)) for name in ("a.png", "a.bmp", "b.png"))
    assert a.digest == same.digest != other.digest
    assert a.size_hw == (40, 60)
    assert not is_same_file(str(tmp_path / "a.png"), str(tmp_path / "gone.png"))


def test_run_records_the_data_check(tmp_path: Path) -> None:
    root = write_coco(tmp_path / "coco", empty=(1,))
    edit(root, TRAIN, lambda content: content["annotations"][0].update(bbox=[1, 1, 0, 5]))
    fine_tune("--coco_path", root, "--output_dir", tmp_path / "out", "--epochs", 1)
    record = json.loads((tmp_path / "out" / "args.json").read_text())["data_check"]
    assert record["train"]["found"] == {"box without area": 1}
    assert record["train"]["images_without_objects"] == 1
    assert record["val"]["images"] == 3
    assert record["warnings"] == []


def large_dataset(images: int, first_id: int, folder: Path) -> CocoDetection:
    """A labelled dataset with 7 boxes per image. All images are the same file."""
    corners = np.random.default_rng(0).uniform(0, 20, (images * 7, 2))
    annotations = Annotations(
        source="large.json",
        file_names=PackedStrings(["one.png"] * images),
        image_ids=np.arange(first_id, first_id + images),
        sizes_hw=np.full((images, 2), 40),
        offsets=np.arange(images + 1) * 7,
        boxes_xyxy_abs=np.column_stack([corners, corners + 10]).astype(np.float32),
        labels=np.ones(images * 7, dtype=np.int64),
        areas=np.full(images * 7, 100, dtype=np.float32),
        class_names={1: "thing"},
    )
    return CocoDetection(
        str(folder), annotations, lambda image, target, rng: (image, target), num_classes=2
    )


def test_startup_checks_are_fast(tmp_path: Path) -> None:
    """On a dataset of COCO's size, 118,000 images and 826,000 boxes, they take about 0.3 seconds on one core."""
    Image.new("RGB", (40, 40)).save(tmp_path / "one.png")
    train, val = large_dataset(118_000, 0, tmp_path), large_dataset(5_000, 500_000, tmp_path)
    args = resolve(check_dataset.parse([]))
    start = time.process_time()
    record = run_startup_checks(train, val, args)
    assert time.process_time() - start < 4
    assert record["train"]["boxes"] == 826_000
    assert any(line.startswith("shared image: 5000 ") for line in record["warnings"])


@pytest.mark.parametrize("name", ["$$", "100 \ud83d", "安全帽"])
def test_unusual_class_names_are_drawn(name: str, tmp_path: Path) -> None:
    """Not as a formula, and without a warning for each character that matplotlib's font lacks."""
    root = write_coco(tmp_path / "coco", train=2, val=2)
    for split in (TRAIN, VAL):
        edit(root, split, lambda content: content["categories"][0].update(name=name))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        _, lines = check("--coco_path", root, "--output_dir", tmp_path / "check")
    assert "dataset.png" in lines[-1]
    assert name in json.loads((tmp_path / "check" / "check.json").read_text())["train"]["classes"]


def test_masks(tmp_path: Path) -> None:
    """Each planted fault of a segmentation is found with its annotation, only with --masks, and nothing else."""
    root = write_coco(tmp_path / "coco")

    def plant(content: dict) -> None:
        for item in content["annotations"]:
            x, y, w, h = item["bbox"]
            item["segmentation"] = [[x, y, x + w, y, x + w, y + h, x, y + h]]
        image = content["images"][0]
        size, pixels = [image["height"], image["width"]], image["height"] * image["width"]
        faults = {
            901: {"size": size[::-1], "counts": [pixels]},
            902: {"size": size, "counts": [pixels]},
            903: [[40, 40, 60, 40, 60, 55]],
            904: [],
            905: [[1, 2, 3, 4]] * 40,
            906: {"size": size, "counts": "abc"},
        }
        for number, (annotation_id, value) in enumerate(faults.items()):
            box = {"bbox": [1 + number, 2, 8, 9], "category_id": 1, "segmentation": value}
            content["annotations"].append({"id": annotation_id, "image_id": image["id"], **box})

    edit(root, TRAIN, plant)
    edit(
        root,
        VAL,
        lambda content: [a.update(segmentation=[a["bbox"] * 2]) for a in content["annotations"]],
    )
    status, _ = check("--coco_path", root, "--output_dir", tmp_path / "plain")
    assert status == 0
    assert not problems(tmp_path / "plain")

    status, lines = check("--coco_path", root, "--masks", "--output_dir", tmp_path / "out")
    assert status == 1
    found = {key for key in problems(tmp_path / "out") if key[1] == "train"}
    first = "000000.png"
    assert found == {
        ("segmentation broken", "train", first, "1/901"),
        ("mask empty", "train", first, "1/902"),
        ("mask differs from box", "train", first, "1/903"),
        ("no segmentation", "train", first, "1/904"),
        ("no segmentation", "train", first, "1/905"),
        ("segmentation broken", "train", first, "1/906"),
    }
    [row] = [
        line for line in lines[-2].splitlines() if line.startswith("problem  segmentation broken")
    ]
    assert row.split()[3] == "2"
    assert "annotation 901" in lines[-2]


def test_masks_are_checked_by_worker_processes(tmp_path: Path) -> None:
    root = write_coco(tmp_path / "coco", train=2 * check_dataset.CHUNK, val=1)
    for split in (TRAIN, VAL):
        edit(
            root,
            split,
            lambda content: [a.update(segmentation=[[1, 1, 2]]) for a in content["annotations"]],
        )
        edit(root, split, lambda content: content["annotations"][-1].update(segmentation="x"))
    status, _ = check(
        "--coco_path", root, "--masks", "--num_workers", 2, "--output_dir", tmp_path / "out"
    )
    assert status == 1
    broken = [key for key in problems(tmp_path / "out") if key[0] == "segmentation broken"]
    assert {key[1] for key in broken} == {"train", "val"}
    assert len(broken) == 2


def test_panoptic_data(tmp_path: Path) -> None:
    root = write_panoptic(tmp_path)
    flags = ["--dataset_file", "coco_panoptic", "--coco_path", root / "coco"]
    flags += ["--coco_panoptic_path", root / "panoptic", "--num_queries", 100]
    shutil.rmtree(root / "coco" / VAL)
    (root / "coco" / TRAIN).rename(
        root / "coco" / VAL
    )  # the splits share their images; check one of them
    pngs = root / "panoptic" / f"panoptic_{VAL}"
    check(*flags, "--output_dir", tmp_path / "clean")
    kinds = {key[0] for key in problems(tmp_path / "clean")}
    assert kinds == {"unusable"}, "of the training images, which are not there"

    def names(image_id: int) -> tuple[str, str]:
        return f"{image_id:012d}.jpg", f"{image_id}/"

    ids = draw_ids(7)
    ids[0, 0] = 77
    ids[ids == CAR] = 0
    write_png(pngs / "000000000007.png", ids)
    write_png(pngs / "000000000008.png", draw_ids(8)[:, :30])
    (pngs / "000000000009.png").unlink()
    moved = draw_ids(10)
    moved[5:12, 4:9] = 0
    moved[5:12, 30:34] = PERSON
    write_png(pngs / "000000000010.png", moved)
    status, _ = check(*flags, "--output_dir", tmp_path / "out")
    assert status == 1
    found = {key for key in problems(tmp_path / "out") if key[1] == "val"}
    assert found == {
        ("segment not listed", "val", *names(7)),
        ("segment without pixels", "val", names(7)[0], f"7/{CAR}"),
        ("panoptic PNG unusable", "val", *names(8)),
        ("no panoptic segments", "val", *names(9)),
        ("mask differs from box", "val", names(10)[0], f"10/{PERSON}"),
    }
