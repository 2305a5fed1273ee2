"""DETR's script for SLURM by its published name: prints the command that does the same here, and starts nothing.

submitit is not used. A partition has to be named, which DETR's script left to the cluster's default.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence


def command(argv: Sequence[str]) -> str:
    """Return the command for the flags of DETR's script: 4 nodes of 8 GPUs for 60 minutes by default."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--ngpus", type=int, default=8)
    parser.add_argument("--nodes", type=int, default=4)
    parser.add_argument("--timeout", type=int, default=60)  # minutes
    parser.add_argument("--job_dir", default="")
    args, flags = parser.parse_known_args(argv)
    if args.job_dir:
        flags += ["--output_dir", args.job_dir]

    per_node = "" if args.ngpus == 8 else f"GPUS_PER_NODE={args.ngpus} "
    return (
        f'{per_node}SRUN_ARGS="--time {args.timeout}" ./tools/run_dist_slurm.sh PARTITION detr '
        f"{args.ngpus * args.nodes} finetune_main.py {shlex.join(flags)}"
    )


if __name__ == "__main__":
    sys.exit(
        "error: submitit is not used here, nothing was started. With your PARTITION, this does the same, and "
        f"--resume auto continues it when its time is over:\n  {command(sys.argv[1:])}"
    )
