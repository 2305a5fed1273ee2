"""run_with_submitit.py: what it submits, training by submitit's own executors, and requeueing."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import finetune_main
import run_with_submitit
from tests.tiny import (
    FROZEN,
    ROOT,
    RUN_FLAGS,
    assert_same_logs,
    captured_log,
    fine_tune,
    read_log,
    write_coco,
)
from util.errors import StopRequested, UserError
from util.runs.signals import StopSignal

submitit = pytest.importorskip("submitit", reason="the extra cluster")

# Stands in for sbatch: keeps the script that it gets, and answers as SLURM does.
SBATCH = '#!/bin/sh\ncp "$1" "$SUBMITTED"\necho Submitted batch job 12\n'


def submit(*words: object) -> list[str]:
    """Run the script in this process and return its log."""
    with captured_log() as lines:
        run_with_submitit.main(run_with_submitit.parse([str(word) for word in words]))
    return lines


def small_run(root: Path, train: int = 4) -> list[str]:
    coco = write_coco(root / "coco", train=train, val=2)
    return [*RUN_FLAGS, *FROZEN, "--coco_path", str(coco), "--batch_size", "2"]


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], str]:
    """Programs of a login node. Returns a function that reads the submitted script."""
    for name in ("sbatch", "srun"):
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(SBATCH)
        path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("SUBMITTED", str(tmp_path / "submitted.sh"))
    return lambda: (tmp_path / "submitted.sh").read_text()


def test_job_of_slurm_has_the_published_resources(
    slurm: Callable[[], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    lines = submit("--timeout", 3000, "--partition", "gpu", "--slurm", "account=vision", "mem=0",
                   "--coco_path", "/path/to/coco")  # fmt: skip
    script = slurm()
    for option in (
        "nodes=4", "gpus-per-node=8", "ntasks-per-node=8", "cpus-per-task=10", "time=3000",
        "partition=gpu", "account=vision", "mem=0", "job-name=detr", "signal=USR2@120",
    ):  # fmt: skip
        assert re.search(rf"^#SBATCH --{option}$", script, re.M), option
    assert f"export PYTHONPATH={ROOT}" in script
    assert any("submitted job 12" in line for line in lines)

    pickled = tmp_path / "exps" / "submitit" / "12" / "12_submitted.pkl"
    training = submitit.helpers.DelayedSubmission.load(pickled).function
    assert type(training) is run_with_submitit.Training  # by its name, so that every task finds it
    assert training.flags == ["--coco_path", "/path/to/coco", "--resume", "auto"]
    assert training.output_dir == str(tmp_path / "exps" / "submitit" / "%j")


def test_dry_run_submits_nothing(slurm: Callable[[], str], tmp_path: Path) -> None:
    lines = submit("--nodes", 2, "--ngpus", 4, "--job_dir", tmp_path / "job", "--script", "main.py",
                   "--imagenet_path", "IMAGES", "--output_dir", tmp_path / "run", "--dry_run")  # fmt: skip
    (text,) = lines
    assert "nodes=2, tasks_per_node=4, gpus_per_node=4" in text
    assert (
        f"each of the 8 tasks runs: python main.py --imagenet_path IMAGES --output_dir {tmp_path}/run"
        in text
    )
    assert f"logs: {tmp_path}/job" in text
    assert not (tmp_path / "submitted.sh").exists()
    assert not (tmp_path / "job").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--foo", 3], "finetune_main.py would refuse its flags: unknown argument --foo"),
        (["--coco_path", "C", "--eval"], "would refuse its flags: --eval needs"),
        (["--coco_path", "C", "--ngpus", -1], "--ngpus -1: give 0 or more"),
        (["--coco_path", "C", "--slurm", "account"], "--slurm account: give KEY=VALUE"),
        (["--coco_path", "C", "--cluster", "local"], "--cluster local has one node"),
    ],
)
def test_what_would_fail_on_the_cluster_is_refused(flags: list, message: str) -> None:
    with pytest.raises(UserError, match=message):
        submit(*flags)


def test_missing_programs_and_packages_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="srun is not on the PATH"):
        submit("--coco_path", "C", "--job_dir", tmp_path)
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(UserError, match="pip install submitit"):
        submit("--coco_path", "C", "--job_dir", tmp_path)


def test_submitit_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps, in this process."""
    monkeypatch.setattr("run_with_submitit.run_script", lambda main, parse, argv: main(parse(argv)))
    submit("--cluster", "debug", "--nodes", 1, "--ngpus", 0, "--job_dir", tmp_path / "jobs" / "%j",
           *small_run(tmp_path), "--epochs", 1)  # fmt: skip
    (run,) = (path.parent for path in tmp_path.glob("jobs/*/checkpoint.pth"))
    assert run.name.startswith("DEBUG_")
    (epoch,) = read_log(run)
    assert epoch["epoch"] == 0
    assert epoch["train_loss"] > 0


# ----------------------------------------------------------------------------------------------------------- requeueing


def test_requeued_job_resumes_from_the_output_folder(tmp_path: Path) -> None:
    flags = ["--coco_path", "C", "--resume", "start.pth", "--overwrite"]
    training = run_with_submitit.Training("finetune_main.py", flags, str(tmp_path))
    assert training.checkpoint().function.flags == flags  # it had not saved anything yet
    (tmp_path / "checkpoint.pth").write_bytes(b"")
    again = training.checkpoint().function
    settings = finetune_main.parse([*again.flags, "--output_dir", again.output_dir])
    assert settings.resume == "auto"
    assert not getattr(settings, "overwrite", False)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("during", ["set-up", "training"])
def test_preempted_training_saves_before_the_job_is_requeued(
    during: str, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGUSR2, as SLURM sends it: in training, submitit's handler waits until the run is saved."""
    events = []

    def requeue(number: int, frame: object) -> None:  # as submitit's: it ends rank 0
        events.append("requeued")
        if rank == 0:
            raise SystemExit(255)

    def train(_: object) -> None:
        if during == "set-up":
            os.kill(os.getpid(), signal.SIGUSR2)
            return
        with StopSignal() as stop:
            os.kill(os.getpid(), signal.SIGUSR2)
            assert stop.requested
            events.append("saved")
        raise StopRequested("saved")

    monkeypatch.setattr(finetune_main, "main", train)
    job = type("Job", (), {"num_tasks": 1, "job_id": "7", "global_rank": rank})
    monkeypatch.setattr(submitit, "JobEnvironment", lambda: job)
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR2)}
    signal.signal(signal.SIGUSR2, requeue)
    training = run_with_submitit.Training("finetune_main.py", [], "runs/%j")
    try:
        if rank == 0:
            with pytest.raises(SystemExit, match="255"):
                training()
        else:
            training()  # ends without an error, which would make SLURM end rank 0
        assert signal.getsignal(signal.SIGUSR2) == requeue
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    requeued = ["requeued"] if during == "set-up" or rank == 0 else []
    assert events == (requeued if during == "set-up" else ["saved", *requeued])
    assert training.output_dir == "runs/7"


@pytest.mark.slow
def test_preempted_job_continues_exactly(tmp_path: Path) -> None:
    """With submitit's local executor, which requeues as SLURM does: SIGUSR2 after the first epoch."""
    psutil = pytest.importorskip("psutil")
    words = [*small_run(tmp_path, train=40), "--epochs", "3"]
    command = [sys.executable, str(ROOT / "run_with_submitit.py"), "--cluster", "local", "--nodes",
               "1", "--ngpus", "0", "--job_dir", str(tmp_path / "job"), *words]  # fmt: skip
    process = subprocess.Popen(command, cwd=tmp_path)
    try:
        while not (tmp_path / "job" / "checkpoint.pth").exists():  # after the first epoch
            assert process.poll() is None
            time.sleep(0.02)
        for child in psutil.Process(process.pid).children(recursive=True):
            if "submitit.core._submit" in child.cmdline():
                child.send_signal(signal.SIGUSR2)
        assert process.wait(timeout=300) == 0
    finally:
        process.kill()
    text = "\n".join(path.read_text() for path in (tmp_path / "job").glob("*_log.*"))
    assert "Requeued job" in text
    assert "--resume" in text or "continu" in text
    fine_tune(*words, "--output_dir", tmp_path / "whole")
    assert_same_logs(tmp_path / "job", tmp_path / "whole")
