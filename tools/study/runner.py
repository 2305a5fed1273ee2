"""Runs the steps of a study, several at once: skips what is done, goes on with what was interrupted, and stops cleanly.

Each step has a folder below the study's, and beside it NAME.json, its record (command, seconds, state), and NAME.log,
its output. study.json holds the data's hashes, the preset, what was chosen, and every step that was ever planned.
"""

import contextlib
import json
import os
import shlex
import subprocess
import sys
import time
from argparse import Namespace
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

from tools.study.folder import (
    begin_study,
    best_rates,
    check_study,
    chosen_rates,
    keep_choices,
    locked,
    read_study,
    warn_of_choices,
)
from tools.study.plan import RESULTS, Options, Step, choice_plan, difference, make_plan, options_of
from tools.study.prepare import read_manifest
from tools.study.presets import PRESETS
from util.errors import StopRequested, UserError
from util.files import make_folder, write_text
from util.logger import format_seconds, log
from util.runs.folder import ROOT, environment, read_record
from util.runs.log import read_log
from util.runs.page import evaluations
from util.runs.signals import SignalHandler, kill_family

POLL = 0.2  # seconds
GRACE = 45.0  # seconds that a run has to save itself before it is ended; torchrun gives its processes 30 of them
VARIES = {  # kind of a step -> flags in which runs of one column of a table may differ
    "finetune": ("--seed", "--output_dir", "--pretrain", "--train_annotations"),
    "pretrain": ("--seed", "--output_dir"),
}
TAIL = 6  # lines of a failed run's output


def run_study(args: Namespace) -> None:
    """
    Raises:
        UserError: data, study or plan do not fit each other, another process works on the study, or runs failed.
        StopRequested: on SIGINT and SIGTERM, when all runs have stopped.
    """
    began, manifest = time.monotonic(), read_manifest(args.data)
    study = read_study(args.output_dir)
    check_study(study, args, manifest)
    rates = chosen_rates(study)
    undecided = [detector for detector in args.detectors if detector not in rates] if args.choose else []
    options = options_of(args, manifest, rates)
    warn_of_choices(options, study)
    steps = choice_plan(replace(options, detectors=undecided), manifest) if undecided else make_plan(options, manifest)
    check_plan(steps, study, args.output_dir)
    if args.list:
        show_plan(steps, args)
        return
    make_folder(args.output_dir)
    with locked(args.output_dir) as lock, Stop() as stop:
        deadline = began + args.time_limit * 60 if args.time_limit else None
        work = do_work(args, options, manifest, steps, stop, deadline, lock)
        if undecided and not work.unfinished():
            choices = best_rates(args.output_dir, steps)
            options = replace(
                options, rates={**rates, **{detector: choice["lr"] for detector, choice in choices.items()}}
            )
            steps = make_plan(options, manifest)
            check_plan(
                steps, read_study(args.output_dir), args.output_dir
            )  # before it is kept: a choice binds all later calls
            keep_choices(args.output_dir, choices)
            work = do_work(args, options, manifest, steps, stop, deadline, lock)
    finish(args, work, stop)


def do_work(
    args: Namespace,
    options: Options,
    manifest: dict[str, Any],
    steps: list[Step],
    stop: "Stop",
    deadline: float | None,
    lock: BinaryIO,
) -> "Work":
    """Writes a checked plan down, and runs it as far as it goes."""
    begin_study(args, options, read_study(args.output_dir), manifest, steps)
    work = Work(args, steps, stop, deadline, lock)
    work.run()
    return work


def finish(args: Namespace, work: "Work", stop: "Stop") -> None:
    """Writes the report, says what is left, and reports what failed."""
    from tools.study.report import write_report

    left, again = work.unfinished(), "the same command goes on"
    if any(is_done(step, args.output_dir) and step.kind == "finetune" for step in work.steps):
        write_report(args.output_dir, args.output_dir / "transfer.md", args.output_dir)
    if work.failed:
        raise UserError(
            f"{len(work.failed)} of {len(work.steps)} runs failed: {', '.join(work.failed)}; their .log files in "
            f"{args.output_dir} say why; {again}"
        )
    if left:
        raise StopRequested(
            f"{'' if stop.asked else 'time is up: '}{len(left)} of {len(work.steps)} runs are left; {again}"
        )
    log.info("all runs are done")


# ---------------------------------------------------------------------------------------------------------------------
# the steps


def record_path(step: Step, folder: Path) -> Path:
    return folder / f"{step.name}.json"


def is_done(step: Step, folder: Path) -> bool:
    return (
        bool(read_record(record_path(step, folder)).get("finished"))
        and (folder / step.name / RESULTS[step.kind]).is_file()
    )


def origins(step: Step, folder: Path) -> dict[str, int | None]:
    """Each step that it needs -> when that one was finished: another time, another result."""
    return {name: read_record(folder / f"{name}.json").get("finished_at") for name in step.needs}


def state_of(step: Step, folder: Path) -> str:
    record = read_record(record_path(step, folder))
    if is_done(step, folder):
        return f"done in {format_seconds(record['seconds'])}"
    return ("failed" if record.get("failed") else "interrupted") if record else "to do"


def check_plan(steps: list[Step], study: dict[str, Any], folder: Path) -> None:
    """
    Raises:
        UserError: a step was begun with other settings, or would stand in a table with runs that have others; they are
            named.
    """
    _check_settings(steps, folder)
    _check_alike(steps, study, folder)


def _check_settings(steps: list[Step], folder: Path) -> None:
    for step in steps:
        record = read_record(record_path(step, folder))
        if not record and (folder / step.name).exists() and any((folder / step.name).iterdir()):
            raise UserError(
                f"{folder / step.name} was not written by this study: move it away, or choose another --output_dir"
            )
        differing = difference(record["words"], step.words) if record else ""
        if differing:
            raise UserError(
                f"{folder / step.name} was made with other settings: {differing}; choose another --output_dir, or "
                "remove the folder and the .json beside it"
            )
        stale = [
            name
            for name, when in origins(step, folder).items()
            if record and record.get("origins", {}).get(name, when) != when
        ]
        if stale:
            raise UserError(
                f"{folder / step.name} was made from an earlier {stale[0]}: remove the folder and the .json beside "
                "it, and it is made again"
            )


def _check_alike(steps: list[Step], study: dict[str, Any], folder: Path) -> None:
    """What stands in one table has to differ in what the table names, and in nothing else, whatever the calls that made
    it.
    """
    planned = {step.name for step in steps}
    earlier = [
        (name, facts, read_record(folder / f"{name}.json"))
        for name, facts in study.get("steps", {}).items()
        if name not in planned and facts["kind"] in VARIES
    ]
    for step in steps:
        for name, facts, record in earlier:
            same_row = step.kind == "finetune" or facts["variant"] == step.variant
            if record and (facts["kind"], facts["detector"]) == (step.kind, step.detector) and same_row:
                differing = difference(record["words"], step.words, VARIES[step.kind])
                if differing:
                    raise UserError(
                        f"{folder / step.name} would stand in a table with {name} and have other settings: "
                        f"{differing}; choose another --output_dir"
                    )


def cores_of(step: Step, args: Namespace) -> int:
    """Of each process of a run."""
    processes = PRESETS[args.preset].processes if step.kind in ("pretrain", "finetune", "choose") else 1
    return max(1, args.cores // (args.jobs * processes))


def command_of(step: Step, args: Namespace) -> list[str]:
    """What is run, without the interpreter; both folders as full paths."""
    places = {"{data}": str(args.data.resolve()), "{study}": str(args.output_dir.resolve())}
    words = list(step.words)
    for mark, place in places.items():
        words = [word.replace(mark, place) for word in words]
    workers, alone = args.num_workers, cores_of(step, args)
    if step.kind == "proposals":
        return [*words, "--num_workers", str(alone if workers is None else workers)]
    words += ["--num_workers", str(min(alone - 1, 8) if workers is None else workers)]
    return [*words, "--device", args.device] if args.device else words


def launched(words: list[str], processes: int, python: str, root: Path) -> tuple[list[str], dict[str, str]]:
    """The whole command, and what its environment has to have. Configs are run by bash, and start the script with
    $LAUNCH.
    """
    starts = [python]
    if processes > 1 and not words[0].startswith("tools/"):
        starts += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    if words[0].endswith(".sh"):
        return ["bash", str(root / words[0]), *words[1:]], {"LAUNCH": shlex.join(starts)}
    return [*starts, str(root / words[0]), *words[1:]], {}


def launcher(words: list[str], processes: int) -> tuple[list[str], dict[str, str]]:
    """With this interpreter, from any directory."""
    return launched(words, processes, sys.executable, ROOT)


def typed(step: Step, args: Namespace) -> str:
    """Its command as one would type it in the project's folder."""
    words = [word.format(data=args.data, study=args.output_dir) if "{" in word else word for word in step.words]
    words, settings = launched(words, PRESETS[args.preset].processes, "python", Path())
    return " ".join([*(f"{name}={shlex.quote(value)}" for name, value in settings.items()), shlex.join(words)])


def show_plan(steps: list[Step], args: Namespace) -> None:
    preset = PRESETS[args.preset]
    log.info("%s: %s", args.preset, preset.title)
    if preset.processes > 1:
        log.info("each training run takes %d processes, one a GPU", preset.processes)
    states = Counter()
    for step in steps:
        state = state_of(step, args.output_dir)
        states[state.split(" in ")[0]] += 1
        log.info("[%s] %s\n    %s", state, step.name, typed(step, args))
    log.info("%d runs: %s", len(steps), ", ".join(f"{count} {state}" for state, count in states.items()))


class Stop(SignalHandler):
    """SIGINT and SIGTERM become a flag; a second one ends the runs at once."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = 0

    def _handle(self, number: int, frame) -> None:
        self.asked += 1


def start_process(words: list[str], settings: dict[str, str], output: BinaryIO, lock: BinaryIO) -> subprocess.Popen:
    """In a session of its own: Ctrl-C reaches it through us, once. It keeps the study's lock as long as it lives."""
    return subprocess.Popen(
        words,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        env={**os.environ, **settings},
        start_new_session=True,
        pass_fds=[lock.fileno()] if os.name == "posix" else [],
    )


@dataclass
class Active:
    """A run that is going on; before: seconds of its earlier starts."""

    step: Step
    process: subprocess.Popen
    before: float
    began: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        return self.before + time.monotonic() - self.began


@dataclass
class Work:
    """Goes over the steps; failed: names of those that did, and of those that need them. code: its version, for the
    records.
    """

    args: Namespace
    steps: list[Step]
    stop: Stop
    deadline: float | None
    lock: BinaryIO
    active: list[Active] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    code: str = field(default_factory=lambda: environment()["code"])

    def unfinished(self) -> list[Step]:
        return [step for step in self.steps if not is_done(step, self.args.output_dir)]

    def run(self) -> None:
        pending = self.unfinished()
        log.info("%d runs, %d of them done before", len(self.steps), len(self.steps) - len(pending))
        done = {step.name for step in self.steps} - {step.name for step in pending}
        try:
            while (pending or self.active) and not self._must_end():
                self._collect(done)
                self._drop_hopeless(pending)
                for step in [step for step in pending if done.issuperset(step.needs)][
                    : self.args.jobs - len(self.active)
                ]:
                    pending.remove(step)
                    self._start(step)
                time.sleep(POLL)
        finally:
            self._end_all()

    def _must_end(self) -> bool:
        return bool(self.stop.asked) or self.deadline is not None and time.monotonic() >= self.deadline

    def _drop_hopeless(self, pending: list[Step]) -> None:
        for step in [step for step in pending if set(step.needs) & set(self.failed)]:
            log.error("%s is left out: it needs %s", step.name, ", ".join(step.needs))
            pending.remove(step)
            self.failed.append(step.name)

    def _start(self, step: Step) -> None:
        folder, threads = self.args.output_dir, cores_of(step, self.args)
        words, more = launcher(command_of(step, self.args), PRESETS[self.args.preset].processes)
        path = record_path(step, folder)
        before = read_record(path).get("seconds", 0.0)
        record = {
            "words": step.words,
            "origins": origins(step, folder),
            "code": self.code,
            "seconds": before,
            "finished": False,
        }
        write_text(path, json.dumps(record, indent=1) + "\n")
        log.info("begins: %s%s", step.name, " again" if before else "")
        with path.with_suffix(".log").open("ab") as output:
            output.write(f"$ {shlex.join(words)}\n".encode())
            output.flush()
            settings = {"OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1", **more}
            self.active.append(Active(step, start_process(words, settings, output, self.lock), before))

    def _collect(self, done: set[str]) -> None:
        for run in [run for run in self.active if run.process.poll() is not None]:
            self.active.remove(run)
            if self._keep_record(run):
                done.add(run.step.name)
                left = self._left()
                log.info(
                    "[%d/%d] done in %s: %s%s%s",
                    len(done),
                    len(self.steps),
                    format_seconds(run.seconds),
                    run.step.name,
                    result_line(run.step, self.args.output_dir),
                    f"; about {format_seconds(left)} left" if left else "",
                )
            else:
                self.failed.append(run.step.name)
                path = record_path(run.step, self.args.output_dir).with_suffix(".log")
                lines = path.read_text(encoding="utf-8", errors="replace").splitlines()[-TAIL:]
                log.error(
                    "failed with status %s: %s, see %s\n%s",
                    run.process.returncode,
                    run.step.name,
                    path,
                    "\n".join(f"    {line}" for line in lines),
                )

    def _keep_record(self, run: Active) -> bool:
        """Writes down how a run ended; whether it is finished."""
        folder, status = self.args.output_dir, run.process.returncode
        finished = status == 0 and (folder / run.step.name / RESULTS[run.step.kind]).is_file()
        record = {
            "words": run.step.words,
            "origins": origins(run.step, folder),
            "code": self.code,
            "seconds": round(run.seconds, 1),
            "finished": finished,
            "status": status,
            "failed": not finished and not self._must_end(),
        }
        if finished:
            record["finished_at"] = time.time_ns()
        write_text(record_path(run.step, folder), json.dumps(record, indent=1) + "\n")
        if finished and not self.args.keep_checkpoints:
            needed = "checkpoint.pth" if run.step.kind == "pretrain" else None
            for path in (folder / run.step.name).glob("checkpoint*.pth"):
                if path.name != needed:
                    path.unlink()
        return finished

    def _left(self) -> float:
        """Seconds, from those of finished steps of the same kind; 0 where too little is known."""
        folder = self.args.output_dir
        spent: dict[str, list[float]] = {}
        for step in self.steps:
            if is_done(step, folder):
                spent.setdefault(step.kind, []).append(read_record(record_path(step, folder))["seconds"])
        kinds = [step.kind for step in self.unfinished()]
        if not set(kinds) <= spent.keys():
            return 0.0
        going = sum(run.seconds for run in self.active)
        return max(0.0, sum(sum(spent[kind]) / len(spent[kind]) for kind in kinds) - going) / self.args.jobs

    def _end_all(self) -> None:
        """Every run is asked to save itself and to stop; who does not is ended after GRACE seconds, or at a second
        Ctrl-C.
        """
        if self.active:
            log.info("stopping %s", ", ".join(run.step.name for run in self.active))
        asked = self.stop.asked
        for run in self.active:
            with contextlib.suppress(ProcessLookupError):
                run.process.terminate()
        until = time.monotonic() + GRACE
        while (
            any(run.process.poll() is None for run in self.active)
            and time.monotonic() < until
            and self.stop.asked <= max(asked, 1)
        ):
            time.sleep(POLL)
        for run in self.active:
            if run.process.poll() is None:
                kill_family(run.process.pid)
                run.process.wait()
            self._keep_record(run)
        self.active = []


def result_line(step: Step, folder: Path) -> str:
    """What a finished step found, in short; it may not be readable yet."""
    place = folder / step.name
    if step.kind == "recall":
        return f", AR100 {100 * read_record(place / RESULTS['recall']).get('AR100', 0):.1f}"
    evaluated = evaluations(read_log(place)) if step.kind in ("finetune", "choose") else []
    return f", AP {100 * evaluated[-1][1][0]:.1f}, AP50 {100 * evaluated[-1][1][1]:.1f}" if evaluated else ""
