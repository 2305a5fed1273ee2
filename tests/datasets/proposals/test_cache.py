"""The proposal cache: built in chunks by processes that may be killed, verified when it is read, and equal to the
method itself.
"""

import json
import multiprocessing
import os
import pickle
import random
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import datasets.proposals.cache_builder as cache_builder
from datasets import build_dataset
from datasets.images.image_folder import ImageFolder, read_image
from datasets.proposals import build_proposals
from datasets.proposals.cache import ProposalCache
from datasets.sample import BadImageError
from tests.tiny import captured_log, draw, proposal_settings, tiny_args
from tools import cache_proposals
from util.errors import UserError
from util.random_state import SampleRNG
from util.settings import PRETRAIN

pytest.importorskip("cv2", reason="OpenCV is not installed")


def write_tree(root: Path, count: int = 12) -> Path:
    """Write images with the same base names, but different content, to two folders."""
    for i in range(count):
        path = root / ("a" if i % 2 else "b/deep") / f"{i // 2:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw(i, 50 + i % 3, 60)[0]).save(path)
    return root


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tree(tmp_path_factory.mktemp("data") / "images")


def build_cache(images: Path, output: Path, *flags: object) -> None:
    words = ["--images", images, "--output_dir", output, "--num_workers", 0, *flags]
    cache_proposals.main(cache_proposals.parse(list(map(str, words))))


@pytest.fixture(scope="module")
def cache(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of selective search in the published setting, built by one process. Tests must not change it."""
    output = tmp_path_factory.mktemp("cache") / "ss128"
    build_cache(images, output)
    return output


def content(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def cached_method(folder: Path, images: Path | None = None, **flags: object):
    known = ImageFolder(str(images)) if images else None
    return build_proposals(
        proposal_settings(**{"proposals": "selective_search", "cache_path": str(folder), **flags}),
        known,
    )


def test_cached_boxes_equal_those_of_the_method_in_the_same_order(
    images: Path, cache: Path
) -> None:
    folder = ImageFolder(str(images))
    live = build_proposals(proposal_settings(proposals="selective_search"))
    cached = cached_method(cache, images)
    for index in (0, 5, 11):
        image = read_image(folder.path(index))
        for seed in (1, 2):
            assert torch.equal(
                cached(image, SampleRNG(seed), folder.name(index)),
                live(image, SampleRNG(seed), ""),
            )


def test_order_changes_with_the_epoch_and_is_equal_in_two_runs(images: Path, cache: Path) -> None:
    path = ImageFolder(str(images)).path(0)
    method = cached_method(cache)
    draws = [
        method(read_image(path), SampleRNG.from_key(3, epoch, 0), "a/000.png")
        for epoch in (0, 1, 0)
    ]
    assert torch.equal(draws[0], draws[2])
    assert not torch.equal(draws[0], draws[1])


def test_equal_base_names_do_not_collide(images: Path, cache: Path) -> None:
    live = build_proposals(proposal_settings(proposals="selective_search"))
    cached = cached_method(cache)
    for name in ("a/000.png", "b/deep/000.png"):
        image = read_image(str(images / name))
        assert torch.equal(cached(image, SampleRNG(0), name), live(image, SampleRNG(0), name))


@pytest.mark.parametrize("method", ["edge_boxes", "full"])
def test_other_methods(images: Path, tmp_path: Path, method: str) -> None:
    flags = ("--ss_resize", 0) if method == "full" else ("--proposals", method)
    build_cache(images, tmp_path / "cache", *flags)
    if method == "full":
        choice = {"proposals": "selective_search", "ss_resize": 0}
    else:
        choice = {"proposals": method}
    live = build_proposals(proposal_settings(**choice))
    cached = cached_method(tmp_path / "cache", images, **choice)
    image = read_image(str(images / "a" / "001.png"))
    assert torch.equal(cached(image, SampleRNG(7), "a/001.png"), live(image, SampleRNG(7), ""))
    expected = live.propose(image.permute(1, 2, 0).numpy(), "")[1]
    found = cached.propose(image.permute(1, 2, 0).numpy(), "a/001.png")[1]
    assert (expected is None and found is None) or np.array_equal(found, expected)


def test_two_workers_give_the_same_cache(images: Path, cache: Path, tmp_path: Path) -> None:
    build_cache(images, tmp_path / "two", "--num_workers", 2)
    assert content(tmp_path / "two") == content(cache)


def test_shards_and_merge_give_the_same_cache(images: Path, cache: Path, tmp_path: Path) -> None:
    output = tmp_path / "parts"
    for shard in ("3/3", "1/3"):
        build_cache(images, output, "--shard", shard)
    with pytest.raises(UserError, match=r"lacks 4 of 12 chunks, the first is 1 .*--merge"):
        build_cache(images, output, "--merge")
    with pytest.raises(UserError, match="is not finished"):
        cached_method(output)
    build_cache(images, output, "--shard", "2/3")
    build_cache(images, output, "--merge")
    assert content(output) == content(cache)
    with captured_log() as lines:
        build_cache(images, output)
    assert lines[-1].endswith("is already complete")


def test_killed_build_resumes_to_the_same_cache(images: Path, cache: Path, tmp_path: Path) -> None:
    """SIGKILL the builder at random moments until a run finishes."""
    context, moments = multiprocessing.get_context("fork"), random.Random(5)
    output, kills, counts = tmp_path / "killed", 0, []
    while not (output / "header.json").exists():
        builder = context.Process(target=build_cache, args=(images, output, "--num_workers", 2))
        builder.start()
        builder.join(moments.uniform(0.02, 0.3) if kills < 6 else 60)
        if builder.is_alive():
            os.kill(builder.pid, signal.SIGKILL)
            builder.join()
            kills += 1
            # A finished cache has merged its chunks and removed them.
            if not (output / "header.json").exists():
                counts.append(len(list(output.glob("chunks/*.npz"))))
    build_cache(images, output)
    assert kills, "no run was killed"
    assert counts == sorted(counts), "finished chunks are kept"
    assert content(output) == content(cache)


def test_workers_exit_with_a_killed_builder(images: Path, tmp_path: Path) -> None:
    args = (images, tmp_path / "killed", "--num_workers", 2, "--ss_resize", 0)
    builder = multiprocessing.get_context("fork").Process(target=build_cache, args=args)
    builder.start()
    children = Path(f"/proc/{builder.pid}/task/{builder.pid}/children")
    if not children.exists():
        builder.join()
        pytest.skip("this system does not list child processes")
    deadline, workers = time.monotonic() + 20, []
    while len(workers) < 2 and builder.is_alive() and time.monotonic() < deadline:
        workers = children.read_text().split()
        time.sleep(0.01)
    os.kill(builder.pid, signal.SIGKILL)
    builder.join()
    while any(
        Path(f"/proc/{pid}/stat").exists()
        and Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
        for pid in workers
    ):
        assert time.monotonic() < deadline, "a worker outlives its builder"
        time.sleep(0.05)


def test_killed_worker_gives_a_clear_error(
    images: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(cache_proposals, "make_chunk", lambda *_: os._exit(9))
        with pytest.raises(
            UserError,
            match="a worker process was killed .* run the same command again, perhaps with --num_workers 1",
        ):
            build_cache(images, tmp_path / "cache", "--num_workers", 2)
    build_cache(images, tmp_path / "cache")
    assert content(tmp_path / "cache") == content(cache)


def test_interrupted_merge_is_repeated(
    images: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "cache"

    def fail(*_args, **_settings) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(cache_builder, "_stream", fail)
        with pytest.raises(KeyboardInterrupt):
            build_cache(images, output)
    with monkeypatch.context() as patch:
        patch.setattr(cache_builder.shutil, "rmtree", fail)
        with pytest.raises(KeyboardInterrupt):
            build_cache(images, output)
    (output / ".0123.tmp").touch()  # left by a killed process
    build_cache(images, output)
    assert content(output) == content(cache)


def test_two_processes_merge_at_once(images: Path, cache: Path, tmp_path: Path) -> None:
    """The second process finishes while the first one merges its first chunk."""
    output = tmp_path / "cache"
    build_cache(images, output, "--shard", "1/2")
    build_cache(images, output, "--shard", "2/2")
    plan = cache_proposals.build_plan(
        cache_proposals.parse(["--images", str(images), "--output_dir", str(output)])
    )
    others = iter([lambda: cache_builder.merge(plan)])
    assert (
        cache_builder.merge(plan, lambda: next(others, lambda: None)()).header
        == ProposalCache(cache).header
    )
    assert content(output) == content(cache)
    cache_builder.make_chunk(plan, 0)  # a third process is still searching
    cache_builder.merge(plan)
    assert content(output) == content(cache)


def flip_a_box(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[data.index(b"boxes.npy") + 139] ^= 255
    path.write_bytes(data)


@pytest.mark.parametrize(
    "damage",
    [
        flip_a_box,
        lambda path: path.write_bytes(path.read_bytes()[:-50]),
        lambda path: path.write_bytes(b""),
        lambda path: np.savez(path),
    ],
)
def test_damaged_chunk_gives_a_one_line_error(damage, images: Path, tmp_path: Path) -> None:
    for shard in ("1/2", "2/2"):
        build_cache(images, tmp_path / "cache", "--shard", shard)
    damage(tmp_path / "cache" / "chunks" / "000003.npz")
    with pytest.raises(UserError, match=r"000003\.npz is damaged \(.+\); remove it and run"):
        build_cache(images, tmp_path / "cache", "--merge")


def test_unreadable_images_are_reported_and_recorded(tmp_path: Path) -> None:
    images = write_tree(tmp_path / "images", 4)
    (images / "a" / "broken.png").write_bytes(b"no image")
    with captured_log() as lines:
        build_cache(images, tmp_path / "cache")
    assert any(
        "1 images could not be read" in line and "broken.png: can't be decoded" in line
        for line in lines
    )
    header = ProposalCache(tmp_path / "cache").header
    assert (header["images"], header["unreadable"], header["problems"][0][0]) == (
        5,
        1,
        "a/broken.png",
    )
    method = cached_method(tmp_path / "cache", images)
    with pytest.raises(BadImageError, match="could not be read when its proposals were cached"):
        method(torch.zeros(3, 9, 9, dtype=torch.uint8), SampleRNG(0), "a/broken.png")
    assert len(method(read_image(str(images / "a" / "001.png")), SampleRNG(0), "a/001.png"))


def test_boxes_are_in_the_pixels_that_exif_says(tmp_path: Path) -> None:
    """A cache of rotated images is not used for images as they are stored, nor the other way round."""
    images, exif = write_tree(tmp_path / "images", 2), Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(draw(1, 50, 60)[0]).save(images / "a" / "000.png", exif=exif)
    build_cache(images, tmp_path / "stored")
    build_cache(images, tmp_path / "rotated", "--exif", "apply")
    sizes = [ProposalCache(tmp_path / name).sizes_hw[0].tolist() for name in ("stored", "rotated")]
    assert sizes == [[50, 60], [60, 50]]
    assert "exif" not in ProposalCache(tmp_path / "stored").header

    folder = ImageFolder(str(images))
    flags = {"proposals": "selective_search", "cache_path": str(tmp_path / "rotated")}
    with pytest.raises(UserError, match="made with --exif apply, this run has --exif ignore: give"):
        build_proposals(proposal_settings(**flags), folder)
    folder.exif = "apply"
    method = build_proposals(proposal_settings(**flags), folder)
    assert len(method(folder.read(0), SampleRNG(0), folder.name(0)))


def test_changed_dataset_gives_a_clear_error(tmp_path: Path) -> None:
    images = write_tree(tmp_path / "images", 4)
    build_cache(images, tmp_path / "cache")
    method, path = cached_method(tmp_path / "cache", images), images / "a" / "000.png"
    with captured_log() as lines:
        build_cache(images, tmp_path / "cache", "--check")
    assert "all 4 images" in lines[-1]

    Image.fromarray(draw(77, 51, 60)[0]).save(path)  # the same size: only the content differs
    with pytest.raises(UserError, match=r"1 of 4 images differ .* the first is a/000\.png"):
        build_cache(images, tmp_path / "cache", "--check")
    with pytest.raises(
        UserError,
        match=r"a/000\.png has \d+ bytes, but had \d+ when .* was made: the dataset has changed",
    ):
        cached_method(tmp_path / "cache", images)
    Image.fromarray(draw(1, 70, 90)[0]).save(path)
    with pytest.raises(UserError, match=r"a/000\.png has 90 x 70 pixels, but had 60 x 51"):
        method(read_image(str(path)), SampleRNG(0), "a/000.png")
    Image.fromarray(draw(1, 51, 60)[0]).save(images / "new.png")
    with pytest.raises(UserError, match=r"lacks 1 of 5 images, the first is new\.png"):
        cached_method(tmp_path / "cache", images)
    with pytest.raises(UserError, match=r"contains proposals with images 4, now it is 5"):
        build_cache(images, tmp_path / "cache")
    with pytest.raises(UserError, match=r"has no image new\.png"):
        method(torch.zeros(3, 9, 9, dtype=torch.uint8), SampleRNG(0), "new.png")


def test_mismatched_settings_are_named(images: Path, cache: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="was made with resize 128, the flags say 0"):
        cached_method(cache, ss_resize=0)
    with pytest.raises(
        UserError, match="was made with method selective_search, the flags say edge_boxes"
    ):
        cached_method(cache, proposals="edge_boxes")
    with pytest.raises(UserError, match="can't be used with --proposals random"):
        cached_method(cache, proposals="random", num_patches=4)
    with pytest.raises(UserError, match="contains proposals with settings .* now it is"):
        build_cache(images, cache, "--ss_resize", 64)
    words = [
        "--images",
        str(images),
        "--output_dir",
        str(tmp_path / "new"),
        "--proposals",
        "random",
    ]
    with pytest.raises(UserError, match="draws new boxes"):
        cache_proposals.build_plan(cache_proposals.parse(words))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").write_text("precious")
    with pytest.raises(UserError, match="contains other files"):
        build_cache(images, tmp_path / "other")
    with pytest.raises(UserError, match="is no proposal cache .*--proposals file:"):
        cached_method(tmp_path / "other")


def test_subset_of_images_and_any_cache_by_file(images: Path, cache: Path) -> None:
    """A run may use a subset of the images, and file:CACHE reads a cache of any method."""
    method = build_proposals(proposal_settings(proposals=f"file:{cache}"), ImageFolder(str(images)))
    image = read_image(str(images / "a" / "002.png"))
    assert torch.equal(
        method(image, SampleRNG(0), "a/002.png"),
        cached_method(cache)(image, SampleRNG(0), "a/002.png"),
    )
    names = images / "some.txt"
    names.write_text("a/002.png\nb/deep/001.png\n")
    cached_method(cache, names)


def test_list_of_images(images: Path, cache: Path, tmp_path: Path) -> None:
    # utf-8-sig: Windows writes a byte order mark.
    lines = "b/deep/001.png 17\na/002.png 3\na/002.png 3\n"
    (tmp_path / "list.txt").write_text(lines, encoding="utf-8-sig")
    build_cache(images, tmp_path / "some", "--list", tmp_path / "list.txt")
    some, whole = ProposalCache(tmp_path / "some"), ProposalCache(cache)
    assert [some.names[i] for i in range(len(some.names))] == ["a/002.png", "b/deep/001.png"]
    for row in range(2):
        assert np.array_equal(
            some.get_boxes(row)[0], whole.get_boxes(whole.names.find(some.names[row]))[0]
        )
    (tmp_path / "list.txt").write_text("nowhere.png\n")
    with pytest.raises(UserError, match=r"its first image nowhere\.png is not in"):
        build_cache(images, tmp_path / "none", "--list", tmp_path / "list.txt")


def test_boxes_from_files_can_be_cached(images: Path, tmp_path: Path) -> None:
    """Also if only some images have scores: the boxes of the others are shuffled."""
    rows = {
        "a/000.png": np.array([[0.5, 1, 9, 9, 0.1], [2, 2, 8, 8.25, 0.9]]),
        "a/001.png": np.array([[0, 0, 5, 5], [1, 1, 6, 6.0]]),
    }
    np.savez(tmp_path / "boxes.npz", **rows)
    (tmp_path / "list.txt").write_text("\n".join(rows))
    build_cache(
        images,
        tmp_path / "cache",
        "--list",
        tmp_path / "list.txt",
        "--proposals",
        f"file:{tmp_path / 'boxes.npz'}",
    )
    cache = ProposalCache(tmp_path / "cache")
    assert cache.boxes.dtype == np.float32
    boxes, scores = cache.get_boxes(0)
    assert boxes.tolist() == [[2, 2, 8, 8.25], [0.5, 1, 9, 9]]
    assert np.allclose(scores, [0.9, 0.1])
    assert cache.get_boxes(1)[1] is None
    build_cache(
        images,
        tmp_path / "again",
        "--list",
        tmp_path / "list.txt",
        "--proposals",
        f"file:{tmp_path / 'cache'}",
    )
    assert np.array_equal(ProposalCache(tmp_path / "again").boxes, cache.boxes)


def test_damaged_caches(cache: Path, tmp_path: Path) -> None:
    for name, change, message in (
        (
            "boxes.npy",
            lambda path: path.write_bytes(path.read_bytes()[:-50]),
            "boxes.npy can't be read",
        ),
        (
            "offsets.npy",
            lambda path: np.save(path, np.load(path)[:-1]),
            "its arrays are not as long as header.json says",
        ),
        ("sizes.npy", Path.unlink, "sizes.npy can't be read"),
        ("header.json", lambda path: path.write_text("{"), "header.json can't be read"),
        (
            "header.json",
            lambda path: path.write_text(
                json.dumps({**json.loads(path.read_text()), "format": 99})
            ),
            "has format 99",
        ),
    ):
        copy = tmp_path / "copy"
        shutil.copytree(cache, copy)
        change(copy / name)
        with pytest.raises(UserError, match=message):
            cached_method(copy)
        shutil.rmtree(copy)


def test_arrays_are_memory_mapped_and_not_sent_to_workers(images: Path, cache: Path) -> None:
    method = cached_method(cache, images)
    assert isinstance(method.cache.boxes, np.memmap)
    sent = pickle.dumps(method)
    assert len(sent) < 2000
    image = read_image(str(images / "a" / "000.png"))
    again = pickle.loads(sent)  # noqa: S301 - as dataloader workers receive it
    assert torch.equal(
        again(image, SampleRNG(0), "a/000.png"), method(image, SampleRNG(0), "a/000.png")
    )


@pytest.mark.parametrize("pretext", ["random_query_patch", "region_prior"])
def test_pretext_datasets_use_cached_boxes(images: Path, cache: Path, pretext: str) -> None:
    flags = [
        "--pretext",
        pretext,
        "--imagenet_path",
        str(images),
        "--proposals",
        "selective_search",
        "--cache_path",
        str(cache),
    ]
    if pretext == "region_prior":
        # 10 is the default: this pretext rejects other values.
        flags += ["--max_prop", "6", "--num_patches", "10"]
    dataset = build_dataset("train", tiny_args(PRETRAIN, *flags))
    first, again, later = dataset[(0, 3)][1], dataset[(0, 3)][1], dataset[(1, 3)][1]
    assert torch.equal(first["boxes"], again["boxes"])
    assert not torch.equal(first["boxes"], later["boxes"])
    assert 2 <= len(first["boxes"]) <= 6


def test_shard_flag() -> None:
    for word in ("0/2", "3/2", "1", "a/b"):
        with pytest.raises(SystemExit):
            cache_proposals.parse(["--images", "x", "--output_dir", "y", "--shard", word])
