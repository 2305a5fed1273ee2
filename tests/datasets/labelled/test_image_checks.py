"""Findings in image files: those of the sample at the start of a run, and what training does with the same files."""

import re
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from datasets.images.image_folder import ImageFolder
from datasets.images.image_info import ImageInfo, inspect_header, inspect_image
from datasets.images.packed_strings import PackedStrings
from datasets.labelled.annotations import Annotations
from datasets.labelled.checks import image_files
from datasets.labelled.checks.image_files import sample_images
from datasets.labelled.checks.shared_images import same_files
from datasets.labelled.checks.split import Split
from datasets.labelled.checks.startup import probe_images, run_startup_checks
from datasets.labelled.checks.table import run_checks
from datasets.labelled.coco import CocoDetection
from datasets.sample import BadImageError, SampleDataset, TooFewProposalsError
from tests.tiny import captured_log, draw, write_custom_dataset
from util.errors import UserError
from util.random_state import SampleRNG
from util.runs.meters import BadImages
from util.settings import settings

UPRIGHT = draw(0, 60, 80)[0]
BOX = [10, 20, 40, 50]  # (x0, y0, x1, y1) in the upright image


def make_dataset(
    folder: Path, files: list[str], sizes_hw: list[tuple[int, int]] | None = None
) -> CocoDetection:
    """A labelled dataset with the same box in each file."""
    count = len(files)
    annotations = Annotations(
        source="boxes.json",
        file_names=PackedStrings(files),
        image_ids=np.arange(count),
        sizes_hw=np.array(sizes_hw or [(0, 0)] * count),
        offsets=np.arange(count + 1),
        boxes_xyxy_abs=np.array([BOX] * count, dtype=np.float32),
        labels=np.zeros(count, dtype=np.int64),
        areas=np.full(count, 900, dtype=np.float32),
        class_names={0: "thing"},
    )
    return CocoDetection(
        str(folder), annotations, lambda image, target, rng: (image, target), num_classes=1
    )


def save_rotated(path: Path, orientation: int, seed: int = 0, height: int = 60) -> None:
    """Save an image as a camera held in another way does."""
    turn = {3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90}[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(draw(seed, height, 80)[0]).transpose(turn).save(path, exif=exif)


def startup_lines(dataset: CocoDetection) -> tuple[list[str], list[str]]:
    """Return (warnings, lines of the log)."""
    with captured_log() as lines:
        record = run_startup_checks(dataset, None, settings())
    return record["warnings"], lines


def kinds(split: Split) -> dict[str, int]:
    """Return kind -> number of findings of `tools/check_dataset.py`, without those about unlisted sizes."""
    split.num_queries = split.num_classes = 9
    split.image_infos = [
        inspect_image(split.file(i), split.exif, split.listed_hw(i))
        for i in range(len(split.images))
    ]
    found = Counter(finding.kind for finding in run_checks([split]))
    del found["size not listed"]  # tests/datasets/labelled/test_annotation_values.py has it
    return dict(found)


def test_rotated_images_whose_listed_size_is_the_rotated_one_are_rotated(tmp_path: Path) -> None:
    save_rotated(tmp_path / "a.png", 6)
    dataset = make_dataset(tmp_path, ["a.png"], [(60, 80)])
    image, target = dataset.load(0, SampleRNG(0))
    assert np.array_equal(image.permute(1, 2, 0).numpy(), UPRIGHT)
    assert target["boxes"].tolist() == [BOX]
    assert torch.equal(dataset.read(0), image)

    warned, lines = startup_lines(dataset)
    assert warned == []
    assert any("are rotated as their EXIF orientation says" in line for line in lines)
    assert kinds(Split("train", dataset)) == {"EXIF orientation": 1}


def test_rotated_images_whose_listed_size_is_the_stored_one_are_not(tmp_path: Path) -> None:
    """The sizes of these decide for the ones that half a turn leaves as they are."""
    save_rotated(tmp_path / "a.png", 6)
    save_rotated(tmp_path / "b.png", 3, seed=1)
    dataset = make_dataset(tmp_path, ["a.png", "b.png"], [(80, 60), (60, 80)])
    assert dataset.load(0, SampleRNG(0))[0].shape == (3, 80, 60)
    assert startup_lines(dataset)[0] == []
    assert kinds(Split("train", dataset)) == {"EXIF orientation": 2}


def test_orientations_that_sizes_do_not_decide_are_warned_of(tmp_path: Path) -> None:
    save_rotated(tmp_path / "half.png", 3)
    save_rotated(tmp_path / "unknown.png", 6, seed=1)
    save_rotated(tmp_path / "square.png", 6, seed=2, height=80)
    save_rotated(tmp_path / "known.png", 6, seed=3)
    files = ["half.png", "unknown.png", "square.png", "known.png"]
    dataset = make_dataset(tmp_path, files, [(60, 80), (0, 0), (80, 80), (60, 80)])
    warned, _ = startup_lines(dataset)
    assert len(warned) == 1
    assert warned[0].startswith("rotated by EXIF: 3 of 4 images that were tried (used as stored")
    assert "--exif" in warned[0]
    assert "half.png, image 0, orientation 3; the sizes of 1 others say --exif apply" in warned[0]
    assert kinds(Split("train", dataset)) == {"rotated by EXIF": 3, "EXIF orientation": 1}

    dataset.exif = "apply"
    assert startup_lines(dataset)[0] == []
    assert np.array_equal(dataset.read(0).permute(1, 2, 0).numpy(), UPRIGHT)
    assert kinds(Split("train", dataset)) == {"EXIF orientation": 4}


def test_forced_orientation_that_contradicts_the_sizes_is_a_bad_image(tmp_path: Path) -> None:
    save_rotated(tmp_path / "a.png", 6)
    dataset = make_dataset(tmp_path, ["a.png"], [(60, 80)])
    dataset.exif = "ignore"
    with pytest.raises(BadImageError, match="or omit --exif ignore"):
        dataset.load(0, SampleRNG(0))
    assert kinds(Split("train", dataset)) == {"EXIF orientation": 1, "size differs": 1}


def test_messages_on_swapped_width_and_height(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        Image.fromarray(draw(0, 60, 80)[0]).save(tmp_path / name)
    dataset = make_dataset(tmp_path, ["a.png", "b.png"], [(80, 60), (60, 80)])
    (warning,) = probe_images(dataset, "val")
    assert "a.png: 80 x 60 pixels, but image 0 is 60 x 80" in warning
    assert warning.endswith(
        "(rotated, or are width and height swapped?); their objects count as missed"
    )
    dataset = make_dataset(tmp_path, ["a.png", "b.png"], [(80, 60), (80, 60)])
    with pytest.raises(UserError, match="check the image folder and the listed sizes"):
        probe_images(dataset)


def test_images_without_boxes_are_used_as_stored_without_a_warning(tmp_path: Path) -> None:
    save_rotated(tmp_path / "a.png", 6)
    split = Split("train", ImageFolder(str(tmp_path)))
    assert kinds(split) == {"EXIF orientation": 1}


def test_images_without_content_are_warned_of(tmp_path: Path) -> None:
    Image.new("RGB", (80, 60), (200, 10, 10)).save(tmp_path / "red.png")
    Image.new("RGB", (80, 60), (200, 10, 10)).save(tmp_path / "same.png")
    Image.fromarray((UPRIGHT[..., 0] % 3).astype(np.uint8)).save(tmp_path / "mask.png")
    Image.fromarray(UPRIGHT[..., 0].astype(np.uint16) * 16).save(tmp_path / "deep.png")
    rgba = Image.fromarray(UPRIGHT)
    rgba.putalpha(Image.fromarray(UPRIGHT[..., 1]))
    rgba.save(tmp_path / "clear.png")
    Image.fromarray(UPRIGHT).save(tmp_path / "fine.png")
    files = ["red.png", "same.png", "mask.png", "deep.png", "clear.png", "fine.png"]
    dataset = make_dataset(tmp_path, files)
    warned, _ = startup_lines(dataset)
    for line, start in zip(
        warned,
        ["one color: 3 of 6", "fewer than 16 bits: 1 of 6", "transparent: 1 of 6"],
        strict=True,
    ):
        assert line.startswith(start)
    assert "red.png, image 0, pixels differ by at most 0 of 255" in warned[0]
    assert "deep.png, image 3, 12 bits" in warned[1]
    assert kinds(Split("train", dataset)) == {
        "one color": 3,
        "fewer than 16 bits": 1,
        "transparent": 1,
    }


def test_thermal_images_with_an_offset_are_warned_of(tmp_path: Path) -> None:
    """Scaled by their largest value, they are almost flat, though a dead and a hot pixel span the whole scale."""
    ramp = np.linspace(0, 1, 60 * 80).reshape(60, 80)
    for name, low, high in (("narrow", 30000, 32000), ("wide", 20000, 32000)):
        values = (low + (high - low) * ramp).astype(np.uint16)
        values[0, 0], values[-1, -1] = 0, 32767
        Image.fromarray(values).save(tmp_path / f"{name}.png")
    dataset = make_dataset(tmp_path, ["wide.png", "narrow.png"])
    warned, _ = startup_lines(dataset)
    (line,) = [line for line in warned if line.startswith("narrow range")]
    assert line.startswith("narrow range: 1 of 2 images that were tried (16-bit gray, ")
    assert "save it as 8 bit" in line
    assert re.search(r"narrow.png, image 1, values use [3-7] % of the range of 16 bits$", line)
    assert kinds(Split("train", dataset))["narrow range"] == 1


def test_animations_are_counted(tmp_path: Path) -> None:
    frames = [Image.fromarray(draw(seed, 60, 80)[0]) for seed in range(2)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert kinds(Split("train", make_dataset(tmp_path, ["a.gif"]))) == {"several frames": 1}


def test_sample_is_small_and_bounded_in_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.fromarray(UPRIGHT).save(tmp_path / "a.png")
    split = Split("train", make_dataset(tmp_path, ["a.png"] * 1000))
    infos = sample_images(split)
    assert {0, 999} <= set(infos)
    assert len(infos) <= 8 + 128
    assert sum(bool(info.digest) for info in infos.values()) == 8
    monkeypatch.setattr(image_files, "SAMPLE_SECONDS", -1)
    assert sample_images(split) == {}


def test_sample_reads_each_header_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [f"{i:03}.png" for i in range(200)]
    for file in files:
        Image.fromarray(UPRIGHT).save(tmp_path / file)
    read: list[str] = []

    def counted(file: str, *args: object) -> ImageInfo:
        read.append(file)
        return inspect_header(file, *args)

    monkeypatch.setattr("datasets.labelled.checks.split.inspect_header", counted)
    monkeypatch.setattr(image_files, "SAMPLE_SECONDS", 60)
    # The last 100 do not list their size: the sample has some of them.
    split = Split("train", make_dataset(tmp_path, files, [(60, 80)] * 100 + [(0, 0)] * 100))
    split.sample_infos = sample_images(split)
    in_sample = [index for index in split.sample_infos if index >= 100]
    assert split.sizes_hw.all(1).sum() >= 100 + len(in_sample)
    assert read == [], "the sample has enough sizes"

    split = Split("train", make_dataset(tmp_path, files, [(60, 80)] * 150 + [(0, 0)] * 50))
    split.sample_infos = sample_images(split)
    assert split.sizes_hw.all(1).sum() > 150 + 32
    assert len(read) == len(set(read)) > 0
    assert not {Path(file).name for file in read} & {files[i] for i in split.sample_infos}


def test_validation_images_in_the_training_set_are_found_under_other_names(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "val").mkdir()
    for i in range(6):
        # Files without compression all have the same size.
        Image.fromarray(draw(i, 60, 80)[0]).save(tmp_path / "train" / f"{i}.bmp")
    for i, number in enumerate((4, 50, 51)):
        Image.fromarray(draw(number, 60, 80)[0]).save(tmp_path / "val" / f"other_{i}.bmp")
    train = make_dataset(tmp_path / "train", [f"{i}.bmp" for i in range(6)])
    val = make_dataset(tmp_path / "val", [f"other_{i}.bmp" for i in range(3)])
    paths = Split("train", train).paths, Split("val", val).paths
    assert same_files(*paths) == [(4, 0)]
    assert same_files(*paths, {0}) == []
    with captured_log():
        warned = run_startup_checks(train, val, settings())["warnings"]
    assert len(warned) == 1
    assert warned[0].startswith("shared image: 1 ")
    assert "other_0.bmp" in warned[0]
    assert "4.bmp" in warned[0]


def test_copies_with_other_pixels_are_found_by_the_tool(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "val").mkdir()
    photos = [photo(i) for i in range(12)]
    for i, image in enumerate(photos[:8]):
        image.save(tmp_path / "train" / f"{i}.png")
    photos[1].save(tmp_path / "val" / "0.jpg", quality=70)
    photos[2].resize((100, 100)).save(tmp_path / "val" / "1.jpg")
    photos[3].save(tmp_path / "val" / "2.png", compress_level=0)  # the same pixels
    for i, image in enumerate(photos[8:], start=3):
        image.save(tmp_path / "val" / f"{i}.jpg")
    Image.new("RGB", (80, 60), "navy").save(tmp_path / "train" / "8.png")
    Image.new("RGB", (80, 60), "navy").save(tmp_path / "val" / "7.jpg")
    train = Split("train", make_dataset(tmp_path / "train", [f"{i}.png" for i in range(9)]), 9, 9)
    names = ["0.jpg", "1.jpg", "2.png", *(f"{i}.jpg" for i in range(3, 8))]
    val = Split("val", make_dataset(tmp_path / "val", names), 9, 9)
    for split in (train, val):
        split.image_infos = [inspect_image(split.file(i)) for i in range(len(split.images))]
    by_kind: dict[str, list[str]] = {}
    for finding in run_checks([train, val]):
        by_kind.setdefault(finding.kind, []).append(str(finding))
    assert len(by_kind["shared image"]) == 1
    first, second = by_kind["similar image"]
    assert first.startswith(str(tmp_path / "val" / "0.jpg"))
    assert first.endswith("1.png, image 1")
    assert second.startswith(str(tmp_path / "val" / "1.jpg"))
    assert second.endswith("2.png, image 2")


def photo(seed: int) -> Image.Image:
    """An image with smooth areas of random colors."""
    colors = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(colors).resize((160, 120), Image.Resampling.BICUBIC)


def test_evaluation_finds_training_images_of_its_checkpoint(tmp_path: Path) -> None:
    """The training set of a resumed run is known from its settings, if its files are still there."""
    root = write_custom_dataset(tmp_path / "own")
    shutil.copy(root / "photos" / "a" / "000001.png", root / "held_out" / "000002.png")
    flags = {name: str(root / path) for name, path in PATHS.items()}
    val = make_dataset(root / "held_out", [f"00000{i}.png" for i in range(3)])
    known = settings(dataset_file="custom", **flags)
    with captured_log():
        (warning,) = run_startup_checks(None, val, known)["warnings"]
    assert warning.startswith("shared image: 1 ")
    assert "same as " + str(root / "photos" / "a" / "000001.png") in warning
    (root / "train.json").unlink()
    with captured_log():
        assert run_startup_checks(None, val, known)["warnings"] == []


PATHS = {
    "train_images": "photos",
    "train_annotations": "train.json",
    "val_images": "held_out",
    "val_annotations": "val.json",
}


class BoxlessDataset(SampleDataset):
    """Images 1 and 2 of 8 have too few proposals."""

    def __len__(self) -> int:
        return 8

    def path(self, index: int) -> str:
        return f"{index}.jpg"

    def load(self, index: int, rng: SampleRNG) -> tuple[torch.Tensor, dict]:
        if index in (1, 2):
            raise TooFewProposalsError(0, 1)
        return torch.zeros(3, 4, 4), {}


def test_images_with_too_few_proposals_are_counted_apart() -> None:
    dataset = BoxlessDataset(0)
    (warning,) = probe_images(dataset)
    assert warning.startswith(
        "2 of 8 images that were tried have too few proposals, the first is 1.jpg: too few proposals (0, "
    )
    bad_images = BadImages()
    with captured_log() as lines:
        for _ in range(2):
            bad_images.add(dataset[1][1]["problems"])
        bad_images.warn_of_epoch(0, 0)
    assert (bad_images.count, bad_images.boxless_count) == (0, 4)
    assert lines[0].startswith("skipped 1.jpg: too few proposals")
    assert lines[1].startswith("4 images with too few proposals were replaced")
    assert len(lines) == 2
