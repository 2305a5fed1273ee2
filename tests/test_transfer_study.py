"""A transfer study: its data are disjoint, its plan fair, its runs skipped, resumed and stopped, its numbers those of the definitions."""
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from argparse import Namespace
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pytest
import torch
from PIL import Image

from tests.tiny import MODEL_FLAGS, ROOT, logged, read_log, write_coco, write_images, write_voc
from tools import transfer_study
from tools.study import plan, presets, runner
from tools.study.pictures import common_epochs
from tools.study.plan import flags_of, make_plan, options_of
from tools.study.prepare import read_manifest, repeated
from tools.study.results import collect
from tools.study.statistics import in_words, paired_difference, summarize
from util.logger import StopRequested, UserError

TINY = presets.Preset(
    "for tests", {**dict(zip((name[2:] for name in MODEL_FLAGS[::2]), MODEL_FLAGS[1::2], strict=True)), "backbone_weights": "none"}, (4, 4),
    (8, 16), {"lr": 1e-4, "fre_cnn": True, "backbone_norm": "frozen"}, (1e-4, 2e-4), 0.0, presets._pretexts(5, 32, 5),
    finetune={"backbone_norm": "frozen"}, evaluations=2,
)


def study(command: str, *words: object) -> list[str]:
    with logged() as lines:
        transfer_study.main(transfer_study.parse([command, *map(str, words)]))
    return lines


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 training, 4 validation and 6 test images; copies of two of the test images are among the unlabelled ones."""
    root = tmp_path_factory.mktemp("study")
    coco = write_coco(root / "coco", train=24, val=6)
    unlabelled = write_images(root / "unlabelled", 3)
    for i in range(2):
        with Image.open(coco / "val2017" / f"{i:06d}.png") as image:
            image.resize((150, 130)).save(unlabelled / f"copy{i}.jpg", quality=70)
    words = ["--coco_path", coco, "--unlabelled", unlabelled, "--image_size", 64, "--fractions", 1, 0.5]
    study("prepare", *words, "--output_dir", root / "data")
    return root / "data"


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(presets.PRESETS, "cpu-smoke", TINY)


def run_words(data: Path, folder: Path, *more: object) -> list[object]:
    return ["--data", data, "--output_dir", folder, "--preset", "cpu-smoke", "--device", "cpu", "--num_workers", 0, *more]


# ----------------------------------------------------------------------------------------------------------------------- data


def names(data: Path, part: str) -> set[str]:
    return {image["file_name"] for image in json.loads((data / "annotations" / f"{part}.json").read_text())["images"]}


def test_parts_are_disjoint_and_nothing_held_out_is_pre_trained_on(data: Path) -> None:
    train, val, test = (names(data, part) for part in ("train", "val", "test"))
    assert [len(part) for part in (train, val, test)] == [20, 4, 6]
    assert not train & val
    assert not (train | val) & test
    listed = set((data / "unlabelled.txt").read_text().split())
    assert {f"labelled/{name}" for name in train} <= listed
    assert not {f"labelled/{name}" for name in val | test} & listed
    assert sorted(Path(name).name for name in listed if name.startswith("unlabelled")) == ["000.png.jpg", "001.png.jpg", "002.png.jpg"]
    manifest = read_manifest(data)
    assert manifest["unlabelled"]["left_out_as_held_out"] == 2
    assert manifest["unlabelled"]["images"] == len(listed) == 23
    assert str(data.parent) not in json.dumps(manifest), "no place of one's own disk"


def test_a_fraction_is_as_long_as_the_whole(data: Path) -> None:
    split = json.loads((data / "splits" / "0.5.json").read_text())
    whole, part = (json.loads((data / "annotations" / f"{name}.json").read_text()) for name in ("train", "train_0.5"))
    chosen = {image["file_name"] for image in whole["images"] if image["id"] in split["ids"]}
    assert len(chosen) == 10
    assert len(part["images"]) == len(whole["images"]) == 20
    listed = [image["file_name"] for image in part["images"]]
    assert {name: listed.count(name) for name in chosen} == dict.fromkeys(chosen, 2)


def test_repeated_images_keep_their_boxes() -> None:
    content = {"images": [{"id": 7, "file_name": "a"}, {"id": 9, "file_name": "b"}], "categories": [],
               "annotations": [{"id": 1, "image_id": 9, "bbox": [1, 2, 3, 4]}]}
    again = repeated(content, 5)
    assert [image["file_name"] for image in again["images"]] == ["a", "b", "a", "b", "a"]
    assert [image["id"] for image in again["images"]] == [1, 2, 3, 4, 5]
    assert [(box["id"], box["image_id"]) for box in again["annotations"]] == [(1, 2), (2, 4)]


def test_boxes_are_in_the_pixels_of_the_small_images(tmp_path: Path) -> None:
    voc = write_voc(tmp_path / "VOCdevkit", {"2007_trainval": 8, "2007_test": 3})
    study("prepare", "--dataset_file", "voc", "--voc_path", voc, "--voc_train", "2007_trainval", "--image_size", 32, "--fractions", 1,
          "--output_dir", tmp_path / "data")
    content = json.loads((tmp_path / "data" / "annotations" / "test.json").read_text())
    assert content["annotations"]
    sizes = {image["id"]: image for image in content["images"]}
    for image in content["images"]:
        with Image.open(tmp_path / "data" / "labelled" / image["file_name"]) as small:
            assert small.size == (image["width"], image["height"])
            assert min(small.size) == 32
    for box in content["annotations"]:
        image, (x, y, width, height) = sizes[box["image_id"]], box["bbox"]
        assert x + width <= image["width"] + 1
        assert y + height <= image["height"] + 1
        with Image.open(tmp_path / "data" / "labelled" / image["file_name"]) as small:
            inner = np.asarray(small)[round(y + height / 2), round(x + width / 2)].astype(int)
        assert np.ptp(inner) > 80, "a plain rectangle of one colour lies on grey"


def test_prepare_goes_on_and_refuses_other_settings(data: Path, tmp_path: Path) -> None:
    words = ["--coco_path", data.parent / "coco", "--unlabelled", data.parent / "unlabelled", "--image_size", 64, "--fractions", 1, 0.5]
    assert study("prepare", *words, "--output_dir", data)[-1] == f"{data} is finished"
    with pytest.raises(UserError, match="prepared with val_share 0.15, now it is 0.3"):
        study("prepare", *words, "--val_share", 0.3, "--output_dir", data)
    folder = tmp_path / "again"
    study("prepare", *words, "--output_dir", folder)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.jpg")}
    missing = next(iter(sorted(before)))
    missing.unlink()
    (folder / "manifest.json").unlink()
    study("prepare", *words, "--output_dir", folder)
    assert {path for path, written in before.items() if path.stat().st_mtime_ns != written} == {missing}
    assert read_manifest(folder)["sha256"] == read_manifest(data)["sha256"]
    (folder / "annotations" / "test.json").write_text("{}")
    with pytest.raises(UserError, match=r"annotations/test\.json is not what was prepared"):
        read_manifest(folder)


def test_rare_classes_are_left_out(data: Path, tmp_path: Path) -> None:
    counts = [read_manifest(data)[part]["boxes_by_class"] for part in ("train", "test")]
    least = min(counts[1].values()) + 1
    study("prepare", "--coco_path", data.parent / "coco", "--image_size", 64, "--min_objects", least, "--output_dir", tmp_path / "data")
    kept = {name for name in counts[0] if all(count[name] >= least for count in counts)}
    assert set(read_manifest(tmp_path / "data")["test"]["boxes_by_class"]) == kept != set(counts[0])


# ----------------------------------------------------------------------------------------------------------------------- plan


def plan_of(data: Path, *words: object) -> list[plan.Step]:
    args = transfer_study.parse(["run", *map(str, run_words(data, Path("out"), *words))])
    return make_plan(options_of(args, read_manifest(data)), read_manifest(data))


@pytest.mark.parametrize("preset", presets.PRESETS)
@pytest.mark.parametrize("detector", presets.DETECTOR_FLAGS)
def test_fine_tunings_differ_in_where_they_start_alone(data: Path, preset: str, detector: str) -> None:
    steps = plan_of(data, "--preset", preset, "--detectors", detector, "--ablations", "region_prior-random", "--fractions", 1)
    tuned = [flags_of(step.words) for step in steps if step.kind == "finetune" and step.fraction == 1 and step.seed == 2]
    assert len(tuned) == 5
    assert "--pretrain" not in tuned[0]
    assert len({flags.pop("--pretrain", "") for flags in tuned}) == 5
    assert len({flags.pop("--output_dir") for flags in tuned}) == 5
    assert all(flags == tuned[0] for flags in tuned)


@pytest.mark.parametrize("preset", presets.PRESETS)
def test_commands_are_commands_of_the_scripts(data: Path, preset: str) -> None:
    """Every row of every preset; configs are run by bash, and their names exist."""
    from tests.documents import config_words, parse, tool

    of_configs = {pretext for _, pretext in presets.PRESETS[preset].configs}
    ablations = [name for name, row in presets.ABLATIONS.items() if not (row.pretext in of_configs and None in row.changes.values())]
    words = ["--preset", preset, "--detectors", *presets.DETECTOR_FLAGS, "--seeds", 1, "--fractions", 1, "--ablations"]
    steps = plan_of(data, *words, *ablations)
    for step in steps:
        words = [word.replace("{data}", str(data)).replace("{study}", "out") for word in step.words]
        if words[0].endswith(".sh"):
            words = config_words(ROOT / words[0], *words[1:])
        if words[0].startswith("tools/"):
            tool(words[0]).parse(words[1:])
        else:
            settings = parse(words)
            assert settings.image_size == 64
            assert settings.seed == 1


def test_seeds_come_whole(data: Path) -> None:
    """Order of the plan: a stopped study is balanced; one pre-training serves all fine-tunings."""
    fractions = "--fractions", 1, 0.5
    steps = plan_of(data, "--seeds", 5, 6, "--pretrain_seeds", 1, *fractions)
    tuned = [step for step in steps if step.kind == "finetune"]
    assert [step.seed for step in tuned] == [5] * 8 + [6] * 8
    assert [step.fraction for step in tuned[:8]] == [1.0] * 4 + [0.5] * 4
    assert sum(step.kind == "pretrain" for step in steps) == 4, "three pretexts and the untrained model"
    varied = plan_of(data, "--seeds", 5, 6, "--pretrain_seeds", 1, 2, *fractions)
    starts = {step.seed: step.needs for step in varied if step.kind == "finetune" and step.variant == "siamese"}
    assert starts == {seed: (f"pretrain/conditional_detr/siamese_seed{seed - 4}",) for seed in (5, 6)}


def test_a_config_can_not_be_cut(data: Path) -> None:
    with pytest.raises(UserError, match=r"no_reconstruction leaves out what configs/UPDETR_conditional_pretrain_in\.sh sets"):
        plan_of(data, "--preset", "paper", "--fractions", 1, "--ablations", "random_query_patch-no_reconstruction")


def test_fractions_have_to_be_prepared(data: Path) -> None:
    with pytest.raises(UserError, match=r"--fractions 0\.25: .* has 0\.5 1"):
        plan_of(data, "--fractions", 0.25)


# ----------------------------------------------------------------------------------------------------------------- statistics


def test_mean_and_deviation_by_hand() -> None:
    found = summarize([1.0, 2.0, 6.0])
    assert (found.mean, found.count) == (3.0, 3)
    assert found.deviation == pytest.approx(7**0.5)  # (4 + 1 + 9) / 2
    assert summarize([4.0]).deviation is None
    assert summarize([]) is None


def test_paired_difference_by_hand() -> None:
    """Differences 1, 2, 3: deviation 1, t of two degrees of freedom 4.302653; seed 9 has no partner."""
    found = paired_difference({1: 11.0, 2: 22.0, 3: 33.0, 9: 0.0}, {1: 10.0, 2: 20.0, 3: 30.0, 8: 5.0})
    assert (found.mean, found.count) == (2.0, 3)
    assert found.half_width == pytest.approx(4.302653 / 3**0.5, rel=1e-6)
    assert not found.shown
    assert in_words(found) == "+2.0 ± 2.5 AP: no difference that 3 seeds can show"
    assert in_words(paired_difference({1: 5.0, 2: 6.1}, {1: 1.0, 2: 2.0}), "AP50") == "+4.0 ± 0.6 AP50: higher over 2 seeds"
    assert in_words(paired_difference({1: 1.0, 2: 2.0}, {1: 5.0, 2: 6.1})) == "-4.0 ± 0.6 AP: lower over 2 seeds"
    assert in_words(paired_difference({1: 1.0}, {1: 1.04})) == "+0.0 AP with one seed: nothing can be said"
    assert in_words(paired_difference({1: 1.0}, {2: 1.0})) == "not measured yet"


def test_curves_show_epochs_that_all_seeds_have() -> None:
    epochs, values = common_epochs([[(1, 0.5), (2, 1.0), (4, 3.0)], [(2, 2.0), (4, 5.0)]])
    assert epochs == [2, 4]
    assert values.tolist() == [[1.0, 3.0], [2.0, 5.0]]


# ---------------------------------------------------------------------------------------- the runs, with programs in their place

STAND_IN = """
import json, os, signal, sys, time
words, behaviour = sys.argv[2:], json.loads(sys.argv[1])
folder = words[words.index("--output_dir") + 1]
name = folder.split("/out/")[1]
how = next((value for key, value in behaviour.items() if key in name), "")
os.makedirs(folder, exist_ok=True)
print("starts", name, flush=True)
if how == "fails" :
    sys.exit("error: no such thing")
if how == "waits" and not os.path.exists(folder + "/begun"):
    def leave(*_):
        open(folder + "/begun", "w").close()
        sys.exit(143)
    signal.signal(signal.SIGTERM, leave)
    open(folder + "/waiting", "w").close()
    time.sleep(60)
ap = 0.1 + 0.01 * ("siamese" in name)
entry = {"epoch": 0, "test_coco_eval_bbox": [ap, 2 * ap] + [0] * 10}
for file, text in (("log.txt", json.dumps(entry) + "\\n"), ("checkpoint.pth", "x"), ("header.json", "{}"), ("results.json", "[]"),
                   ("proposal_metrics.json", json.dumps({"AR100": 0.2}))):
    with open(folder + "/" + file, "w") as out:
        out.write(text)
"""


class StandIns:
    """Programs of milliseconds in place of the runs; behaviour: a part of a step's name -> "fails" or "waits" (for SIGTERM, once)."""

    def __init__(self) -> None:
        self.behaviour: dict[str, str] = {}
        self.started: list[str] = []

    def launch(self, words: list[str], processes: int) -> tuple[list[str], dict[str, str]]:
        self.started.append(words[words.index("--output_dir") + 1].split("/out/")[1])
        return [sys.executable, "-c", STAND_IN, json.dumps(self.behaviour), *words[1:]], {}


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch, tiny: None) -> StandIns:
    found = StandIns()
    monkeypatch.setattr(runner, "launcher", found.launch)
    monkeypatch.setattr(runner, "POLL", 0.01)
    return found


ROWS = ("--pretexts", "none", "siamese", "--fractions", 1, "--seeds", 1, 2)


def test_done_runs_are_skipped_and_other_settings_refused(data: Path, tmp_path: Path, stand_ins: StandIns) -> None:
    words = run_words(data, tmp_path / "out", *ROWS, "--jobs", 4)
    study("run", *words)
    first = list(stand_ins.started)
    assert len(first) == len(set(first)) == 11  # store, 2 pre-trainings, 4 evaluations without classes, 4 fine-tunings
    before = [first.index(name) for name in ("proposals/selective_search", "pretrain/conditional_detr/siamese_seed1")]
    assert before == sorted(before)
    assert not list((tmp_path / "out" / "finetune").rglob("checkpoint.pth"))
    assert (tmp_path / "out" / "pretrain" / "conditional_detr" / "siamese_seed1" / "checkpoint.pth").exists()
    lines = study("run", *words)
    assert stand_ins.started == first
    assert any("11 of them done before" in line for line in lines)
    listed = study("run", *words, "--list")
    assert listed[-1] == "11 runs: 11 done"
    study("run", *words, "--seeds", 1, 2, 3)
    assert stand_ins.started[len(first):] == [f"finetune/conditional_detr/{row}/1_seed3" for row in ("none", "siamese")]
    with pytest.raises(UserError, match=r"siamese_seed1 was made with other settings: --backbone resnet18 then and resnet34 now"):
        study("run", *words, "--backbone", "resnet34")
    with pytest.raises(UserError, match="was made with --preset cpu-smoke, now it is cpu"):
        study("run", *words, "--preset", "cpu")


def test_failures_are_reported_and_others_go_on(data: Path, tmp_path: Path, stand_ins: StandIns) -> None:
    stand_ins.behaviour = {"pretrain/conditional_detr/siamese": "fails"}
    words = run_words(data, tmp_path / "out", *ROWS)
    with logged() as lines, pytest.raises(UserError, match=r"^4 of 11 runs failed: pretrain/conditional_detr/siamese_seed1, "):
        transfer_study.main(transfer_study.parse(["run", *map(str, words)]))
    text = "\n".join(lines)
    assert "failed with status 1: pretrain/conditional_detr/siamese_seed1" in text
    assert "    error: no such thing" in text
    assert "finetune/conditional_detr/none/1_seed2" in stand_ins.started
    page = (tmp_path / "out" / "transfer.md").read_text()
    assert "0 of 2, incomplete" in page
    assert "Not finished: 4 of 11 runs are left." in page
    assert "`siamese`: not measured yet" in page
    stand_ins.behaviour = {}
    study("run", *words)
    assert "Not finished" not in (tmp_path / "out" / "transfer.md").read_text()


def test_the_time_limit_asks_runs_to_save_and_the_same_command_goes_on(data: Path, tmp_path: Path, stand_ins: StandIns) -> None:
    stand_ins.behaviour = {"none/1_seed1": "waits"}
    words = run_words(data, tmp_path / "out", "--pretexts", "none", "--fractions", 1, "--seeds", 1, 2)
    began = time.monotonic()
    lines = study("run", *words, "--time_limit", 0.02)
    assert time.monotonic() - began < 20
    assert lines[-1] == "time is up: 2 of 2 runs are left; the same command goes on"
    place = tmp_path / "out" / "finetune" / "conditional_detr" / "none"
    assert (place / "1_seed1" / "begun").exists(), "it got SIGTERM"
    assert study("run", *words, "--list")[-1] == "2 runs: 1 interrupted, 1 to do"
    study("run", *words)
    assert stand_ins.started == [f"finetune/conditional_detr/none/1_seed{seed}" for seed in (1, 1, 2)]
    assert json.loads((place / "1_seed1.json").read_text())["seconds"] > 1, "both starts are counted"


def test_a_signal_stops_all_runs(data: Path, tmp_path: Path, stand_ins: StandIns) -> None:
    stand_ins.behaviour = {"seed": "waits"}
    words = run_words(data, tmp_path / "out", "--pretexts", "none", "--fractions", 1, "--seeds", 1, 2, "--jobs", 2)
    places = [tmp_path / "out" / "finetune" / "conditional_detr" / "none" / f"1_seed{seed}" for seed in (1, 2)]

    def stop() -> None:
        while not all((place / "waiting").exists() for place in places):
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop, daemon=True).start()
    with pytest.raises(StopRequested, match="2 of 2 runs are left"):
        study("run", *words)
    assert all((place / "begun").exists() for place in places)


def test_one_process_a_study(data: Path, tmp_path: Path, stand_ins: StandIns) -> None:
    pytest.importorskip("fcntl")
    (tmp_path / "out").mkdir()
    with runner.locked(tmp_path / "out"), pytest.raises(UserError, match="another process works on this study"):
        study("run", *run_words(data, tmp_path / "out", *ROWS))


def test_folders_of_something_else_are_refused(data: Path, tmp_path: Path, stand_ins: StandIns) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="holds something that is not of a study"):
        study("run", *run_words(data, tmp_path / "out", *ROWS))
    with pytest.raises(UserError, match="is no study"):
        study("report", tmp_path / "out")
    study("run", *run_words(data, tmp_path / "mine" / "out", *ROWS))
    with pytest.raises(UserError, match="is not the page of a study"):
        study("report", tmp_path / "mine" / "out", "--output", tmp_path / "out" / "mine.txt")
    assert (tmp_path / "out" / "mine.txt").read_text() == "mine"


def test_the_rate_is_chosen_on_val_and_kept(data: Path, tmp_path: Path, stand_ins: StandIns, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = STAND_IN.replace("ap = 0.1", 'ap = 0.1 * (1 + 2 * (words[words.index("--lr") + 1 if "--lr" in words else 0] == "0.0002"))')
    monkeypatch.setattr(sys.modules[__name__], "STAND_IN", stand_in)
    words = run_words(data, tmp_path / "out", "--pretexts", "none", "--fractions", 1, "--seeds", 1)
    study("run", *words, "--choose", "lr")
    assert stand_ins.started == ["choose/conditional_detr/none/lr0.0001", "choose/conditional_detr/none/lr0.0002",
                                 "finetune/conditional_detr/none/1_seed1"]
    record = json.loads((tmp_path / "out" / "choose" / "conditional_detr" / "none" / "lr0.0001.json").read_text())
    assert flags_of(record["words"])["--val_annotations"] == "{data}/annotations/val.json"
    tuned = flags_of(json.loads((tmp_path / "out" / "finetune" / "conditional_detr" / "none" / "1_seed1.json").read_text())["words"])
    assert (tuned["--lr"], tuned["--val_annotations"]) == ("0.0002", "{data}/annotations/test.json")
    study("run", *words)
    assert len(stand_ins.started) == 3
    assert "The rate with the best mean, 0.0002," in (tmp_path / "out" / "transfer.md").read_text()


# ------------------------------------------------------------------------------------------------------------ a study as a whole


class Forked:
    """A run of a study in a copy of this process, where everything is imported already: a fresh one would need seconds for that."""

    def __init__(self, words: list[str], output: BinaryIO) -> None:
        self.returncode: int | None = None
        sys.stdout.flush()
        self.pid = os.fork()
        if not self.pid:
            os.setsid()
            for number in (1, 2):
                os.dup2(output.fileno(), number)
            os._exit(self._run(words))

    @staticmethod
    def _run(words: list[str]) -> int:
        import importlib
        import io

        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        sys.stdout = io.TextIOWrapper(os.fdopen(1, "wb", closefd=False), write_through=True)
        torch.set_num_threads(1)
        name = str(Path(words[1]).relative_to(ROOT).with_suffix("")).replace("/", ".")
        module = importlib.import_module(name)
        with contextlib.suppress(SystemExit):
            runner.log.handlers.clear()
            sys.modules["util.session"].run_script(module.main, module.parse, words[2:])
            return 0
        return sys.exc_info()[1].code if sys.exc_info()[1] else 143

    def poll(self) -> int | None:
        if self.returncode is None:
            done, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if done else None
        return self.returncode

    def terminate(self) -> None:
        os.kill(self.pid, signal.SIGTERM)

    def wait(self) -> int:
        self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.returncode


def test_a_study_from_end_to_end(data: Path, tmp_path: Path, tiny: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Real runs of a tiny model: one is killed in its midst and goes on, all finish, and the page has their numbers."""
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(runner, "start_process", lambda words, settings, output, lock: Forked(words, output))
    words = run_words(data, tmp_path / "out", "--pretexts", "none", "random_query_patch", "--fractions", 0.5, "--seeds", 1)
    place = tmp_path / "out" / "finetune" / "conditional_detr" / "none" / "0.5_seed1"
    killed = []

    def kill(run: runner.Active) -> None:
        while not (place / "checkpoint.pth").exists():
            time.sleep(0.01)
        os.kill(run.process.pid, signal.SIGKILL)
        killed.append(run.step.name)

    start = runner.Work._start

    def start_and_kill(work: runner.Work, step: plan.Step) -> None:
        start(work, step)
        if step.name.startswith("finetune/conditional_detr/none") and not killed:
            threading.Thread(target=kill, args=(work.active[-1],), daemon=True).start()

    monkeypatch.setattr(runner.Work, "_start", start_and_kill)
    with pytest.raises(UserError, match="1 of 7 runs failed: finetune/conditional_detr/none/0.5_seed1"):
        study("run", *words)
    lines = study("run", *words)
    assert lines[-1] == "all runs are done"
    assert "continuing at epoch" in place.with_name("0.5_seed1.log").read_text()
    assert [entry["epoch"] for entry in read_log(place)] == [0]
    results = collect(tmp_path / "out")
    ap = read_log(place)[-1]["test_coco_eval_bbox"][0]
    assert results.values(("conditional_detr", "none", 0.5), 0) == {1: 100 * ap}
    page = (tmp_path / "out" / "transfer.md").read_text()
    assert f"| none               | {100 * ap:.1f}" in page
    assert "untrained" in page
    for name in ("predictions_conditional_detr_0.5.png", "transfer_curves/conditional_detr_0.5.png"):
        assert (tmp_path / "out" / name).read_bytes()[:4] == b"\x89PNG"
    study("report", tmp_path / "out", "--output", tmp_path / "page" / "x.md", "--pictures", tmp_path / "pictures")
    assert (tmp_path / "page" / "x_curves" / "conditional_detr_0.5.png").exists()
    assert "(x_curves/conditional_detr_0.5.png)" in (tmp_path / "page" / "x.md").read_text()


def test_as_a_program(data: Path, tmp_path: Path) -> None:
    words = [sys.executable, str(ROOT / "tools" / "transfer_study.py"), "run", "--data", str(data), "--output_dir", "x", "--list"]
    done = subprocess.run([*words, "--fractions", "0.3"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stdout.startswith("error: --fractions 0.3")
    assert not (tmp_path / "x").exists()


def test_help_names_the_flags_of_all_commands(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        transfer_study.parse(["--help"])
    shown = capsys.readouterr().out
    assert all(flag in shown for flag in ("--unlabelled", "--pretrain_seeds", "--pictures"))
    assert isinstance(transfer_study.parse(["report", "x"]), Namespace)
