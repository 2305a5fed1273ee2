"""Batches: padding, packing, normalization, and equal samples for any number of dataloader workers."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from datasets import build_dataset, build_loader
from datasets.collate import (
    collate,
    normalize,
    normalize_images,
    to_device,
)
from tests.tiny import write_coco
from util.errors import UserError
from util.packed_images import ROW
from util.packed_targets import PackedTargets, pack_objects
from util.settings import Settings, settings

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def make_sample(height: int, width: int, objects: int, **extra) -> tuple[Tensor, dict]:
    generator = torch.Generator().manual_seed(height * width)
    image = torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8)
    return image, {
        "boxes": torch.rand(objects, 4),
        "labels": torch.arange(objects),
        "size": torch.tensor([height, width]),
        **extra,
    }


def test_padding() -> None:
    batch = [make_sample(20, 30, 2), make_sample(25, 10, 0)]
    samples, _ = collate(batch)
    assert samples.padded
    assert samples.tensors.dtype == torch.uint8
    assert samples.tensors.shape == (2, 3, 25, 30)
    for (image, _), padded, mask in zip(batch, samples.tensors, samples.mask, strict=True):
        _, h, w = image.shape
        assert torch.equal(padded[:, :h, :w], image)
        assert int(padded.sum()) == int(image.sum())
        assert not mask[:h, :w].any()
        assert int(mask.sum()) == mask.numel() - h * w


def test_equal_sizes_need_no_padding() -> None:
    samples, _ = collate([make_sample(20, 30, 1), make_sample(20, 30, 1)])
    assert not samples.padded
    assert not samples.mask.any()
    assert samples.pad().tensors.data_ptr() == samples.pixels.data_ptr()  # and no copy


def test_workers_send_no_padding() -> None:
    """One tensor, of less than a row more than the pixels of the images."""
    batch = [make_sample(20, 300, 2), make_sample(250, 10, 0), make_sample(60, 60, 1)]
    samples, _ = collate(batch)
    tensors = [value for value in vars(samples).values() if isinstance(value, Tensor)]
    used = 3 * (20 * 300 + 250 * 10 + 60 * 60)
    assert 0 <= sum(tensor.nbytes for tensor in tensors) - used < 3 * ROW
    assert samples.tensors.numel() > 18 * used
    assert samples.pad().tensors.is_contiguous(memory_format=torch.channels_last)
    for name in ("tensors", "mask"):
        moved = getattr(samples.to("cpu", non_blocking=True), name)
        assert torch.equal(moved, getattr(samples, name)), name


def test_padding_to_a_multiple_and_its_fraction() -> None:
    batch = [make_sample(20, 30, 2), make_sample(25, 10, 0)]
    samples, _ = collate(batch, multiple=16)
    assert samples.tensors.shape == (2, 3, 32, 32)
    assert int((~samples.mask).sum()) == 20 * 30 + 25 * 10
    assert samples.padding_fraction == pytest.approx(1 - 850 / 2048)
    assert collate(batch[:1])[0].padding_fraction == 0


def test_targets_that_no_loss_reads_stay_on_the_host() -> None:
    """On the device "meta", whose tensors have no values."""
    extra = {"image_id": torch.tensor([3]), "orig_size": torch.tensor([40, 60])}
    objects = {"area": torch.ones(2), "iscrowd": torch.zeros(2, dtype=torch.int64)}
    packed = PackedTargets.pack([make_sample(20, 30, 2, **extra, **objects)[1]]).to("meta")
    devices = {key: tensor.device.type for key, tensor in packed.tensors.items()}
    assert devices == {
        **dict.fromkeys(("boxes", "labels", "size"), "meta"),
        **dict.fromkeys(("image_id", "orig_size", "area", "iscrowd"), "cpu"),
    }


@pytest.mark.parametrize("pretext", [None, "random_query_patch"])
@pytest.mark.parametrize("image_set", ["train", "val"])
def test_final_size_is_known_before_the_image_is_decoded(
    pretext: str | None, image_set: str, tmp_path: Path
) -> None:
    flags = {"coco_path": str(write_coco(tmp_path, train=6, val=4)), "seed": 5, "image_size": 90}
    dataset = build_dataset(image_set, settings(pretext=pretext, **flags))
    for key in [(epoch, index) for epoch in range(3) for index in range(len(dataset))]:
        assert dataset.final_size(*key) == tuple(dataset[key][0].shape[1:])


def test_bucket_aspect_needs_known_sizes(tmp_path: Path) -> None:
    own = settings(
        pretext="siamese",
        proposals="random",
        coco_path=str(write_coco(tmp_path, train=6, val=4)),
        bucket_aspect=True,
    )
    with pytest.raises(UserError, match="--bucket_aspect: the sizes of the samples of --pretext s"):
        build_loader(build_dataset("train", own), own, train=True)


def test_packing_and_unpacking() -> None:
    targets = [make_sample(8, 8, n)[1] for n in (2, 0, 3)]
    targets[1]["problems"] = [("a.png", "broken")]
    packed = PackedTargets.pack(targets)
    assert set(packed.tensors) == {"boxes", "labels", "size"}
    assert packed.counts["boxes"] == [2, 0, 3]
    assert packed.problems == [("a.png", "broken")]
    assert len(packed) == 3
    for original, unpacked in zip(targets, packed.to("cpu").unpack(), strict=True):
        assert set(unpacked) == {"boxes", "labels", "size"}
        assert all(torch.equal(unpacked[key], original[key]) for key in unpacked)
    assert packed.unpack()[2]["boxes"].data_ptr() == packed.tensors["boxes"][2:].data_ptr()


def test_packed_targets_are_a_sequence_of_image_targets() -> None:
    targets = [make_sample(8, 8, n)[1] for n in (2, 0, 3)]
    packed = PackedTargets.pack(targets)
    for i, (original, iterated) in enumerate(zip(targets, packed, strict=True)):
        for own in (packed[i], packed[i - 3], iterated):
            assert set(own) == set(original)
            assert all(torch.equal(own[key], original[key]) for key in own)
    with pytest.raises(IndexError):
        packed[3]


def test_objects_are_packed_once() -> None:
    """Packed targets are used unchanged. From a list, only objects and image ids (of any shape) are packed."""
    targets = [{**make_sample(8, 8, n)[1], "image_id": torch.tensor(n)} for n in (2, 0, 3)]
    packed = pack_objects(targets)
    assert set(packed.tensors) == {"boxes", "labels", "image_id"}
    assert packed.counts["labels"] == [2, 0, 3]
    assert packed.tensors["image_id"].tolist() == [2, 0, 3]
    assert pack_objects(packed) is packed
    assert "image_id" not in pack_objects([targets[0], make_sample(8, 8, 1)[1]]).tensors


def make_masks(sizes: list[tuple[int, int, int]], seed: int = 0) -> list[Tensor]:
    """Return random masks of each image, uint8 [n, h, w]."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 2, size, generator=generator, dtype=torch.uint8) for size in sizes]


def test_masks_of_a_list_are_padded_to_the_largest() -> None:
    masks = make_masks([(2, 5, 9), (0, 7, 3), (1, 4, 4)])
    targets = [{**make_sample(8, 8, len(own))[1], "masks": own.bool()} for own in masks]
    packed = pack_objects(targets)
    assert packed.tensors["masks"].shape == (3, 7, 9)
    assert packed.tensors["masks"].dtype == torch.bool
    assert packed.counts["masks"] == packed.counts["boxes"] == [2, 0, 1]
    assert torch.equal(packed.tensors["masks"][:2, :5, :9], masks[0].bool())
    assert torch.equal(packed.tensors["masks"][2, :4, :4], masks[2][0].bool())
    assert int(packed.tensors["masks"].sum()) == sum(int(own.sum()) for own in masks)
    del targets[1]["masks"]
    assert "masks" not in pack_objects(targets).tensors


@pytest.mark.parametrize(
    "sizes",
    [
        [(2, 20, 30), (0, 25, 10), (3, 5, 33)],
        [(1, 8, 16), (2, 8, 16)],
        [(1, 3, 1)],
        [(0, 4, 9), (0, 6, 5)],
    ],
)
def test_masks_are_bits_until_they_are_on_the_device(sizes: list[tuple[int, int, int]]) -> None:
    masks = make_masks(sizes)
    batch = [make_sample(h, w, n, masks=own) for (n, h, w), own in zip(sizes, masks, strict=True)]
    samples, packed = collate(batch)
    total, height, width = sum(n for n, *_ in sizes), *samples.tensors.shape[-2:]
    assert packed.tensors["masks"].shape == (total, height, -(-width // 8))
    assert packed.tensors["masks"].dtype == torch.uint8
    assert packed.counts["masks"] == packed.counts["boxes"] == [n for n, *_ in sizes]

    _, moved = to_device(samples, packed, torch.device("cpu"), MEAN, STD)
    assert moved.tensors["masks"].shape == (total, height, width)
    assert moved.tensors["masks"].dtype == torch.bool
    for own, unpacked in zip(masks, moved, strict=True):
        n, h, w = own.shape
        assert torch.equal(unpacked["masks"][:, :h, :w], own.bool())
        assert int(unpacked["masks"].sum()) == int(own.sum()), "padding is 0"
        assert len(unpacked["boxes"]) == n


def test_targets_with_different_keys() -> None:
    _, target = make_sample(8, 8, 1)
    _, other = make_sample(8, 8, 1, patches=torch.zeros(1))
    with pytest.raises(ValueError, match="different keys"):
        PackedTargets.pack([target, other])


def test_normalization() -> None:
    batch = [make_sample(20, 30, 0), make_sample(25, 10, 0)]
    samples = normalize(collate(batch)[0], MEAN, STD)
    mean, std = torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None]
    assert samples.tensors.dtype == torch.float32
    for (image, _), normalized in zip(batch, samples.tensors, strict=True):
        _, h, w = image.shape
        expected = (image / 255 - mean) / std
        assert torch.equal(normalized[:, :h, :w], expected)
        assert torch.equal(normalized, torch.nn.functional.pad(expected, (0, 30 - w, 0, 25 - h)))
    # The same as of a batch that is padded first, and of images without padding.
    assert torch.equal(normalize(collate(batch)[0].pad(), MEAN, STD).tensors, samples.tensors)
    whole = normalize(collate(batch[:1])[0], MEAN, STD).tensors[0]
    assert torch.equal(whole, normalize_images(batch[0][0], MEAN, STD))
    patch, _ = make_sample(8, 8, 0)
    patches = torch.stack([patch, patch])
    assert torch.equal(normalize_images(patches, MEAN, STD)[1], normalize_images(patch, MEAN, STD))


@pytest.fixture
def args(tmp_path: Path) -> Settings:
    from tests.datasets.images.test_image_folder import pretext_args, save

    for i in range(7):
        save(tmp_path / f"{i}.png", seed=i, width=60 + 5 * i, height=64)
    return pretext_args(tmp_path)


def load_epoch(
    args: Settings, train: bool, epoch: int = 0, start_batch: int = 0
) -> list[tuple[Tensor, list[dict]]]:
    dataset = build_dataset("train" if train else "val", args)
    loader = build_loader(dataset, args, train)
    loader.batch_sampler.set_epoch(epoch, start_batch)
    return [(samples.tensors, targets.unpack()) for samples, targets in loader]


def assert_same(first: list, second: list) -> None:
    assert len(first) == len(second)
    for (images, targets), (other_images, other_targets) in zip(first, second, strict=True):
        assert torch.equal(images, other_images)
        for target, other in zip(targets, other_targets, strict=True):
            assert all(torch.equal(target[key], other[key]) for key in target)


def test_workers_do_not_change_samples(args: Settings) -> None:
    without_workers = load_epoch(args, train=True, epoch=1)
    assert len(without_workers) == 3
    args = args.replace(num_workers=2)
    assert_same(without_workers, load_epoch(args, train=True, epoch=1))
    assert_same(without_workers[2:], load_epoch(args, train=True, epoch=1, start_batch=2))


def test_epochs_differ_in_training_but_not_in_evaluation(args: Settings) -> None:
    first, second = load_epoch(args, train=True), load_epoch(args, train=True, epoch=1)
    assert [int(t["image_id"]) for _, b in first for t in b] != [
        int(t["image_id"]) for _, b in second for t in b
    ]
    evaluation = load_epoch(args, train=False)
    assert [int(target["image_id"]) for _, batch in evaluation for target in batch] == list(
        range(7)
    )
    assert_same(evaluation, load_epoch(args, train=False))


def test_persistent_workers_follow_the_epoch(args: Settings) -> None:
    args = args.replace(num_workers=1)
    loader = build_loader(build_dataset("train", args), args, train=True)
    epochs = []
    for epoch in range(2):
        loader.batch_sampler.set_epoch(epoch)
        epochs.append([(samples.tensors, targets.unpack()) for samples, targets in loader])
    assert_same(epochs[0], load_epoch(args, train=True, epoch=0))
    assert_same(epochs[1], load_epoch(args, train=True, epoch=1))


def test_too_few_images_for_a_batch(args: Settings) -> None:
    args = args.replace(batch_size=8)
    with pytest.raises(
        UserError, match="7 training images are fewer than one batch .* --batch_size 7"
    ):
        build_loader(build_dataset("train", args), args, train=True)
    assert len(build_loader(build_dataset("val", args), args, train=False)) == 1
