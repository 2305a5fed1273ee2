"""Contenders with the code of another checkout: `--against DIR`.

A subprocess imports `engine`, `models`, `datasets` and `util` of DIR, and the subjects of the benchmark from here, so
that an older checkout needs no benchmark of its own. A subject's `build(case)` may therefore only use what both have.
It answers one line of JSON per request. Weights, samples and outputs travel as files.

    {"do": "build", "name": NAME, "subject": SUBJECT, "case": {...}}   -> {}
    {"do": "outputs", "name": NAME, "file": PATH}                      -> {}
    {"do": "time", "name": NAME, "calls": N}                           -> {"wall": seconds, "cpu": seconds}
    {"do": "peak", "name": NAME}                                       -> {"mib": MiB or null}
    {"do": "drop"}                                                     -> {}   forget all contenders

A request that fails is answered with {"error": MESSAGE}.
"""

import importlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent


# ---- in the subprocess: nothing of the project is imported before `serve` ----


def serve(folder: str) -> None:
    """Answer requests until the input ends, with the code in `folder`."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the code prints must not look like a reply
    _import_from(folder)
    contenders: dict[str, Any] = {}
    for line in sys.stdin:
        try:
            reply = _answer(json.loads(line), contenders)
        except Exception as error:  # noqa: BLE001 - whatever fails there is a skipped row here
            reply = {"error": f"{type(error).__name__}: {error}".partition("\n")[0]}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


def _import_from(folder: str) -> None:
    """Import the project from `folder`, but `tools.benchmarks` from here."""
    sys.path[0] = folder  # was the folder of this file
    package = importlib.util.spec_from_file_location(
        "tools.benchmarks", HERE / "__init__.py", submodule_search_locations=[str(HERE)]
    )
    assert package is not None
    sys.modules["tools.benchmarks"] = importlib.util.module_from_spec(package)


def _answer(request: dict[str, Any], contenders: dict[str, Any]) -> dict[str, Any]:
    import torch

    if torch.get_num_threads() != request["threads"]:
        torch.set_num_threads(request["threads"])
    if request["do"] == "drop":
        contenders.clear()
        return {}
    if request["do"] == "build":
        subject = importlib.import_module(f"tools.benchmarks.{request['subject']}")
        contenders[request["name"]] = subject.build(request["case"])
        return {}
    contender = contenders[request["name"]]
    if request["do"] == "outputs":
        torch.save([tensor.cpu() for tensor in contender.outputs()], request["file"])
        return {}
    if request["do"] == "peak":
        return {"mib": contender.peak_mib()}
    seconds = contender.time(request["calls"])
    return {"wall": seconds.wall, "cpu": seconds.cpu}


# ---- in the benchmark ----


class Checkout:
    """Another checkout of this project and the process that runs it, until `close`.

    Raises:
        UserError: the folder has no checkout.
    """

    def __init__(self, folder: Path, scratch: Path) -> None:
        from util.errors import UserError

        folder = folder.resolve()
        if not (folder / "engine.py").exists():
            raise UserError(
                f"--against {folder}: no checkout of this project, engine.py is missing"
            )
        self.name = commit(folder) or folder.name
        self.scratch = scratch
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "worker.py"), str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=folder,
        )

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()

    def build(self, name: str, subject: str, case: dict[str, Any]) -> "Remote":
        """Return the contender that `SUBJECT.build(case)` makes there.

        Raises:
            RuntimeError: it could not be built.
        """
        self.ask(do="build", name=name, subject=subject, case=case)
        return Remote(self, name)

    def drop(self) -> None:
        """Free the memory of all contenders."""
        self.ask(do="drop")

    def ask(self, **request: Any) -> dict[str, Any]:
        import torch

        assert self.process.stdin is not None
        assert self.process.stdout is not None
        request["threads"] = torch.get_num_threads()
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the process of {self.name} ended, see its message above")
        reply = json.loads(line)
        if "error" in reply:
            raise RuntimeError(reply["error"])
        return reply


class Remote:
    """A contender of another checkout."""

    def __init__(self, checkout: Checkout, name: str) -> None:
        self.checkout, self.name = checkout, name

    def outputs(self) -> list[Any]:
        import torch

        path = self.checkout.scratch / "outputs.pth"
        self.checkout.ask(do="outputs", name=self.name, file=str(path))
        return torch.load(path, weights_only=True)

    def time(self, calls: int) -> Any:
        from tools.benchmarks.measure import Seconds

        return Seconds(**self.checkout.ask(do="time", name=self.name, calls=calls))

    def peak_mib(self) -> float | None:
        return self.checkout.ask(do="peak", name=self.name)["mib"]


def commit(folder: Path) -> str:
    """Return the abbreviated commit of a checkout, with "+" if files differ from it; "" without git."""
    try:
        found = [
            subprocess.run(
                ["git", "-C", str(folder), *words], capture_output=True, text=True, check=True
            ).stdout.strip()
            for words in (
                ("rev-parse", "--short", "HEAD"),
                ("status", "--porcelain", "--untracked-files=no"),
            )
        ]
    except (OSError, subprocess.CalledProcessError):
        return ""
    return found[0] + ("+" if found[1] else "")


if __name__ == "__main__":
    serve(sys.argv[1])
