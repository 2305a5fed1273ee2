"""Measure the speed of this code: training step, inference, loader, evaluation, matching, kernels.

    python tools/benchmark.py step --models detr --batch_size 2 --size 480 640 --variant "--amp bf16"
    python tools/benchmark.py step --against ../older_checkout
    python tools/benchmark.py report --output outputs/benchmark

Contenders must agree in what they compute before they are timed, in turns, so that other load on the machine affects
all of them alike. Each subject is a file in tools/benchmarks; docs/performance.md explains the output.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tools.benchmarks.command import main, parse  # noqa: E402
from util.runs.session import run_script  # noqa: E402

if __name__ == "__main__":
    run_script(main, parse)
