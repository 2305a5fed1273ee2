"""The tasks that SLURM's `srun` started."""

import os


def slurm_tasks() -> int:
    """Return the number of tasks of the `srun` step that this process belongs to; 1 outside of one."""
    # A batch job's shell has SLURM_PROCID and SLURM_NTASKS, too, but is no task. Only srun sets SLURM_STEP_NUM_TASKS.
    if "SLURM_PROCID" not in os.environ:
        return 1
    return int(os.environ.get("SLURM_STEP_NUM_TASKS", "1"))
