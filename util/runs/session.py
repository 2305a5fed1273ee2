"""Start and end an entry script: logger, process group, checkpoint, settings, seeds, and errors in one line."""

import multiprocessing
import os
import random
import secrets
import signal
import sys
import threading
from argparse import Namespace
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from util.checkpoints.adoption import settings_from_checkpoint
from util.checkpoints.checkpoint import Checkpoint, load_checkpoint
from util.checkpoints.newest import resolve_resume_path
from util.distributed import (
    TIMEOUT_MINUTES,
    all_gather_object,
    barrier,
    get_rank,
    init_distributed,
    is_distributed,
    shutdown,
)
from util.errors import NonFinite, StopRequested, UserError, one_line
from util.files import DISK_FULL, is_disk_error, user_error
from util.logger import log, logging_to_stdout, setup_logger
from util.runs.folder import SETTINGS, read_json_object
from util.runs.process_state import restored_process_state
from util.settings import FINETUNE, Settings, given_flags, resolve
from util.settings.resolving import default_device
from util.settings.value_types import AUTO

# Images on which `--batch_size auto` measures the memory: batch norm of some pretexts can't train on one.
SMALLEST_TRAINABLE = 2
# Exit statuses, as a shell reports them for these signals (128 + signal number).
SIGTERM_STATUS, SIGINT_STATUS = 143, 130


@dataclass(frozen=True)
class Session:
    """What an entry script starts from.

    settings: all settings. checkpoint: of `--resume`, `--pretrain` or `--frozen_weights`, None without one. device: of
    this process. auto_batch_size: the batch size is still to be chosen (`--batch_size auto`); `settings` have 2.
    """

    settings: Settings
    checkpoint: Checkpoint | None
    device: torch.device
    auto_batch_size: bool = False


def start_session(args: Namespace | Mapping[str, Any], script: str | None = None) -> Session:
    """Initialize distributed training, load the checkpoint, resolve the settings and seed the random generators.

    Afterwards `settings.resume` is the path or URL of the checkpoint, or empty.

    Raises:
        UserError: the checkpoint can't be used, or flags contradict it or each other.
    """
    values = args if isinstance(args, Mapping) else vars(args)
    script = script or values.get("script") or FINETUNE
    given = given_flags(values)
    device = init_distributed(
        given.get("device") or default_device(),
        given.get("dist_url") or "env://",
        given.get("dist_timeout_minutes") or TIMEOUT_MINUTES,
    )

    given = _resolve_resume_and_seed(given)
    source = given.get("resume") or given.get("pretrain") or given.get("frozen_weights")
    checkpoint = load_checkpoint(source) if source else None
    # A resumed run keeps the batch size that `--batch_size auto` chose at its first start.
    chosen = {name: value for name, value in given.items() if (name, value) != ("batch_size", AUTO)}
    adopted = settings_from_checkpoint(checkpoint, chosen, script) if checkpoint else {}
    settings = resolve(chosen if "batch_size" in adopted else given, adopted, script)
    if checkpoint and checkpoint.raw_model and settings.eval and not settings.ema:
        checkpoint.model = checkpoint.raw_model
    seed_everything(settings.seed)
    if settings.tf32:
        torch.backends.cudnn.allow_tf32 = settings.tf32 == "yes"
        torch.backends.cuda.matmul.allow_tf32 = settings.tf32 == "yes"
    auto_batch_size = settings.batch_size == AUTO
    if auto_batch_size:
        settings = settings.replace(batch_size=SMALLEST_TRAINABLE)
    return Session(settings, checkpoint, device, auto_batch_size)


def _resolve_resume_and_seed(given: dict[str, Any]) -> dict[str, Any]:
    """Return the given flags with the path that `--resume auto` finds and the seed that `--random_seed` draws."""
    given = dict(given)
    is_auto = given.get("resume") == "auto"
    evaluates = given.get("eval") or given.get("viz")
    if is_auto and given.get("overwrite") and not evaluates:
        raise UserError(
            "--overwrite replaces the run that --resume auto continues; give only one of them"
        )

    folder = given.get("output_dir")
    described = read_json_object(Path(folder) / SETTINGS) if is_auto and folder else {}
    path = resolve_resume_path(given.get("resume"), folder, described.get("settings"))
    # On a disk that not all nodes share, some ranks would not find what rank 0 found.
    if is_auto and not all(all_gather_object(path is None or os.path.exists(path))):
        raise UserError(
            f"--resume auto: only some processes see a checkpoint in {given['output_dir']}; use a folder that all "
            "nodes share"
        )
    if is_auto and path is None:
        log.info(
            "--resume auto: no checkpoint in %s yet, starting from scratch", given["output_dir"]
        )
    if path and given.get("pretrain"):
        # A requeued job keeps its command: --pretrain counts in the first start only.
        log.info("--resume: continuing from %s, --pretrain is no longer needed", path)
        del given["pretrain"]
    if "resume" in given:
        given["resume"] = path or ""

    if given.get("random_seed") and not path:
        # All ranks use rank 0's draw. A resumed run adopts its seed from the checkpoint.
        given["seed"] = all_gather_object(secrets.randbelow(2**31))[0]
        log.info("--random_seed: %d", given["seed"])
    return given


def seed_everything(seed: int) -> None:
    """Seed the global random generators of this process with `seed` + rank."""
    seed += get_rank()
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)  # NumPy takes 32 bits only
    random.seed(seed)


def kill_dataloader_workers(keep: Collection[Any] = ()) -> None:
    """Kill all dataloader workers, that is, all children that multiprocessing knows.

    They ignore the signals by which multiprocessing ends its children at exit. PyTorch's SIGCHLD handler is removed
    meanwhile, since it reports a killed worker as an error.

    keep: children to leave alone, which are not of the run.
    """
    children = [child for child in multiprocessing.active_children() if child not in keep]
    if not children:
        return
    in_main_thread = threading.current_thread() is threading.main_thread()
    if in_main_thread:  # Python allows signal handlers only there
        handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for child in children:
        child.kill()
    for child in children:
        child.join(timeout=5)
    if in_main_thread:
        signal.signal(signal.SIGCHLD, handler)


def run_script(
    main: Callable[[Namespace], Any],
    parse: Callable[[list[str]], Namespace],
    argv: list[str] | None = None,
) -> None:
    """Run an entry script. Only here does a run turn errors into exit statuses.

    Errors that the user can fix are logged in one line, with status 1. A requested stop has status 143.
    """
    setup_logger()
    argv = sys.argv[1:] if argv is None else argv
    status: Any = 0
    try:
        main(parse(argv))
    except (UserError, NonFinite) as error:
        log.error("error: %s", error if isinstance(error, UserError) else one_line(str(error)))
        status = 1
    except torch.OutOfMemoryError as error:
        log.error("error: %s", _out_of_memory(error))
        status = 1
    except OSError as error:
        # A disk can fail at any file. What is not an error of the disk is one of this code.
        if not (is_disk_error(error) or error.errno in DISK_FULL):
            raise
        log.error("error: %s", user_error("use", error.filename or "a file", error))
        status = 1
    except StopRequested as stop:
        log.error("stopped: %s", stop)
        status = SIGTERM_STATUS
    except KeyboardInterrupt:
        log.error("stopped")
        status = SIGINT_STATUS
    except SystemExit as leave:
        status = leave.code
    finally:
        sys.stdout.flush()
        kill_dataloader_workers()

    # After an error other ranks may wait in a collective, and destroying the process group would wait for them.
    if status in (0, SIGTERM_STATUS):
        shutdown()
    if status:
        sys.exit(status)


def run_in_program(main: Callable[[Namespace], Any], args: Namespace) -> None:
    """Run an entry script's `main` inside a user's program or notebook: errors are raised, and nothing exits.

    The log goes to standard output during the run. What a run changes in the whole process is restored at the end; a
    process group that it joined is left.

    Raises:
        UserError: as the script, also if the GPU is out of memory.
        StopRequested: a signal, such as the interrupt of a notebook, asked to stop; the run is saved.
    """
    children = multiprocessing.active_children()
    had_group = is_distributed()
    with restored_process_state(), logging_to_stdout():
        try:
            main(args)
        except torch.OutOfMemoryError as error:
            raise UserError(_out_of_memory(error)) from error
        except StopRequested:
            _leave_group(had_group)
            raise
        else:
            _leave_group(had_group)
        finally:
            kill_dataloader_workers(keep=children)


def _leave_group(had_group: bool) -> None:
    """Destroy the process group unless it is the user's. Not after errors, see `run_script`."""
    barrier()  # what rank 0 writes is complete on every rank
    if not had_group:
        shutdown()


def _out_of_memory(error: torch.OutOfMemoryError) -> str:
    return (
        f"the GPU is out of memory ({str(error).split('. ')[0]}): lower --batch_size or --image_size, or use "
        "--amp bf16 or --activation_checkpoint"
    )
