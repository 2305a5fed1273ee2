"""Starting and ending an entry script: logger, processes, seeds, and errors as one line."""

import multiprocessing
import random
import secrets
import signal
import sys
from argparse import Namespace
from collections.abc import Callable

import numpy as np
import torch

from util.checkpoints.checkpoint import Checkpoint, adopt_architecture, find_resume, is_pretext, load_checkpoint
from util.distributed import all_gather_object, get_rank, init_distributed, shutdown
from util.errors import NonFinite, StopRequested, UserError
from util.logger import log, setup_logger
from util.settings.arguments import FEW_SHOT, OWN_DATA, PLACES, given_flags, resolve, set_default
from util.settings.flags import FINETUNE, PRETRAIN
from util.settings.registry import DETECTORS, PRETEXTS

# What a checkpoint says of its own start and does not hand on; the backbone's weights lie in it and need not be fetched
# again.
OWN_TO_A_SESSION = {
    "output_dir",
    "resume",
    "overwrite",
    "dry_run",
    "eval",
    "pretrain",
    "device",
    "num_workers",
    "dist_url",
    "start_epoch",
    "backbone_weights",
    "ms_deform_attn",
}
# Not taken over by a run on another kind of data.
DATA_PLACES = {
    "data_root",
    "dataset",
    "voc_train",
    "voc_val",
    "voc_metric",
    "filter_pct",
    "split_file",
    "few_shot",
    "novel_split",
    *FEW_SHOT,
    *PLACES,
    *OWN_DATA,
}
# What a published file says of training and means the same here.
PUBLISHED = ("lr", "lr_backbone", "weight_decay", "clip_max_norm", "epochs", "lr_drop")
STOPPED = 143  # what a shell reports of a process that SIGTERM ended


def start_session(args: Namespace) -> torch.device:
    """Joins the processes, seeds them, and returns the device. `args` need not be resolved."""
    set_default(args, "device", "cuda" if torch.cuda.is_available() else "cpu")
    return init_distributed(args.device, args.dist_url or "env://")


def prepare_checkpoint(args: Namespace) -> Checkpoint | None:
    """Finds and reads the checkpoint of `--resume` or `--pretrain`, lets flags that were not given take over its
    architecture, and resolves all flags. `args.resume` is a path or an address afterwards, or empty.

    Raises:
        UserError: the file can't be used, or a flag contradicts it.
    """
    given = given_flags(args)
    if args.resume == "auto" and args.overwrite:
        raise UserError("--overwrite replaces the run that --resume auto continues: give one of them")
    resume = find_resume(args.resume, args.output_dir)
    if len(set(all_gather_object(bool(resume)))) > 1:
        raise UserError(
            f"--resume auto: only some processes see a checkpoint in {args.output_dir}; use a folder that all "
            f"nodes share"
        )
    if args.resume == "auto" and resume is None:
        log.info("--resume auto: no checkpoint in %s yet, starting afresh", args.output_dir)
    if resume and getattr(args, "pretrain", None):
        log.info("--resume: continuing from %s, --pretrain is not needed any more", resume)
        args.pretrain = None
    args.resume = resume or ""
    if args.random_seed and not resume:
        args.seed = all_gather_object(secrets.randbelow(2**31))[0]
        log.info("--random_seed: %d", args.seed)
    source = resume or getattr(args, "pretrain", None)
    checkpoint = load_checkpoint(source) if source else None
    if checkpoint is not None:
        for line in adopt_architecture(checkpoint, args, given, same_queries=bool(resume)):
            log.info(line)
        _check_kind(args, checkpoint)
        if resume:
            _adopt_settings(args, checkpoint.get("args", {}), given)
    args._given, args._adopted = (
        given,
        given_flags(args) - given - {"resume"},
    )  # kept with the run, see `setting_origins`
    resolve(args)
    return checkpoint


def _adopt_settings(args: Namespace, stored: dict, given: set[str]) -> None:
    """A run that goes on keeps its settings: those of our own checkpoints count where no flag was given, and those of
    training in published ones, whose other settings have other meanings."""
    if args.script == FINETUNE and "script" not in stored:
        others = ("epochs", "lr_drop") if "max_iters" in given else ()
        stored = {name: stored[name] for name in PUBLISHED if name in stored and name not in others}
    elif stored.get("script") != args.script:
        return
    other_data = "dataset_file" in given and stored.get("dataset_file") != args.dataset_file
    kept = (
        OWN_TO_A_SESSION
        | (DATA_PLACES if other_data else set())
        | ({"lr_drop_epochs"} if "lr_drop" in given else set())
    )
    for name, value in stored.items():
        if name in vars(args) and name not in given and name not in kept and value is not None:
            setattr(args, name, value)


def _check_kind(args: Namespace, checkpoint: Checkpoint) -> None:
    """A run that is resumed must be of the kind that the script runs; every detector of a file must be one that can be
    built.
    """
    if args.detector not in DETECTORS:
        raise UserError(
            f"{checkpoint.source} holds {args.detector}, which this version does not build ({', '.join(DETECTORS)})"
        )
    if args.resume and args.script == FINETUNE and is_pretext(checkpoint):
        raise UserError(
            f"{checkpoint.source} is from pre-training and knows no classes: give it as --pretrain to {FINETUNE}"
        )
    if args.resume and args.script == PRETRAIN and not is_pretext(checkpoint):
        raise UserError(
            f"{checkpoint.source} holds a detector without a pretext; {PRETRAIN} can resume only its own checkpoints"
        )
    if args.resume and args.script == PRETRAIN:
        _check_pretext(args, checkpoint)


def _check_pretext(args: Namespace, checkpoint: Checkpoint) -> None:
    """A published file does not say which pretext it is of, but the names in it do."""
    pretext = args.pretext or (checkpoint.get("args") or {}).get("pretext") or "random_query_patch"
    able = [name for name, entry in PRETEXTS.items() if any(key.startswith(entry.parts) for key in checkpoint["model"])]
    if able and pretext not in able:
        raise UserError(f"{checkpoint.source} is not of --pretext {pretext}: add --pretext {able[0]}")


def seed_everything(seed: int) -> None:
    """Seeds the generators of this process; processes differ by their number."""
    seed += get_rank()
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def end_loaders() -> None:
    """Ends all loader processes. They ignore the signals that multiprocessing would end them with at exit, and PyTorch
    takes a killed one for an accident as long as it listens."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for child in multiprocessing.active_children():
        child.kill()


def run_script(
    main: Callable[[Namespace], None], parse: Callable[[list[str]], Namespace], argv: list[str] | None = None
) -> None:
    """Runs an entry script; what the user can mend is one line and exit status 1, a requested stop is status 143."""
    setup_logger()
    argv = sys.argv[1:] if argv is None else argv
    status = 0
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
        end_loaders()
    if status in (0, STOPPED):
        shutdown()  # otherwise the others may wait in a collective, and taking the group down would wait for them
    if status:
        sys.exit(status)


def one_line(error: Exception) -> str:
    """The message alone: an error from a loader process arrives with its traceback as text."""
    text = str(error)
    if "Traceback (most recent call last)" not in text:
        return text
    return text.strip().splitlines()[-1].split(": ", 1)[-1]
