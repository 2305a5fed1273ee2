"""DETR's script for SLURM by its published name: prints the command that does the same here, and starts nothing.

submitit is not used. A partition has to be named, which DETR's script left to the cluster's default.
"""

from util.environment import check_environment

check_environment()  # before what an old Python or PyTorch can't import

import shlex
import sys
from collections.abc import Sequence

from util.settings import FINETUNE, Parser
from util.settings.right_script import HELP_FLAGS, refusal


def answer(argv: Sequence[str]) -> str:
    """Return the command for the flags of DETR's script (4 nodes of 8 GPUs for 60 minutes by default), or why there
    is none.
    """
    parser = Parser("run_with_submitit.py", add_help=False)
    parser.add_argument("--ngpus", type=int, default=8)
    parser.add_argument("--nodes", type=int, default=4)
    parser.add_argument("--timeout", type=int, default=60)  # minutes
    parser.add_argument("--job_dir", default="")
    args, flags = parser.parse_known_args(argv)
    if args.job_dir:
        flags += ["--output_dir", args.job_dir]
    flags = [word for word in flags if word not in HELP_FLAGS]
    refused = refusal(flags, FINETUNE)
    if refused:
        return f"With these flags, {FINETUNE} would answer: {refused}"

    per_node = "" if args.ngpus == 8 else f"GPUS_PER_NODE={args.ngpus} "
    return (
        "With your PARTITION, this does the same, and with --output_dir DIR --resume auto it continues when its time "
        f'is over:\n  {per_node}SRUN_ARGS="--time {args.timeout}" ./tools/run_dist_slurm.sh PARTITION detr '
        f"{args.ngpus * args.nodes} {FINETUNE} {shlex.join(flags)}"
    )


if __name__ == "__main__":
    sys.exit(f"error: submitit is not used here, nothing was started. {answer(sys.argv[1:])}")
