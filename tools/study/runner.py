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
    RESULT_FILES,
    check_steps,
    check_study,
    finish_times,
    has_result,
    read_step,
    record_start,
    step_state,
)
from tools.study.plan import Plan, Step, build_plan
from tools.study.prepare import read_manifest
from tools.study.presets import PRESETS
from tools.study.report import write_report
from util.errors import StopRequested, UserError
from util.files import make_folder, write_text
from util.logger import format_seconds, log
from util.runs.folder import ROOT, collect_environment, read_json_object
from util.runs.log import read_log
from util.runs.page import evaluations
from util.runs.signals import StopSignal
from util.settings.words import to_words

POLL_SECONDS = 0.2
# Time for a run to save its checkpoint before it is killed. torchrun gives its own processes 30 seconds of it.
GRACE_SECONDS = 45.0
MAX_WORKERS = 8  # dataloader workers per process, unless --num_workers is given
TAIL_LINES = 6  # lines of a failed run's output that are logged
RESUME_HINT = "the same command resumes"


def run_study(args: Namespace) -> None:
    """Run all steps that have not finished, then write the report.

    Raises:
        UserError: data, study and command do not match, another process uses the study, or runs failed.
        StopRequested: on SIGINT, SIGTERM or at the time limit, when all runs have stopped.
    """
    deadline = time.monotonic() + 60 * args.time_limit if args.time_limit else float("inf")
    plan = build_plan(args, read_manifest(args.data))
    steps = plan.steps()
    check_study(plan, args)
    check_steps(steps, args.output_dir)
    if args.list:
        list_steps(steps, args)
        return

    make_folder(args.output_dir)
    try:
        lock = FileLock(args.output_dir / ".lock").acquire(timeout=0)
    except Timeout as error:
        raise UserError(
            f"--output_dir {args.output_dir}: another process uses this study; wait for it or end it"
        ) from error
    with lock, StopSignal() as stop:
        runner = Runner(args, plan, steps, stop=stop, deadline=deadline)
        runner.run()
    report_outcome(runner)


def report_outcome(runner: "Runner") -> None:
    """Write the report, and raise if runs failed or are left."""
    folder, total, left = runner.args.output_dir, len(runner.steps), runner.unfinished()
    if any(step.kind == "finetune" and step not in left for step in runner.steps):
        write_report(folder, folder / "transfer.md")

    if runner.failed:
        names = ", ".join(runner.failed)
        raise UserError(
            f"{len(runner.failed)} of {total} runs failed: {names}; see their .log in {folder}; {RESUME_HINT}"
        )
    if left:
        raise StopRequested(f"{len(left)} of {total} runs are left; {RESUME_HINT}")
    log.info("all runs are done")


def list_steps(steps: list[Step], args: Namespace) -> None:
    """Log each step with its state and its command, and the number of steps in each state."""
    log.info("%s: %s", args.preset, PRESETS[args.preset].title)
    states = [step_state(step.name, step.kind, args.output_dir) for step in steps]
    for step, state in zip(steps, states, strict=True):
        words, variables = build_command(step, args, "python", Path())
        assignments = [f"{name}={shlex.quote(value)}" for name, value in variables.items()]
        command = " ".join([*assignments, shlex.join(words)])
        log.info("[%s] %s\n    %s", state, step.name, command)

    counts = ", ".join(f"{count} {state}" for state, count in Counter(states).items())
    log.info("%d runs: %s", len(steps), counts)


def build_command(
    step: Step, args: Namespace, python: str = sys.executable, root: Path = ROOT
) -> tuple[list[str], dict[str, str]]:
    """Return the command line of a step and its environment variables.

    Configs are bash scripts that start Python by $LAUNCH.
    """
    # The tools that search and evaluate proposals run in one process.
    is_distributed = step.kind not in ("proposals", "recall")
    processes = PRESETS[args.preset].processes if is_distributed else 1
    cores = max(1, args.cores // (args.jobs * processes))  # per process

    folders = {"{data}": str(args.data.resolve()), "{study}": str(args.output_dir.resolve())}
    argv = to_words({**step.flags, **_execution_flags(step, args, cores)})
    for placeholder, folder in folders.items():
        argv = [word.replace(placeholder, folder) for word in argv]

    launch = [python]
    if processes > 1:
        launch += ["-m", "torch.distributed.run", "--standalone"]
        launch += ["--nproc_per_node", str(processes)]
    variables = {"OMP_NUM_THREADS": str(cores)}
    if step.script.endswith(".sh"):
        variables["LAUNCH"] = shlex.join(launch)
        return ["bash", str(root / step.script), *argv], variables
    return [*launch, str(root / step.script), *argv], variables


def _execution_flags(step: Step, args: Namespace, cores: int) -> dict[str, object]:
    """Return the flags that depend on the machine; they are not recorded with the step."""
    num_workers = args.num_workers
    if num_workers is None:
        # The search for proposals runs in the workers alone; training needs a core for itself.
        num_workers = cores if step.kind == "proposals" else min(cores - 1, MAX_WORKERS)
    flags: dict[str, object] = {"num_workers": num_workers}
    if args.device and step.kind != "proposals":
        flags["device"] = args.device
    return flags


@dataclass
class Job:
    """A step that is running. previous_seconds: the time of its earlier attempts."""

    step: Step
    process: Popen
    previous_seconds: float
    started_at: float  # by time.monotonic

    @property
    def seconds(self) -> float:
        return self.previous_seconds + time.monotonic() - self.started_at


class Runner:
    """Runs steps until all are done or failed, or a stop is requested.

    Attributes:
        failed: names of the steps that failed, and of those that need them.
        done: names of the steps that have finished, in this call or before.
        seconds: kind of step -> times of its finished runs.
    """

    def __init__(
        self,
        args: Namespace,
        plan: Plan,
        steps: list[Step],
        *,
        stop: StopSignal,
        deadline: float,
    ) -> None:
        self.args, self.plan, self.steps = args, plan, steps
        self.stop, self.deadline = stop, deadline
        self.folder = args.output_dir
        self.jobs: list[Job] = []
        self.failed: list[str] = []
        self.done: set[str] = set()
        self.environment = collect_environment()
        self.seconds: defaultdict[str, list[float]] = defaultdict(list)

    def unfinished(self) -> list[Step]:
        return [
            step for step in self.steps if step_state(step.name, step.kind, self.folder) != "done"
        ]

    def run(self) -> None:
        self._begin()
        pending, grace = self.unfinished(), GRACE_SECONDS
        log.info("%d runs, %d of them done before", len(self.steps), len(self.done))
        try:
            while (pending or self.jobs) and not self._must_stop():
                self._collect()
                self._skip_blocked(pending)
                ready = [step for step in pending if self.done.issuperset(step.needs)]
                for step in ready[: self.args.jobs - len(self.jobs)]:
                    pending.remove(step)
                    self._start(step)
                time.sleep(POLL_SECONDS)
        except KeyboardInterrupt:  # the second Ctrl-C; `StopSignal` caught the first
            grace = 0
        finally:
            self._stop_all(grace)

    def _must_stop(self) -> bool:
        return self.stop.requested or time.monotonic() >= self.deadline

    def _begin(self) -> None:
        """Record this call and collect the steps that are done.

        Raises:
            UserError: a run that an earlier, killed call started is still running.
        """
        for step in self.steps:
            record = read_step(step.name, self.folder)
            # Two runs in one folder would overwrite each other's checkpoints.
            if record.get("state") == "running" and _is_alive(record["pid"], step.name):
                raise UserError(
                    f"{step.name} is still running as process {record['pid']}: wait for it or end it"
                )

        record_start(self.plan, self.steps, self.args, self.environment)
        pending = self.unfinished()
        for step in self.steps:
            if step not in pending:
                self.done.add(step.name)
                self.seconds[step.kind].append(read_step(step.name, self.folder)["seconds"])

    def _skip_blocked(self, pending: list[Step]) -> None:
        """Count steps that need a failed one as failed."""
        blocked = [step for step in pending if set(step.needs) & set(self.failed)]
        for step in blocked:
            log.error("skipped %s: it needs %s", step.name, ", ".join(step.needs))
            pending.remove(step)
            self.failed.append(step.name)

    def _start(self, step: Step) -> None:
        words, variables = build_command(step, self.args)
        previous_seconds = read_step(step.name, self.folder).get("seconds", 0.0)
        log.info("%s: %s", "resumed" if previous_seconds else "started", step.name)

        log_file = self.folder / f"{step.name}.log"
        log_file.parent.mkdir(parents=True, exist_ok=True)
        with log_file.open("ab") as output:
            output.write(f"$ {shlex.join(words)}\n".encode())
            output.flush()  # before the process writes to the same file
            process = Popen(
                words,
                stdin=DEVNULL,
                stdout=output,
                stderr=STDOUT,
                env={**os.environ, "PYTHONUNBUFFERED": "1", **variables},
                # A terminal sends Ctrl-C to all processes of its session. Runs get it from here, once.
                start_new_session=True,
            )
        self.jobs.append(Job(step, process, previous_seconds, time.monotonic()))
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
        """Record how a run ended, "done" or `otherwise`, and remove checkpoints; return whether it is done."""
        step = job.step
        # A run without its result has failed, even if its exit status is 0.
        done = job.process.returncode == 0 and has_result(step.name, step.kind, self.folder)
        self._record(job, "done" if done else otherwise)

        if done and not self.args.keep_checkpoints:
            for path in (self.folder / step.name).glob("checkpoint*.pth"):
                # Fine-tuning and recall start from the last checkpoint of pre-training.
                if step.kind != "pretrain" or path.name != "checkpoint.pth":
                    path.unlink()
        return done

    def _collect(self) -> None:
        """Close the runs that have ended and log their results."""
        for job in [job for job in self.jobs if job.process.poll() is not None]:
            self.jobs.remove(job)
            if self._close(job, "failed"):
                self.done.add(job.step.name)
                self.seconds[job.step.kind].append(job.seconds)
                self._log_done(job)
            else:
                self.failed.append(job.step.name)
                self._log_failure(job)

    def _log_done(self, job: Job) -> None:
        count = f"{len(self.done)}/{len(self.steps)}"
        result = result_line(job.step, self.folder)
        log.info(
            "[%s] done in %s: %s%s%s",
            count,
            format_seconds(job.seconds),
            job.step.name,
            result,
            self._time_left(),
        )

    def _log_failure(self, job: Job) -> None:
        path = self.folder / f"{job.step.name}.log"
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        tail = "\n    ".join(lines[-TAIL_LINES:])
        status = job.process.returncode
        log.error("failed with status %s: %s, see %s\n    %s", status, job.step.name, path, tail)

    def _time_left(self) -> str:
        """Return the expected time by the mean of each kind; empty before one run of each kind has finished."""
        left = [step for step in self.steps if step.name not in self.done]
        if not left or any(step.kind not in self.seconds for step in left):
            return ""
        expected = sum(mean(self.seconds[step.kind]) for step in left)
        spent = sum(job.seconds for job in self.jobs)
        return f"; about {format_seconds(max(expected - spent, 0) / self.args.jobs)} left"

    def _stop_all(self, grace: float) -> None:
        """Ask every run to save and exit; kill those that have not ended after `grace` seconds."""
        for job in self.jobs:
            log.info("stopping %s", job.step.name)
            job.process.terminate()
        try:
            deadline = time.monotonic() + grace
            while self._any_running() and time.monotonic() < deadline:
                time.sleep(POLL_SECONDS)
        except KeyboardInterrupt:
            log.info("killing the runs; they resume from their last checkpoints")

        for job in self.jobs:
            if job.process.poll() is None:
                _kill_tree(job.process.pid)
                job.process.wait()
            self._close(job, "interrupted")
        self.jobs = []

    def _any_running(self) -> bool:
        return any(job.process.poll() is None for job in self.jobs)


def _is_alive(pid: int, name: str) -> bool:
    """Return whether a process still runs the step of this name; the system may have reused the number."""
    try:
        return name in " ".join(psutil.Process(pid).cmdline())
    except psutil.Error:
        return False


def _kill_tree(pid: int) -> None:
    """Kill a process and all its descendants.

    Killing the process group would miss torchrun's workers, which have sessions of their own.
    """
    with contextlib.suppress(psutil.NoSuchProcess):
        root = psutil.Process(pid)
        for process in [*root.children(recursive=True), root]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


def result_line(step: Step, folder: Path) -> str:
    """Return a finished step's metric for the log; empty if it has none."""
    if step.kind == "recall":
        metrics = read_json_object(folder / step.name / RESULT_FILES["recall"])
        return f", AR100 {100 * metrics.get('AR100', 0):.1f}"
    if step.kind == "finetune":
        found = evaluations(read_log(folder / step.name))
        if found:
            _, stats = found[-1]
            return f", AP {100 * stats[0]:.1f}"
    return ""
