"""Hostile weight files: one line that says why, at once, without running code or using more memory than the file."""

import argparse
import collections
import contextlib
import io
import json
import os
import pickle
import signal
import struct
import zipfile

import numpy as np
import pytest
import torch

import trainer
from util import random_state
from util.checkpoints import content_check, pickle_scan
from util.checkpoints.adoption import settings_from_checkpoint
from util.checkpoints.checkpoint import Checkpoint, load_checkpoint
from util.checkpoints.classes import infer_classes
from util.checkpoints.weight_files import read_weights
from util.errors import UserError
from util.settings import FINETUNE, resolve

STATE = {"query_embed.weight": torch.arange(12.0).view(3, 4), "class_embed.bias": torch.ones(3)}
SECONDS = 60  # far more than a load takes


@pytest.fixture(autouse=True)
def _no_hang():
    def stop(*_):
        raise AssertionError("the file was read for too long")

    previous = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, previous)


@pytest.fixture
def small_memory():
    """Let this process allocate at most 2 GiB more than it has."""
    resource = pytest.importorskip("resource", reason="Windows has no limit of memory")
    if not os.path.exists("/proc/self/statm"):
        pytest.skip("the size of a process is read from /proc")
    with open("/proc/self/statm") as file:
        size = int(file.read().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (size + 2**31, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, limits)


def one_line(path, *words):
    with pytest.raises(UserError) as excinfo:
        load_checkpoint(path)
    text = str(excinfo.value)
    assert "\n" not in text
    assert str(path) in text
    for word in words:
        assert word in text
    return text


def write_zip(path, data_pkl, records=None, compression=zipfile.ZIP_STORED):
    """Write a file in torch.save's zip format around a pickle."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", data_pkl)
        archive.writestr("archive/byteorder", b"little")
        for name, content in (records or {"data/0": bytes(64)}).items():
            archive.writestr(f"archive/{name}", content)
        archive.writestr("archive/version", b"3\n")
    return path


def text(value):
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def long_number(value):
    data = value.to_bytes(8, "little", signed=True)
    return b"\x8a\x08" + data


def storage(count, kind="FloatStorage", key="0"):
    return (
        b"(" + text("storage") + b"ctorch\n" + kind.encode() + b"\n" + text(key) + text("cpu")
        + long_number(count) + b"tQ"
    )  # fmt: skip


def tensor(size, stride, offset=0, count=16):
    """Return the instructions of torch.save for a tensor with one dimension."""
    return (
        b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage(count) + long_number(offset) + long_number(size)
        + b"\x85" + long_number(stride) + b"\x85\x89ccollections\nOrderedDict\n)RtR"
    )  # fmt: skip


def model_with(instructions):
    """Return a pickle of {"model": {"w": VALUE}}."""
    return b"\x80\x02}" + text("model") + b"}" + text("w") + instructions + b"ss."


def args_with(instructions):
    """Return a pickle of {"model": {"w": tensor}, "args": VALUE}."""
    return (
        b"\x80\x02}" + text("model") + b"}" + text("w") + tensor(4, 1) + b"ss"
        + text("args") + instructions + b"s."
    )  # fmt: skip


def test_the_helpers_write_a_file_that_loads(tmp_path):
    write_zip(tmp_path / "f.pth", args_with(b"}" + text("lr") + b"K\x01s"))
    checkpoint = load_checkpoint(tmp_path / "f.pth")
    assert checkpoint.model["w"].tolist() == [0.0] * 4
    assert checkpoint.args == {"lr": 1}


# ------------------------------------------------------------------------------------------------------ code


class Evil:
    def __reduce__(self):
        return (os.system, ("touch ran",))


PLACES = {
    "top level": lambda evil: evil,
    "args": lambda evil: {"model": STATE, "args": evil},
    "a value of args": lambda evil: {"model": STATE, "args": argparse.Namespace(lr=evil)},
    "a class name": lambda evil: {"model": STATE, "class_names": {0: evil}},
    "a key of class names": lambda evil: {"model": STATE, "class_names": {(evil,): "cat"}},
    "optimizer": lambda evil: {"model": STATE, "optimizer": {"state": {0: {"exp_avg": evil}}}},
    "epoch": lambda evil: {"model": STATE, "epoch": evil},
    "random states": lambda evil: {"model": STATE, "random_states": [{"python": evil}]},
    "model": lambda evil: {"model": {**STATE, "w": evil}},
    "nested": lambda evil: {"model": STATE, "x": [({"y": [evil]},)]},
    "an array": lambda evil: {"model": STATE, "args": {"x": np.array([evil, 1], dtype=object)}},
    "a default": lambda evil: {"model": STATE, "x": collections.defaultdict(list, a=evil)},
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("zipped", [True, False])
def test_code_does_not_run_from_any_place(tmp_path, monkeypatch, place, zipped):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "evil.pth"
    torch.save(PLACES[place](Evil()), path, _use_new_zipfile_serialization=zipped)
    one_line(path, "posix.system", "may run code")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "instructions",
    [
        b"cos\nsystem\n" + text("touch ran") + b"\x85R",
        b"cbuiltins\neval\n" + text("1") + b"\x85R",
        b"ctorch\nload\n" + text("x.pth") + b"\x85R",
        b"ctorch.hub\nload\n" + text("x") + b"\x85R",
        b"cnumpy\nload\n" + text("x") + b"\x85R",
        b"cargparse\nNamespace.__class__\n)R",
        b"c__builtin__\ngetattr\n)R",
        b"(S'touch ran'\nios\nsystem\n",  # INST
        b"\x8c\x05posix\x8c\x06system\x93" + text("touch ran") + b"\x85R",  # STACK_GLOBAL
        b"\x82\x01",  # EXT1
    ],
)
def test_instructions_that_would_run_code_are_refused(tmp_path, monkeypatch, instructions):
    monkeypatch.chdir(tmp_path)
    one_line(write_zip(tmp_path / "f.pth", args_with(instructions)))
    assert not (tmp_path / "ran").exists()


# ------------------------------------------------------------------------------------------------------ sizes


def test_zip_bomb_is_refused_before_it_is_unpacked(tmp_path, small_memory):
    """A record of 4 GiB of zeros, in a file of 4 MiB."""
    path = tmp_path / "bomb.pth"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        archive.writestr("archive/data.pkl", args_with(b"}"))
        with archive.open("archive/data/0", "w", force_zip64=True) as record:
            for _ in range(64):
                record.write(bytes(2**20))
    # The sizes in the directory are what a reader allocates; 4 GiB of zeros would take too long to write here.
    content = path.read_bytes()
    assert content.count(struct.pack("<I", 2**26)) >= 1
    path.write_bytes(content.replace(struct.pack("<I", 2**26), struct.pack("<I", 2**32 - 2)))
    one_line(path, "claims 4,096 MiB", "does not compress")


def test_pickle_that_unpacks_to_much_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(pickle_scan, "MAX_UNPACKED_EXTRA", 2**20)
    path = tmp_path / "bomb.pth"
    write_zip(path, model_with(text("a" * (3 * 2**20))), compression=zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 2**20
    one_line(path, "its content claims 3 MiB")


def test_records_that_share_their_data_are_refused(tmp_path, small_memory):
    """Fifield's bomb: thousands of names in the directory, all of the same record."""
    path = tmp_path / "bomb.pth"
    write_zip(path, args_with(b"}"), {"data/0": bytes(2**20)})
    with zipfile.ZipFile(path, "a") as archive:
        shared = archive.getinfo("archive/data/0")
        for number in range(1, 5000):
            entry = zipfile.ZipInfo(f"archive/data/{number}")
            entry.header_offset, entry.CRC = shared.header_offset, shared.CRC
            entry.file_size = entry.compress_size = shared.file_size
            archive.filelist.append(entry)
        archive._didModify = True
    one_line(path, "its content claims 5,000 MiB")


def test_compressed_file_of_weights_loads(tmp_path):
    """A program may have packed the file again."""
    torch.save({"model": STATE}, tmp_path / "plain.pth")
    with (
        zipfile.ZipFile(tmp_path / "plain.pth") as old,
        zipfile.ZipFile(tmp_path / "packed.pth", "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry))
    assert torch.equal(
        load_checkpoint(tmp_path / "packed.pth").model["query_embed.weight"],
        STATE["query_embed.weight"],
    )


TENSORS = {
    "storage beyond the file": (tensor(4, 1, count=10**12), "claims 4000000000000 bytes"),
    "storage one number too long": (tensor(4, 1, count=17), "claims 68 bytes of data/0, which has 64"),
    "storage of negative size": (tensor(4, 1, count=-1), ""),
    "tensor beyond its storage": (tensor(17, 1), ""),
    "offset beyond its storage": (tensor(4, 1, offset=13), ""),
    "negative offset": (tensor(4, 1, offset=-1), ""),
    "negative stride": (tensor(4, -1, offset=8), ""),
    "negative size": (tensor(-4, 1), ""),
    "repeated without end": (tensor(10**12, 0), "repeats"),
    "repeated beyond any integer": (tensor(2**62, 0), ""),
    "unknown record": (tensor(4, 1).replace(text("0"), text("7")), "data/7, which has 0"),
    "path as a record": (tensor(4, 1).replace(text("0"), text("../../x")), "which has 0"),
    "call of a tensor type": (b"ctorch\nFloatTensor\n" + long_number(10**11) + b"\x85R", "FloatTensor"),
    "call of a storage type": (b"ctorch\nFloatStorage\n" + long_number(10**11) + b"\x85R", ""),
    "meta": (b"ctorch._utils\n_rebuild_meta_tensor_no_storage\n)R", "not a plain tensor"),
}  # fmt: skip


@pytest.mark.parametrize("case", TENSORS)
def test_tensors_of_impossible_sizes_are_one_line(tmp_path, small_memory, case):
    instructions, word = TENSORS[case]
    one_line(write_zip(tmp_path / "f.pth", model_with(instructions)), word)


def test_legacy_file_that_claims_more_than_it_has_is_one_line(tmp_path, small_memory):
    path = tmp_path / "f.pth"
    torch.save({"model": {"w": torch.ones(77)}}, path, _use_new_zipfile_serialization=False)
    content = path.read_bytes()
    path.write_bytes(content.replace(b"KM", b"J" + struct.pack("<i", 2**31 - 1)))
    assert path.read_bytes() != content
    one_line(path, "its content claims 8,192 MiB")


@pytest.mark.parametrize("kind", ["sparse", "quantized", "meta", "nested"])
def test_tensors_that_are_not_plain_are_one_line(tmp_path, kind):
    value = {
        "sparse": lambda: torch.eye(3).to_sparse(),
        "quantized": lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
        "meta": lambda: torch.ones(10**9, device="meta"),
        "nested": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    }[kind]()
    with pytest.raises(UserError, match=f"{kind}.* tensor"):
        content_check.check_content({"model": {"w": value}}, "f.pth")
    if kind != "nested":  # which torch.save writes as a wrapper around a class
        torch.save({"model": {**STATE, "w": value}}, tmp_path / "f.pth")
        one_line(tmp_path / "f.pth", "not a plain tensor")


def doubled(times):
    """Return the instructions of a list that holds a list twice that holds a list twice ..."""
    return b"]]q\x00a" + b"](h\x00h\x00eq\x00a" * times


ARGS = {
    "doubled lists": (doubled(40), "entries"),
    "doubled tuples": (b")q\x00" + b"h\x00h\x00\x86q\x00" * 60, "nested tuples"),
    "doubled tuples as a key": (b"}" + b")q\x00" + b"h\x00h\x00\x86q\x00" * 60 + b"Ns", "nested tuples"),
    "deep lists": (b"]" * 10**4 + b"a" * (10**4 - 1), "nested 50 deep"),
    "list in itself": (b"]q\x00h\x00a", "contains itself"),
    "dict in itself": (b"}q\x00" + text("x") + b"h\x00s", "contains itself"),
    "namespace in itself": (b"cargparse\nNamespace\n)\x81q\x00}" + text("x") + b"h\x00sb", "contains itself"),
    "bytearray": (b"c__builtin__\nbytearray\n" + long_number(10**11) + b"\x85R", "bytearray"),
    "text of nested lists": (b"c__builtin__\nstr\n" + doubled(60) + b"\x85R", ""),
    "longer and longer text": (
        text("a") + b"q\x00" + (b"c_codecs\nencode\nh\x00" + text("hex") + b"\x86Rq\x00") * 50, "",
    ),
    "array of any size": (b"cnumpy\nndarray\n" + long_number(10**11) + b"\x85\x85R", "OK"),
    "array beyond its data": (
        b"cnumpy._core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + text("b") + b"\x87R(K\x01"
        + long_number(10**11) + b"\x85cnumpy\ndtype\n" + text("f8") + b"\x89\x88\x87R\x89U\x08" + bytes(8) + b"tb", "",
    ),
    "array of pointers": (
        b"cnumpy._core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + text("b") + b"\x87R(K\x01K\x01\x85"
        + b"cnumpy\ndtype\n" + text("O8") + b"\x89\x88\x87R\x89U\x08" + b"A" * 8 + b"tb", "",
    ),
    "array of records": (b"cnumpy\ndtype\n" + text("V8") + b"\x89\x88\x87R", ""),
    "number of 2 GB": (
        b"cnumpy._core.multiarray\nscalar\ncnumpy\ndtype\n" + text("S2000000000") + b"\x89\x88\x87R\x85R", "",
    ),
    "value missing": (b"}s", ""),
    "unknown memory": (b"h\x07", ""),
    "no end": (b"", ""),
}  # fmt: skip


@pytest.mark.parametrize("case", ARGS)
def test_contents_that_take_any_time_or_memory_are_one_line(tmp_path, small_memory, case):
    instructions, word = ARGS[case]
    path = write_zip(tmp_path / "f.pth", args_with(instructions))
    if word == "OK":  # the size is ignored
        assert load_checkpoint(path).extra["args"] == []
    else:
        one_line(path, word)


def test_arrays_with_other_byte_order_and_text_load(tmp_path):
    args = {"a": np.arange(3, dtype=">i4"), "t": np.array(["x", "yz"]), "o": np.array([None, "a"])}
    args |= {
        "empty": np.zeros((0, 4)),
        "b": np.bool_(True),
        "f": np.float32(0.5),
        "s": np.str_("hi"),
    }
    torch.save({"model": STATE, "args": args}, tmp_path / "f.pth")
    assert load_checkpoint(tmp_path / "f.pth").args == {
        "a": [0, 1, 2], "t": ["x", "yz"], "o": [None, "a"], "empty": [], "b": True, "f": 0.5, "s": "hi",
    }  # fmt: skip


def test_storages_are_read_from_the_pickle():
    found = list(pickle_scan._scan(io.BytesIO(model_with(tensor(4, 1, count=16))), "f.pth"))
    assert found == [pickle_scan.Storage("0", 64)]


# ------------------------------------------------------------------------------------------------------ damage


def test_truncated_at_every_place_is_one_line(tmp_path):
    for zipped in (True, False):
        torch.save({"model": STATE}, tmp_path / "ok.pth", _use_new_zipfile_serialization=zipped)
        content = (tmp_path / "ok.pth").read_bytes()
        path = tmp_path / "cut.pth"
        for length in range(1, len(content) - 1, len(content) // 40):
            path.write_bytes(content[:length])
            one_line(path)


def safetensors_file(header, data=b"\0" * 16, length=None):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(header) if length is None else length) + header + data


F32 = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
SAFETENSORS = {
    "length beyond the file": safetensors_file({"w": F32}, length=2**63),
    "length of 1 GB": safetensors_file({"w": F32}, length=10**9),
    "length 0": safetensors_file({"w": F32}, length=0),
    "no JSON": safetensors_file(b"{{{{"),
    "not UTF-8": safetensors_file(b'{"\xff": 1}'),
    "a list": safetensors_file([1]),
    "nested without end": safetensors_file(b'{"w":' + b"[" * 10**5 + b"}"),
    "unknown type": safetensors_file({"w": {**F32, "dtype": "F33"}}),
    "offsets beyond the file": safetensors_file({"w": {**F32, "data_offsets": [0, 10**15]}}),
    "offsets the wrong way": safetensors_file({"w": {**F32, "data_offsets": [16, 0]}}),
    "shape of another size": safetensors_file({"w": {**F32, "shape": [10**15]}}),
    "shape beyond 64 bits": safetensors_file({"w": {**F32, "shape": [2**40, 2**40]}}),
    "negative shape": safetensors_file({"w": {**F32, "shape": [-4]}}),
    "overlapping": safetensors_file({"w": F32, "v": F32}),
    "no data": safetensors_file({"w": F32}, data=b""),
    "no tensors": safetensors_file({}, data=b""),
}


@pytest.mark.parametrize("case", SAFETENSORS)
def test_damaged_safetensors_file_is_one_line(tmp_path, small_memory, case):
    pytest.importorskip("safetensors", reason="safetensors is not installed")
    path = tmp_path / "f.safetensors"
    path.write_bytes(SAFETENSORS[case])
    one_line(path)


# ------------------------------------------------------------------------------------------------------ wrong types

WRONG = {
    "model is a list": ({"model": [1]}, "no 'model'"),
    "model is empty": ({"model": {}}, "no 'model'"),
    "model has a text": ({"model": {"w": "x"}}, "not a named tensor"),
    "model has a number as a name": ({"model": {1: torch.ones(1)}}, "not a named tensor"),
    "name of a megabyte": ({"model": {"criterion." * 10**5: torch.ones(1)}}, "1000000 characters"),
    "name with a line break": ({"model": {"a\nb": torch.ones(1)}}, "no parameter name"),
    "NaN": ({"model": {"w": torch.tensor([float("nan")])}}, "NaN"),
    "a number": (5, "contains a int"),
    "a text": ("x", "contains a str"),
    "None": (None, "contains a NoneType"),
}


@pytest.mark.parametrize("case", WRONG)
def test_content_without_weights_is_one_line(tmp_path, case):
    content, word = WRONG[case]
    torch.save(content, tmp_path / "f.pth")
    one_line(tmp_path / "f.pth", word)


HUGE = 10**400
IGNORED = {
    "args": [["a"], "text", 5, torch.ones(3), None],
    "class_names": [5, "text", torch.ones(2), {0: 1}, {(0, 1): "a"}, {0: "x" * 10**6}, {0: "\ud800"},
                    {torch.ones(2): "a"}, [None]],
    "category_ids": [[1], {0: "cat"}, {0: 2**70}, {HUGE: 1}, {0: None}, {0: torch.ones(2)}],
    "things": [[True], {0: "yes"}, {0: 5}],
    "epoch": ["three", [3], float("nan"), float("inf"), -5, True, torch.ones(2), {}],
    "batch": [-1, "x", {}],
    "best": ["x", float("nan"), torch.ones(2)],
    "optimizer": [5, "x", [1]],
    "lr_scheduler": ["x", 1],
    "averages": [[1], {"loss": "x"}, {"loss": [1]}, {"loss": [1, "x"]}],
    "pending": ["x", {"loss": torch.ones(2)}, {"loss": {}}],
    "frozen": ["x", {"a": 5}, {"a": {"w": 5}}, {"a": {}}],
    "raw_model": ["x", {}, {"w": 5}],
    "random_states": ["x", {}, 5],
    "position_unit": ["x", 5],
    "data_fingerprint": [5, [1]],
    "world_size": ["x", -1],
}  # fmt: skip


@pytest.mark.parametrize("key", IGNORED)
def test_entry_of_a_wrong_type_counts_as_missing(tmp_path, key):
    missing = getattr(Checkpoint(model=STATE), key)
    for value in IGNORED[key]:
        checkpoint = Checkpoint.from_dict({"model": STATE, key: value}, "f.pth")
        assert getattr(checkpoint, key) == missing, value
        checkpoint.missing_state()


@pytest.mark.parametrize("groups", [1.5, torch.ones(2), "x", {0: {}}, []])
def test_optimizer_without_groups_is_missing(groups: object) -> None:
    entries = {"model": STATE, "optimizer": {"state": {}, "param_groups": groups}}
    assert Checkpoint.from_dict(entries, "f.pth").missing_state() == "no optimizer"


def test_pickle_with_a_cut_storage_is_not_read_beyond_its_end(tmp_path):
    torch.save({"model": {"w": torch.ones(1000)}}, tmp_path / "a.pth")
    with zipfile.ZipFile(tmp_path / "a.pth") as archive:
        records = {name.split("/", 1)[1]: archive.read(name) for name in archive.namelist()}
    data_pkl = records.pop("data.pkl")
    records["data/0"] = records["data/0"][:-1]
    one_line(
        write_zip(tmp_path / "f.pth", data_pkl, {"data/0": records["data/0"]}), "claims 4000 bytes"
    )


def test_plain_pickle_is_one_line(tmp_path):
    path = tmp_path / "f.pth"
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        path.write_bytes(pickle.dumps({"model": {"w": np.ones(3)}}, protocol))
        with pytest.raises(UserError) as excinfo:
            read_weights(path)
        assert "\n" not in str(excinfo.value)


# ------------------------------------------------------------------------------------------------ settings, resuming


def detector_state(**shapes):
    """Return a state dict with the names that show DETR's architecture, and tensors of width 4."""
    layer = {
        "self_attn.in_proj_weight": (12, 4), "linear1.weight": (8, 4), "norm1.weight": (4,),
    }  # fmt: skip
    known = {
        f"transformer.{part}.layers.0.{name}": shape
        for part in ("encoder", "decoder")
        for name, shape in layer.items()
    }
    known["transformer.decoder.layers.0.multihead_attn.in_proj_weight"] = (12, 4)
    known |= {"query_embed.weight": (5, 4), "class_embed.weight": (3, 4), "class_embed.bias": (3,)}
    return {name: torch.ones(shape) for name, shape in {**known, **shapes}.items()}


def resolved(state, args):
    checkpoint = Checkpoint.from_dict({"model": state, "args": args}, "f.pth")
    given = {"resume": "f.pth", "eval": True, "device": "cpu"}
    return resolve(given, settings_from_checkpoint(checkpoint, given), FINETUNE)


GOOD_ARGS = {"nheads": 2, "backbone": "resnet18", "lr": 1e-3, "epochs": 30.0}


def test_settings_of_the_right_types_are_adopted():
    found = resolved(detector_state(), {**GOOD_ARGS, "masks": False, "script": FINETUNE})
    assert (found.hidden_dim, found.nheads, found.lr, found.epochs) == (4, 2, 1e-3, 30)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("nheads", 0),
        ("nheads", -2),
        ("nheads", 2**70),
        ("backbone", "resnet18\nx"),
        ("lr", "fast"),
        ("lr", [1e-3]),
        ("lr", float("nan")),
        ("lr", {}),
        ("epochs", "three"),
        ("epochs", 2.5),
        ("epochs", torch.ones(2)),
        ("weight_decay", "x" * 10**6),
        ("coco_path", 5),
        ("num_queries", True),
        ("dilation", 3),
        ("classification", ["softmax"]),
    ],
)
def test_setting_of_a_wrong_type_is_one_line_or_ignored(name, value):
    args = {**GOOD_ARGS, "script": FINETUNE, name: value}
    try:
        found = resolved(detector_state(), args)
    except UserError as error:
        message = str(error)
    else:
        assert type(getattr(found, name)) is not type(value)
        message = name
    assert "\n" not in message
    assert len(message) < 500
    assert name in message


@pytest.mark.parametrize(
    "shapes",
    [
        {"transformer.encoder.layers.99999999.norm1.weight": (4,)},
        {"transformer.decoder.layers.0.norm1.weight": (10**6,)},
    ],
)  # fmt: skip
def test_names_that_imply_a_giant_model_are_one_line(shapes):
    with pytest.raises(UserError, match="implies .* layers"):
        resolved(detector_state(**shapes), GOOD_ARGS)


@pytest.mark.parametrize(
    "name",
    ["query_embed.weight", "class_embed.bias", "transformer.decoder.layers.0.norm1.weight"],
)
def test_parameter_without_dimensions_is_no_traceback(name):
    state = {**detector_state(), name: torch.tensor(1.0)}
    with contextlib.suppress(UserError):
        resolved(state, GOOD_ARGS)
    infer_classes(Checkpoint(model=state))


GOOD_GROUP = {"lr": 0.1, "initial_lr": 0.1, "weight_decay": 0.0, "params": [0, 1]}


@pytest.mark.parametrize(
    "entries",
    [
        {"optimizer": {"state": {}, "param_groups": [{"params": "x"}]}},
        {"optimizer": {"state": {}, "param_groups": [{"lr": 1}]}},
        {"optimizer": {"state": {0: 5}, "param_groups": [GOOD_GROUP]}},
        {"optimizer": {"state": {"x": {}}, "param_groups": [{**GOOD_GROUP, "params": [[0], {}]}]}},
        {"lr_scheduler": {"step_size": "x", "last_epoch": []}},
        {"lr_scheduler": {"step_size": 3}},
        {"random_states": [5]},
        {"random_states": [{"python": "x"}]},
        {"random_states": [{"python": [3, [1], None], "numpy": {}, "torch": torch.ones(3)}]},
        {"raw_model": {"w": torch.ones(1)}},
    ],
)
def test_damaged_training_state_is_one_line(entries):
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3)
    good = {
        "model": model.state_dict(),
        "optimizer": {"state": {}, "param_groups": [GOOD_GROUP]},
        "lr_scheduler": scheduler.state_dict(),
        "epoch": 1,
    }
    run = argparse.Namespace(
        model=model, optimizer=optimizer, scheduler=scheduler, scaler=None, checkpoint_extras={},
        max_iters=None, epoch=0, epochs=3, batch=0, average=None,
    )  # fmt: skip
    state = random_state.get_rng_states()
    try:
        with pytest.raises(UserError) as excinfo:
            trainer.resume_run(run, Checkpoint.from_dict({**good, **entries}, "f.pth"))
    finally:
        random_state.set_rng_states(state)
    assert "\n" not in str(excinfo.value)
    assert len(str(excinfo.value)) < 500
