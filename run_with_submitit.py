"""Submit a training run to SLURM with submitit, by the name and flags of DETR's script.

    python run_with_submitit.py --timeout 3000 --coco_path COCO
    python run_with_submitit.py --nodes 1 --ngpus 4 --partition gpu --job_dir runs/detr --coco_path COCO --dry_run

All other flags are those of the script that each task runs. A job that is preempted, or whose time is over, saves,
is put into the queue again, and continues.
"""

from util.environment import check_environment

check_environment()  # before what an old Python or PyTorch can't import

import importlib
import shlex
import shutil
import signal
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from util.checkpoints.checkpoint import LATEST
from util.errors import UserError
from util.logger import log
from util.runs.session import SIGTERM_STATUS, run_script
from util.settings import FINETUNE, Parser
from util.settings.right_script import refusal
from util.settings.table import SCRIPTS

ROOT = Path(__file__).resolve().parent
CLUSTERS = ("slurm", "local", "debug")
# As published: per GPU and task, and how often a job whose time is over is put into the queue again.
MEMORY_GB, CPUS, MAX_TIMEOUTS = 40, 10, 30
SIGNAL_SECONDS = 120  # before the end of a job's time, for the step that runs and for saving
JOB_ID = "%j"  # in --job_dir, as submitit and SLURM write it
REQUEUE_SIGNAL = signal.SIGUSR2  # submitit's


class Training:
    """A training run as submitit calls it, once in each task of the job.

    Args:
        script: `finetune_main.py` or `main.py`.
        flags: its flags.
        output_dir: where the run saves its checkpoints; with `%j` for the number of the job.
    """

    def __init__(self, script: str, flags: Sequence[str], output_dir: str) -> None:
        self.script = script
        self.flags = list(flags)
        self.output_dir = output_dir

    def __call__(self) -> None:
        import submitit

        job = submitit.JobEnvironment()
        self.output_dir = self.output_dir.replace(JOB_ID, job.job_id)
        if job.num_tasks > 1:
            submitit.helpers.TorchDistributedEnvironment().export(
                set_cuda_visible_devices=False, overwrite=True
            )
        module = importlib.import_module(self.script.removesuffix(".py"))
        flags = [*self.flags, "--output_dir", self.output_dir]
        with _SaveBeforeRequeue(job.global_rank):
            run_script(module.main, module.parse, flags)

    def checkpoint(self) -> Any:
        """Return what submitit runs next time: the same, from the newest checkpoint of the output folder."""
        import submitit

        flags = self.flags
        # Without a checkpoint yet, `--resume auto` would start from scratch instead of from a given `--resume`.
        if Path(self.output_dir, LATEST).exists():
            flags = [flag for flag in flags if flag != "--overwrite"] + ["--resume", "auto"]
        return submitit.helpers.DelayedSubmission(Training(self.script, flags, self.output_dir))


class _SaveBeforeRequeue:
    """Let training save in the middle of an epoch before submitit's handler puts the job into the queue again.

    submitit would requeue at once, and the steps since the last checkpoint would be lost. Outside of training, where
    nothing can be saved, its handler is called at once.
    """

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.requested = False
        self.outside = signal.getsignal(signal.SIGTERM)
        self.requeue: Any = signal.getsignal(REQUEUE_SIGNAL)

    def __enter__(self) -> None:
        if callable(self.requeue):  # submitit's debug executor has none
            signal.signal(REQUEUE_SIGNAL, self._handle)

    def __exit__(self, _: Any, error: BaseException | None, *rest: Any) -> bool:
        if callable(self.requeue):
            signal.signal(REQUEUE_SIGNAL, self.requeue)
        saved = isinstance(error, SystemExit) and error.code == SIGTERM_STATUS
        if not saved:
            return False
        if (
            self.rank
        ):  # must not fail before rank 0 has requeued the job: SLURM would end rank 0, too
            return True
        if self.requested:
            self.requeue(REQUEUE_SIGNAL, None)  # exits
        return False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        stop: Any = signal.getsignal(signal.SIGTERM)
        if stop == self.outside or not callable(stop):
            self.requeue(number, frame)
        else:  # during training, which finishes its step, saves and stops on SIGTERM
            self.requested = True
            stop(signal.SIGTERM, frame)


# -------------------------------------------------------------------------------------------------------- command line


def parse(argv: Sequence[str]) -> Namespace:
    """Return the flags of this script, and those of the training script as `flags`."""
    parser = Parser("run_with_submitit.py", description=__doc__.splitlines()[0])
    parser.add_argument("--ngpus", type=int, default=8, help="GPUs and tasks per node; 0: CPUs")
    parser.add_argument("--nodes", type=int, default=4, help="nodes")
    parser.add_argument("--timeout", type=int, default=60, metavar="MINUTES", help="time")
    parser.add_argument(
        "--job_dir",
        default=f"exps/submitit/{JOB_ID}",
        metavar="DIR",
        help="folder for the logs of the job and, without --output_dir, for the run; %%j is the job's number",
    )
    parser.add_argument(
        "--partition", default="", help="SLURM partition; empty: the cluster's default"
    )
    parser.add_argument(
        "--slurm",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="further options of sbatch, such as account=vision mem=0",
    )
    parser.add_argument("--script", choices=SCRIPTS, default=FINETUNE, help="what each task runs")
    parser.add_argument(
        "--cluster",
        choices=CLUSTERS,
        default="slurm",
        help="local: processes on this machine; debug: in this process",
    )
    parser.add_argument("--dry_run", action="store_true", help="print what would be submitted")
    args, flags = parser.parse_known_args(argv)
    return Namespace(**vars(args), flags=flags)


def main(args: Namespace) -> None:
    check(args)
    training = make_training(args)
    folder, resources = str(Path(args.job_dir).absolute()), request(args)
    if args.dry_run:
        log.info("%s", description(args, training, folder, resources))
        return

    submitit = _import_submitit()
    if args.cluster == "slurm" and shutil.which("srun") is None:
        raise UserError(
            "srun is not on the PATH: run this on a SLURM login node, or use --cluster local or torchrun"
        )
    executor = submitit.AutoExecutor(
        folder, cluster=args.cluster, slurm_max_num_timeout=MAX_TIMEOUTS
    )
    executor.update_parameters(**resources)
    try:
        job = executor.submit(training)
    except submitit.core.utils.FailedSubmissionError as error:
        raise UserError(f"sbatch refused the job: {' '.join(str(error).split())}") from error
    log.info("submitted job %s, its log: %s", job.job_id, job.paths.stdout)
    if args.cluster != "slurm":  # a SLURM job does not need this process
        wait(job)


def wait(job: Any) -> None:
    """Wait for the end of a job.

    Raises:
        UserError: it failed.
    """
    submitit = _import_submitit()
    try:
        job.results()
    except submitit.core.utils.UncompletedJobError as error:
        raise UserError(f"job {job.job_id} failed: see {job.paths.stdout}") from error


def check(args: Namespace) -> None:
    """Refuse what would fail on the cluster.

    Raises:
        UserError: a number is too small, `--slurm` is no KEY=VALUE, or the training script would refuse its flags.
    """
    for name, least in (("ngpus", 0), ("nodes", 1), ("timeout", 1)):
        if getattr(args, name) < least:
            raise UserError(f"--{name} {getattr(args, name)}: give {least} or more")
    for option in args.slurm:
        if "=" not in option:
            raise UserError(f"--slurm {option}: give KEY=VALUE, such as account=vision")
    if args.cluster != "slurm" and args.nodes > 1:
        raise UserError(f"--cluster {args.cluster} has one node: add --nodes 1")
    if args.cluster == "debug" and args.ngpus > 1:
        raise UserError("--cluster debug is one process: add --ngpus 1, or 0 for the CPU")
    message = refusal(args.flags, args.script)
    if message:
        raise UserError(f"{args.script} would refuse its flags: {message}")


def make_training(args: Namespace) -> Training:
    """Return the run, which resumes from its output folder unless the flags say where to start."""
    flags, output_dir = list(args.flags), args.job_dir
    names = [flag.split("=")[0] for flag in flags]
    if "--output_dir" in names:
        at = len(names) - 1 - names[::-1].index("--output_dir")
        output_dir = flags[at].partition("=")[2] or flags[at + 1]
    if not {"--resume", "--eval", "--overwrite"} & set(names):
        flags += ["--resume", "auto"]
    return Training(args.script, flags, str(Path(output_dir).absolute()))


def request(args: Namespace) -> dict[str, Any]:
    """Return the resources of the job in submitit's terms."""
    tasks = max(args.ngpus, 1)
    resources: dict[str, Any] = {
        "name": "detr",
        "nodes": args.nodes,
        "tasks_per_node": tasks,
        "gpus_per_node": args.ngpus or None,
        "cpus_per_task": CPUS,
        "mem_gb": MEMORY_GB * tasks,
        "timeout_min": args.timeout,
        "slurm_signal_delay_s": SIGNAL_SECONDS,
        "slurm_setup": [_python_path()],
        "local_setup": [_python_path()],
    }
    if args.partition:
        resources["slurm_partition"] = args.partition
    if args.slurm:
        options = (option.partition("=") for option in args.slurm)
        resources["slurm_additional_parameters"] = {name: value for name, _, value in options}
    return resources


def _python_path() -> str:
    """Return the shell command by which the tasks find this project, from whatever folder a job is submitted."""
    return f"export PYTHONPATH={shlex.quote(str(ROOT))}${{PYTHONPATH:+:$PYTHONPATH}}"


def description(args: Namespace, training: Training, folder: str, resources: dict[str, Any]) -> str:
    """Return what would be submitted, as text."""
    tasks = args.nodes * resources["tasks_per_node"]
    requested = ", ".join(
        f"{name}={value}"
        for name, value in resources.items()
        if value is not None and name[-5:] != "setup"
    )
    command = shlex.join(["python", training.script, *training.flags])
    return (
        f"nothing is submitted. Cluster {args.cluster}: {requested}\n"
        f"logs: {folder}\n"
        f"each of the {tasks} tasks runs: {command} --output_dir {shlex.quote(training.output_dir)}\n"
        f"requeued when it is preempted, and up to {MAX_TIMEOUTS} times when its time is over"
    )


def _import_submitit() -> Any:
    try:
        import submitit
    except ImportError as error:
        raise UserError(
            "run_with_submitit.py needs the package submitit: pip install submitit (in requirements-extras.txt); "
            "without it, tools/run_dist_slurm.sh starts the same run by srun"
        ) from error
    return submitit


if __name__ == "__main__":
    # By its name as a module, so that the tasks of the job can import the class.
    this = importlib.import_module("run_with_submitit")
    run_script(this.main, this.parse)
