"""Memory of a training step: estimated before the first one, compared with what is free, and `--batch_size auto`."""

import torch

import engine
from datasets import padding_multiple
from datasets.collate import collate
from datasets.sample import SampleDataset
from datasets.transfer import Transfer
from models.activation_checkpoint import checkpoint_activations
from models.criterion import SetCriterion
from models.trainable import TrainableModel
from util.bf16 import AMP_DTYPES
from util.distributed import all_gather_object, get_world_size
from util.errors import UserError
from util.logger import log
from util.nested_tensor import pad_batch
from util.runs.memory import (
    FILL,
    PEAK,
    MemoryEstimate,
    available_memory,
    counting_outputs,
    counting_saved_bytes,
    nothing_changes,
    parameter_bytes,
)
from util.runs.session import SMALLEST_TRAINABLE
from util.settings import PRETRAIN, Settings


def plan_memory(
    settings: Settings,
    model: TrainableModel,
    criterion: SetCriterion,
    dataset: SampleDataset,
    device: torch.device,
    choose_batch_size: bool = False,
) -> Settings:
    """Turn on `--activation_checkpoint`, and log how much memory a training step needs and how much there is.

    Collective.

    Args:
        choose_batch_size: return settings with the largest batch size that fits on every rank.

    Raises:
        UserError: with `choose_batch_size`, not even the smallest batch fits, or the system does not tell its memory.
    """
    if settings.activation_checkpoint:
        log.info(
            "--activation_checkpoint: %d layers and blocks compute their activations again in the backward pass",
            checkpoint_activations(model.base_detector()),
        )
    estimate = estimate_memory(settings, model, criterion, dataset, device)
    available = available_memory(device)
    if device.type == "cpu" and available is not None:
        available //= get_world_size()  # all processes use the same memory
    if choose_batch_size:
        settings = settings.replace(
            batch_size=_largest_batch_size(estimate, available, dataset, device)
        )

    needed, side = estimate.step(settings.batch_size), largest_side(settings)
    log.info(
        "memory: about %.2f GiB for a step on %d images padded to %d x %d (gradients and optimizer %.2f GiB, "
        "activations %.2f GiB per image)%s",
        needed / 2**30,
        settings.batch_size,
        side,
        side,
        estimate.parameters / 2**30,
        estimate.activations / 2**30,
        "" if available is None else f"; available: {available / 2**30:.1f} GiB",
    )
    if available is not None and needed > available:
        log.warning(
            "a training step may not fit into memory: lower --batch_size (auto: the largest that fits) or "
            "--image_size, or use --activation_checkpoint or --amp bf16"
        )
    return settings


def _largest_batch_size(
    estimate: MemoryEstimate, available: int | None, dataset: SampleDataset, device: torch.device
) -> int:
    if available is None:
        raise UserError(
            "--batch_size auto: this system does not tell its free memory: give a number"
        )
    own = estimate.largest_batch(FILL[device.type] * available)
    fits = min(all_gather_object(own))
    if fits < SMALLEST_TRAINABLE:
        needed = estimate.step(SMALLEST_TRAINABLE) / 2**30
        raise UserError(
            f"--batch_size auto: {SMALLEST_TRAINABLE} images need {needed:.1f} GiB and {available / 2**30:.1f} GiB are "
            "free: lower --image_size, or use --activation_checkpoint or --amp bf16"
        )
    chosen = min(fits, max(len(dataset) // get_world_size(), 1))
    log.info("--batch_size auto: %d", chosen)
    return chosen


def estimate_memory(
    settings: Settings,
    model: TrainableModel,
    criterion: SetCriterion,
    dataset: SampleDataset,
    device: torch.device,
) -> MemoryEstimate:
    """Estimate the memory of a training step from a forward pass on a few samples, padded to the largest size.

    Nothing changes: weights, batch norm statistics, random states and the order of the data stay as they are.
    """
    model.train()
    criterion.train()
    collated = collate([dataset[(0, i % len(dataset))] for i in range(SMALLEST_TRAINABLE)])
    samples, targets = Transfer(device, model.normalization)(*collated)
    side = largest_side(settings)
    samples = pad_batch(samples, side, side)
    backbone = model.base_detector().backbone[0]
    with (
        nothing_changes(model, device),
        counting_saved_bytes(model) as saved,
        counting_outputs(backbone) as outputs,
    ):
        amp = AMP_DTYPES[settings.amp]
        results = engine.forward_losses(model, criterion, samples, targets, amp)
        del results

    optimizer = "sgd" if settings.sgd else "adamw"
    # The gradients of the largest block and of its input are in flight at the same time.
    activations = PEAK * (saved.total + 2 * saved.largest) / SMALLEST_TRAINABLE
    if engine.looks_ahead(device, model):
        # The next batch, and input, output and shortcut of the backbone's largest block.
        activations += (samples.tensors.nbytes + 3 * max(outputs)) / SMALLEST_TRAINABLE
    parameters = parameter_bytes(model, optimizer, averaged=bool(settings.ema))
    return MemoryEstimate(parameters, round(activations))


def largest_side(settings: Settings) -> int:
    """Return the side in pixels that a batch of wide and tall images is padded to in training."""
    side = settings.max_size
    if not side:
        long_side, short_side = (600, 480) if settings.script == PRETRAIN else (1333, 800)
        side = round(long_side * settings.image_size / short_side)
    multiple = padding_multiple(settings)
    return -(-side // multiple) * multiple
