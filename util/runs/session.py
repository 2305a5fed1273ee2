"""Starting and ending an entry script: logger, processes, checkpoint, settings, seeds, and errors as one line."""

import multiprocessing
import random
import secrets
import signal
import sys
from argparse import Namespace
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from util.checkpoints.adoption import settings_from_checkpoint
from util.checkpoints.checkpoint import Checkpoint, load_checkpoint, resolve_resume_path
from util.distributed import all_gather_object, get_rank, init_distributed, shutdown
from util.errors import NonFinite, StopRequested, UserError
from util.logger import log, setup_logger
from util.settings import FINETUNE, Settings, given_flags, resolve
from util.settings.resolving import default_device

STOPPED = 143  # what a shell reports of a process that SIGTERM ended


@dataclass(frozen=True)
class Session:
    """What an entry script starts from.

    settings: complete. checkpoint: of `--resume` or `--pretrain`, None without one. device: of this process.
    """

    settings: Settings
    checkpoint: Checkpoint | None
    device: torch.device


def start_session(args: Namespace | Mapping[str, Any], script: str | None = None) -> Session:
    """Joins the processes, reads the checkpoint, resolves the settings and seeds the random generators.

    `settings.resume` is the path or address of the checkpoint afterwards, or empty.

    Raises:
        UserError: the checkpoint can't be used, or flags contradict it or each other.
    """
    values = args if isinstance(args, Mapping) else vars(args)
    script, given = script or values.get("script") or FINETUNE, given_flags(values)
    device = init_distributed(
        given.get("device") or default_device(), given.get("dist_url") or "env://"
    )
    given = _with_resume(given)
    source = given.get("resume") or given.get("pretrain")
    checkpoint = load_checkpoint(source) if source else None
    adopted = settings_from_checkpoint(checkpoint, given, script) if checkpoint else {}
    settings = resolve(given, adopted, script)
    seed_everything(settings.seed)
    return Session(settings, checkpoint, device)


def _with_resume(given: dict[str, Any]) -> dict[str, Any]:
    """The given flags with the path that `--resume auto` means, and with the seed that `--random_seed` draws."""
    evaluates = given.get("eval") or given.get("viz")
    if given.get("resume") == "auto" and given.get("overwrite") and not evaluates:
        raise UserError(
            "--overwrite replaces the run that --resume auto continues: give one of them"
        )
    found = resolve_resume_path(given.get("resume"), given.get("output_dir"))
    if len(set(all_gather_object(bool(found)))) > 1:
        raise UserError(
            f"--resume auto: only some processes see a checkpoint in {given['output_dir']}; use a folder that all "
            "nodes share"
        )
    if given.get("resume") == "auto" and found is None:
        log.info(
            "--resume auto: no checkpoint in %s yet, starting from scratch", given["output_dir"]
        )
    if found and given.get("pretrain"):
        log.info("--resume: continuing from %s, --pretrain is not needed any more", found)
        given = {name: value for name, value in given.items() if name != "pretrain"}
    if "resume" in given:
        given = {**given, "resume": found or ""}
    if given.get("random_seed") and not found:
        given = {**given, "seed": all_gather_object(secrets.randbelow(2**31))[0]}
        log.info("--random_seed: %d", given["seed"])
    return given


def seed_everything(seed: int) -> None:
    """Seeds the global random generators of this process; the rank is added."""
    seed += get_rank()
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def kill_dataloader_workers() -> None:
    """Ends all dataloader workers. They ignore the signals by which multiprocessing would end them at exit, and PyTorch
    takes a killed one for an accident as long as it listens.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for child in multiprocessing.active_children():
        child.kill()


def run_script(
    main: Callable[[Namespace], Any],
    parse: Callable[[list[str]], Namespace],
    argv: list[str] | None = None,
) -> None:
    """Runs an entry script; what the user can mend is one line and exit status 1, a requested stop is status 143."""
    setup_logger()
    argv = sys.argv[1:] if argv is None else argv
    status: Any = 0
    try:
        main(parse(argv))
    except (UserError, NonFinite) as error:
        log.error("error: %s", one_line(error))
        status = 1
    except torch.OutOfMemoryError as error:
        log.error(
            "error: the GPU's memory is full (%s): lower --batch_size or --image_size, or use --amp bf16",
            str(error).split(". ")[0],
        )
        status = 1
    except StopRequested as stop:
        log.error("stopped: %s", stop)
        status = STOPPED
    except KeyboardInterrupt:
        log.error("stopped")
        status = 130
    except SystemExit as leave:
        status = leave.code
    finally:
        sys.stdout.flush()
        kill_dataloader_workers()
    if status in (0, STOPPED):
        shutdown()  # otherwise the others may wait in a collective, and taking the group down would wait for them
    if status:
        sys.exit(status)


def one_line(error: Exception) -> str:
    """The message alone: an error from a dataloader worker arrives with its traceback as text."""
    text = str(error)
    if "Traceback (most recent call last)" not in text:
        return text
    return text.strip().splitlines()[-1].split(": ", 1)[-1]
