"""Unlabelled images: folder trees, damaged and unusual files, query patches."""

import io
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import datasets.sample as sample_module
from datasets import build_dataset
from datasets.images.image_folder import ImageFolder, image_extensions, read_image
from datasets.images.image_info import inspect_image
from datasets.images.packed_strings import PackedStrings
from datasets.images.pixels import ROTATED, UNDECIDED
from datasets.proposals import build_proposals
from datasets.sample import BadImageError
from tests.tiny import proposal_settings
from util.errors import UserError
from util.random_state import SampleRNG
from util.settings import PRETRAIN, Settings, settings
from util.settings.registry import PROPOSALS


def make_image(seed: int = 0, width: int = 40, height: int = 30, mode: str = "RGB") -> Image.Image:
    pixels = np.random.RandomState(seed).randint(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def save(path: Path, **settings) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    make_image(**settings).save(path)
    return path


def pretext_args(path: Path, **changes) -> Settings:
    return settings(PRETRAIN).replace(
        **{
            "seed": 3,
            "num_workers": 0,
            "batch_size": 2,
            "device": "cpu",
            "dataset_file": "coco",
            "coco_path": None,
            "data_root": None,
            "imagenet_path": str(path),
            "pretext": "random_query_patch",
            "proposals": "random",
            "num_patches": 4,
            "patch_size": 24,
            "image_size": 48,
            "max_size": None,
            "train_images": None,
            **changes,
        }
    )


def test_folder_tree_in_sorted_order(tmp_path: Path) -> None:
    for name in ("b/z.PNG", "b/a.jpeg", "a/deep/er/x.webp", "c.JPG"):
        save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "._c.JPG").write_bytes(b"resource fork")
    folder = ImageFolder(str(tmp_path))
    names = [os.path.relpath(folder.path(i), tmp_path) for i in range(len(folder))]
    assert names == ["a/deep/er/x.webp", "b/a.jpeg", "b/z.PNG", "c.JPG"]
    assert folder.skipped == 2


def test_symbolic_links_are_followed_but_not_in_cycles(tmp_path: Path) -> None:
    save(tmp_path / "elsewhere" / "one.png")
    root = tmp_path / "root"
    root.mkdir()
    (root / "linked").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (root / "file.png").symlink_to(tmp_path / "elsewhere" / "one.png")
    (root / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "elsewhere" / "back").symlink_to(root, target_is_directory=True)
    (root / "self").symlink_to(root, target_is_directory=True)
    folder = ImageFolder(str(root))
    assert [os.path.relpath(folder.path(i), root) for i in range(len(folder))] == [
        "file.png",
        "gone.png",
        "linked/one.png",
    ]
    with pytest.raises(BadImageError, match="no such file"):  # so it is reported and counted
        read_image(folder.path(1))


def test_links_that_can_not_be_followed(tmp_path: Path) -> None:
    """A cycle of links, like a missing permission, is an error other than "no such file"."""
    save(tmp_path / "a.png")
    (tmp_path / "cycle").symlink_to(tmp_path / "cycle")
    (tmp_path / "cycle.png").symlink_to(tmp_path / "cycle.png")
    folder = ImageFolder(str(tmp_path))
    assert (len(folder), folder.skipped) == (2, 1)
    with pytest.raises(BadImageError, match="can't be decoded"):
        read_image(folder.path(1))


def test_list_of_files(tmp_path: Path) -> None:
    save(tmp_path / "images" / "a.png")
    absolute = save(tmp_path / "b.png")
    (tmp_path / "list.txt").write_text(f"# two images\nimages/a.png\n\n{absolute}\n")
    folder = ImageFolder(str(tmp_path / "list.txt"))
    assert [read_image(folder.path(i)).shape for i in range(len(folder))] == [(3, 30, 40)] * 2
    (tmp_path / "wrong.txt").write_text("images/none.png\n")
    with pytest.raises(UserError, match="first entry images/none.png does not exist"):
        ImageFolder(str(tmp_path / "wrong.txt"))
    (tmp_path / "windows.txt").write_bytes(b"\xef\xbb\xbfimages/a.png\r\nimages/a.png\r\n")
    assert ImageFolder(str(tmp_path / "windows.txt")).name(1) == "images/a.png"
    (tmp_path / "folders.txt").write_text("images\n")
    with pytest.raises(BadImageError, match=r"can't be opened \(is a directory\)"):
        read_image(ImageFolder(str(tmp_path / "folders.txt")).path(0))


@pytest.mark.parametrize(
    ("first", "second", "encoding"),
    [
        ("images/a 1.png", "images/b.png", "utf-16"),
        ("images/a 1.png", "images/b.png", "utf-8-sig"),
        ("images\\a 1.png", "images\\b.png", "utf-8"),
        ('"images/a 1.png"', '"images/b.png"', "utf-8"),
        ("images/a 1.png 0", "images/b.png 1", "utf-8"),
        ("images/a 1.png,0", "images/b.png,1", "utf-8"),
        ('"images/a 1.png";cat;3', '"images/b.png";dog;4', "utf-8"),
        ("images\\a 1.png\t0", "images\\b.png\t1", "utf-8"),
        ("images/a%201.png", "images/b.png", "utf-8"),
    ],
)
def test_lists_of_other_programs(first: str, second: str, encoding: str, tmp_path: Path) -> None:
    for name in ("a 1.png", "b.png"):
        (tmp_path / "images").mkdir(exist_ok=True)
        (tmp_path / "images" / name).touch()
    (tmp_path / "list.txt").write_bytes(f"{first}\r\n{second}\r\n".encode(encoding))
    folder = ImageFolder(str(tmp_path / "list.txt"))
    assert [folder.name(i) for i in range(len(folder))] == ["images/a 1.png", "images/b.png"]


@pytest.mark.parametrize("entry", ["images/A.PNG", "images/a.jpg", "images\\a.jpeg"])
def test_error_of_a_list_names_a_similar_file(entry: str, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").touch()
    (tmp_path / "list.txt").write_text(entry)
    with pytest.raises(UserError, match=r"does not exist.*; did you mean a.png\?$"):
        ImageFolder(str(tmp_path / "list.txt"))


def test_missing_and_empty_folders(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere does not exist"):
        ImageFolder(str(tmp_path / "nowhere"))
    (tmp_path / "readme.md").write_text("nothing")
    with pytest.raises(UserError, match=r"contains no image \(1 other files\)"):
        ImageFolder(str(tmp_path))


def test_fingerprint_changes_with_the_files(tmp_path: Path) -> None:
    for name in ("one/a.png", "one/b.png", "two/a.png", "two/b.png"):
        save(tmp_path / name)
    first, second = (ImageFolder(str(tmp_path / name)).fingerprint() for name in ("one", "two"))
    assert first == second
    save(tmp_path / "two" / "c.png")
    assert ImageFolder(str(tmp_path / "two")).fingerprint() != first


def test_known_extensions() -> None:
    assert {
        ".jpg",
        ".jpeg",
        ".png",
        ".webp",
        ".bmp",
        ".tif",
        ".tiff",
        ".gif",
        ".ppm",
    } <= image_extensions()
    assert not {".mpg", ".pdf", ".h5", ".txt"} & image_extensions()


MODES = [("L", "png"), ("P", "png"), ("CMYK", "jpg"), ("RGBA", "png"), ("1", "png"), ("LA", "png")]


@pytest.mark.parametrize(("mode", "extension"), MODES)
def test_all_modes_become_rgb(tmp_path: Path, mode: str, extension: str) -> None:
    image = make_image().convert("L").convert(mode) if mode == "LA" else make_image(mode=mode)
    image.save(tmp_path / f"image.{extension}")
    pixels = read_image(str(tmp_path / f"image.{extension}"))
    assert (pixels.dtype, pixels.shape) == (torch.uint8, (3, 30, 40))
    with Image.open(tmp_path / f"image.{extension}") as again:
        assert np.array_equal(pixels.permute(1, 2, 0).numpy(), np.asarray(again.convert("RGB")))


def test_16_bit_gray_keeps_its_range(tmp_path: Path) -> None:
    values = np.linspace(0, 65535, 30 * 40).astype(np.uint16).reshape(30, 40)
    Image.fromarray(values).save(tmp_path / "deep.png")
    pixels = read_image(str(tmp_path / "deep.png"))
    assert np.array_equal(pixels[0].numpy(), values >> 8)


def test_exif_rotation_is_ignored(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    make_image().save(tmp_path / "rotated.jpg", exif=exif)
    assert read_image(str(tmp_path / "rotated.jpg")).shape == (3, 30, 40)


def test_tiff_files_are_rotated_and_the_checker_knows(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    for extension, size_hw, rotation in (("tif", (40, 30), ROTATED), ("png", (30, 40), UNDECIDED)):
        path = tmp_path / f"rotated.{extension}"
        make_image().save(path, exif=exif)
        facts = inspect_image(str(path))
        assert tuple(read_image(str(path)).shape[1:]) == facts.size_hw == size_hw
        assert (facts.orientation, facts.rotation) == (6, rotation)


def test_floating_point_images_are_bad(tmp_path: Path) -> None:
    for name, scale in (("dark.tif", 1), ("bright.tif", 1e6)):
        Image.fromarray(np.random.RandomState(0).rand(30, 40).astype(np.float32) * scale).save(
            tmp_path / name
        )
        with pytest.raises(BadImageError, match="floating-point pixels; save it as 8 or 16 bit"):
            read_image(str(tmp_path / name))
        assert inspect_image(str(tmp_path / name)).error.startswith("floating-point pixels")


@pytest.mark.parametrize("extension", ["jpg", "png", "webp", "gif", "bmp", "tif"])
def test_truncated_images_raise(tmp_path: Path, extension: str) -> None:
    buffer = io.BytesIO()
    make_image(width=200, height=200).save(
        buffer, {"jpg": "jpeg", "tif": "tiff"}.get(extension, extension)
    )
    path = tmp_path / f"half.{extension}"
    path.write_bytes(buffer.getvalue()[: len(buffer.getvalue()) // 2])
    with pytest.raises(BadImageError):
        read_image(str(path))


def test_files_that_are_no_image_or_missing(tmp_path: Path) -> None:
    (tmp_path / "text.jpg").write_text("this is text")
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "page.jpg").write_text("\n<!DOCTYPE html><title>Not found</title>")
    (tmp_path / "pointer.jpg").write_text("version https://git-lfs.github.com/spec/v1\nsize 9\n")
    for name, reason in (
        ("text.jpg", "can't be decoded .unknown image format"),
        ("empty.jpg", "can't be decoded .an empty file"),
        ("page.jpg", "can't be decoded .a web page"),
        ("pointer.jpg", "can't be decoded .a Git LFS pointer; run git lfs pull"),
        ("none.jpg", "no such file"),
    ):
        with pytest.raises(BadImageError, match=reason):
            read_image(str(tmp_path / name))


def dds_of_unknown_format() -> bytes:
    header = struct.pack("<7I44x", 124, 0x1007, 8, 8, 0, 0, 0)
    pixel_format = struct.pack("<2I4s5I", 32, 4, b"ZZZZ", 0, 0, 0, 0, 0)
    return b"DDS " + header + pixel_format + bytes(20) + bytes(256)


def test_format_that_pillow_does_not_implement_is_a_bad_image(tmp_path: Path) -> None:
    path = tmp_path / "odd.dds"
    path.write_bytes(dds_of_unknown_format())
    with pytest.raises(NotImplementedError), Image.open(path) as image:
        image.load()
    with pytest.raises(BadImageError, match="can't be decoded"):
        read_image(str(path))


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (AttributeError("first\nsecond"), BadImageError),
        (RuntimeError(), BadImageError),
        (MemoryError(), MemoryError),
    ],
)
def test_any_decoding_error_except_memory_error_is_a_bad_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, expected: type
) -> None:
    def fail(*_args, **_settings) -> None:
        raise error

    path = save(tmp_path / "a.png")
    monkeypatch.setattr(Image.Image, "convert", fail)
    with pytest.raises(expected) as caught:
        read_image(str(path))
    assert "\n" not in str(caught.value)


def test_packed_strings() -> None:
    strings = ["", "a", "ümläut", "x" * 300, ""]
    packed = PackedStrings(strings)
    assert [packed[i] for i in range(len(packed))] == strings
    assert packed.digest() != PackedStrings(["a", "", "ümläut", "x" * 300, ""]).digest()
    with pytest.raises(IndexError):
        packed[5]


def test_query_patch_sample(tmp_path: Path) -> None:
    for i in range(3):
        save(tmp_path / f"{i}.png", seed=i, width=120, height=90)
    dataset = build_dataset("train", pretext_args(tmp_path))
    image, target = dataset[(0, 1)]
    assert image.dtype == target["patches"].dtype == torch.uint8
    assert target["patches"].shape == (4, 3, 24, 24)
    assert target["boxes"].shape == (4, 4)
    assert target["labels"].tolist() == [1] * 4
    assert target["orig_size"].tolist() == [90, 120]
    assert target["size"].tolist() == list(image.shape[1:])
    assert float(target["boxes"].min()) >= 0
    assert float(target["boxes"].max()) <= 1
    again, same = dataset[(0, 1)]
    assert torch.equal(image, again)
    assert all(torch.equal(target[key], same[key]) for key in target)
    assert not torch.equal(target["boxes"], dataset[(1, 1)][1]["boxes"])
    other_seed = build_dataset("train", pretext_args(tmp_path, seed=4))
    assert not torch.equal(target["boxes"], other_seed[(0, 1)][1]["boxes"])


def test_patches_are_cropped_from_the_original_image(tmp_path: Path) -> None:
    """Without augmentation, a patch is the resized region of its box in the original image."""
    save(tmp_path / "one.png", width=200, height=100)
    dataset = build_dataset(
        "val", pretext_args(tmp_path, num_patches=1, image_size=100, max_size=200)
    )
    image, target = dataset[0]
    cx, cy, w, h = (target["boxes"][0] * torch.tensor([200, 100, 200, 100])).tolist()
    x0, y0, x1, y1 = (round(v) for v in (cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2))
    assert image.shape == (3, 100, 200)
    region = Image.open(tmp_path / "one.png").crop((x0, y0, x1, y1))
    expected = np.asarray(region.resize((24, 24), Image.Resampling.BILINEAR)).astype(int)
    patch = target["patches"][0].permute(1, 2, 0).numpy().astype(int)
    assert np.abs(patch - expected).max() <= 1


@pytest.mark.parametrize("name", [name for name in PROPOSALS if not name.endswith(":")])
def test_proposals_are_inside_the_image(name: str) -> None:
    if name != "random":
        pytest.importorskip("cv2", reason="OpenCV is not installed")
    propose = build_proposals(proposal_settings(proposals=name, num_patches=50))
    boxes = propose(torch.zeros(3, 17, 300, dtype=torch.uint8), SampleRNG(0))
    assert boxes.dtype == torch.float32
    assert bool((boxes[:, 2:] > boxes[:, :2]).all())
    assert float(boxes.min()) >= 0
    assert bool((boxes[:, 2:] <= torch.tensor([300, 17])).all())


def test_unknown_names_list_the_choices(tmp_path: Path) -> None:
    save(tmp_path / "a.png")
    with pytest.raises(UserError, match="--proposals nonsense is unknown: choose one of random"):
        build_dataset("train", pretext_args(tmp_path, proposals="nonsense"))
    with pytest.raises(
        UserError, match="--pretext nonsense is unknown: choose one of random_query_patch"
    ):
        build_dataset("train", pretext_args(tmp_path, pretext="nonsense"))
    with pytest.raises(UserError, match="--imagenet_path"):
        build_dataset("train", pretext_args(tmp_path, imagenet_path=None))


def test_bad_and_tiny_images_are_replaced_and_reported(tmp_path: Path) -> None:
    for name, size in (("a.png", 64), ("b.png", 64), ("d.png", 16)):
        save(tmp_path / name, width=64, height=size)
    (tmp_path / "c.png").write_bytes(b"broken")
    dataset = build_dataset("train", pretext_args(tmp_path))
    image, target = dataset[(0, 2)]
    assert [(os.path.basename(path), reason[:5]) for path, reason in target["problems"]] == [
        ("c.png", "can't"),
        ("d.png", "64 x "),
    ]
    assert int(target["image_id"]) == 0
    assert "problems" not in dataset[(0, 0)][1]
    # The replacement has its own random numbers, not those of the image it repeats.
    assert not torch.equal(target["boxes"], dataset[(0, 0)][1]["boxes"])


def test_too_many_bad_images_in_a_row_are_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for i in range(6):
        (tmp_path / f"{i}.png").write_bytes(b"broken")
    save(tmp_path / "z.png", width=64, height=64)
    dataset = build_dataset("train", pretext_args(tmp_path))
    assert len(dataset[0][1]["problems"]) == 6
    monkeypatch.setattr(sample_module, "MAX_CONSECUTIVE_BAD_IMAGES", 5)
    with pytest.raises(
        UserError, match=r"5 images in a row can't be used, the first is .*0\.png: can't be decoded"
    ):
        dataset[0]
