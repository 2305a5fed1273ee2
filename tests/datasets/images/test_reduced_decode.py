"""`--reduced_decode`: samples as from whole images but for small differences of pixels, and nothing enlarged."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from datasets import build_dataset
from datasets.images.image_folder import ImageFiles, read_header, read_image
from datasets.images.pixels import EXIF_ORIENTATION
from datasets.images.reduced_decode import choose_reduction
from datasets.transforms import detection_transforms, region_prior_transforms, size_hw
from util.errors import UserError
from util.settings import settings

SIZE = 1203, 1601  # (height, width), no multiples of 8


def write_photo(
    path: Path, orientation: int = 1, seed: int = 0, size: tuple[int, int] = SIZE
) -> None:
    """Write smooth colors, as of a photo, with an EXIF orientation."""
    coarse = np.random.default_rng(seed).integers(0, 256, (9, 11, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize(size[::-1], Image.Resampling.BICUBIC)
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = orientation
    image.save(path, **({"quality": 92} if path.suffix == ".jpg" else {}), exif=exif)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("photos")
    for i, orientation in enumerate((1, 6, 3)):
        write_photo(root / f"{i}.jpg", orientation, seed=i)
    return root


def mean_levels(a: Tensor, b: Tensor) -> float:
    """Return the mean absolute difference in gray levels."""
    return float((a.float() - b.float()).abs().mean())


@pytest.mark.parametrize("exif", [None, "apply"])
@pytest.mark.parametrize("reduction", [2, 4, 8])
def test_reduced_image_shows_the_same(photos: Path, reduction: int, exif: str | None) -> None:
    path = str(photos / "1.jpg")
    whole = read_image(path, exif)
    reduced = read_image(path, exif, reduction=reduction)
    assert read_header(path).decoded_size(exif) == size_hw(whole)
    assert size_hw(whole) == (SIZE[::-1] if exif else SIZE)
    expected = [-(-side // reduction) for side in size_hw(whole)]
    assert list(size_hw(reduced)) == expected
    assert mean_levels(reduced, F.resize(whole, expected, antialias=True)) < 3


def test_other_formats_are_decoded_whole(tmp_path: Path) -> None:
    for name in ("a.png", "a.webp", "a.bmp"):
        Image.new("RGB", SIZE[::-1], (10, 20, 30)).save(tmp_path / name)
        assert not read_header(str(tmp_path / name)).is_jpeg
        assert size_hw(read_image(str(tmp_path / name), reduction=8)) == SIZE


def make_samples(root: Path, reduced: bool, **flags: object) -> list[tuple[Tensor, dict]]:
    common = {"imagenet_path": str(root), "proposals": "random", "exif": "apply", "seed": 3}
    own = settings(reduced_decode=reduced, **{**common, **flags})
    dataset = build_dataset("train", own)
    return [dataset[epoch, index] for epoch in range(2) for index in range(len(dataset))]


PRETEXTS = {
    "random_query_patch": {"image_size": 64, "patch_size": 4, "num_patches": 2},
    "region_prior": {"image_size": 64, "object_embedding_loss": True, "patch_size": 4, "max_prop": 3},
    "siamese": {"image_size": 64, "patch_size": 16},
}  # fmt: skip


@pytest.mark.parametrize("pretext", PRETEXTS)
def test_samples_are_those_of_whole_images(
    pretext: str, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reductions, read = [], ImageFiles.read

    def recorded(self, index: int, reduction: int = 1) -> Tensor:
        reductions.append(reduction)
        return read(self, index, reduction)

    monkeypatch.setattr(ImageFiles, "read", recorded)
    flags = {"pretext": pretext, **PRETEXTS[pretext]}
    whole, reduced = (make_samples(photos, on, **flags) for on in (False, True))
    assert set(reductions[: len(whole)]) == {1}
    assert max(reductions) > 2
    if pretext == "siamese":  # its patches are cut from the views
        assert min(reductions[len(whole) :]) == 8

    for (image, target), (own_image, own_target) in zip(whole, reduced, strict=True):
        assert own_target.keys() == target.keys()
        for key in target.keys() - {"patches"}:
            assert torch.equal(own_target[key], target[key]), key
        assert own_image.shape == image.shape
        assert mean_levels(own_image, image) < 4
        assert mean_levels(own_target["patches"], target["patches"]) < 8
    pairs = [(own, image) for (own, _), (image, _) in zip(reduced, whole, strict=True)]
    assert not all(torch.equal(own, image) for own, image in pairs)


def test_samples_of_other_formats_stay_bit_exact(tmp_path: Path) -> None:
    write_photo(tmp_path / "a.png", orientation=6, size=(200, 300))
    flags = {"pretext": "random_query_patch", **PRETEXTS["random_query_patch"]}
    for (image, target), (own_image, own_target) in zip(
        *(make_samples(tmp_path, on, **flags) for on in (False, True)), strict=True
    ):
        assert torch.equal(own_image, image)
        assert torch.equal(own_target["patches"], target["patches"])


def test_nothing_is_enlarged() -> None:
    assert choose_reduction((3000, 4000), (480, 640)) == 4
    assert choose_reduction((3840, 5120), (480, 640)) == 8
    assert choose_reduction((500, 640), (480, 614)) == 1
    boxes = torch.tensor([[0.0, 0.0, 1000.0, 2000.0], [100.0, 100.0, 358.0, 900.0]])
    assert choose_reduction((3000, 4000), (480, 640), boxes, patch_size=128) == 2
    boxes[1, 2] = 357  # 257 pixels may become 128 only if no corner is rounded
    assert choose_reduction((3000, 4000), (480, 640), boxes, patch_size=128) == 1
    assert choose_reduction((3000, 4000), (480, 640), boxes[:0], patch_size=128) == 4


def test_largest_resize_of_a_pipeline() -> None:
    """The first resize counts: crops and other resizes get what it leaves."""
    photo = (3000, 4000)
    assert region_prior_transforms("train").largest_resize(photo) == (600, 800)  # before the crop
    assert region_prior_transforms("val").largest_resize(photo) == (450, 600)  # at most 600 wide
    assert detection_transforms("train", 400).largest_resize(photo) == (400, 533)


def test_methods_that_search_the_image_are_refused(photos: Path) -> None:
    with pytest.raises(UserError, match="--reduced_decode: --proposals selective_search searches"):
        make_samples(photos, True, pretext="region_prior", proposals="selective_search")
