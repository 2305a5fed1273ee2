"""Damaged and hostile files: each loads, or is refused with one line. tools/fuzz.py tries any number of them."""

import json
import os
import warnings
from random import Random

import numpy as np
import pytest

from tools import fuzz
from tools.fuzzing import mutations
from tools.fuzzing.targets import TARGETS
from util.errors import UserError

CASES = 80


@pytest.mark.parametrize("target", TARGETS)
def test_damaged_files_load_or_are_refused_in_one_line(target, tmp_path):
    found = [fuzz.run_case(target, seed, tmp_path / "case") for seed in range(CASES)]
    assert "loaded" in found, "damage that no file survives tests only the first check"
    assert len(set(found)) > 5, "the files differ in what is wrong with them"


# Files that once ended in a traceback, or in a message of several lines or thousands of characters.
@pytest.mark.parametrize(
    ("target", "seed"),
    [
        ("coco", 253),  # a segmentation that is no JSON
        ("proposals", 757),  # a box beyond float32, of which NumPy warned
        ("image", 5246),  # a chunk of a PNG file that claims 4 GB
    ],
)
def test_files_of_earlier_findings(target, seed, tmp_path):
    with fuzz.limited_memory(2):
        fuzz.run_case(target, seed, tmp_path / "case")


@pytest.mark.parametrize(
    ("action", "words"),
    [
        (lambda: os.system("true"), "os.system"),
        (lambda: [None for _ in iter(int, 1)], "more than 0.1 s"),
    ],
)
def test_code_that_runs_and_hangs_are_findings(tmp_path, monkeypatch, action, words):
    monkeypatch.setattr(fuzz, "CPU_SECONDS", 0.1)
    monkeypatch.setitem(TARGETS, "evil", lambda folder, rng: action())
    with pytest.raises(fuzz.Finding, match=words):
        fuzz.run_case("evil", 0, tmp_path / "case")


def test_code_that_hides_its_trace_is_a_finding(tmp_path, monkeypatch):
    def hide(folder, rng):
        try:
            os.system("true")
        except fuzz.Finding as error:
            raise UserError(f"{folder}: fine") from error

    monkeypatch.setitem(TARGETS, "evil", hide)
    with pytest.raises(fuzz.Finding, match=r"os\.system"):
        fuzz.run_case("evil", 0, tmp_path / "case")


@pytest.mark.parametrize("text", ["no file", ""])
def test_messages_must_name_the_file(tmp_path, monkeypatch, text):
    def refuse(folder, rng):
        raise UserError(text)

    monkeypatch.setitem(TARGETS, "evil", refuse)
    with pytest.raises(fuzz.Finding, match="a message"):
        fuzz.run_case("evil", 0, tmp_path / "case")


def test_warnings_are_findings(tmp_path, monkeypatch):
    monkeypatch.setitem(
        TARGETS, "evil", lambda folder, rng: warnings.warn("odd", RuntimeWarning, stacklevel=1)
    )
    with pytest.raises(fuzz.Finding, match="a warning: odd"):
        fuzz.run_case("evil", 0, tmp_path / "case")


def test_command_prints_seeds_of_findings(monkeypatch, caplog):
    def fail_sometimes(folder, rng):
        if rng.random() < 0.5:
            raise KeyError("oops")

    monkeypatch.setitem(TARGETS, "coco", fail_sometimes)
    monkeypatch.setattr(fuzz.log, "propagate", True)
    bad = [seed for seed in range(7, 17) if Random(f"coco {seed}").random() < 0.5]
    with (
        caplog.at_level("INFO", logger="predetr"),
        pytest.raises(UserError, match=f"{len(bad)} find"),
    ):
        fuzz.main(fuzz.parse(["--target", "coco", "--cases", "10", "--seed", "7"]))
    for seed in bad:
        assert f"--target coco --seed {seed} --cases 1" in caplog.text
    assert f"coco: 10 files, {10 - len(bad)} loaded, 0 refused, {len(bad)} findings" in caplog.text


def test_mutations_depend_on_the_seed_alone():
    content = json.dumps({"a": [1, 2, {"b": "c"}], "d": None}).encode()
    for mutate in (mutations.mutate_json, mutations.mutate_bytes, mutations.mutate_numbers):
        once = [mutate(content, Random(seed)) for seed in range(30)]
        assert once == [mutate(content, Random(seed)) for seed in range(30)]
        assert len(set(once)) > 15


def test_structural_mutations_depend_on_the_seed_alone():
    """They change values, types and nesting of a file that parsers accept."""
    xml, table = b"<a><b>1</b><c><d>2</d></c></a>", b"x,y\n1,2\n3,4\n"
    array = np.arange(6).reshape(2, 3)
    for mutate in (
        lambda rng: mutations.mutate_xml(xml, rng),
        lambda rng: mutations.mutate_csv(table, rng, ("a", "b")),
        lambda rng: repr(mutations.mutate_array(array, rng)),
    ):
        once = [mutate(Random(seed)) for seed in range(40)]
        assert once == [mutate(Random(seed)) for seed in range(40)]
        assert len(set(once)) > 15
    assert array.tolist() == [[0, 1, 2], [3, 4, 5]], "the original stays as it is"
