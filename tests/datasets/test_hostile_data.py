"""Values in data files that once ended in a traceback, or in more memory than the machine has."""

import io
import json
import pickle
import struct

import numpy as np
import pytest

from datasets.labelled.airbus_ship import read_rle_csv
from datasets.labelled.coco_parser import parse_coco
from datasets.labelled.segmentations import SegmentationError, decode_mask
from datasets.labelled.subsets import _read_json
from datasets.labelled.voc import read_xml
from datasets.proposals.cache import FORMAT, HEADER, ProposalCache
from datasets.proposals.from_file import CocoProposals, NpyFolderProposals, NpzProposals, read_npy
from util.errors import UserError

IMAGE = np.zeros((20, 24, 3), np.uint8)


def npy_with_shape(shape):
    file = io.BytesIO()
    header = {"descr": "<f4", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
    return file.getvalue() + bytes(64)


def test_segmentation_that_is_no_json():
    for text in ('{"size": [1, 2], "counts": "a\tb"}', "{x}", "[" * 10**5):
        with pytest.raises(SegmentationError, match="not valid JSON"):
            decode_mask(text, (20, 24))


@pytest.mark.parametrize("side", ["1e30", "9" * 30, "-1e30", "inf", "nan"])
def test_voc_image_of_any_size(tmp_path, side):
    path = tmp_path / "a.xml"
    path.write_text(
        f"<annotation><size><width>{side}</width><height>2</height></size></annotation>"
    )
    with pytest.raises(UserError, match="<size>"):
        read_xml(str(path))


def test_null_character_in_a_file_name(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"ImageId,EncodedPixels\na.png,\nb\0.png,1 2\n")
    with pytest.raises(UserError, match="line 3.*not a valid file name"):
        read_rle_csv(str(tmp_path / "a.csv"), str(tmp_path))
    content = {"images": [{"id": 1, "file_name": "a\0.png"}], "annotations": [], "categories": []}
    with pytest.raises(UserError, match="not a valid file name"):
        parse_coco(content, "a.json")


def test_an_airbus_image_that_is_a_folder_is_named_with_its_own(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "ships.csv").write_text("ImageId,EncodedPixels\n/,1 2\n")
    with pytest.raises(UserError, match=r"images: the image / can't be decoded"):
        read_rle_csv(str(tmp_path / "ships.csv"), str(tmp_path / "images"))


@pytest.mark.filterwarnings("error")
def test_boxes_beyond_float32_are_clipped_without_a_warning(tmp_path):
    boxes = np.array([[1, 2, 1e300, 12], [-1e300, 4, 20, 1e200]])
    np.savez(tmp_path / "boxes.npz", **{"a.png": np.hstack([boxes, [[0.5], [1e99]]])})
    method = NpzProposals(str(tmp_path / "boxes.npz"))
    found, scores = method.propose(np.zeros((20, 24, 3), np.uint8), "a.png")
    assert found.tolist() == [[0, 4, 20, 20], [1, 2, 24, 12]]
    assert scores.tolist() == [np.inf, 0.5]


@pytest.mark.parametrize("shape", [(2**32, 4), (2**62, 4), (17,), (-4, 4), (2**62, 0, 2**62)])
def test_npy_file_that_claims_more_than_it_has(tmp_path, shape):
    (tmp_path / "a.npy").write_bytes(npy_with_shape(shape))
    with pytest.raises(UserError, match="a.npy can't be read|expected boxes"):
        NpyFolderProposals(str(tmp_path)).propose(IMAGE, "a.png")


def test_npz_file_that_claims_more_than_it_has(tmp_path):
    import zipfile

    with zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        archive.writestr("a.png.npy", npy_with_shape((2**40, 4)))
        # 80 MiB of zeros in 80 KiB.
        archive.writestr("b.png.npy", npy_with_shape((5 * 2**20, 4))[:-64] + bytes(80 * 2**20))
        archive.writestr("c.png.npy", npy_with_shape((4, 4)))
    method = NpzProposals(str(tmp_path / "a.npz"))
    for name in ("a.png", "b.png"):
        with pytest.raises(UserError, match=f"array {name} can't be read"):
            method.propose(IMAGE, name)
    assert len(method.propose(IMAGE, "c.png")[0]) == 0


class Evil:
    def __reduce__(self):
        import os

        return (os.system, ("touch ran",))


def pickled_npy(content):
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "|O", "fortran_order": False, "shape": ()})
    return file.getvalue() + content


@pytest.mark.parametrize(
    "content",
    [
        pickle.dumps({"box": Evil()}),
        pickle.dumps({"box": np.array([Evil()], dtype=object)}),
        b"\x80\x04Nr\xff\xff\xff\x7f.",  # a place in the memo that would need 32 GB
        b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b".",  # a bytearray of 1 TB
    ],
)
def test_pickled_npy_file_runs_no_code_and_takes_no_memory(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.npy").write_bytes(pickled_npy(content))
    with pytest.raises(UserError, match="a.npy"):
        NpyFolderProposals(str(tmp_path)).propose(IMAGE, "a.png")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("dtype", ["<f4", ">f8", "<i2", "|u1"])
def test_arrays_of_every_kind_still_load(tmp_path, dtype):
    for order in ("C", "F"):
        boxes = np.asarray([[1, 2, 10, 12], [3, 4, 20, 18]], dtype=dtype, order=order)
        for content in (boxes, {"box": boxes, "score": np.array([1.0, 0.5])}):
            np.save(tmp_path / "a.npy", np.asarray(content), allow_pickle=True)
            found = read_npy(tmp_path / "a.npy")
            found = found["box"] if isinstance(content, dict) else found
            assert np.array_equal(found, boxes)


def test_brackets_nested_deeper_than_pythons_limit(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("[" * 10**5)
    for read in (_read_json, CocoProposals):
        with pytest.raises(UserError, match="a.json"):
            read(str(path))


GOOD = {
    "header": {
        "format": FORMAT, "method": "random", "settings": {}, "grid": 0, "images": 2, "boxes": 3, "scores": False,
        "names": "x", "unreadable": 0,
    },
    "name_bytes": np.frombuffer(b"a.pngb.png", np.uint8),
    "name_ends": np.array([5, 10]),
    "offsets": np.array([0, 1, 3]),
    "boxes": np.zeros((3, 4), np.uint16),
    "sizes": np.zeros((2, 2), np.int32),
    "file_bytes": np.zeros(2, np.int64),
    "file_crc32": np.zeros(2, np.uint32),
}  # fmt: skip


def write_cache(folder, **changes):
    for name, value in {**GOOD, **changes}.items():
        if name == "header":
            (folder / HEADER).write_text(json.dumps(value))
        else:
            np.save(folder / f"{name}.npy", value)


def test_the_cache_without_changes_loads(tmp_path):
    write_cache(tmp_path)
    assert len(ProposalCache(tmp_path).get_boxes(1)[0]) == 2


@pytest.mark.parametrize(
    "changes",
    [
        {"header": []},
        {"header": {**GOOD["header"], "images": "2"}},
        {"header": {**GOOD["header"], "images": -2}},
        {"header": {**GOOD["header"], "boxes": True}},
        {"header": {**GOOD["header"], "settings": None}},
        {"header": {**GOOD["header"], "scores": 1}},
        {"header": {"format": FORMAT}},
        {"offsets": np.array([0, 2, 1])},
        {"offsets": np.array([-1, 1, 3])},
        {"offsets": np.array([0.0, 1, 3])},
        {"offsets": np.array([[0, 1, 3]])},
        {"boxes": np.zeros((3, 3), np.uint16)},
        {"boxes": np.zeros(3, np.uint16)},
        {"boxes": np.zeros((3, 4), "U1")},
        {"sizes": np.zeros((2, 3), np.int32)},
        {"name_ends": np.array([11, 10])},
        {"name_ends": np.array([5, 9])},
        {"name_bytes": np.zeros(10)},
        {"file_bytes": np.zeros((), np.int64)},
    ],
)
def test_cache_with_wrong_arrays_is_one_line(tmp_path, changes):
    write_cache(tmp_path, **changes)
    with pytest.raises(UserError) as excinfo:
        ProposalCache(tmp_path)
    assert str(tmp_path) in str(excinfo.value)
    assert "\n" not in str(excinfo.value)
