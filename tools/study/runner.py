"""Runs the steps of a study, several at once: skips finished ones, resumes interrupted ones, and stops cleanly."""

import contextlib
import json
import os
import shlex
import sys
import time
from argparse import Namespace
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from subprocess import DEVNULL, STDOUT, Popen

import psutil
from filelock import FileLock, Timeout

from tools.study.folder import (
    RESULTS,
    begin_study,
    check_steps,
    check_study,
    finish_times,
    has_result,
    read_step,
    state_of,
)
from tools.study.plan import Plan, Step, plan_of, words_of
from tools.study.prepare import read_manifest
from tools.study.presets import PRESETS
from tools.study.report import write_report
from util.errors import StopRequested, UserError
from util.files import make_folder, write_text
from util.logger import format_seconds, log
from util.runs.folder import ROOT, environment, read_record
from util.runs.log import read_log
from util.runs.page import evaluations
from util.runs.signals import StopSignal

POLL = 0.2  # seconds
GRACE = 45.0  # seconds that a run has to save itself before it is killed; torchrun gives its processes 30 of them
TAIL = 6  # lines of a failed run's output that are shown
AGAIN = "the same command continues"


def run_study(args: Namespace) -> None:
    """
    Raises:
        UserError: data, study and command do not fit each other, another process works on the study, or runs failed.
        StopRequested: on SIGINT, SIGTERM or at the time limit, when all runs have stopped.
    """
    deadline = time.monotonic() + 60 * args.time_limit if args.time_limit else float("inf")
    plan = plan_of(args, read_manifest(args.data))
    steps = plan.steps()
    check_study(plan, args)
    check_steps(steps, args.output_dir)
    if args.list:
        show_steps(steps, args)
        return
    make_folder(args.output_dir)
    try:
        lock = FileLock(args.output_dir / ".lock").acquire(timeout=0)
    except Timeout as error:
        remedy = "wait for it or end it"
        raise UserError(
            f"--output_dir {args.output_dir}: another process works on this study; {remedy}"
        ) from error
    with lock, StopSignal() as stop:
        runner = Runner(args, plan, steps, stop, deadline)
        runner.run()
    finish(runner)


def finish(runner: "Runner") -> None:
    """Writes the report, and reports what failed or is left."""
    folder, total, left = runner.args.output_dir, len(runner.steps), runner.unfinished()
    if any(step.kind == "finetune" and step not in left for step in runner.steps):
        write_report(folder, folder / "transfer.md")
    if runner.failed:
        names = ", ".join(runner.failed)
        raise UserError(
            f"{len(runner.failed)} of {total} runs failed: {names}; see their .log in {folder}; {AGAIN}"
        )
    if left:
        raise StopRequested(f"{len(left)} of {total} runs are left; {AGAIN}")
    log.info("all runs are done")


def show_steps(steps: list[Step], args: Namespace) -> None:
    log.info("%s: %s", args.preset, PRESETS[args.preset].title)
    states = [state_of(step.name, step.kind, args.output_dir) for step in steps]
    for step, state in zip(steps, states, strict=True):
        words, variables = command(step, args, "python", Path())
        shown = [
            *(f"{name}={shlex.quote(value)}" for name, value in variables.items()),
            shlex.join(words),
        ]
        log.info("[%s] %s\n    %s", state, step.name, " ".join(shown))
    log.info(
        "%d runs: %s",
        len(steps),
        ", ".join(f"{count} {state}" for state, count in Counter(states).items()),
    )


def command(
    step: Step, args: Namespace, python: str = sys.executable, root: Path = ROOT
) -> tuple[list[str], dict]:
    """The words of its command, and what its environment needs. Configs are run by bash and start Python by $LAUNCH."""
    processes = PRESETS[args.preset].processes if step.kind not in ("proposals", "recall") else 1
    cores = max(1, args.cores // (args.jobs * processes))  # of each process
    flags = {**step.flags, "num_workers": args.num_workers}
    if args.num_workers is None:
        flags["num_workers"] = cores if step.kind == "proposals" else min(cores - 1, 8)
    if args.device and step.kind != "proposals":
        flags["device"] = args.device
    places = {"{data}": str(args.data.resolve()), "{study}": str(args.output_dir.resolve())}
    words = words_of(flags)
    for name, place in places.items():
        words = [word.replace(name, place) for word in words]
    launch = [python]
    if processes > 1:
        launch += [
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node",
            str(processes),
        ]
    threads = {"OMP_NUM_THREADS": str(cores)}
    if step.script.endswith(".sh"):
        return ["bash", str(root / step.script), *words], {**threads, "LAUNCH": shlex.join(launch)}
    return [*launch, str(root / step.script), *words], threads


@dataclass
class Job:
    """A run in progress. earlier: seconds of its earlier starts."""

    step: Step
    process: Popen
    earlier: float
    began: float

    @property
    def seconds(self) -> float:
        return self.earlier + time.monotonic() - self.began


class Runner:
    """Runs steps until all are done, failed or asked to stop. failed: names, with those of steps that need them."""

    def __init__(
        self, args: Namespace, plan: Plan, steps: list[Step], stop: StopSignal, deadline: float
    ) -> None:
        self.args, self.plan, self.steps, self.stop, self.deadline = (
            args,
            plan,
            steps,
            stop,
            deadline,
        )
        self.folder = args.output_dir
        self.jobs: list[Job] = []
        self.failed: list[str] = []
        self.done: set[str] = set()
        self.environment = environment()
        self.seconds = defaultdict(list)  # kind -> of each finished run

    def unfinished(self) -> list[Step]:
        return [
            step for step in self.steps if state_of(step.name, step.kind, self.folder) != "done"
        ]

    def run(self) -> None:
        self._begin()
        pending, grace = self.unfinished(), GRACE
        log.info("%d runs, %d of them done before", len(self.steps), len(self.done))
        try:
            while (pending or self.jobs) and not self._must_stop():
                self._collect()
                self._skip_hopeless(pending)
                ready = [step for step in pending if self.done.issuperset(step.needs)]
                for step in ready[: self.args.jobs - len(self.jobs)]:
                    pending.remove(step)
                    self._start(step)
                time.sleep(POLL)
        except KeyboardInterrupt:  # the second Ctrl-C
            grace = 0
        finally:
            self._stop_all(grace)

    def _must_stop(self) -> bool:
        return self.stop.requested or time.monotonic() >= self.deadline

    def _begin(self) -> None:
        """
        Raises:
            UserError: a run of a killed call still goes on.
        """
        for step in self.steps:
            record = read_step(step.name, self.folder)
            if record.get("state") == "running" and _is_alive(record["pid"], step.name):
                raise UserError(
                    f"{step.name} is still run by process {record['pid']}: wait for it or end it"
                )
        begin_study(self.plan, self.steps, self.args, self.environment)
        pending = self.unfinished()
        for step in self.steps:
            if step not in pending:
                self.done.add(step.name)
                self.seconds[step.kind].append(read_step(step.name, self.folder)["seconds"])

    def _skip_hopeless(self, pending: list[Step]) -> None:
        for step in [step for step in pending if set(step.needs) & set(self.failed)]:
            log.error("%s is skipped: it needs %s", step.name, ", ".join(step.needs))
            pending.remove(step)
            self.failed.append(step.name)

    def _start(self, step: Step) -> None:
        """In a session of its own: Ctrl-C reaches it through us, once."""
        words, more = command(step, self.args)
        earlier = read_step(step.name, self.folder).get("seconds", 0.0)
        log.info("%s: %s", "resumed" if earlier else "started", step.name)
        log_file = self.folder / f"{step.name}.log"
        log_file.parent.mkdir(parents=True, exist_ok=True)
        with log_file.open("ab") as output:
            output.write(f"$ {shlex.join(words)}\n".encode())
            output.flush()
            process = Popen(
                words,
                stdin=DEVNULL,
                stdout=output,
                stderr=STDOUT,
                env={**os.environ, "PYTHONUNBUFFERED": "1", **more},
                start_new_session=True,
            )
        self.jobs.append(Job(step, process, earlier, time.monotonic()))
        self._record(self.jobs[-1], "running")

    def _record(self, job: Job, state: str) -> None:
        record = {
            "script": job.step.script,
            "flags": job.step.flags,
            "needed": finish_times(job.step, self.folder),
            "code": self.environment["code"],
            "state": state,
            "pid": job.process.pid,
            "seconds": round(job.seconds, 1),
            "finished_at": time.time_ns() if state == "done" else None,
        }
        write_text(self.folder / f"{job.step.name}.json", json.dumps(record, indent=1) + "\n")

    def _close(self, job: Job, otherwise: str) -> bool:
        """Records how a run ended; whether it is done. Of the checkpoints the one of pre-training is needed later."""
        step = job.step
        done = job.process.returncode == 0 and has_result(step.name, step.kind, self.folder)
        self._record(job, "done" if done else otherwise)
        if done and not self.args.keep_checkpoints:
            for path in (self.folder / step.name).glob("checkpoint*.pth"):
                if step.kind != "pretrain" or path.name != "checkpoint.pth":
                    path.unlink()
        return done

    def _collect(self) -> None:
        """Looks after the runs that have ended."""
        for job in [job for job in self.jobs if job.process.poll() is not None]:
            self.jobs.remove(job)
            step = job.step
            if self._close(job, "failed"):
                self.done.add(step.name)
                self.seconds[step.kind].append(job.seconds)
                found, left = result_line(step, self.folder), self._time_left()
                count = f"{len(self.done)}/{len(self.steps)}"
                log.info(
                    "[%s] done in %s: %s%s%s",
                    count,
                    format_seconds(job.seconds),
                    step.name,
                    found,
                    left,
                )
            else:
                self.failed.append(step.name)
                path = self.folder / f"{step.name}.log"
                tail = "\n    ".join(
                    path.read_text(encoding="utf-8", errors="replace").splitlines()[-TAIL:]
                )
                log.error(
                    "failed with status %s: %s, see %s\n    %s",
                    job.process.returncode,
                    step.name,
                    path,
                    tail,
                )

    def _time_left(self) -> str:
        """By the mean time of finished runs of each kind; nothing before there is one of each."""
        left = [step for step in self.steps if step.name not in self.done]
        if not left or any(step.kind not in self.seconds for step in left):
            return ""
        seconds = sum(mean(self.seconds[step.kind]) for step in left) - sum(
            job.seconds for job in self.jobs
        )
        return f"; about {format_seconds(max(seconds, 0) / self.args.jobs)} left"

    def _stop_all(self, grace: float) -> None:
        """Asks every run to save itself, and kills those that have not ended after `grace` seconds."""
        for job in self.jobs:
            log.info("stopping %s", job.step.name)
            job.process.terminate()
        try:
            until = time.monotonic() + grace
            while any(job.process.poll() is None for job in self.jobs) and time.monotonic() < until:
                time.sleep(POLL)
        except KeyboardInterrupt:
            log.info("killing the runs; they resume from their last checkpoints")
        for job in self.jobs:
            if job.process.poll() is None:
                _kill_tree(job.process.pid)
                job.process.wait()
            self._close(job, "interrupted")
        self.jobs = []


def _is_alive(pid: int, name: str) -> bool:
    """Whether a process still runs the step of this name."""
    try:
        return name in " ".join(psutil.Process(pid).cmdline())
    except psutil.Error:
        return False


def _kill_tree(pid: int) -> None:
    """A process and all below it, also those in sessions of their own as torchrun's are."""
    with contextlib.suppress(psutil.NoSuchProcess):
        root = psutil.Process(pid)
        for process in [*root.children(recursive=True), root]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


def result_line(step: Step, folder: Path) -> str:
    """What a finished step found, in short."""
    if step.kind == "recall":
        return f", AR100 {100 * read_record(folder / step.name / RESULTS['recall']).get('AR100', 0):.1f}"
    found = evaluations(read_log(folder / step.name)) if step.kind == "finetune" else []
    return f", AP {100 * found[-1][1][0]:.1f}" if found else ""
