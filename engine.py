"""The one training loop and the one evaluation loop, used by both entry scripts.

Everything comes in as an object: nothing here looks at the name of a detector, a pretext or a data set.
"""

import contextlib
import itertools
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from datasets.collate import to_device
from models.criterion import SetCriterion
from util.checkpoints.checkpoint import random_states, save_checkpoint, set_random_states
from util.distributed import (
    all_gather_object,
    barrier,
    broadcast,
    get_rank,
    get_world_size,
    is_main_process,
    share_statistics,
)
from util.errors import NonFinite, StopRequested, UserError
from util.logger import Progress, format_seconds, log
from util.nested_tensor import NestedTensor
from util.runs.log import append_log, is_logged
from util.runs.meters import (
    PAIRS,
    Averages,
    LossReader,
    check_finite,
    check_gradient,
    peak_host_memory,
    per_pair,
    to_host,
    with_pairs,
)
from util.runs.optimizer import build_optimizer, build_scheduler, restore_optimizer
from util.runs.signals import SignalHandler

CHECKPOINT_VERSION = 1


class ProblemCounter:
    """Bad images that the loader replaced: each is reported once with its path, all are counted."""

    def __init__(self) -> None:
        self.seen: set[str] = set()
        self.count = 0

    def add(self, problems: list[tuple[str, str]]) -> None:
        for path, reason in problems:
            self.count += 1
            if path not in self.seen:
                self.seen.add(path)
                log.warning("left out %s: %s (the next image takes its place)", path, reason)


class StopSignal(SignalHandler):
    """Turns SIGTERM and SIGINT into a flag that is read after each step; a second SIGINT stops at once.

    Inside `with stop.at_once():`, where nothing can be lost, the first signal raises `StopRequested`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.asked = False
        self.waits = True

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        self.waits = False
        try:
            if self.asked:
                raise StopRequested("after training")
            yield
        finally:
            self.waits = True

    def _handle(self, number: int, frame) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True
        if not self.waits:
            raise StopRequested("during evaluation")


@dataclass
class Run:
    """A training run: what is trained, with what, where it is kept, and how far it has come."""

    model: nn.Module
    criterion: SetCriterion
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    loader: torch.utils.data.DataLoader
    device: torch.device
    epochs: int
    clip_max_norm: float
    amp: bool
    folder: Path | None
    save_every: int
    keep: dict  # what else goes into each checkpoint: settings, class names, normalisation
    evaluate: Callable[[nn.Module, int], dict] | None = None  # (model, epoch) -> test_* values of the log
    eval_every: int = 1
    plot: Callable[[], None] | None = None
    epoch: int = 0  # the epoch to train next
    batch: int = 0  # and the first batch of it
    averages: Averages = field(default_factory=Averages)
    problems: ProblemCounter = field(default_factory=ProblemCounter)
    stop: StopSignal = field(default_factory=StopSignal)
    gradient_norm: Tensor | None = None  # of the last step, not read yet
    pending: dict | None = None  # a trained epoch's values that wait for its evaluation
    best: float = -1.0
    seconds: float = 0.0  # of training, over all sessions
    max_iters: int | None = (
        None  # with it the run ends after as many steps, which the rate schedule then counts too, not epochs
    )


def bare(model: nn.Module) -> nn.Module:
    """The model without its distributed wrapper."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def autocast(device: torch.device, enabled: bool) -> torch.autocast:
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled)


def forward_losses(
    run_model: nn.Module, criterion: SetCriterion, samples: NestedTensor, targets: list[dict[str, Tensor]], amp: bool
) -> tuple[dict, dict[str, Tensor], Tensor]:
    """One forward pass: outputs, named losses, weighted total. Pretexts see the targets, detectors do not."""
    with autocast(samples.tensors.device, amp):
        outputs = run_model(samples, targets) if getattr(bare(run_model), "sees_targets", False) else run_model(samples)
    losses = criterion(outputs, targets)
    total = criterion.total(losses)
    return outputs, losses if criterion.reproduce_published else with_pairs(losses, criterion.last_pairs), total


def logged_values(losses: dict[str, float], weights: dict[str, float]) -> dict[str, float]:
    """The published log: each weighted loss by its name, each raw value with `_unscaled`, `loss` the weighted sum."""
    losses = per_pair(losses)
    values = {f"{name}_unscaled": value for name, value in losses.items() if name != PAIRS}
    scaled = {name: losses[name] * weight for name, weight in weights.items() if name in losses}
    kept = {name: losses[name] for name in ("class_error", PAIRS) if name in losses}
    return {**values, **scaled, "loss": sum(scaled.values()), **kept}


def train_step(
    run: Run, samples: NestedTensor, targets: list[dict[str, Tensor]], stop: bool
) -> tuple[dict[str, float], bool]:
    """Forward, backward, clip, step. Returns the values for the log, averaged over processes, and whether any was asked
    to stop.

    Raises:
        NonFiniteLoss: before the optimiser's step, so that weights stay as they are; or the gradient of the step before
            was not finite, which is looked at only now, since the device would have to wait.
    """
    try:
        _, losses, total = forward_losses(run.model, run.criterion, samples, targets, run.amp)
        reader = LossReader(losses, float(stop))
        run.optimizer.zero_grad(set_to_none=True)
        total.backward()
        values = reader.read()
        check_finite(
            values, (int(target["image_id"]) for target in targets)
        )  # ids are read only where something is wrong
    except NonFinite:
        check_gradient(run.gradient_norm)
        raise
    if run.clip_max_norm > 0:
        parameters = [p for group in run.optimizer.param_groups for p in group["params"]]
        run.gradient_norm = torch.nn.utils.clip_grad_norm_(parameters, run.clip_max_norm)
    run.optimizer.step()
    return logged_values(values, run.criterion.weight_dict), reader.flag > 0


def train_one_epoch(run: Run) -> None:
    """Trains from `run.batch` to the end of the epoch; `run.averages` grow with each step.

    Raises:
        StopRequested: after a step, with `run.batch` saying where to go on.
    """
    run.model.train()
    run.criterion.train()
    mean, std = run.keep["normalization"]["mean"], run.keep["normalization"]["std"]
    sampler, after_step = run.loader.batch_sampler, getattr(bare(run.model), "after_step", lambda share: None)
    sampler.set_epoch(run.epoch, run.batch, run.max_iters and run.max_iters - run.scheduler.last_epoch)
    steps = run.batch + len(sampler)
    bar = Progress(steps, f"epoch {run.epoch + 1}/{run.epochs}", start=run.batch)
    began, images, problems_before = time.monotonic(), 0, run.problems.count
    for samples, targets in run.loader:
        run.problems.add(targets.problems)
        images += sampler.batch_size * get_world_size()  # `samples` may hold several views of each
        samples, targets = to_device(samples, targets, run.device, mean, std)
        values, asked = train_step(run, samples, targets, run.stop.asked)
        values["lr"] = run.optimizer.param_groups[0]["lr"]
        after_step(share_done(run))
        if run.max_iters:
            run.scheduler.step()
        run.averages.add(values)
        run.batch += 1
        rate = images / (time.monotonic() - began)
        bar.step(_progress_text(values, rate) if bar.wants_text() else None)
        if asked:
            _stop(run, began, steps)
    if any(all_gather_object(run.stop.asked)):  # the signal came in the last step, after its flag was sent
        _stop(run, began, steps)
    if run.problems.count > problems_before:
        log.warning(
            "%d unreadable or tiny images were replaced in this epoch (%d different ones in this run)",
            run.problems.count - problems_before,
            len(run.problems.seen),
        )
    run.seconds += time.monotonic() - began


def share_done(run: Run) -> float:
    """Of the whole training, before the step that `run.batch` counts; 0 at the start."""
    epochs = run.epoch + run.batch / run.loader.batch_sampler.batches_per_epoch
    return run.scheduler.last_epoch / run.max_iters if run.max_iters else epochs / run.epochs


def _stop(run: Run, began: float, steps: int) -> None:
    """Also after the last batch: the resumed run then finishes the epoch without a step."""
    run.seconds += time.monotonic() - began
    raise StopRequested(f"epoch {run.epoch + 1}, after batch {run.batch} of {steps}")


def _progress_text(values: dict[str, float], rate: float) -> str:
    names = ("loss", "loss_ce", "loss_bbox", "loss_giou", "loss_feature")
    losses = " ".join(f"{name.removeprefix('loss_')} {values[name]:.3f}" for name in names if name in values)
    return f"{losses} {rate:.1f} images/s lr {values['lr']:.1e}"


@torch.no_grad()
def evaluate(
    model: nn.Module,
    criterion: SetCriterion,
    postprocessors: dict,
    loader: torch.utils.data.DataLoader,
    evaluator,
    device: torch.device,
    normalization: dict,
    amp: bool,
    keep_examples: int = 0,
) -> tuple[dict, list[dict]]:
    """Losses and metrics over a data set, each image once over all processes.

    Returns (values without prefix, examples): `coco_eval_bbox` holds the evaluator's numbers, AP first; what else it
    gives is there by its name; examples are the first `keep_examples` images of this process with their predictions and
    targets.
    """
    model = bare(model).eval()
    share_statistics(model)
    criterion.eval()
    averages, examples, bar = Averages(), [], Progress(len(loader), "evaluation")
    problems = ProblemCounter()
    for samples, packed in loader:
        problems.add(packed.problems)
        inputs, targets = to_device(samples, packed, device, normalization["mean"], normalization["std"])
        outputs, losses, _ = forward_losses(model, criterion, inputs, targets, amp)
        averages.add(logged_values(to_host(losses), criterion.weight_dict), len(samples))
        sizes = torch.stack([target["orig_size"] for target in targets])
        results = postprocessors["bbox"](outputs, sizes)
        # One copy a kind for the whole batch, not one an image.
        host = {name: torch.stack([result[name] for result in results]).cpu() for name in results[0]}
        results = [{name: values[i] for name, values in host.items()} for i in range(len(results))]
        evaluator.update(dict(zip(packed.tensors["image_id"].tolist(), results, strict=True)))
        examples += _examples(samples, targets, results, keep_examples - len(examples))
        bar.step()
    if problems.count:
        log.warning("%d images of the evaluation can't be used: their objects count as missed", problems.count)
    values = averages.merged().means()
    evaluator.synchronize_between_processes()
    summary = evaluator.summarize()
    values["coco_eval_bbox"] = summary.pop("stats")
    return {**values, **summary}, examples


def _examples(samples: NestedTensor, targets: list[dict], results: list[dict], count: int) -> list[dict]:
    """Images as the model saw them, uint8 [3, h, w], with boxes in their pixels."""
    kept = []
    for image, target, result in list(zip(samples.tensors, targets, results, strict=True))[: max(count, 0)]:
        (height, width), original = target["size"].tolist(), target["orig_size"].tolist()
        scale = torch.tensor([width / original[1], height / original[0]] * 2)
        kept.append(
            {
                "image": image[:, :height, :width].clone(),
                "image_id": int(target["image_id"]),
                "boxes_cxcywh": target["boxes"].cpu(),
                "labels": target["labels"].cpu(),
                "predictions": {**result, "boxes": result["boxes"] * scale},
            }
        )
    return kept


def checkpoint_state(run: Run) -> dict:
    """Everything that an exact resume needs. `epoch` is the last finished one, as published."""
    frozen = getattr(bare(run.model), "frozen_parts", dict)()
    return {
        "model": bare(run.model).state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "lr_scheduler": run.scheduler.state_dict(),
        "epoch": run.epoch - 1,
        "batch": run.batch,
        "averages": run.averages.state(),
        "pending": run.pending,
        "best": run.best,
        "seconds": run.seconds,
        "world_size": get_world_size(),
        "position_unit": position_unit(run),
        "random_states": all_gather_object(random_states()),
        **run.keep,
        **({"frozen": {name: part.state_dict() for name, part in frozen.items()}} if frozen else {}),
    }


def restore(run: Run, checkpoint: dict) -> None:
    """Counterpart of `checkpoint_state`, but for model and optimiser."""
    run.epoch, run.batch = checkpoint["epoch"] + 1, checkpoint.get("batch", 0)
    run.averages, run.best = Averages(checkpoint.get("averages")), checkpoint.get("best", -1.0)
    run.pending, run.seconds = checkpoint.get("pending"), checkpoint.get("seconds", 0.0)
    states = checkpoint.get("random_states", [])
    if len(states) == get_world_size():
        set_random_states(states[get_rank()])
    elif states:
        log.info(
            "the checkpoint is of %d processes, this run has %d: random states are new", len(states), get_world_size()
        )
    if run.batch and checkpoint.get("position_unit") != position_unit(run):
        log.info(
            "images, batch size or processes are not those of the checkpoint (%s, now %s): its epoch starts anew",
            checkpoint.get("position_unit"),
            position_unit(run),
        )
        run.batch, run.averages = 0, Averages()


def position_unit(run: Run) -> list[int]:
    """What a batch number counts: (images of the data set, images of a global batch)."""
    return [len(run.loader.dataset), run.loader.batch_sampler.batch_size * get_world_size()]


def save(run: Run, names: list[str]) -> None:
    """Collective: every process calls it, the first one writes.

    Raises:
        NonFiniteLoss: the last step's gradient was not finite; nothing is written.
    """
    check_gradient(run.gradient_norm)
    state = checkpoint_state(run)
    if run.folder is not None and is_main_process():
        for name in names:
            save_checkpoint(state, run.folder / name)
    barrier()


def fit(run: Run) -> None:
    """Trains to the last epoch: after each the rate schedule, checkpoint, evaluation, one line of `log.txt` and the
    curves.

    Raises:
        NonFiniteLoss: a loss was NaN or infinite; the last checkpoint is untouched.
        StopRequested: a signal asked to stop; the run was saved, in mid-epoch too.
    """
    saved = (
        f"saved in {run.folder}; go on with --resume auto"
        if run.folder
        else "not saved, since there is no --output_dir"
    )
    with run.stop:
        try:
            if run.pending is not None and not is_logged(run.folder, run.epoch - 1):
                _finish_epoch(run)  # the run was ended between training and evaluation
            if run.epoch >= run.epochs:
                log.warning(
                    "nothing to train: the checkpoint has finished epoch %d, --epochs is %d", run.epoch, run.epochs
                )
            while run.epoch < run.epochs:
                _train_and_save(run)
                _finish_epoch(run)
        except StopRequested as stop:
            raise StopRequested(f"{stop}; {saved}") from None


def _train_and_save(run: Run) -> None:
    """One epoch, or what is left of it; when asked to stop, saves where it is."""
    rate = run.optimizer.param_groups[0]["lr"]
    try:
        train_one_epoch(run)
    except StopRequested:
        run.pending = None
        save(run, ["checkpoint.pth"])
        raise
    if not run.max_iters:
        run.scheduler.step()
    dropped = run.optimizer.param_groups[0]["lr"] != rate
    run.pending = {f"train_{name}": value for name, value in run.averages.means().items()}
    run.epoch, run.batch, run.averages = run.epoch + 1, 0, Averages()
    numbered = dropped or run.epoch % run.save_every == 0
    save(run, ["checkpoint.pth"] + ([f"checkpoint{run.epoch - 1:04d}.pth"] if numbered else []))


def _finish_epoch(run: Run) -> None:
    """Evaluation, one line of the log, and the curves of the epoch that was trained last. It is saved already."""
    record = dict(run.pending)
    if run.evaluate is not None and (run.epoch == run.epochs or run.epoch % run.eval_every == 0):
        with run.stop.at_once():
            values = run.evaluate(run.model, run.epoch - 1)
        record.update(values)
        _keep_best(run, values)
    parameters = sum(p.numel() for p in bare(run.model).parameters() if p.requires_grad)
    record = {**record, "epoch": run.epoch - 1, "n_parameters": parameters, "train_seconds": round(run.seconds, 1)}
    append_log(run.folder, record)
    if run.plot is not None and run.folder is not None and is_main_process():
        run.plot()


def _keep_best(run: Run, values: dict) -> None:
    score = values.get("test_coco_eval_bbox", [-1.0])[0]
    if score > run.best:
        run.best = score
        save(run, ["checkpoint.pth", "checkpoint_best.pth"])


def make_run(
    args,
    model: nn.Module,
    criterion: SetCriterion,
    loader: torch.utils.data.DataLoader,
    device: torch.device,
    folder: Path | None,
    keep: dict,
) -> Run:
    """Optimiser, schedule and distributed wrapper around a model that lies on its device."""
    optimizer = build_optimizer(
        model,
        args.lr,
        args.lr_backbone,
        args.weight_decay,
        args.lr_backbone_names,
        args.lr_linear_proj_names,
        args.lr_linear_proj_mult,
        args.sgd,
    )
    scheduler = (
        build_scheduler(optimizer, args.lr_drop_iters)
        if args.max_iters
        else build_scheduler(optimizer, args.lr_drop, args.lr_drop_epochs)
    )
    if get_world_size() > 1:
        broadcast(
            tensor for part in getattr(model, "frozen_parts", dict)().values() for tensor in part.state_dict().values()
        )
        devices = [device] if device.type == "cuda" else None
        model = DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True)
    run = Run(
        model,
        criterion,
        optimizer,
        scheduler,
        loader,
        device,
        args.epochs,
        args.clip_max_norm,
        args.amp == "bf16",
        folder,
        args.save_every,
        keep,
        epoch=args.start_epoch,
        max_iters=args.max_iters,
    )
    _count_epochs(run)
    return run


def _count_epochs(run: Run) -> None:
    """What a number of steps is in epochs, the last one perhaps not whole."""
    if run.max_iters:
        left = max(run.max_iters - run.scheduler.last_epoch, 0) + run.batch
        run.epochs = run.epoch + -(-left // run.loader.batch_sampler.batches_per_epoch)


def continue_run(run: Run, checkpoint: dict) -> None:
    """Optimiser, schedule, position and random states of a checkpoint; one that holds weights only starts at
    `--start_epoch`.
    """
    if all(name in checkpoint for name in ("optimizer", "lr_scheduler", "epoch")):
        if bool(run.max_iters) != bool(checkpoint.get("args", {}).get("max_iters")):
            raise UserError(
                "--max_iters: the schedule of this checkpoint counts %s; resume it with the same kind of schedule"
                % ("epochs" if run.max_iters else "iterations")
            )
        restore_optimizer(run.optimizer, run.scheduler, checkpoint, bare(run.model))
        restore(run, checkpoint)
        _count_epochs(run)
        where = f", batch {run.batch}" if run.batch else ""
        log.info("continuing at epoch %d of %d%s", run.epoch + 1, run.epochs, where)
    else:
        log.info("the checkpoint holds weights only: a fresh optimiser, from epoch %d", run.epoch + 1)


def dry_run(run: Run) -> None:
    """Three steps on real batches (the first is slower): shapes, losses, time of an epoch, peak memory. Nothing is
    saved.
    """
    run.model.train()
    run.criterion.train()
    mean, std = run.keep["normalization"]["mean"], run.keep["normalization"]["std"]
    steps = len(run.loader.batch_sampler)
    seconds = []
    for samples, packed in itertools.islice(iter(run.loader), 3):
        began = time.monotonic()
        samples, targets = to_device(samples, packed, run.device, mean, std)
        values, _ = train_step(run, samples, targets, stop=False)
        seconds.append(time.monotonic() - began)
        log.info("step on %s: loss %.3f, %.2f s", list(samples.tensors.shape), values["loss"], seconds[-1])
    step = min(seconds)
    if run.device.type == "cuda":
        memory = torch.cuda.max_memory_allocated(run.device) / 2**30
    else:
        memory = peak_host_memory() / 2**30
    log.info(
        "dry run: %d steps an epoch, about %s an epoch and %s for %d epochs (loading and evaluation not counted)",
        steps,
        format_seconds(step * steps),
        format_seconds(step * steps * run.epochs),
        run.epochs,
    )
    log.info("dry run: peak memory %.1f GiB; nothing was saved", memory)
