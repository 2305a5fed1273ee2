"""A training run: made from settings, trained to its end, saved, restored, and tried out by a dry run."""

import itertools
import time
from collections.abc import Callable, Mapping, Sequence, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import engine
from datasets.collate import to_device
from models.criterion import SetCriterion
from models.trainable import TrainableModel
from util.checkpoints.checkpoint import BEST, LATEST, VERSION, Checkpoint, save_checkpoint
from util.distributed import (
    all_gather_object,
    barrier,
    broadcast,
    get_rank,
    get_world_size,
    is_main_process,
    unwrap_model,
)
from util.errors import StopRequested, UserError
from util.files import link_or_copy
from util.logger import format_seconds, log
from util.random_state import random_states, set_random_states
from util.runs.log import append_log, is_logged
from util.runs.meters import Averages, check_gradient, peak_host_memory
from util.runs.optimizer import build_optimizer, build_scheduler, restore_optimizer
from util.settings import Settings

DRY_RUN_STEPS = 3  # the first is slower than the others


@dataclass(kw_only=True)
class Run(engine.TrainState):
    """A training run with the place where it is kept.

    folder: None: nothing is saved. save_every: epochs between numbered checkpoints. checkpoint_extras: what each
    checkpoint holds besides the state and the normalization. evaluate: (model, epoch) -> `test_*`
    values of the log. on_epoch_end: called on rank 0 of a saved run, after the log's line. pending: values of a trained
    epoch whose evaluation is still to come. best: the best AP so far.
    """

    folder: Path | None
    save_every: int
    checkpoint_extras: dict[str, Any]
    evaluate: Callable[[nn.Module, int], dict[str, Any]] | None = None
    eval_every: int = 1
    on_epoch_end: Callable[[], None] | None = None
    pending: dict[str, Any] | None = None
    best: float = -1.0


# -------------------------------------------------------------------------------------------------------------- making


def make_run(
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
    """Optimizer, schedule and distributed wrapper around a model that is on its device already.

    checkpoint_extras: what each checkpoint holds besides the state and the normalization, by the fields of
    `Checkpoint`: `args`, `class_names`, `category_ids`. normalization: by default that of the backbone.
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
    run = Run(
        model=_distributed(model, device),
        criterion=criterion,
        optimizer=optimizer,
        scheduler=scheduler,
        loader=loader,
        device=device,
        normalization=normalization or model.normalization,
        epochs=settings.epochs,
        clip_max_norm=settings.clip_max_norm,
        amp=settings.amp == "bf16",
        max_iters=settings.max_iters,
        epoch=settings.start_epoch,
        folder=folder,
        save_every=settings.save_every,
        checkpoint_extras=checkpoint_extras or {},
    )
    _count_epochs(run)
    return run


def _distributed(model: TrainableModel, device: torch.device) -> nn.Module:
    """The model in DistributedDataParallel where there are several processes."""
    if get_world_size() == 1:
        return model
    broadcast(
        tensor for part in model.frozen_parts().values() for tensor in part.state_dict().values()
    )
    devices = [device] if device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True)


def _count_epochs(run: Run) -> None:
    """With `max_iters`: the epochs that these steps are, the last one perhaps not whole."""
    if run.max_iters:
        left = max(run.max_iters - run.scheduler.last_epoch, 0) + run.batch
        run.epochs = run.epoch + -(-left // run.sampler.batches_per_epoch)


# ------------------------------------------------------------------------------------------------------------ training


def fit(run: Run) -> None:
    """Trains to the last epoch; each ends with the schedule's step, a checkpoint, the evaluation and a line of the log.

    Raises:
        NonFiniteLoss: a loss was NaN or infinite; the last checkpoint is untouched.
        StopRequested: a signal asked to stop; the run was saved, in mid-epoch too.
    """
    saved = (
        f"saved in {run.folder}; continue with --resume auto"
        if run.folder
        else "not saved: no --output_dir"
    )
    with run.stop:
        try:
            if run.pending is not None and not is_logged(run.folder, run.epoch - 1):
                _finish_epoch(run)  # the run was ended between training and evaluation
            if run.epoch >= run.epochs:
                log.warning(
                    "nothing to train: the checkpoint has finished epoch %d, --epochs is %d",
                    run.epoch,
                    run.epochs,
                )
            while run.epoch < run.epochs:
                _train_and_save(run)
                _finish_epoch(run)
        except StopRequested as stop:
            raise StopRequested(f"{stop}; {saved}") from None


def _train_and_save(run: Run) -> None:
    """One epoch, or what is left of it; when asked to stop, saves where it is."""
    lr = run.optimizer.param_groups[0]["lr"]
    try:
        engine.train_one_epoch(run)
    except StopRequested:
        run.pending = None
        save(run, [LATEST])
        raise
    if not run.max_iters:
        run.scheduler.step()
    dropped = run.optimizer.param_groups[0]["lr"] != lr
    run.pending = {f"train_{name}": value for name, value in run.averages.means().items()}
    run.epoch, run.batch, run.averages = run.epoch + 1, 0, Averages()
    numbered = dropped or run.epoch % run.save_every == 0
    save(run, [LATEST, f"checkpoint{run.epoch - 1:04d}.pth"] if numbered else [LATEST])


def _finish_epoch(run: Run) -> None:
    """Evaluation, one line of the log, and the page of the epoch that was trained last. It is saved already."""
    record = dict(run.pending or {})
    if run.evaluate is not None and (run.epoch == run.epochs or run.epoch % run.eval_every == 0):
        with run.stop.at_once():
            values = run.evaluate(run.model, run.epoch - 1)
        record.update(values)
        _keep_best(run, values)
    parameters = sum(p.numel() for p in run.model.parameters() if p.requires_grad)
    record.update(
        {"epoch": run.epoch - 1, "n_parameters": parameters, "train_seconds": round(run.seconds, 1)}
    )
    append_log(run.folder, record)
    if run.on_epoch_end is not None and run.folder is not None and is_main_process():
        run.on_epoch_end()


def _keep_best(run: Run, values: Mapping[str, Any]) -> None:
    score = values.get("test_coco_eval_bbox", [-1.0])[0]
    if score > run.best:
        run.best = score
        save(run, [LATEST, BEST])


def dry_run(run: Run) -> None:
    """Some steps on real batches: shapes, losses, time of an epoch, peak memory. Nothing is saved."""
    run.model.train()
    run.criterion.train()
    steps, seconds = len(run.sampler), []
    for samples, packed in itertools.islice(iter(run.loader), DRY_RUN_STEPS):
        began = time.monotonic()
        samples, targets = to_device(samples, packed, run.device, **run.normalization)
        values, _ = engine.train_step(run, samples, targets, stop=False)
        seconds.append(time.monotonic() - began)
        log.info(
            "step on %s: loss %.3f, %.2f s",
            list(samples.tensors.shape),
            values["loss"],
            seconds[-1],
        )
    epoch = min(seconds) * steps
    if run.device.type == "cuda":
        memory = torch.cuda.max_memory_allocated(run.device)
    else:
        memory = peak_host_memory()
    log.info(
        "dry run: %d steps per epoch, about %s per epoch and %s for %d epochs (without data loading and evaluation)",
        steps,
        format_seconds(epoch),
        format_seconds(epoch * run.epochs),
        run.epochs,
    )
    log.info("dry run: peak memory %.1f GiB; nothing was saved", memory / 2**30)


# ---------------------------------------------------------------------------------------------------- saving, restoring


def save(run: Run, names: list[str]) -> None:
    """Writes the checkpoint once, and links the other names to it. Collective: every process calls it, rank 0 writes.

    Raises:
        NonFiniteLoss: the last step's gradient was not finite; nothing is written.
    """
    check_gradient(run.gradient_norm)
    state = checkpoint_state(run)
    if run.folder is not None and is_main_process():
        first, *others = (run.folder / name for name in names)
        save_checkpoint(state, first)
        for path in others:
            link_or_copy(first, path)
    barrier()


def checkpoint_state(run: Run) -> Checkpoint:
    """Everything that an exact resume needs. `epoch` is the last finished one, as published."""
    model = unwrap_model(run.model)
    return Checkpoint(
        model=model.state_dict(),
        frozen={name: part.state_dict() for name, part in model.frozen_parts().items()} or None,
        optimizer=run.optimizer.state_dict(),
        lr_scheduler=run.scheduler.state_dict(),
        epoch=run.epoch - 1,
        batch=run.batch,
        averages=run.averages.state(),
        pending=run.pending,
        best=run.best,
        seconds=run.seconds,
        world_size=get_world_size(),
        position_unit=position_unit(run),
        random_states=all_gather_object(random_states()),
        normalization=dict(run.normalization),
        version=VERSION,
        **run.checkpoint_extras,
    )


def continue_run(run: Run, checkpoint: Checkpoint) -> None:
    """Restores optimizer, schedule, position and random states. A checkpoint of weights alone starts at
    `--start_epoch`.

    Raises:
        UserError: its schedule counts iterations and this run's epochs, or the other way round.
    """
    if not checkpoint.can_resume:
        log.info("the checkpoint holds weights only: a new optimizer, from epoch %d", run.epoch + 1)
        return
    if bool(run.max_iters) != bool(checkpoint.args.get("max_iters")):
        counted = "epochs" if run.max_iters else "iterations"
        raise UserError(
            f"--max_iters: the schedule of this checkpoint counts {counted}; resume it with the same kind of schedule"
        )
    restore_optimizer(run.optimizer, run.scheduler, checkpoint, unwrap_model(run.model))
    _restore_position(run, checkpoint)
    _count_epochs(run)
    where = f", batch {run.batch}" if run.batch else ""
    log.info("continuing at epoch %d of %d%s", run.epoch + 1, run.epochs, where)


def _restore_position(run: Run, checkpoint: Checkpoint) -> None:
    """Counterpart of `checkpoint_state`, without model and optimizer."""
    assert checkpoint.epoch is not None  # of a checkpoint that can be resumed
    run.epoch, run.batch = checkpoint.epoch + 1, checkpoint.batch or 0
    run.averages, run.pending = Averages(checkpoint.averages), checkpoint.pending
    run.best = -1.0 if checkpoint.best is None else checkpoint.best
    run.seconds = checkpoint.seconds or 0.0
    states = checkpoint.random_states or []
    if len(states) == get_world_size():
        set_random_states(states[get_rank()])
    elif states:
        log.info(
            "the checkpoint is of %d processes, this run has %d: random states start from the seed",
            len(states),
            get_world_size(),
        )
    if run.batch and checkpoint.position_unit != position_unit(run):
        log.info(
            "images, batch size or processes are not those of the checkpoint (%s, now %s): the epoch starts over",
            checkpoint.position_unit,
            position_unit(run),
        )
        run.batch, run.averages = 0, Averages()


def position_unit(run: Run) -> list[int]:
    """What a batch number counts: (images of the dataset, images of a global batch)."""
    return [len(cast(Sized, run.loader.dataset)), run.sampler.batch_size * get_world_size()]
