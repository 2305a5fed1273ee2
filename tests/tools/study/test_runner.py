"""Runs of a transfer study: skipped when done, resumed, stopped. One test trains tiny models for real."""

import importlib
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import psutil
import pytest
import torch
from filelock import FileLock

from tests.study_cases import TINY, argv, prepare_data, run_words, study
from tests.tiny import ROOT, captured_log, read_log
from tools import transfer_study
from tools.study import folder as study_folder
from tools.study import presets, runner
from tools.study.plan import Step
from tools.study.results import read_evaluations, read_steps, read_study
from util.errors import StopRequested, UserError
from util.logger import log
from util.runs.folder import read_json_object
from util.runs.session import run_script


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_data(tmp_path_factory.mktemp("study"))


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(presets.PRESETS, "cpu-smoke", TINY)


# ---------------------------------------------------------------------------------------------------- with fake runs

FAKE_RUN = """
import json, os, signal, subprocess, sys, time
words, behavior = sys.argv[2:], json.loads(sys.argv[1])
folder = words[words.index("--output_dir") + 1]
name = folder.split("/out/")[1]
how = next((value for key, value in behavior.items() if key in name), "")
os.makedirs(folder, exist_ok=True)
print("starts", name, flush=True)
if how == "fails":
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


class FakeRuns:
    """Replaces the runs by programs that take milliseconds.

    behavior: part of a step's name -> "fails", "waits" (for SIGTERM, once) or "stays" (ignores SIGTERM, and has a
    worker in its own session, as torchrun does). started: names of the steps, in the order in which they started.
    """

    def __init__(self) -> None:
        self.behavior: dict[str, str] = {}
        self.started: list[str] = []

    def command(
        self, step: Step, args: Namespace, *listed: object
    ) -> tuple[list[str], dict[str, str]]:
        self.started += [] if listed else [step.name]
        folder = str(args.output_dir / step.name)
        return [
            sys.executable,
            "-S",
            "-c",
            FAKE_RUN,
            json.dumps(self.behavior),
            "x",
            "--output_dir",
            folder,
        ], {}


@pytest.fixture
def fake_runs(monkeypatch: pytest.MonkeyPatch, tiny: None) -> FakeRuns:
    found = FakeRuns()
    monkeypatch.setattr(runner, "build_command", found.command)
    monkeypatch.setattr(runner, "POLL_SECONDS", 0.01)
    return found


ROWS = {"pretexts": ("none", "siamese"), "fractions": 1, "seeds": (1, 2)}
NAMES = {
    "proposals/selective_search",
    *(f"{kind}/conditional_detr/siamese_seed1" for kind in ("pretrain", "recall")),
    *(
        f"finetune/conditional_detr/{row}/1_seed{seed}"
        for row in ("none", "siamese")
        for seed in (1, 2)
    ),
}


def test_done_runs_are_skipped_and_other_settings_refused(
    data: Path, tmp_path: Path, fake_runs: FakeRuns
) -> None:
    """Runs with other settings are refused, and so are runs that would share a table with them."""
    out = tmp_path / "out"
    words = run_words(data, out, **ROWS, jobs=4)
    assert study("run", *words)[-1] == "all runs are done"
    first = list(fake_runs.started)
    assert (len(first), set(first)) == (7, NAMES)
    before = [
        first.index(name)
        for name in ("proposals/selective_search", "pretrain/conditional_detr/siamese_seed1")
    ]
    assert before == sorted(before)
    assert not list((out / "finetune").rglob("checkpoint.pth"))
    assert (out / "pretrain" / "conditional_detr" / "siamese_seed1" / "checkpoint.pth").exists()
    assert any("7 of them done before" in line for line in study("run", *words))
    assert fake_runs.started == first
    study("run", *words, seeds=(1, 2, 3))
    assert fake_runs.started[len(first) :] == [
        f"finetune/conditional_detr/{row}/1_seed3" for row in ("none", "siamese")
    ]
    for more in ({}, {"seeds": 4}, {"pretexts": "none", "fractions": 0.5}):
        with pytest.raises(
            UserError, match="was made with --backbone resnet18, now it is resnet34: choose another"
        ):
            study("run", *words, backbone="resnet34", **more)
    for flag, before, now in (
        ("preset", "cpu-smoke", "cpu"),
        ("lr", "0.0001", "0.3"),
        ("evaluate_on", "test", "val"),
    ):
        with pytest.raises(UserError, match=f"was made with --{flag} {before}, now it is {now}"):
            study("run", *words, **{flag: now})
    with pytest.raises(
        UserError,
        match=r"siamese/1_seed2 was made with other settings: --pretrain .*seed1/.*seed2/",
    ):
        study("run", *words, pretrain_seeds=(1, 2))
    page = (out / "transfer.md").read_text()
    assert "no difference shown" not in page
    assert (
        "- conditional_detr, 100 % of the labels: higher: `siamese` (+1.0 ± 0.0, 3 seeds)" in page
    )
    assert "| conditional_detr | siamese      | 1    |" in page, "class-agnostic recall"


def test_a_listing_shows_states_and_commands(data: Path, tmp_path: Path, tiny: None) -> None:
    lines = study("run", *run_words(data, tmp_path / "out", **ROWS, list=True))
    assert lines[-1] == "7 runs: 7 to do"
    shown = next(
        line
        for line in lines
        if line.startswith("[to do] finetune/conditional_detr/siamese/1_seed2")
    )
    assert (
        f"--pretrain {tmp_path}/out/pretrain/conditional_detr/siamese_seed1/checkpoint.pth" in shown
    )
    assert " python finetune_main.py --detector conditional_detr " in shown
    assert not (tmp_path / "out").exists()


def test_failures_are_reported_and_the_others_continue(
    data: Path, tmp_path: Path, fake_runs: FakeRuns
) -> None:
    fake_runs.behavior = {"pretrain/conditional_detr/siamese": "fails"}
    words = run_words(data, tmp_path / "out", **ROWS)
    failed = r"^4 of 7 runs failed: pretrain/conditional_detr/siamese_seed1, .*; the same command resumes"
    with captured_log() as lines, pytest.raises(UserError, match=failed):
        transfer_study.main(transfer_study.parse(["run", *words]))
    text = "\n".join(lines)
    assert "failed with status 1: pretrain/conditional_detr/siamese_seed1" in text
    assert "    error: no such thing" in text
    assert "finetune/conditional_detr/none/1_seed2" in fake_runs.started
    page = (tmp_path / "out" / "transfer.md").read_text()
    assert "1 (1): -, 2 (1): -" in page
    assert "Not finished: 4 of 7 runs are left." in page
    assert "not measured: `siamese`" in page
    assert study("run", *words, list=True)[-1] == "7 runs: 3 done, 1 failed, 3 to do"
    fake_runs.behavior = {}
    study("run", *words)
    assert "Not finished" not in (tmp_path / "out" / "transfer.md").read_text()


def test_the_time_limit_asks_runs_to_save_and_the_same_command_continues(
    data: Path, tmp_path: Path, fake_runs: FakeRuns
) -> None:
    fake_runs.behavior = {"none/1_seed1": "waits"}
    words = run_words(data, tmp_path / "out", pretexts="none", fractions=1, seeds=(1, 2))
    began = time.monotonic()
    with pytest.raises(StopRequested, match="2 of 2 runs are left; the same command resumes"):
        study("run", *words, time_limit=0.02)
    assert time.monotonic() - began < 20
    folder = tmp_path / "out" / "finetune" / "conditional_detr" / "none"
    assert (folder / "1_seed1" / "begun").exists(), "it received SIGTERM"
    assert study("run", *words, list=True)[-1] == "2 runs: 1 interrupted, 1 to do"
    study("run", *words)
    assert fake_runs.started == [
        f"finetune/conditional_detr/none/1_seed{seed}" for seed in (1, 1, 2)
    ]
    assert json.loads((folder / "1_seed1.json").read_text())["seconds"] > 1, (
        "the time of both attempts"
    )


def interrupt_when(ready: Callable[[], bool], *signals: int) -> None:
    """Send signals to this process as soon as `ready()`."""

    def send() -> None:
        while not ready():
            time.sleep(0.02)
        for number in signals:
            os.kill(os.getpid(), number)
            time.sleep(0.5)  # two pending signals of one kind would be delivered once

    threading.Thread(target=send, daemon=True).start()


def test_a_signal_stops_all_runs(data: Path, tmp_path: Path, fake_runs: FakeRuns) -> None:
    fake_runs.behavior = {"seed": "waits"}
    words = run_words(data, tmp_path / "out", pretexts="none", fractions=1, seeds=(1, 2), jobs=2)
    folders = [
        tmp_path / "out" / "finetune" / "conditional_detr" / "none" / f"1_seed{seed}"
        for seed in (1, 2)
    ]
    interrupt_when(lambda: all((folder / "waiting").exists() for folder in folders), signal.SIGTERM)
    with pytest.raises(StopRequested, match="2 of 2 runs are left"):
        study("run", *words)
    assert all((folder / "begun").exists() for folder in folders)


def test_a_second_ctrl_c_kills_runs_with_their_workers(
    data: Path, tmp_path: Path, fake_runs: FakeRuns
) -> None:
    fake_runs.behavior = {"seed": "stays"}
    worker = tmp_path / "out" / "finetune" / "conditional_detr" / "none" / "1_seed1" / "worker"
    interrupt_when(worker.exists, signal.SIGINT, signal.SIGINT)
    began = time.monotonic()
    with pytest.raises(StopRequested, match="1 of 1 runs are left"):
        study(
            "run",
            *run_words(data, tmp_path / "out", pretexts="none", fractions=1, seeds=1),
        )
    assert time.monotonic() - began < 30, "without waiting for GRACE_SECONDS"
    assert ends(int(worker.read_text())), "the worker is still running"


def ends(pid: int) -> bool:
    """Return whether a process soon exits, or is a zombie that nobody waits for."""
    for _ in range(500):
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.02)
    return False


def test_only_one_process_runs_a_study(data: Path, tmp_path: Path, fake_runs: FakeRuns) -> None:
    (tmp_path / "out").mkdir()
    with (
        FileLock(tmp_path / "out" / ".lock"),
        pytest.raises(UserError, match="another process uses this study"),
    ):
        study("run", *run_words(data, tmp_path / "out", **ROWS))


def test_a_run_that_outlived_its_study_is_not_started_twice(
    data: Path, tmp_path: Path, fake_runs: FakeRuns
) -> None:
    """The tool was killed, and a run that it had started is still running in its own session."""
    words = run_words(data, tmp_path / "out", pretexts="none", fractions=1, seeds=1)
    study("run", *words)
    name = "finetune/conditional_detr/none/1_seed1"
    path = tmp_path / "out" / f"{name}.json"
    alive = subprocess.Popen(
        [sys.executable, "-S", "-c", "import time; time.sleep(60)", str(tmp_path / "out" / name)]
    )
    try:
        path.write_text(
            json.dumps({**read_json_object(path), "state": "running", "pid": alive.pid})
        )
        with pytest.raises(UserError, match=f"{name} is still running as process {alive.pid}"):
            study("run", *words)
    finally:
        alive.kill()
        alive.wait()
    assert fake_runs.started == [name]
    study("run", *words)
    assert fake_runs.started == [name, name]


def test_runs_from_a_replaced_pre_training_are_refused(
    data: Path, tmp_path: Path, fake_runs: FakeRuns
) -> None:
    words = run_words(data, tmp_path / "out", pretexts="siamese", fractions=1, seeds=1)
    study("run", *words)
    folder = tmp_path / "out" / "pretrain" / "conditional_detr"
    shutil.rmtree(folder / "siamese_seed1")
    (folder / "siamese_seed1.json").unlink()
    with pytest.raises(
        UserError,
        match="recall/conditional_detr/siamese_seed1 was made from an earlier pretrain/conditional_detr/siam",
    ):
        study("run", *words)
    shutil.rmtree(tmp_path / "out" / "recall")
    shutil.rmtree(tmp_path / "out" / "finetune")
    before = len(fake_runs.started)
    study("run", *words)
    assert "finetune/conditional_detr/siamese/1_seed1" in fake_runs.started[before:]


def test_a_folder_with_other_files_is_refused(
    data: Path, tmp_path: Path, fake_runs: FakeRuns
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="has files that are not a study's"):
        study("run", *run_words(data, tmp_path / "out", **ROWS))
    assert not fake_runs.started


def test_another_preset_under_the_same_name_is_another_study(
    data: Path, tmp_path: Path, fake_runs: FakeRuns, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = run_words(data, tmp_path / "out", pretexts="none", fractions=1, seeds=1)
    study("run", *words)
    monkeypatch.setattr(study_folder, "DETECTOR_FLAGS", {})
    with pytest.raises(UserError, match="was made with the sha256 of the preset"):
        study("run", *words, seeds=2)


# -------------------------------------------------------------------------------------------------- with real runs


def run_forked(words: list[str], output: int) -> None:
    """Run a script in a forked process. It has none of the threads of libraries: one thread, and the evaluator without
    threads.
    """
    for descriptor in (1, 2):
        os.dup2(output, descriptor)
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115 - pytest's own goes elsewhere
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    signal.alarm(120)  # a hanging run fails
    torch.set_num_threads(1)
    log.handlers.clear()
    module = importlib.import_module(
        ".".join(Path(words[1]).relative_to(ROOT).with_suffix("").parts)
    )
    more = [] if words[1].endswith("/main.py") else ["--coco_evaluator", "pycocotools"]
    run_script(module.main, module.parse, [*words[2:], *more])


class Forked(multiprocessing.get_context("fork").Process):
    """`Popen` that forks this process, which has imported everything already; a new process takes seconds for it."""

    def __init__(self, words: list[str], stdout: BinaryIO, **_: object) -> None:
        super().__init__(target=run_forked, args=(words, stdout.fileno()))
        self.start()

    def poll(self) -> int | None:
        return self.exitcode

    returncode = property(poll)


def test_study_end_to_end(
    data: Path, tmp_path: Path, tiny: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fine-tuning is killed during evaluation and resumed; the report has its AP."""
    out, name = tmp_path / "out", "finetune/conditional_detr/random_query_patch/0.5_seed1"
    words = run_words(data, out, pretexts="random_query_patch", fractions=0.5, seeds=1)
    monkeypatch.setattr(runner, "Popen", Forked)

    def kill() -> None:
        while not (out / name / "checkpoint.pth").exists():
            time.sleep(0.01)
        os.kill(read_json_object(out / f"{name}.json")["pid"], signal.SIGKILL)

    threading.Thread(target=kill, daemon=True).start()
    with pytest.raises(UserError, match=f"1 of 3 runs failed: {name}"):
        study("run", *words)
    assert study("run", *words)[-1] == "all runs are done"
    assert "training is complete: epoch 1 of 1" in (out / f"{name}.log").read_text(), (
        "only the evaluation was missing"
    )
    assert [entry["epoch"] for entry in read_log(out / name)] == [0]
    ap = read_log(out / name)[-1]["test_coco_eval_bbox"][0]
    assert read_evaluations(out, read_steps(out, read_study(out)))["AP"].tolist() == [ap]
    page = (out / "transfer.md").read_text()
    assert f"| random_query_patch | {100 * ap:.1f}" in page
    assert "| conditional_detr | random_query_patch | 1    |" in page, "class-agnostic recall"


@pytest.mark.slow  # starts and ends like every script: tests/test_scripts.py
def test_errors_of_the_program_are_one_line(data: Path, tmp_path: Path) -> None:
    words = [sys.executable, str(ROOT / "tools" / "transfer_study.py"), "run"]
    words += argv(data=data, output_dir="x", list=True, fractions=0.3)
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stdout.startswith("error: --fractions 0.3")
    assert not (tmp_path / "x").exists()


def test_help_names_the_flags_of_all_commands(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        transfer_study.parse(["--help"])
    shown = capsys.readouterr().out
    assert all(flag in shown for flag in ("--unlabelled", "--pretrain_seeds", "--output FILE.md"))
    assert isinstance(transfer_study.parse(["report", "x"]), Namespace)


def test_error_names_the_missing_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    for name in ("report", "runner", "results"):
        monkeypatch.delitem(sys.modules, f"tools.study.{name}", raising=False)
    with pytest.raises(UserError, match="a study needs pandas: pip install pandas"):
        study("report", tmp_path)
