"""Runs of a transfer study: skipped when done, resumed, stopped and reported; once for real, with a tiny model."""

import importlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from argparse import Namespace
from pathlib import Path
from typing import BinaryIO

import pytest
import torch

from tests.study_cases import TINY, prepare_data, run_words, study
from tests.tiny import ROOT, logged, read_log
from tools import transfer_study
from tools.study import plan, presets, runner, text
from tools.study.plan import flags_of
from tools.study.results import collect
from util.errors import StopRequested, UserError
from util.runs.session import run_script


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_data(tmp_path_factory.mktemp("study"))


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(presets.PRESETS, "cpu-smoke", TINY)


# ---------------------------------------------------------------------------------------- the runs, with programs in
# their place

STAND_IN = """
import json, os, signal, subprocess, sys, time
words, behaviour = sys.argv[2:], json.loads(sys.argv[1])
folder = words[words.index("--output_dir") + 1]
name = folder.split("/out/")[1]
how = next((value for key, value in behaviour.items() if key in name), "")
os.makedirs(folder, exist_ok=True)
print("starts", name, flush=True)
if how == "fails" :
    sys.exit("error: no such thing")
if how == "stays":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
    with open(folder + "/worker.part", "w") as out:
        out.write(str(worker.pid))
    os.rename(folder + "/worker.part", folder + "/worker")
    time.sleep(60)
if how == "waits" and not os.path.exists(folder + "/begun"):
    def leave(*_):
        open(folder + "/begun", "w").close()
        sys.exit(143)
    signal.signal(signal.SIGTERM, leave)
    open(folder + "/waiting", "w").close()
    time.sleep(60)
ap = 0.1 + 0.01 * ("siamese" in name)
entry = {"epoch": 0, "test_coco_eval_bbox": [ap, 2 * ap] + [0] * 10}
for file, text in (("log.txt", json.dumps(entry) + "\\n"), ("checkpoint.pth", "x"), ("header.json", "{}"),
                   ("results.json", "[]"), ("proposal_metrics.json", json.dumps({"AR100": 0.2}))):
    with open(folder + "/" + file, "w") as out:
        out.write(text)
"""


class StandIns:
    """Programs of milliseconds in place of the runs; behaviour: a part of a step's name -> "fails", "waits" (for
    SIGTERM, once), or "stays" (whatever the signal, with a worker in a session of its own, as torchrun has them)."""

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
    assert stand_ins.started[len(first) :] == [
        f"finetune/conditional_detr/{row}/1_seed3" for row in ("none", "siamese")
    ]
    with pytest.raises(
        UserError, match=r"siamese_seed1 was made with other settings: --backbone resnet18 then and resnet34 now"
    ):
        study("run", *words, "--backbone", "resnet34")
    with pytest.raises(UserError, match="was made with --preset cpu-smoke, now it is cpu"):
        study("run", *words, "--preset", "cpu")


def test_failures_are_reported_and_others_go_on(data: Path, tmp_path: Path, stand_ins: StandIns) -> None:
    stand_ins.behaviour = {"pretrain/conditional_detr/siamese": "fails"}
    words = run_words(data, tmp_path / "out", *ROWS)
    with (
        logged() as lines,
        pytest.raises(UserError, match=r"^4 of 11 runs failed: pretrain/conditional_detr/siamese_seed1, "),
    ):
        transfer_study.main(transfer_study.parse(["run", *map(str, words)]))
    text = "\n".join(lines)
    assert "failed with status 1: pretrain/conditional_detr/siamese_seed1" in text
    assert "    error: no such thing" in text
    assert "finetune/conditional_detr/none/1_seed2" in stand_ins.started
    page = (tmp_path / "out" / "transfer.md").read_text()
    assert "1: -, 2: -" in page
    assert "Not finished: 4 of 11 runs are left." in page
    assert "`siamese`: not measured yet" in page
    stand_ins.behaviour = {}
    study("run", *words)
    assert "Not finished" not in (tmp_path / "out" / "transfer.md").read_text()


def test_the_time_limit_asks_runs_to_save_and_the_same_command_goes_on(
    data: Path, tmp_path: Path, stand_ins: StandIns
) -> None:
    stand_ins.behaviour = {"none/1_seed1": "waits"}
    words = run_words(data, tmp_path / "out", "--pretexts", "none", "--fractions", 1, "--seeds", 1, 2)
    began = time.monotonic()
    with pytest.raises(StopRequested, match="time is up: 2 of 2 runs are left; the same command goes on"):
        study("run", *words, "--time_limit", 0.02)
    assert time.monotonic() - began < 20
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


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes in other sessions are found by /proc")
def test_a_second_signal_ends_runs_with_their_workers(data: Path, tmp_path: Path, stand_ins: StandIns) -> None:
    stand_ins.behaviour = {"seed": "stays"}
    worker = tmp_path / "out" / "finetune" / "conditional_detr" / "none" / "1_seed1" / "worker"

    def stop() -> None:
        while not worker.exists():
            time.sleep(0.02)
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.5)  # two that are pending together are one

    threading.Thread(target=stop, daemon=True).start()
    began = time.monotonic()
    with pytest.raises(StopRequested, match="1 of 1 runs are left"):
        study("run", *run_words(data, tmp_path / "out", "--pretexts", "none", "--fractions", 1, "--seeds", 1))
    assert time.monotonic() - began < 30, "not after the time that runs have to save themselves"
    for _ in range(500):
        if has_ended(int(worker.read_text())):
            break
        time.sleep(0.02)
    else:
        pytest.fail("the worker goes on")


def has_ended(pid: int) -> bool:
    """Gone, or a zombie that nobody waits for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def test_one_process_a_study(data: Path, tmp_path: Path, stand_ins: StandIns) -> None:
    pytest.importorskip("fcntl")
    (tmp_path / "out").mkdir()
    with runner.locked(tmp_path / "out"), pytest.raises(UserError, match="another process works on this study"):
        study("run", *run_words(data, tmp_path / "out", *ROWS))


def test_one_table_has_one_setting_whatever_the_calls(data: Path, tmp_path: Path, stand_ins: StandIns) -> None:
    """Other seeds and fractions are compared with what is there, so they need the same settings."""
    words = run_words(data, tmp_path / "out", "--fractions", 1)
    study("run", *words, "--pretexts", "none", "siamese", "--seeds", 1)
    for more in (["none", "--seeds", 4], ["none", "--seeds", 1, "--fractions", 0.5]):
        with pytest.raises(
            UserError,
            match=r"would stand in a table with .* have other settings: --backbone resnet18 then and resnet34",
        ):
            study("run", *words, "--backbone", "resnet34", "--pretexts", *more)
    study("run", *words, "--pretexts", "random_query_patch", "--seeds", 1, 2, "--fractions", 1, 0.5)


def test_what_was_made_from_an_earlier_pre_training_is_named(data: Path, tmp_path: Path, stand_ins: StandIns) -> None:
    words = run_words(data, tmp_path / "out", "--pretexts", "siamese", "--fractions", 1, "--seeds", 1)
    study("run", *words)
    place = tmp_path / "out" / "pretrain" / "conditional_detr"
    shutil.rmtree(place / "siamese_seed1")
    (place / "siamese_seed1.json").unlink()
    with pytest.raises(
        UserError, match="recall/conditional_detr/siamese_seed1 was made from an earlier pretrain/conditional_detr/siam"
    ):
        study("run", *words)
    shutil.rmtree(tmp_path / "out" / "recall")
    shutil.rmtree(tmp_path / "out" / "finetune")
    before = len(stand_ins.started)
    study("run", *words)
    assert "finetune/conditional_detr/siamese/1_seed1" in stand_ins.started[before:]


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


def test_the_rate_is_chosen_on_val_and_kept(
    data: Path, tmp_path: Path, stand_ins: StandIns, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The best over all rows, whatever the first one says."""
    better = '0.02 * ("none" in name and "0.0001" in words) + 0.2 * ("siamese" in name and "0.0002" in words)'
    monkeypatch.setattr(sys.modules[__name__], "STAND_IN", STAND_IN.replace("ap = 0.1", f"ap = 0.1 + {better}"))
    words = run_words(data, tmp_path / "out", "--pretexts", "none", "siamese", "--fractions", 1, "--seeds", 1)
    study("run", *words, "--choose", "lr")
    tried = [f"choose/conditional_detr/{row}/lr{rate}" for rate in ("0.0001", "0.0002") for row in ("none", "siamese")]
    trained = [name for name in stand_ins.started if name.startswith(("choose", "finetune"))]
    assert trained == [*tried, *(f"finetune/conditional_detr/{row}/1_seed1" for row in ("none", "siamese"))]
    count = len(stand_ins.started)
    record = json.loads((tmp_path / "out" / "choose" / "conditional_detr" / "none" / "lr0.0001.json").read_text())
    assert flags_of(record["words"])["--val_annotations"] == "{data}/annotations/val.json"
    tuned = flags_of(
        json.loads((tmp_path / "out" / "finetune" / "conditional_detr" / "none" / "1_seed1.json").read_text())["words"]
    )
    assert (tuned["--lr"], tuned["--val_annotations"]) == ("0.0002", "{data}/annotations/test.json")
    assert not any("was chosen without" in line for line in study("run", *words))
    assert len(stand_ins.started) == count
    assert "| conditional_detr, at rate | 0.0001 | 0.0002 |" in (tmp_path / "out" / "transfer.md").read_text()
    lines = study("run", *words, "--pretexts", "none", "region_prior", "--list")
    assert any("the rate of conditional_detr was chosen without region_prior" in line for line in lines)


def test_words_of_a_person_outlive_the_page(data: Path, tmp_path: Path, stand_ins: StandIns) -> None:
    words = run_words(data, tmp_path / "out", "--pretexts", "none", "--fractions", 1, "--seeds", 1)
    study("run", *words)
    page = tmp_path / "out" / "transfer.md"
    page.write_text(page.read_text().replace(text.WORDS, f"{text.WORDS}\n## Mine\n\n- So it is.", 1))
    study("run", *words[:-1], 1, 2)
    study("report", tmp_path / "out")
    assert f"{text.WORDS}\n## Mine\n\n- So it is.\n{text.END_OF_WORDS}" in page.read_text()
    assert "| none         | 10.0 ± 0.0 |" in page.read_text(), "the second seed is in the table"
    whole = page.read_text()
    for broken in (text.WORDS, text.END_OF_WORDS):
        page.write_text(whole.replace(broken, ""))
        with pytest.raises(UserError, match="the marks of what a person wrote are not there once each"):
            study("report", tmp_path / "out")
        assert page.read_text() == whole.replace(broken, ""), "nothing of it is lost"
    page.write_text(whole)
    lines = page.with_suffix(".csv").read_text().splitlines()
    assert lines[0].startswith("detector,row,fraction,seed,pretrain_seed,epoch,AP,AP50,")
    assert lines[1:] == [f"conditional_detr,none,1.0,{seed},,1,0.1,0.2{',0' * 10},,,," for seed in (1, 2)]


def test_each_detector_has_its_own_choice(data: Path, tmp_path: Path, stand_ins: StandIns) -> None:
    """All rates are equally good here: the first is taken, and what was chosen before is not tried again."""
    words = run_words(data, tmp_path / "out", "--pretexts", "none", "--fractions", 1, "--seeds", 1, "--choose", "lr")
    study("run", *words)
    study("run", *words, "--detectors", "conditional_detr", "detr")
    assert stand_ins.started[3:] == [
        "choose/detr/none/lr0.0001",
        "choose/detr/none/lr0.0002",
        "finetune/detr/none/1_seed1",
    ]
    choices = json.loads((tmp_path / "out" / "study.json").read_text())["choices"]
    assert {detector: choice["lr"] for detector, choice in choices.items()} == {"conditional_detr": 1e-4, "detr": 1e-4}


def test_runs_at_another_rate_than_the_chosen_one_are_an_error(
    data: Path,
    tmp_path: Path,
    stand_ins: StandIns,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    words = run_words(data, tmp_path / "out", "--pretexts", "none", "--fractions", 1, "--seeds", 1)
    study("run", *words)
    monkeypatch.setattr(
        sys.modules[__name__], "STAND_IN", STAND_IN.replace("ap = 0.1", 'ap = 0.1 * (1 + ("0.0002" in words))')
    )
    with pytest.raises(UserError, match="1_seed1 was made with other settings: --lr 0.0001 then and 0.0002 now"):
        study("run", *words, "--choose", "lr")
    assert study("run", *words)[-1] == "all runs are done", "a choice that can't be kept is not"


def test_an_ablation_is_compared_with_its_pretext(
    data: Path, tmp_path: Path, stand_ins: StandIns, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        sys.modules[__name__], "STAND_IN", STAND_IN.replace("ap = 0.1", 'ap = 0.1 + 0.02 * ("random/" in name)')
    )
    study("run", *run_words(data, tmp_path / "out", *ROWS, "--ablations", "siamese-random"))
    page = (tmp_path / "out" / "transfer.md").read_text()
    assert "- `siamese-random`: +3.0 ± 0.0 AP: higher over 2 seeds; " in page
    assert "random boxes in place of proposals. Against `siamese`: +2.0 ± 0.0 AP: higher over 2 seeds." in page


def test_true_boxes_are_compared_with_proposals_on_the_same_images(
    data: Path, tmp_path: Path, stand_ins: StandIns
) -> None:
    rows = (
        "--pretexts",
        "none",
        "region_prior",
        "--ablations",
        "region_prior-labelled_images",
        "region_prior-true_boxes",
    )
    study("run", *run_words(data, tmp_path / "out", *rows, *ROWS[3:]))
    page = (tmp_path / "out" / "transfer.md").read_text()
    said = next(line for line in page.splitlines() if line.startswith("- `region_prior-true_boxes`"))
    assert re.findall("Against `([^`]+)`", said) == ["region_prior", "region_prior-labelled_images"]


def test_the_page_says_which_pre_training_a_run_is_from(data: Path, tmp_path: Path, stand_ins: StandIns) -> None:
    words, page = (
        run_words(data, tmp_path / "out", "--fractions", 1, "--pretexts", "none", "siamese"),
        tmp_path / "out" / "transfer.md",
    )
    study("run", *words, "region_prior", "--seeds", 1, 2)
    assert "Each pretext was pre-trained once" in page.read_text()
    assert "| 1: 11.0, 2: 11.0 |" in page.read_text()
    study("run", *words, "--seeds", 3, "--pretrain_seeds", 2)
    assert "| 1 (1): 11.0, 2 (1): 11.0, 3 (2): 11.0 |" in page.read_text()
    assert "with these seeds: conditional_detr `siamese` 1, 2. " in page.read_text()
    assert "Each other row was pre-trained once" in page.read_text()


def test_versions_of_the_code_are_named_where_a_table_has_several(
    data: Path,
    tmp_path: Path,
    stand_ins: StandIns,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    words, page = run_words(data, tmp_path / "out", *ROWS[:-3]), tmp_path / "out" / "transfer.md"
    for seed, code in ((1, "aaa"), (2, "bbb")):
        monkeypatch.setattr(runner, "environment", lambda code=code: {"code": code})
        study("run", *words, "--seeds", seed)
        assert ("were made with 2 versions of the code: aaa, bbb" in page.read_text()) == (seed == 2)


# ------------------------------------------------------------------------------------------------------------ a study
# as a whole


class Forked:
    """A run of a study in a copy of this process, where everything is imported already: a fresh one would need seconds
    for that.

    A copy has none of the threads that libraries may have started here: one thread, and the evaluator that needs no
    other.
    """

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
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        signal.alarm(120)  # what hangs fails
        sys.stdout = io.TextIOWrapper(os.fdopen(1, "wb", closefd=False), write_through=True)
        torch.set_num_threads(1)
        name = str(Path(words[1]).relative_to(ROOT).with_suffix("")).replace("/", ".")
        module = importlib.import_module(name)
        evaluates = name != "main"
        runner.log.handlers.clear()
        try:
            run_script(
                module.main, module.parse, [*words[2:], *(["--coco_evaluator", "pycocotools"] if evaluates else [])]
            )
        except SystemExit as left:
            return left.code
        except BaseException:  # noqa: BLE001 - nothing may leave the copy
            traceback.print_exc()
            return 1
        return 0

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
    words = run_words(
        data, tmp_path / "out", "--pretexts", "none", "random_query_patch", "--fractions", 0.5, "--seeds", 1
    )
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
    words = [
        sys.executable,
        str(ROOT / "tools" / "transfer_study.py"),
        "run",
        "--data",
        str(data),
        "--output_dir",
        "x",
        "--list",
    ]
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
