"""Images in tar files: the same samples as from folders, and one-line errors for bad files."""

import gzip
import io
import json
import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import main as pretrain_main
from datasets import build_dataset, build_loader
from datasets.images import tar_shards
from datasets.images.image_folder import ImageFolder, read_image
from datasets.proposals.cache import ProposalCache
from datasets.sample import BadImageError, SampleDataset
from tests.large_data import pack, touch
from tests.tiny import (
    FROZEN,
    RUN_FLAGS,
    assert_same,
    assert_same_logs,
    captured_log,
    draw,
    pre_train,
    read_checkpoint,
    stop_after,
    tiny_args,
    write_images,
)
from tools import cache_proposals, check_dataset
from util.errors import StopRequested, UserError
from util.settings import PRETRAIN, make_parser, resolve


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders named like tar files, so that image names and their order equal those in tar files."""
    root = tmp_path_factory.mktemp("data") / "folders"
    for i, name in enumerate(
        ["b.tar/0.png", "b.tar/deep/1.png", "a.tar/2.png", "a.tar/3.png", "a.tar-1.tar/4.png"]
    ):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw(i, 66 + 4 * i, 80)[0]).save(path)
    return root


@pytest.fixture(scope="module")
def shards(folders: Path) -> Path:
    return pack(folders, folders.parent / "shards")


def build_pretext_dataset(root: Path, pretext: str, proposals: str = "random") -> SampleDataset:
    flags = [
        "--pretext",
        pretext,
        "--proposals",
        proposals,
        "--imagenet_path",
        str(root),
        "--patch_size",
        "32",
    ]
    flags += ["--max_prop", "5"] if pretext == "region_prior" else ["--num_patches", "5"]
    return build_dataset("train", resolve(make_parser(PRETRAIN).parse_args([*RUN_FLAGS, *flags])))


@pytest.mark.parametrize("pretext", ["random_query_patch", "region_prior", "siamese"])
def test_samples_equal_those_of_folders(pretext: str, folders: Path, shards: Path) -> None:
    """Names, order, pixels and every random draw."""
    in_tar = build_pretext_dataset(shards, pretext)
    in_folder = build_pretext_dataset(folders, pretext)
    assert in_tar.fingerprint() == in_folder.fingerprint()
    assert len(in_tar) == len(in_folder) == 5
    for index in range(5):
        assert in_tar.images.name(index) == in_folder.images.name(index)
        assert torch.equal(in_tar.read(index), in_folder.read(index))
        for epoch in (0, 3):
            assert_same(in_tar[epoch, index], in_folder[epoch, index])


def test_dataloader_workers_read_tar_files(folders: Path, shards: Path) -> None:
    args = tiny_args(PRETRAIN, "--num_workers", "2", "--batch_size", "2")
    batches = [
        list(build_loader(build_pretext_dataset(root, "random_query_patch"), args, train=True))
        for root in (shards, folders)
    ]
    for ours, theirs in zip(*batches, strict=True):
        assert torch.equal(ours[0].tensors, theirs[0].tensors)
        assert torch.equal(ours[1].tensors["patches"], theirs[1].tensors["patches"])


@pytest.mark.parametrize("style", [tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT])
def test_tar_files_of_other_styles(style: int, tmp_path: Path) -> None:
    """Names as `tar cf x.tar .` writes them, long names, duplicate names, links, hidden files and folders."""
    write_images(tmp_path / "images", 2)
    one, two = (tmp_path / "images" / name for name in ("000.png", "001.png"))
    with tarfile.open(tmp_path / "x.tar", "w", format=style) as tar:
        for path, name in (
            (one, "./" + "long/" * 30 + "a.png"),
            (one, "twice.PNG"),
            (one, "._hidden.png"),
            (two, "twice.PNG"),
            (one, "./a/.thumbnails/x.png"),
            (tmp_path / "images", "folder.png"),
        ):
            tar.add(path, name, recursive=False)
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "twice.PNG"
        tar.addfile(link)
    images = ImageFolder(str(tmp_path / "x.tar"))
    assert [images.name(i) for i in range(len(images))] == [
        "x.tar/" + "long/" * 30 + "a.png",
        "x.tar/twice.PNG",
    ]
    assert torch.equal(read_image(images.file(1)), read_image(str(two))), (
        "the last one, as after unpacking"
    )
    assert images.path(1) == str(tmp_path / "x.tar" / "twice.PNG")
    assert images.skipped == 3


def test_tar_files_inside_of_a_tar_file(tmp_path: Path) -> None:
    """As in ILSVRC2012_img_train.tar, which has a tar file per class."""
    images = write_images(tmp_path / "images", 3)
    names = sorted(path.name for path in images.iterdir())
    for i, name in enumerate(("n01.tar", "n02.tar", "._n03.tar")):
        with tarfile.open(tmp_path / name, "w") as tar:
            tar.add(images / names[i], names[i])
    (tmp_path / "n04.tar").write_bytes(gzip.compress((tmp_path / "n01.tar").read_bytes()))
    (tmp_path / "n05.tar").touch()
    with tarfile.open(tmp_path / "all.tar", "w") as tar:
        for path in sorted(tmp_path.glob("*n0?.tar")):
            tar.add(path, path.name)
        tar.add(images / names[2], "z.png")
    found = ImageFolder(str(tmp_path / "all.tar"))
    assert [found.name(i) for i in range(len(found))] == [
        "all.tar/n01.tar/000.png",
        "all.tar/n02.tar/001.png",
        "all.tar/z.png",
    ]
    assert found.skipped == 3
    for i, name in enumerate(names):
        assert torch.equal(read_image(found.file(i)), read_image(str(images / name)))


def test_incomplete_tar_file_inside_of_a_tar_file(tmp_path: Path) -> None:
    images = write_images(tmp_path / "images", 1)
    with tarfile.open(tmp_path / "n01.tar", "w") as tar:
        tar.add(images / "000.png", "000.png")
    content = (tmp_path / "n01.tar").read_bytes()
    for size in (512 + images.joinpath("000.png").stat().st_size // 512 * 512, 1000):
        (tmp_path / "n01.tar").write_bytes(content[:size])
        with tarfile.open(tmp_path / "all.tar", "w") as tar:
            tar.add(tmp_path / "n01.tar", "n01.tar")
            tar.add(images / "000.png", "z.png")
        with pytest.raises(UserError, match="all.tar"):
            ImageFolder(str(tmp_path / "all.tar"))


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("t-{00..02}.tar", ["t-00.tar", "t-01.tar", "t-02.tar"]),
        ("t-{01..10}.tar", None),
        ("t-{8..10}.tar", None),
        ("{t,u}-0{0,1}.tar", ["t-00.tar", "t-01.tar", "u-00.tar", "u-01.tar"]),
        ("t-*.tar", ["t-00.tar", "t-01.tar", "t-02.tar"]),
        ("{t,u}-?1.tar", ["t-01.tar", "u-01.tar"]),
        ("d*/{00..01}.tar", ["deep/00.tar", "deep/01.tar"]),
        ("v*.tar", None),
    ],
)
def test_patterns(
    pattern: str, expected: list[str] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    touch(
        tmp_path,
        "t-00.tar",
        "t-01.tar",
        "t-02.tar",
        "u-00.tar",
        "u-01.tar",
        "deep/00.tar",
        "deep/01.tar",
    )
    if expected is None:
        with pytest.raises(
            UserError,
            match=r"(t-03|t-8|v\*).tar does not exist; give a pattern that matches tar files, or their",
        ):
            tar_shards.expand_pattern(str(tmp_path / pattern))
        return
    assert tar_shards.expand_pattern(str(tmp_path / pattern)) == (str(tmp_path), expected)
    monkeypatch.chdir(tmp_path)
    assert tar_shards.expand_pattern(pattern) == ("", expected)
    assert tar_shards.expand_pattern("t-00.tar") is None


def test_pattern_names_images_like_their_folder(shards: Path) -> None:
    all_images, some_images = ImageFolder(str(shards)), ImageFolder(str(shards / "{b,a}.tar"))
    assert list(some_images.names) == [name for name in all_images.names if "-1" not in name]
    for index, name in enumerate(some_images.names):
        assert some_images.file(index) == all_images.file(all_images.names.find(name))


def test_pattern_that_the_shell_has_expanded(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        pretrain_main.parse(["--imagenet_path", "t-0.tar", "t-1.tar", "--output_dir", "x"])
    assert "quote a pattern of tar files" in capsys.readouterr().err


def edit_tar(source: Path, target: Path, edit) -> Path:
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(edit(source.read_bytes()))
    return target


def end_of_members(content: bytes) -> int:
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        last = tar.getmembers()[-1]
    return last.offset_data + -(-last.size // 512) * 512


def with_garbage(content: bytes) -> bytes:
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        start = tar.getmembers()[2].offset
    return content[:start] + b"garbage!" * 64 + content[start + 512 :]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda content: content[: end_of_members(content) - 300],
            "x.tar is not a complete tar file .*; check that it was copied completely",
        ),
        (
            lambda content: content[: end_of_members(content)],
            r"x.tar lacks the end marker of a tar file.*truncate -s \+1024",
        ),
        (
            lambda content: content[: end_of_members(content) + 100],
            "x.tar lacks the end marker of a tar file",
        ),
        (with_garbage, r"x.tar is damaged: no tar header at byte \d+"),
        (lambda content: b"", "x.tar is not a complete tar file"),
        (lambda content: b"text " * 300, "x.tar is not a complete tar file"),
        (lambda content: b"\x1f\x8b" + content, r"x.tar is compressed \(gzip\), .* uncompress it"),
        (lambda content: b"\x28\xb5\x2f\xfd" + content, r"x.tar is compressed \(zstd\)"),
        (lambda content: bytes(10240), r"x.tar contains no image \(0 other files\)"),
    ],
)
def test_bad_tar_files(edit, message: str, shards: Path, tmp_path: Path) -> None:
    path = edit_tar(shards / "a.tar", tmp_path / "x.tar", edit)
    with pytest.raises(UserError, match=message) as raised:
        ImageFolder(str(path))
    assert "\n" not in str(raised.value)


def test_compressed_and_missing_tar_files(shards: Path, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar.gz", "w:gz") as tar:
        tar.add(shards, "x")
    for place in (tmp_path, tmp_path / "x.tar.gz"):
        with pytest.raises(UserError, match=r"x.tar.gz is compressed \(gzip\)"):
            ImageFolder(str(place))
    with pytest.raises(
        UserError, match="none.tar does not exist; give a folder of images or tar files"
    ):
        ImageFolder(str(tmp_path / "none.tar"))


def test_tar_files_next_to_images_are_reported(shards: Path, folders: Path, tmp_path: Path) -> None:
    """Archives often stay where they were unpacked."""
    shutil.copytree(folders / "b.tar", tmp_path / "images")
    shutil.copy(shards / "b.tar", tmp_path / "images")
    with captured_log() as lines:
        assert len(ImageFolder(str(tmp_path / "images"))) == 2
    assert any("contains images and 1 tar files, which are not read" in line for line in lines)


def test_tar_file_that_changes_during_a_run(shards: Path, tmp_path: Path) -> None:
    path = shutil.copy(shards / "a.tar", tmp_path)
    image = ImageFolder(path).file(1)
    os.truncate(path, image.offset + 100)
    with pytest.raises(
        BadImageError, match=r"a.tar ends before this image; the file has changed since the start"
    ):
        read_image(image)
    os.unlink(path)
    with pytest.raises(BadImageError, match=r"a.tar can't be read \(no such file"):
        read_image(image)


def test_resume_in_mid_epoch_with_tar_files(
    shards: Path, folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The resumed run equals an uninterrupted run on the same images in folders."""
    flags = (*FROZEN, "--batch_size", 1, "--epochs", 2, "--feature_recon")
    pre_train("--imagenet_path", folders, "--output_dir", tmp_path / "whole", *flags)
    stop_after(monkeypatch, 8)
    with pytest.raises(StopRequested, match="epoch 2, after batch 3 of 5"):
        pre_train("--imagenet_path", shards, "--output_dir", tmp_path / "stopped", *flags)
    pre_train(
        "--imagenet_path", shards, "--output_dir", tmp_path / "stopped", *flags, "--resume", "auto"
    )
    whole = read_checkpoint(tmp_path / "whole" / "checkpoint.pth")
    resumed = read_checkpoint(tmp_path / "stopped" / "checkpoint.pth")
    assert_same(resumed["model"], whole["model"])
    assert_same(resumed["optimizer"], whole["optimizer"])
    assert_same_logs(tmp_path / "stopped", tmp_path / "whole")


def test_proposal_cache_of_tar_files(shards: Path, folders: Path, tmp_path: Path) -> None:
    """The same cache as for folders. It can be checked against both and used for both."""
    names = [str(path.relative_to(folders)) for path in folders.rglob("*.png")]
    content = {
        "images": [{"id": i, "file_name": name} for i, name in enumerate(names)],
        "annotations": [
            {"image_id": i, "bbox": [4 * i, 5, 20, 30 - k]}
            for i in range(len(names))
            for k in range(4)
        ],
    }
    (tmp_path / "boxes.json").write_text(json.dumps(content))
    caches = []
    for images in (shards, folders, shards / "*.tar"):
        output = tmp_path / f"cache{len(caches)}"
        argv = ["--images", str(images), "--output_dir", str(output), "--num_workers", "0"]
        boxes = ["--proposals", f"file:{tmp_path / 'boxes.json'}"]
        cache_proposals.main(cache_proposals.parse([*argv, *boxes]))
        cache_proposals.main(cache_proposals.parse([*argv, "--check"]))
        caches.append(ProposalCache(output))
    for other in caches[1:]:
        for part in ("offsets", "boxes", "sizes_hw", "file_bytes", "file_crc32"):
            assert np.array_equal(getattr(caches[0], part), getattr(other, part)), part
        assert list(caches[0].names) == list(other.names)
    proposals = f"file:{caches[0].folder}"
    in_tar = build_pretext_dataset(shards, "region_prior", proposals)
    in_folder = build_pretext_dataset(folders, "region_prior", proposals)
    assert_same(in_tar[0, 1], in_folder[0, 1])

    changed = tmp_path / "changed"
    shutil.copytree(shards, changed)
    shutil.copy(shards / "a.tar", changed / "b.tar")
    with pytest.raises(
        UserError, match=r"2 of 5 images differ from those .* the first is b.tar/0.png"
    ):
        cache_proposals.check(caches[0], str(changed))


def test_check_dataset_reads_images_in_tar_files(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    shutil.copytree(shards, tmp_path / "shards")
    with tarfile.open(tmp_path / "shards" / "c.tar", "w") as tar:
        for name in ("bad.png", "empty.png"):
            entry = tarfile.TarInfo(name)
            entry.size = 9 if name == "bad.png" else 0
            tar.addfile(entry, io.BytesIO(b"no image!"))
    argv = [
        "--imagenet_path",
        str(tmp_path / "shards"),
        "--num_workers",
        "0",
        "--output_dir",
        str(tmp_path / "check"),
    ]
    with pytest.raises((SystemExit, UserError)):
        check_dataset.main(check_dataset.parse(argv))
    assert json.loads((tmp_path / "check" / "check.json").read_text())["train"]["readable"] == 5
    problems = (tmp_path / "check" / "problems.csv").read_text()
    assert "c.tar/bad.png" in problems
    assert "can't be decoded (an empty file)" in problems
