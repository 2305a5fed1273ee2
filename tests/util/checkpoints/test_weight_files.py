"""Weight files: read without running code, downloaded once, saved atomically."""

import collections
import hashlib
import logging
import pathlib
import pickle
import resource
import subprocess
import sys
import zipfile
from argparse import Namespace

import numpy as np
import pytest
import torch

from util.checkpoints import weight_files
from util.checkpoints.backbone_weights import SWAV
from util.checkpoints.checkpoint import load_checkpoint, save_checkpoint
from util.checkpoints.download import DownloadError
from util.checkpoints.weight_files import cached_path, fetch, read_weights
from util.errors import UserError

STATE = {"query_embed.weight": torch.arange(12.0).view(3, 4), "class_embed.bias": torch.ones(3)}


def one_line(excinfo, *words):
    text = str(excinfo.value)
    assert "\n" not in text
    for word in words:
        assert str(word) in text


# ---------------------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("name", ["old.pth", "old.pth.tar"])
def test_legacy_file_with_pickled_args_loads(tmp_path, zipped, name):
    args = Namespace(
        lr=1e-4,
        output_dir=pathlib.PosixPath("a/b"),
        score=np.float64(0.5),
        seed=np.int64(3),
        table=np.arange(3),
        extra=collections.OrderedDict(x=1),
        lists=collections.defaultdict(list, k=[1, 2]),
        names=["backbone.0"],
    )
    torch.save(
        {
            "model": {"module." + key: value for key, value in STATE.items()},
            "epoch": 3,
            "args": args,
        },
        tmp_path / name,
        _use_new_zipfile_serialization=zipped,
    )
    checkpoint = load_checkpoint(tmp_path / name)
    assert checkpoint.args == {
        "lr": 1e-4,
        "output_dir": "a/b",
        "score": 0.5,
        "seed": 3,
        "table": [0, 1, 2],
        "extra": {"x": 1},
        "lists": {"k": [1, 2]},
        "names": ["backbone.0"],
    }
    assert type(checkpoint.args["score"]) is float
    assert type(checkpoint.args["lists"]) is dict
    assert list(checkpoint.model) == list(STATE)
    assert checkpoint.epoch == 3


def test_numpy_1_names_and_windows_paths_load(tmp_path):
    """NumPy 1 pickles refer to numpy.core, and a WindowsPath can't be created on Linux."""
    raw = tmp_path / "raw.pth"
    torch.save(
        {
            "model": {"w": torch.ones(1)},
            "args": Namespace(a=np.float32(2), p=pathlib.PurePosixPath("x/y")),
        },
        raw,
    )
    with zipfile.ZipFile(raw) as old, zipfile.ZipFile(tmp_path / "old.pth", "w") as new:
        for entry in old.infolist():
            data = old.read(entry)
            if entry.filename.endswith("data.pkl"):
                data = data.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
                data = data.replace(b"cpathlib._local\n", b"cpathlib\n").replace(
                    b"PurePosixPath", b"WindowsPath"
                )
                assert b"WindowsPath" in data
            new.writestr(entry, data)
    assert load_checkpoint(tmp_path / "old.pth").args == {"a": 2.0, "p": "x\\y"}


class RunsCode:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return (pathlib.Path.touch, (pathlib.Path(self.target),))


class Evil:
    def __reduce__(self):
        import os

        return (os.system, ("touch ran",))


@pytest.mark.parametrize("zipped", [True, False])
def test_pickle_that_runs_code_is_refused_and_does_not_run(tmp_path, monkeypatch, zipped):
    monkeypatch.chdir(tmp_path)
    torch.save(
        {"model": {"w": torch.ones(1)}, "args": Evil()},
        "evil.pth",
        _use_new_zipfile_serialization=zipped,
    )
    with pytest.raises(UserError) as excinfo:
        load_checkpoint("evil.pth")
    one_line(excinfo, "evil.pth", "system")
    assert not (tmp_path / "ran").exists()
    torch.load("evil.pth", weights_only=False)
    assert (tmp_path / "ran").exists(), "the file would have run code"


def test_other_methods_of_allowed_modules_are_refused(tmp_path):
    torch.save({"model": {"w": torch.ones(1)}, "args": RunsCode("x")}, tmp_path / "f.pth")
    with pytest.raises(UserError):
        load_checkpoint(tmp_path / "f.pth")


def broken_files(folder):
    good = folder / "good.pth"
    torch.save({"model": STATE}, good)
    (folder / "text.pth").write_text("<html>Sign in</html>")
    (folder / "short.pth").write_bytes(good.read_bytes()[:-200])
    (folder / "empty.pth").touch()
    (folder / "folder.pth").mkdir()
    (folder / "bytes.pth").write_bytes(bytes(range(256)) * 4)
    (folder / "half.safetensors").write_bytes(b"\x05\x00\x00")
    with (folder / "pickle.pth").open("wb") as file:
        pickle.dump(3, file, protocol=2)
    torch.save(torch.ones(2), folder / "tensor.pth")
    torch.save({"optimizer": {}}, folder / "other.pth")


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("text.pth", "text file"),
        ("short.pth", "incomplete"),
        ("empty.pth", "empty"),
        ("folder.pth", "folder"),
        ("missing.pth", "no such file"),
        ("bytes.pth", "damaged"),
        ("pickle.pth", "pickle.pth"),
        ("tensor.pth", "Tensor"),
        ("other.pth", "'model'"),
        ("half.safetensors", "half.safetensors"),
    ],
)
def test_file_that_is_not_a_checkpoint_is_one_line(tmp_path, name, word):
    broken_files(tmp_path)
    with pytest.raises(UserError) as excinfo:
        load_checkpoint(tmp_path / name)
    one_line(excinfo, tmp_path / name, word)


# ---------------------------------------------------------------------------------------------------- downloading


@pytest.mark.parametrize(
    "name",
    [
        "model-00001-of-00002.safetensors",
        "pytorch_model-00002-of-00012.bin",
        "model.safetensors.index.json",
    ],
)
def test_part_of_a_checkpoint_in_several_files_is_one_line(tmp_path, name):
    (tmp_path / name).write_text("{}")
    with pytest.raises(UserError) as excinfo:
        read_weights(tmp_path / name)
    one_line(excinfo, "a checkpoint in several files", "save it in one")


def test_folder_names_a_weight_file_that_it_has(tmp_path):
    (tmp_path / "model-00001-of-00001.safetensors").write_text("")
    with pytest.raises(UserError) as excinfo:
        read_weights(tmp_path)
    one_line(excinfo, "is a folder", "model-00001-of-00001.safetensors")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    return tmp_path / "hub" / "checkpoints"


def test_url_is_downloaded_once_and_its_hash_verified(hub, monkeypatch):
    calls = []

    def download(url, path, sha256_prefix, **_options):
        calls.append((url, sha256_prefix))
        torch.save({"model": STATE}, path)

    monkeypatch.setattr(weight_files, "download", download)
    url = "https://example.org/detr/detr-r50-e632da11.pth"
    for _ in range(2):
        assert load_checkpoint(url).model
    assert calls == [(url, "e632da11")]
    load_checkpoint("https://example.org/r50_deformable_detr-checkpoint.pth")
    assert calls[1][1] is None


def test_urls_with_the_same_file_name_are_different_files(hub, monkeypatch, caplog):
    calls = []

    def download(url, path, sha256_prefix, **_options):
        calls.append((url, sha256_prefix))
        torch.save({"model": {"w": torch.tensor(float(len(calls)))}}, path)

    monkeypatch.setattr(weight_files, "download", download)
    urls = ["https://example.org/a/checkpoint.pth.tar", "https://example.org/b/checkpoint.pth.tar"]
    for _ in range(2):
        with caplog.at_level(logging.INFO, logger="predetr"):
            assert [float(load_checkpoint(url).model["w"]) for url in urls] == [1, 2]
    assert calls == [(url, None) for url in urls], (
        "the digits added to the names are not a hash of the content"
    )
    for url in urls:
        name = f"checkpoint-{hashlib.sha256(url.encode()).hexdigest()[:8]}.pth.tar"
        assert (hub / name).is_file()
        assert f"using {hub / name}" in caplog.text


def test_names_with_a_content_hash_stay(hub):
    assert cached_path(SWAV) == hub / "swav_800ep_pretrain.pth.tar"
    assert (
        cached_path("https://example.org/x/swav_800ep_pretrain.pth.tar").name
        != "swav_800ep_pretrain.pth.tar"
    )
    assert (
        cached_path("https://example.org/x/resnet50-0676ba61.pth") == hub / "resnet50-0676ba61.pth"
    )


def test_file_put_by_hand_where_the_error_says_is_found(hub, monkeypatch):
    def download(*_args, **_kwargs):
        raise DownloadError("no route")

    monkeypatch.setattr(weight_files, "download", download)
    url = "https://example.org/model.pth"
    with pytest.raises(UserError) as excinfo:
        fetch(url)
    place = str(excinfo.value).split("put it at ")[1]
    save_checkpoint({"model": STATE}, place)
    assert load_checkpoint(url).model


@pytest.mark.parametrize(
    "error",
    [
        DownloadError("no route"),
        PermissionError(13, "Permission denied"),
    ],
)
def test_failed_download_names_file_url_and_path(hub, monkeypatch, error):
    def download(*_args, **_kwargs):
        raise error

    monkeypatch.setattr(weight_files, "download", download)
    url = "https://example.org/detr/detr-r50-e632da11.pth"
    with pytest.raises(UserError) as excinfo:
        load_checkpoint(url)
    one_line(excinfo, "detr-r50-e632da11.pth", url, hub / "detr-r50-e632da11.pth")
    assert excinfo.value.__suppress_context__, "a notebook shows this error alone"


def test_url_without_a_file_name_is_refused():
    with pytest.raises(UserError, match="browser"):
        fetch("https://example.org/file/d/1JhL/view?usp=sharing")


# ---------------------------------------------------------------------------------------------------- writing


def test_saving_and_loading_round_trip(tmp_path):
    state = {
        "model": STATE,
        "epoch": 1,
        "args": {"lr": 0.1, "names": ["a"], "none": None},
        "class_names": {1: "cat"},
    }
    save_checkpoint(state, tmp_path / "new" / "checkpoint.pth")
    loaded = load_checkpoint(tmp_path / "new" / "checkpoint.pth")
    assert {key: getattr(loaded, key) for key in ("epoch", "args", "class_names")} == {
        key: state[key] for key in ("epoch", "args", "class_names")
    }
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["checkpoint.pth"]


@pytest.mark.parametrize(
    "value", [Namespace(a=1), np.float64(1), pathlib.Path("x"), lambda: 0, np.zeros(2), object()]
)
def test_saving_other_classes_is_an_error(tmp_path, value):
    path = tmp_path / "checkpoint.pth"
    save_checkpoint({"epoch": 1}, path)
    before = path.read_bytes()
    with pytest.raises(TypeError, match=r"checkpoint\['best'\]\[0\]"):
        save_checkpoint({"best": [value]}, path)
    assert path.read_bytes() == before


def test_interrupted_save_keeps_the_previous_file(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pth"
    save_checkpoint({"epoch": 1}, path)
    before = path.read_bytes()

    def stop(state, file):
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", stop)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint({"epoch": 2}, path)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["checkpoint.pth"]


FULL_DISK = """
import resource, sys, torch
from util.checkpoints.checkpoint import save_checkpoint
from util.errors import UserError
save_checkpoint({"model": {"w": torch.zeros(10)}}, sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
try:
    save_checkpoint({"model": {str(i): torch.randn(20_000) for i in range(20)}}, sys.argv[1])
except UserError as error:
    print(error)
"""


def test_full_disk_is_one_line_and_keeps_the_previous_file(tmp_path):
    """A limit on the file size stands in for a full disk: writes fail in the same way."""
    assert hasattr(resource, "RLIMIT_FSIZE")
    path = tmp_path / "checkpoint.pth"
    root = pathlib.Path(__file__).parents[3]
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(path)],
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1
    assert "disk full" in done.stdout
    assert str(path) in done.stdout
    assert load_checkpoint(path).model["w"].shape == (10,)
    assert [entry.name for entry in tmp_path.iterdir()] == ["checkpoint.pth"]


def test_folder_that_cannot_be_created_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError) as excinfo:
        save_checkpoint({"epoch": 1}, tmp_path / "file" / "checkpoint.pth")
    one_line(excinfo, "checkpoint.pth", "--output_dir")


def test_read_weights_reads_safetensors(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    safetensors.save_file({"w": torch.arange(3.0)}, tmp_path / "f.safetensors")
    assert torch.equal(read_weights(tmp_path / "f.safetensors")["w"], torch.arange(3.0))


def test_every_load_is_weights_only():
    root = pathlib.Path(weight_files.__file__).parents[2]
    for folder in ("util", "models", "."):
        for path in (root / folder).glob("*.py"):
            for line in path.read_text().splitlines():
                assert "torch.load(" not in line or "weights_only=True" in line, f"{path}: {line}"
