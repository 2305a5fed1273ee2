"""A training run: build it from settings, train it, save it, resume it, or try a few steps of it (`--dry_run`)."""

import inspect
import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence, Sized
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import engine
from datasets.transfer import Transfer
from models.criterion import SetCriterion
from models.trainable import TrainableModel
from util.bf16 import AMP_DTYPES
from util.checkpoints.checkpoint import BEST, LATEST, VERSION, Checkpoint, save_checkpoint
from util.checkpoints.newest import step_of
from util.distributed import (
    BATCH_NORMS,
    all_gather_object,
    barrier,
    broadcast_tensors,
    collective,
    compute_on_rank0,
    get_rank,
    get_world_size,
    is_main_process,
    unwrap_model,
)
from util.errors import LostProcess, NonFiniteLoss, StopRequested, UserError
from util.files import disk_errors, link_or_copy
from util.logger import format_seconds, log
from util.random_state import get_rng_states, set_rng_states, unchanged_rng_states
from util.runs.background import BackgroundWriter, copy_to_host
from util.runs.boards import Board
from util.runs.compilation import Compilation, compile_detector
from util.runs.log import append_log, append_step, is_logged, main_metric, trim_step_log
from util.runs.meters import Averages, peak_host_memory
from util.runs.nonfinite import FOLDER as NONFINITE
from util.runs.nonfinite import NonFiniteGuard
from util.runs.optimizer import build_optimizer, build_scheduler, restore_optimizer
from util.runs.optional_files import training_continues
from util.runs.profiling import StepProfiler
from util.runs.resuming import (
    NO_AP,
    changed_data,
    find_best_ap,
    keep_replaced_log,
    warn_if_going_back,
)
from util.runs.signals import StopSignal
from util.runs.step_checkpoints import (
    SaveSchedule,
    remove_later_steps,
    remove_unfinished,
    write_step_checkpoint,
)
from util.runs.tensorboard import TensorBoard
from util.runs.weight_average import WeightAverage
from util.runs.weights_and_biases import WeightsAndBiases
from util.settings import Settings

DRY_RUN_STEPS = 3  # the fastest one counts: the first is slower than the others

# Settings that the order of images within an epoch depends on: always, and with --bucket_aspect.
ORDER_FLAGS = ("seed", "bucket_aspect")
SIZE_FLAGS = ("image_size", "max_size")
# Of DistributedDataParallel. PyTorch 2.13 deprecated the second; the first one still sends buffers at construction.
SYNC_BUFFERS = (
    "forward_sync_buffers"
    if "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    else "broadcast_buffers"
)


@dataclass(kw_only=True)
class Run(engine.TrainState):
    """A training run and the folder where it is saved.

    Attributes:
        folder: None if nothing is saved.
        save_every: save a numbered checkpoint every this many epochs.
        keep_last: number of step checkpoints that stay.
        writer: writes step checkpoints.
        checkpoint_extras: what each checkpoint contains besides training state and normalization.
        evaluate: (model, epoch) -> `test_*` values of the log; None to train without evaluation.
        eval_every: evaluate every this many epochs, and after the last one.
        on_epoch_end: called on rank 0 of a saved run, after the epoch's line is in the log: after evaluations and the
            last epoch, and in between as long as it takes less than a tenth of the time.
        called_at, call_seconds: when on_epoch_end was last called, and how long that took.
        pending: log values of an epoch that is trained but not evaluated and logged yet.
        best_ap: best AP so far; -1 before the first evaluation.
        changed_data: the data that differ from those of the resumed checkpoint: some of "train" and "val".
        latest_is_later: training went back before the `checkpoint.pth` of its folder, which no save has replaced yet.
        numbered: name of the numbered checkpoint of the epoch that was trained last, if it has one.
        compilation: what `--compile` compiled; None without it.
        use_tensorboard, use_wandb: write the log for TensorBoard, and for Weights & Biases, too.
        profile_steps: number of steps to profile.
        boards: the writers of these, on rank 0 while the run trains.
    """

    folder: Path | None
    save_every: int
    checkpoint_extras: dict[str, Any]
    keep_last: int = 2
    writer: BackgroundWriter = field(default_factory=BackgroundWriter)
    evaluate: Callable[[nn.Module, int], dict[str, Any]] | None = None
    eval_every: int = 1
    on_epoch_end: Callable[[], None] | None = None
    called_at: float = -math.inf
    call_seconds: float = 0.0
    pending: dict[str, Any] | None = None
    best_ap: float = NO_AP
    changed_data: list[str] = field(default_factory=list)
    latest_is_later: bool = False
    numbered: str | None = None
    compilation: Compilation | None = None
    use_tensorboard: bool = False
    use_wandb: bool = False
    profile_steps: int = 0
    boards: list[Board] = field(default_factory=list)


# --------------------------------------------------------------------------------------------------------------- build


def build_run(
    settings: Settings,
    model: TrainableModel,
    criterion: SetCriterion,
    loader: torch.utils.data.DataLoader,
    device: torch.device,
    *,
    folder: Path | None,
    checkpoint_extras: dict[str, Any] | None = None,
    normalization: Mapping[str, Sequence[float]] | None = None,
) -> Run:
    """Build optimizer, schedule and the distributed wrapper around a model that is already on its device.

    Args:
        checkpoint_extras: see `Run`; fields of `Checkpoint`: `args`, `data_fingerprint`, `class_names`, `category_ids`.
        normalization: see `TrainState`; the backbone's by default.
    """
    optimizer = build_optimizer(
        model,
        settings.lr,
        settings.lr_backbone,
        settings.weight_decay,
        settings.lr_backbone_names,
        settings.lr_linear_proj_names,
        settings.lr_linear_proj_mult,
        settings.sgd,
    )
    if settings.max_iters:
        scheduler = build_scheduler(optimizer, settings.lr_drop_iters)
    else:
        scheduler = build_scheduler(optimizer, settings.lr_drop, settings.lr_drop_epochs)

    amp = AMP_DTYPES[settings.amp]
    run = Run(
        model=_wrap_ddp(model, device),
        criterion=criterion,
        optimizer=optimizer,
        scheduler=scheduler,
        loader=loader,
        device=device,
        normalization=normalization or model.normalization,
        epochs=settings.epochs,
        clip_max_norm=settings.clip_max_norm,
        amp=amp,
        scaler=engine.build_scaler(device, amp),
        accumulate=settings.accumulate,
        average=WeightAverage(model, settings.ema) if settings.ema else None,
        max_iters=settings.max_iters,
        epoch=settings.start_epoch,
        folder=folder,
        save_every=settings.save_every,
        schedule=SaveSchedule(
            settings.save_every_steps or 0, 60 * (settings.save_every_minutes or 0.0)
        ),
        keep_last=settings.keep_last,
        stop_signal=StopSignal(settings.stop_after_minutes),
        guard=NonFiniteGuard(
            [model, *model.frozen_parts().values()], device, settings.max_nonfinite
        ),
        log_every=settings.log_every or 0,
        checkpoint_extras=checkpoint_extras or {},
        compilation=compile_detector(model, settings.compile),
        use_tensorboard=settings.tensorboard,
        use_wandb=settings.wandb,
        profile_steps=settings.profile or 0,
    )
    _update_num_epochs(run)
    return run


def _wrap_ddp(model: TrainableModel, device: torch.device) -> nn.Module:
    """Wrap the model in DistributedDataParallel if there are several processes."""
    if get_world_size() == 1:
        return model

    # DDP broadcasts the parameters of rank 0, but frozen parts (target encoders) are outside of the model's state.
    for part in model.frozen_parts().values():
        broadcast_tensors(part.state_dict().values())
    device_ids = [device] if device.type == "cuda" else None
    # Constants, such as frozen norms, need not be sent in each forward pass: all ranks have the same.
    has_live_norm = any(isinstance(module, BATCH_NORMS) for module in model.modules())
    sync_buffers: dict[str, Any] = {SYNC_BUFFERS: has_live_norm}
    with collective("the comparison of the models by DistributedDataParallel"):
        return DistributedDataParallel(
            model,
            device_ids=device_ids,
            gradient_as_bucket_view=True,
            **sync_buffers,
        )


def _update_num_epochs(run: Run) -> None:
    """With `max_iters`, set `run.epochs` to the epochs that these steps take; the last one may be incomplete."""
    if run.max_iters:
        steps = max(run.max_iters - run.scheduler.last_epoch, 0)
        is_in_epoch = steps > 0 or run.batch > 0
        run.set_position()
        left = math.ceil(
            (run.sampler.batches_after_earlier - run.sampler.start_batch) / run.accumulate
        )
        steps_per_epoch = math.ceil(run.sampler.batches_per_epoch / run.accumulate)
        following = math.ceil(max(steps - left, 0) / steps_per_epoch)
        run.epochs = run.epoch + int(is_in_epoch) + following


# --------------------------------------------------------------------------------------------------------------- train


def fit(run: Run) -> None:
    """Train to the last epoch. Each epoch ends with the scheduler step, a checkpoint, the evaluation and a log line.

    Raises:
        LostProcess: another process died or did not come to a collective; nothing is saved.
        NonFiniteLoss: too many steps in a row had a NaN or infinite loss or gradient; the run is saved.
        StopRequested: a signal asked to stop; the run is saved, also in the middle of an epoch.
    """
    profiler = _start_profiler(run)
    with run.stop_signal, run.writer:
        try:
            _fit(run)
            if profiler is not None:
                profiler.stop()
        except (NonFiniteLoss, StopRequested) as stop:
            saved = "not saved: no --output_dir"
            if run.folder is not None:
                saved = f"saved in {run.folder}; continue with --resume auto"
            raise type(stop)(f"{stop}; {saved}") from None
        except LostProcess as lost:
            raise LostProcess(
                f"{lost}: epoch {run.epoch + 1}, after {run.step} steps; the output of the other process may say why; "
                "continue with --resume auto, or give processes more time with --dist_timeout_minutes"
            ) from lost
        finally:
            _tell_boards(run, lambda board: board.close())
            run.boards = []


def _fit(run: Run) -> None:
    if run.folder is not None:
        run.on_save = lambda: save_step(run)
        run.guard.folder = run.folder / NONFINITE
        run.guard.describe = lambda: _weights(run)
        run.best_ap = compute_on_rank0(lambda: _inspect_folder(run))
        run.on_log_step = lambda epoch, step, values: _log_step(
            run, {"epoch": epoch, "step": step, **values}
        )
        run.boards = _open_boards(run)
    # The run stopped after an epoch was saved but before it was logged: evaluate and log it now.
    if run.pending is not None and not is_logged(run.folder, run.epoch - 1):
        run.numbered = _find_numbered(run)
        _finish_epoch(run)
    if run.epoch >= run.epochs:
        log.warning(
            "nothing to train: the checkpoint has finished epoch %d and --epochs is %d; give a larger --epochs to "
            "train longer",
            run.epoch,
            run.epochs,
        )
    while run.epoch < run.epochs:
        _train_and_save(run)
        _finish_epoch(run)


def _start_profiler(run: Run) -> StepProfiler | None:
    if run.folder is None or not run.profile_steps or not is_main_process():
        return None
    profiler = StepProfiler(run.folder, run.profile_steps, run.device)
    run.on_step = profiler.step
    return profiler


def _open_boards(run: Run) -> list[Board]:
    """Return writers with everything that is logged so far. The logs end where training continues."""
    if run.folder is None or not is_main_process():
        return []
    boards: list[Board] = []
    steps_per_epoch = run.sampler.batches_per_epoch
    if run.use_tensorboard:
        boards.append(TensorBoard(run.folder, steps_per_epoch))
    if run.use_wandb:
        config = run.checkpoint_extras.get("args", {})
        boards.append(WeightsAndBiases(run.folder, steps_per_epoch, config))
    for board in boards:
        board.add_logs(run.folder, run.epoch)
    return boards


def _log_step(run: Run, record: dict[str, Any]) -> None:
    with training_continues():
        append_step(run.folder, record)
    _tell_boards(run, lambda board: board.add_step(record))


def _tell_boards(run: Run, tell: Callable[[Board], None]) -> None:
    """Call a function with each board. Training continues without one that can't be written any more."""
    for board in list(run.boards):
        try:
            with disk_errors("write", run.folder or "the board"):
                tell(board)
        except UserError as error:
            log.error("training continues without %s: %s", type(board).__name__, error)
            run.boards.remove(board)


def _inspect_folder(run: Run) -> float:
    """Warn if the folder has later epochs than this run, remove later steps from the step log, and return the best AP
    of its checkpoints.
    """
    assert run.folder is not None
    if run.epoch < run.epochs:
        warn_if_going_back(run.folder, run.epoch)
    trim_step_log(run.folder, run.epoch, run.batch)
    remove_unfinished(run.folder)
    latest = run.folder / LATEST
    run.latest_is_later = latest.exists() and step_of(latest) > run.step
    data = run.checkpoint_extras.get("data_fingerprint")
    return find_best_ap(run.folder, run.best_ap, data, "val" in run.changed_data)


def _train_and_save(run: Run) -> None:
    """Train one epoch, or the rest of one, and save it. When training stops early, save in the middle of the epoch."""
    lr = run.optimizer.param_groups[0]["lr"]
    run.pending = None  # the epoch before is logged
    try:
        engine.train_one_epoch(run)
    except (NonFiniteLoss, StopRequested):
        save(run, [LATEST])
        raise

    if not run.max_iters:
        run.scheduler.step()
    lr_dropped = run.optimizer.param_groups[0]["lr"] != lr
    run.pending = {f"train_{name}": value for name, value in run.averages.means().items()}
    run.epoch += 1
    _start_epoch(run)

    # As published, a numbered checkpoint before each drop of the learning rate. Saved before the evaluation, which may
    # be long and may be killed.
    is_numbered = lr_dropped or run.epoch % run.save_every == 0
    run.numbered = _numbered_name(run.epoch - 1) if is_numbered else None
    save(run, [*_names_of_epoch(run), LATEST])


def _numbered_name(epoch: int) -> str:
    return f"checkpoint{epoch:04d}.pth"


def _names_of_epoch(run: Run) -> list[str]:
    return [run.numbered] if run.numbered else []


def _find_numbered(run: Run) -> str | None:
    """Return the name of the numbered checkpoint that an earlier start has saved for the epoch before, if any."""
    name = _numbered_name(run.epoch - 1)
    return name if run.folder is not None and (run.folder / name).exists() else None


def _start_epoch(run: Run) -> None:
    run.batch, run.earlier, run.averages = 0, [], Averages()


def _finish_epoch(run: Run) -> None:
    """Evaluate the epoch that was trained last, write its log line and update the run's page."""
    record = dict(run.pending or {})
    is_last = run.epoch == run.epochs
    evaluate = run.evaluate if is_last or run.epoch % run.eval_every == 0 else None
    if evaluate is not None:
        # The epoch is saved already, so a signal may end the evaluation at once.
        averaged = run.average.applied() if run.average else nullcontext()
        # A killed run repeats the evaluation or does not: training must not depend on it.
        with run.stop_signal.immediately(), averaged, unchanged_rng_states():
            values = evaluate(run.model, run.epoch - 1)
        record.update(values)
        _save_if_best(run, values)

    num_trainable = sum(p.numel() for p in run.model.parameters() if p.requires_grad)
    record["epoch"] = run.epoch - 1
    record["n_parameters"] = num_trainable
    record["train_seconds"] = round(run.seconds, 1)
    append_log(run.folder, record)
    _tell_boards(run, lambda board: board.add_epoch(record))
    if run.compilation is not None:
        run.compilation.log_counts()
    if run.folder is not None and is_main_process():
        _call_on_epoch_end(run, needed=is_last or evaluate is not None)


def _call_on_epoch_end(run: Run, needed: bool) -> None:
    """Call it if `needed`, or if that takes little time: the page of an epoch of seconds would take as long as it."""
    started_at = time.monotonic()
    if run.on_epoch_end is None:
        return
    if not needed and started_at - run.called_at <= 10 * run.call_seconds:
        return
    with unchanged_rng_states(), training_continues():
        run.on_epoch_end()
    run.called_at = time.monotonic()
    run.call_seconds = run.called_at - started_at


def _save_if_best(run: Run, values: Mapping[str, Any]) -> None:
    ap = main_metric(values)
    if ap > run.best_ap:
        run.best_ap = ap
        # The numbered one was saved before its epoch's AP was known. The best one says that all are written.
        save(run, [*_names_of_epoch(run), LATEST, BEST])


# ------------------------------------------------------------------------------------------------------------- dry run


def dry_run(run: Run) -> None:
    """Run a few training steps on real batches and log losses, time per epoch and peak memory. Nothing is saved."""
    run.model.train()
    run.criterion.train()
    run.guard.limit = 1
    transfer = Transfer(run.device, run.normalization)
    seconds = []
    batches = itertools.islice(iter(run.loader), DRY_RUN_STEPS)
    num_steps = min(DRY_RUN_STEPS, len(run.sampler))
    for step, (samples, packed) in enumerate(batches, start=1):
        start = time.monotonic()
        samples, targets = transfer(samples, packed)
        values, _ = engine.train_step(run, samples, targets, stop=False)
        run.guard.check_limit()
        seconds.append(time.monotonic() - start)
        log.info(
            "dry run: step %d of %d on a batch of %s: loss %.3f, %.2f s",
            step,
            num_steps,
            list(samples.tensors.shape),
            values["loss"],
            seconds[-1],
        )

    steps_per_epoch = len(run.sampler)
    epoch_seconds = min(seconds) * steps_per_epoch
    log.info(
        "dry run: %d steps per epoch, about %s per epoch and %s for %d epochs (without data loading and evaluation)",
        steps_per_epoch,
        format_seconds(epoch_seconds),
        format_seconds(epoch_seconds * run.epochs),
        run.epochs,
    )
    if run.device.type == "cuda":
        memory, kind = torch.cuda.max_memory_allocated(run.device), "GPU"
    else:
        memory, kind = peak_host_memory(), "host"
    log.info("dry run: peak memory %.1f GiB (%s); nothing was saved", memory / 2**30, kind)


# ----------------------------------------------------------------------------------------------------- save and resume


def save(run: Run, names: list[str]) -> None:
    """Write the checkpoint once under the first name and link the others to it, one after the other.

    A run that is killed in between continues from the epoch before if LATEST is missing, and repeats the evaluation if
    BEST is, which comes after it: then all of them are written again.

    Collective: all ranks must call it, rank 0 writes.
    """
    run.writer.wait()
    state = checkpoint_state(run)
    if run.folder is not None and is_main_process():
        _replace_later(run.folder, *_position(run))
        first, *others = (run.folder / name for name in names)
        save_checkpoint(state, first)
        for path in others:
            link_or_copy(first, path)
        run.latest_is_later = False
    run.schedule.saved_at = time.monotonic()
    barrier()


def save_step(run: Run) -> None:
    """Save within an epoch, in the background: training waits for the copy to the host, and for the write before.

    Collective. An error of the write is logged later, see `BackgroundWriter`.
    """
    state = checkpoint_state(run)
    run.schedule.saved_at = time.monotonic()
    if run.folder is None or not is_main_process():
        return
    run.writer.wait()
    entries = copy_to_host(state.to_dict())
    folder, keep_last, (epoch, step) = run.folder, run.keep_last, _position(run)

    def write() -> None:
        _replace_later(folder, epoch, step)
        if run.latest_is_later:  # `--resume auto` would return to it
            save_checkpoint(entries, folder / LATEST)
            run.latest_is_later = False
        write_step_checkpoint(folder, step, entries, keep_last)

    run.writer.start(write)


def _position(run: Run) -> tuple[int, int]:
    """Return the first epoch without a log line yet, and the number of optimizer steps done."""
    # The epoch that awaits its evaluation, or the next one.
    return run.epoch - (run.pending is not None), run.step


def _replace_later(folder: Path, epoch: int, step: int) -> None:
    """Before the first checkpoint after going back: put away what the folder has of later epochs and steps."""
    keep_replaced_log(folder, epoch)
    remove_later_steps(folder, step)


def _weights(run: Run) -> Checkpoint:
    """Return the weights that training continues with, and what they mean, without the training state."""
    model = unwrap_model(run.model)
    frozen = {name: part.state_dict() for name, part in model.frozen_parts().items()}
    return Checkpoint(
        model=model.state_dict(),
        frozen=frozen or None,
        normalization=dict(run.normalization),
        version=VERSION,
        **run.checkpoint_extras,
    )


def checkpoint_state(run: Run) -> Checkpoint:
    """Return everything that an exact resume needs. Collective: it gathers the random states of all ranks."""
    weights = _weights(run)
    return replace(
        weights,
        model=run.average.state if run.average else weights.model,
        raw_model=weights.model if run.average else None,
        optimizer=run.optimizer.state_dict(),
        lr_scheduler=run.scheduler.state_dict(),
        scaler=run.scaler.state_dict() if run.scaler else None,
        epoch=run.epoch - 1,  # the last finished one, as in published checkpoints
        batch=run.batch,
        step=run.step,
        averages=run.averages.state(),
        pending=run.pending,
        best=run.best_ap,
        seconds=run.seconds,
        world_size=get_world_size(),
        position_unit=position_unit(run),
        earlier=[list(segment) for segment in run.earlier] or None,
        random_states=all_gather_object(get_rng_states()),
    )


def resume_run(run: Run, checkpoint: Checkpoint) -> None:
    """Restore optimizer, schedule, progress and random states, and log which data changed since the checkpoint.

    A checkpoint whose training state is missing or can't be used starts at `--start_epoch` with a new optimizer.

    Raises:
        UserError: the checkpoint's schedule counts steps and this run's counts epochs, or the other way round; or its
            training state is damaged.
    """
    try:
        _resume_run(run, checkpoint)
    except torch.OutOfMemoryError:
        raise
    except (
        AttributeError,
        LookupError,
        OverflowError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        # A file may have anything in their place.
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
        raise UserError(
            f"{checkpoint.source}: its training state is damaged ({reason}); choose another file, or start from its "
            "weights with --pretrain"
        ) from error


def _resume_run(run: Run, checkpoint: Checkpoint) -> None:
    if checkpoint.raw_model is not None:
        # The model was loaded, and `run.average` copied, with the averages under `model`.
        unwrap_model(run.model).load_state_dict(checkpoint.raw_model)
    run.changed_data = changed_data(checkpoint, run.checkpoint_extras.get("data_fingerprint"))
    missing = checkpoint.missing_state()
    if missing:
        log.info(
            "the checkpoint has weights only (%s): training starts from epoch %d with a new optimizer",
            missing,
            run.epoch + 1,
        )
        return
    if bool(run.max_iters) != bool(checkpoint.args.get("max_iters")):
        unit = "epochs (--epochs)" if run.max_iters else "steps (--max_iters)"
        raise UserError(
            f"--max_iters: the learning rate schedule of this checkpoint counts {unit}; resume it with the same kind "
            "of schedule"
        )

    restore_optimizer(run.optimizer, run.scheduler, checkpoint, unwrap_model(run.model))
    if run.scaler and checkpoint.scaler:
        run.scaler.load_state_dict(checkpoint.scaler)
    _restore_progress(run, checkpoint)
    _update_num_epochs(run)
    if run.epoch < run.epochs:
        position = f", batch {run.batch}" if run.batch else ""
        log.info("continuing at epoch %d of %d%s", run.epoch + 1, run.epochs, position)
    else:
        log.info("training is complete: epoch %d of %d", run.epoch, run.epochs)


def _restore_progress(run: Run, checkpoint: Checkpoint) -> None:
    """Counterpart of `checkpoint_state`, except for model and optimizer."""
    assert checkpoint.epoch is not None  # true for every checkpoint that can be resumed
    run.epoch = checkpoint.epoch + 1
    run.batch = checkpoint.batch or 0
    run.step = _step_of(run, checkpoint)
    run.averages = Averages(checkpoint.averages)
    run.pending = checkpoint.pending
    run.best_ap = NO_AP if checkpoint.best is None else checkpoint.best
    run.seconds = checkpoint.seconds or 0.0

    states = checkpoint.random_states or []
    if len(states) == get_world_size():
        set_rng_states(states[get_rank()])
    elif states:
        log.info(
            "the checkpoint was saved by %d processes and this run has %d: random states start from --seed",
            len(states),
            get_world_size(),
        )

    if run.batch:
        _restore_position(run, checkpoint)


def _restore_position(run: Run, checkpoint: Checkpoint) -> None:
    """Continue within the epoch of the checkpoint, also with another batch size or number of processes.

    With other images, or in another order, the epoch starts over: a batch number then means other ones.
    """
    num_images, size = position_unit(run)
    stored_images, stored_size = checkpoint.position_unit or (0, 0)
    changed = _changed_order(run, checkpoint)
    if "train" in run.changed_data or num_images != stored_images:
        changed = "the training data"
    if changed:
        log.info("%s changed: the epoch starts over", changed)
        _start_epoch(run)
        return

    run.earlier = [(images, batches) for images, batches in checkpoint.earlier or []]
    if size != stored_size:
        own = run.batch - run.earlier_batches
        run.earlier += [(stored_size, own)] if own else []
        log.info(
            "%d images per step instead of %d: the epoch continues with the images that are left",
            size * run.accumulate,
            stored_size * checkpoint.args.get("accumulate", 1),
        )


def _changed_order(run: Run, checkpoint: Checkpoint) -> str:
    """Return the flags that change the order of images within an epoch and differ from those of the checkpoint."""
    now = run.checkpoint_extras.get("args", {})
    flags = ORDER_FLAGS + (SIZE_FLAGS if now.get("bucket_aspect") else ())
    stored = checkpoint.args
    return ", ".join(
        f"--{name}" for name in flags if name in now and stored.get(name, now[name]) != now[name]
    )


def _step_of(run: Run, checkpoint: Checkpoint) -> int:
    """Return the optimizer steps of a checkpoint; those of earlier versions and other codebases do not store them."""
    if checkpoint.step is not None:
        return checkpoint.step
    steps_per_epoch = math.ceil(run.sampler.batches_per_epoch / run.accumulate)
    return run.epoch * steps_per_epoch + run.batch // run.accumulate


def position_unit(run: Run) -> list[int]:
    """Return what a batch number depends on: [images of the dataset, images of a global batch]."""
    return [len(cast(Sized, run.loader.dataset)), run.sampler.batch_size * get_world_size()]
