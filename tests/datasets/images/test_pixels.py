"""Pixels of image files: EXIF orientation, gray values of 16 bits, transparency, huge files and odd metadata."""

import io
import struct
import tarfile
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from datasets.images import image_folder
from datasets.images.image_folder import (
    ImageFolder,
    convert_image,
    decode_image,
    open_image,
    read_header,
)
from datasets.images.pixels import ROTATED, STORED, UNDECIDED, choose_rotation
from datasets.sample import BadImageError

UPRIGHT = np.random.RandomState(0).randint(0, 256, (30, 40, 3), dtype=np.uint8)

# EXIF orientation -> how the pixels of an upright image are stored.
STORED_AS = {
    1: UPRIGHT,
    2: UPRIGHT[:, ::-1],
    3: UPRIGHT[::-1, ::-1],
    4: UPRIGHT[::-1],
    5: UPRIGHT.swapaxes(0, 1),
    6: np.rot90(UPRIGHT, 1),
    7: UPRIGHT[::-1, ::-1].swapaxes(0, 1),
    8: np.rot90(UPRIGHT, -1),
}


def save_rotated(path: Path, orientation: int, **options) -> str:
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = np.ascontiguousarray(STORED_AS[orientation])
    Image.fromarray(pixels).save(path, exif=exif, **options)
    return str(path)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("extension", ["png", "webp", "tif"])
def test_each_orientation_is_applied_or_ignored(
    tmp_path: Path, orientation: int, extension: str
) -> None:
    lossless = {"lossless": True, "exact": True} if extension == "webp" else {}
    path = save_rotated(tmp_path / f"a.{extension}", orientation, **lossless)
    stored = STORED_AS[orientation]
    assert np.array_equal(np.asarray(open_image(path, "apply")), UPRIGHT)
    assert np.array_equal(np.asarray(open_image(path, "ignore")), stored)
    # Without the flag, the listed size decides where it can.
    if orientation >= 5:
        assert np.array_equal(np.asarray(open_image(path, None, (30, 40))), UPRIGHT)
        assert np.array_equal(np.asarray(open_image(path, None, (40, 30))), stored)
    unknown = np.asarray(open_image(path))
    assert np.array_equal(unknown, UPRIGHT if extension == "tif" else stored)
    if extension != "tif":
        assert read_header(path)[:2] == (stored.shape[:2], orientation)


@pytest.mark.parametrize(
    ("orientation", "listed", "expected"),
    [
        (1, (30, 40), STORED),
        (6, (30, 40), ROTATED),
        (6, (40, 30), STORED),
        (6, (0, 0), UNDECIDED),
        (6, (31, 40), UNDECIDED),
        (3, (40, 30), UNDECIDED),
    ],
)
def test_sizes_decide_where_they_differ(
    orientation: int, listed: tuple[int, int], expected: str
) -> None:
    assert choose_rotation(orientation, (40, 30), listed, None) == expected
    assert choose_rotation(orientation, (30, 30), (30, 30), None) in (STORED, UNDECIDED)


def test_orientation_of_a_file_in_a_tar_file(tmp_path: Path) -> None:
    save_rotated(tmp_path / "a.png", 6)
    with tarfile.open(tmp_path / "images.tar", "w") as tar:
        tar.add(tmp_path / "a.png", "a.png")
    images = ImageFolder(str(tmp_path / "images.tar"))
    images.exif = "apply"
    assert np.array_equal(images.read(0).permute(1, 2, 0).numpy(), UPRIGHT)


@pytest.mark.parametrize(
    ("largest", "bits"), [(200, 8), (1000, 10), (4000, 12), (9000, 14), (65000, 16)]
)
def test_gray_images_keep_the_highest_bits_that_they_use(
    tmp_path: Path, largest: int, bits: int
) -> None:
    values = np.linspace(0, largest, 30 * 40).astype(np.uint16).reshape(30, 40)
    for extension in ("png", "tif"):
        Image.fromarray(values).save(tmp_path / f"a.{extension}")
        decoded = decode_image(str(tmp_path / f"a.{extension}"))
        assert decoded.bits == bits
        assert np.array_equal(np.asarray(decoded.image)[..., 0], values >> (bits - 8))


def test_gray_images_of_32_bits(tmp_path: Path) -> None:
    values = np.array([[-5, 0, 2**20 - 1]], dtype=np.int32)
    Image.fromarray(values).save(tmp_path / "a.tif")
    assert np.asarray(open_image(str(tmp_path / "a.tif")))[0, :, 0].tolist() == [0, 0, 255]


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_images_are_shown_on_white(tmp_path: Path, mode: str) -> None:
    """Black lines on a transparent ground, whose color is black too."""
    alpha = np.zeros((30, 40), np.uint8)
    alpha[:, 10] = 255
    image = Image.new("RGBA", (40, 30))
    image.putalpha(Image.fromarray(alpha))
    if mode == "P":  # an index is transparent
        indexed = Image.fromarray((alpha == 255).astype(np.uint8))
        indexed.putpalette([0] * 768)
        indexed.save(tmp_path / "a.png", transparency=0)
    else:
        image.convert(mode).save(tmp_path / "a.png")
    decoded = decode_image(str(tmp_path / "a.png"))
    assert decoded.transparent
    assert np.array_equal(np.asarray(decoded.image), 255 - np.repeat(alpha[..., None], 3, 2))


def test_an_alpha_channel_that_hides_everything_or_nothing_is_dropped() -> None:
    for alpha in (0, 255):
        image = Image.fromarray(UPRIGHT)
        image.putalpha(alpha)
        decoded = convert_image(image)
        assert not decoded.transparent
        assert np.array_equal(np.asarray(decoded.image), UPRIGHT)


@pytest.mark.parametrize("chunk", ["text", "profile"])
def test_png_files_with_much_text_or_a_large_color_profile(tmp_path: Path, chunk: str) -> None:
    path = tmp_path / "a.png"
    if chunk == "text":
        info = PngInfo()
        info.add_text("workflow", "x" * 1_200_000, zip=True)
        Image.fromarray(UPRIGHT).save(path, pnginfo=info)
    else:
        Image.fromarray(UPRIGHT).save(path, icc_profile=bytes(1_200_000))
    with pytest.raises(ValueError, match="MAX_TEXT"), Image.open(path) as image:
        image.load()
    assert np.array_equal(np.asarray(open_image(str(path))), UPRIGHT)


def test_huge_images_are_refused_with_size_and_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(UPRIGHT).save(path)
    monkeypatch.setattr(image_folder, "MAX_PIXELS", 1200)
    assert open_image(str(path)).size == (40, 30)
    Image.new("L", (41, 30)).save(path)
    before = Image.MAX_IMAGE_PIXELS
    with pytest.raises(
        BadImageError, match=r"^41 x 30 pixels, more than .* million pixels; cut it"
    ):
        open_image(str(path))
    assert before == Image.MAX_IMAGE_PIXELS


def test_limit_is_above_the_one_of_pillow(tmp_path: Path) -> None:
    Image.new("1", (14_000, 13_000)).save(tmp_path / "a.png")
    with pytest.raises(Image.DecompressionBombError):
        Image.open(tmp_path / "a.png")
    assert read_header(str(tmp_path / "a.png"))[:2] == ((13_000, 14_000), 1)


def test_warnings_of_pillow_are_collected_and_not_printed(tmp_path: Path) -> None:
    """This EXIF block ends in the middle of its first entry."""
    buffer = io.BytesIO()
    Image.fromarray(UPRIGHT).save(buffer, "jpeg")
    content = buffer.getvalue()
    exif = b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01\x03\0\x01\0\0\0\x06\0\0\0"
    segment = b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif
    (tmp_path / "a.jpg").write_bytes(content[:2] + segment + content[2:])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decoded = decode_image(str(tmp_path / "a.jpg"))
        read_header(str(tmp_path / "a.jpg"))
    assert decoded.image.size == (40, 30)
    assert any("EXIF" in remark for remark in decoded.remarks)
