"""What a benchmark leaves: one JSON file with the runs of all subjects, and tables made from it."""

import argparse
import json
import os
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from tools.benchmarks.measure import Row
from util.errors import UserError
from util.files import write_text
from util.markdown import markdown_table

FILE = "benchmark.json"
SWEEP = "sweep of "  # begins the names of contenders of which the fastest is wanted
PACKAGES = ("torch", "triton", "timm", "transformers", "onnxruntime", "hotcoco", "pycocotools")


def output_argument(parser: argparse.ArgumentParser, default: str, meaning: str) -> None:
    """Add `--output`, a folder."""
    parser.add_argument("--output", type=Path, default=Path(default), metavar="DIR", help=meaning)


def environment(device: torch.device) -> dict[str, str]:
    """Return what the times depend on: hardware, threads, Python and package versions, and the load at the start."""
    if device.type == "cuda":
        hardware = f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}"
    else:
        hardware = f"{cpu_name()}, {torch.get_num_threads()} of {os.cpu_count()} threads"
    found = {
        "device": hardware,
        "load": f"{os.getloadavg()[0]:.1f}",
        "python": platform.python_version(),
    }
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else (platform.processor() or platform.machine())


def read_runs(path: Path) -> list[dict[str, Any]]:
    """Return the runs of a results file; none if there is no such file.

    Raises:
        UserError: it is not such a file.
    """
    if not path.exists():
        return []
    try:
        return json.loads(path.read_text(encoding="utf-8"))["runs"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is no results file of tools/benchmark.py: give another --output"
        ) from error


def save_run(path: Path, run: Mapping[str, Any]) -> None:
    """Add a run to a results file. It replaces an earlier run of the same command."""
    runs = [other for other in read_runs(path) if other["command"] != run["command"]]
    write_text(path, json.dumps({"runs": [*runs, run]}, indent=1) + "\n")


def make_run(
    command: str,
    subject: str,
    info: Mapping[str, str],
    rows: Sequence[Row],
    skipped: Mapping[str, str],
    facts: Mapping[str, Any],
    commit: str,
) -> dict[str, Any]:
    return {
        "subject": subject,
        "command": command,
        "commit": commit,
        "environment": dict(info),
        "rows": [vars(row) for row in rows],
        "not_measured": dict(skipped),
        "facts": dict(facts),
    }


# ---- tables ----


def run_text(run: Mapping[str, Any]) -> str:
    """Return a run as Markdown: command, conditions, table, roof and parts."""
    info = ", ".join(f"{key} {value}" for key, value in run["environment"].items())
    commit = f"commit {run['commit']}, " if run["commit"] else ""
    blocks = [f"`{run['command']}`", f"Conditions: {commit}{info}.", times_table(run["rows"])]
    blocks += _fastest_of_sweeps(run["rows"])
    blocks += [_facts_text(name, facts) for name, facts in run["facts"].items() if facts]
    blocks += [f"Not measured: {name} ({reason})." for name, reason in run["not_measured"].items()]
    return "\n\n".join(block for block in blocks if block)


def times_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the times, and how many times as fast "ours" is as each other contender of the same comparison."""
    head = [
        "what",
        "contender",
        "ms, median (quartiles)",
        "CPU ms",
        "per second",
        "ours is faster by",
        "less CPU by",
        "MiB",
        "difference",
    ]
    cells = []
    for row in rows:
        ours = next(r for r in rows if r["comparison"] == row["comparison"])
        cells.append(
            [
                row["comparison"],
                row["contender"],
                f"{row['median_ms']:.4g} ({row['low_ms']:.4g} to {row['high_ms']:.4g})",
                f"{row['cpu_ms']:.4g}",
                f"{1000 * row['items'] / row['median_ms']:.4g}" if row["items"] else "-",
                _ratio(row["median_ms"], ours["median_ms"]),
                _ratio(row["cpu_ms"], ours["cpu_ms"]),
                "-" if row["peak_mib"] is None else f"{row['peak_mib']:.0f}",
                f"{row['difference']:.1e}",
            ]
        )
    unused = [i for i in (4, 7) if all(row[i] == "-" for row in cells)]
    kept = [i for i in range(len(head)) if i not in unused]
    return markdown_table([head[i] for i in kept], [[row[i] for i in kept] for row in cells])


def _fastest_of_sweeps(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a line with the fastest contender of each comparison's sweep."""
    swept = [row for row in rows if row["contender"].startswith(SWEEP)]
    lines = []
    for name in dict.fromkeys(row["comparison"] for row in swept):
        own = [row for row in swept if row["comparison"] == name]
        best = min(own, key=lambda row: row["median_ms"])
        lines.append(f"{name}: the fastest {best['contender']} ({best['median_ms']:.4g} ms).")
    return lines


def _ratio(value: float, ours: float) -> str:
    return f"{value / ours:.2f}" if ours else "-"


def _facts_text(name: str, facts: Mapping[str, Any]) -> str:
    lines = []
    if "trained parameters" in facts:
        lines.append(f"{facts['trained parameters']:,} trained parameters in every contender.")
    if "roof" in facts:
        roof = facts["roof"]
        lines.append(
            f"Ours runs {roof['operations']} operations with {roof['flops'] / 1e9:.4g} GFLOP and "
            f"{roof['bytes'] / 1e9:.3g} GB of memory traffic. At the measured rates of this device "
            f"({roof['matmul_flops_per_s'] / 1e9:.4g} GFLOP/s, {roof['copy_bytes_per_s'] / 1e9:.3g} GB/s) that is at "
            f"least {roof['compute_ms']:.4g} ms of arithmetic, and {roof['memory_ms']:.4g} ms of traffic if nothing "
            "stayed in a cache."
        )
    if "parts" in facts:
        parts = ", ".join(f"{part} {ms:.4g}" for part, ms in facts["parts"].items())
        lines.append(f"Parts of our step in ms: {parts}.")
    return f"{name}: " + " ".join(lines) if lines else ""
