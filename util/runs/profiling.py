"""`--profile`: a trace and a table of some training steps, by torch.profiler."""

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from util.files import write_text
from util.logger import log

FOLDER = "profile"
TRACE, TABLE = "trace.json", "operations.txt"
# Steps before the first profiled one: they select kernels, create optimizer state and fill the loader's queues.
WARM_UP_STEPS = 5
ROWS_LOGGED, ROWS_WRITTEN = 10, 100


class StepProfiler:
    """Profiles `num_steps` training steps after a warm-up and writes `profile/` in a run's folder.

    Call `step` after each training step and `stop` at the end of the training. Nothing is slower before and after the
    profiled steps.

    Attributes:
        finished: everything is written.
    """

    def __init__(self, folder: Path, num_steps: int, device: torch.device) -> None:
        self.folder, self.num_steps = folder / FOLDER, num_steps
        self.sort_by = f"self_{device.type}_time_total"
        self.finished = False
        activities = [ProfilerActivity.CPU]
        if device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        self.profiler = profile(
            activities=activities,
            schedule=schedule(wait=WARM_UP_STEPS - 1, warmup=1, active=num_steps, repeat=1),
            on_trace_ready=self._write,
        )
        self.profiler.start()

    def step(self) -> None:
        if not self.finished:
            self.profiler.step()

    def stop(self) -> None:
        """Write what was profiled, if the training had fewer steps than asked for."""
        if self.finished:
            return
        self.profiler.stop()
        if not self.finished:
            log.warning(
                "--profile: the training ended within the %d steps of warm-up", WARM_UP_STEPS
            )

    def _write(self, profiler: profile) -> None:
        self.finished = True
        self.folder.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(self.folder / TRACE))
        operations = profiler.key_averages()
        write_text(
            self.folder / TABLE, operations.table(sort_by=self.sort_by, row_limit=ROWS_WRITTEN)
        )
        rows = operations.table(
            sort_by=self.sort_by, row_limit=ROWS_LOGGED, max_name_column_width=40
        )
        log.info("--profile: the operations that took longest\n%s", rows)
        log.info(
            "--profile: trace for chrome://tracing or ui.perfetto.dev, and table, in %s",
            self.folder,
        )
