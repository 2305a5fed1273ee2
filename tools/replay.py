"""Compute the losses of a training step that was skipped because they, or the gradient, were not finite.

    python tools/replay.py outputs/coco/nonfinite/step_000123_rank_0.pth

The file has the weights, the settings and the batches of that step, as the run wrote them. Boxes, losses and gradient
norm are logged: losses as the run had them, and as they are now. `--amp no` shows whether half precision is the cause.
"""

import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch

# So that `python tools/NAME.py` works from any directory.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import engine
from datasets.transfer import Transfer
from models import build_model
from models.criterion import SetCriterion
from models.trainable import TrainableModel
from util.bf16 import AMP_DTYPES
from util.checkpoints.adoption import settings_from_checkpoint
from util.checkpoints.checkpoint import Checkpoint, load_checkpoint
from util.checkpoints.loading import load_strict
from util.distributed import check_device
from util.errors import UserError
from util.logger import log
from util.packed_images import PackedImages
from util.packed_targets import PackedTargets
from util.runs.meters import to_host
from util.runs.nonfinite import ENTRY
from util.runs.session import run_script
from util.settings import FINETUNE, Parser, Settings, flags_of, resolve
from util.settings.resolving import default_device


def parse(argv: list[str]) -> Namespace:
    parser = Parser("tools/replay.py", description=__doc__.splitlines()[0])
    parser.add_argument("file", metavar="FILE", help="a file that a run wrote to nonfinite/")
    parser.add_argument(
        "--device", default=default_device(), help="where to compute (default: %(default)s)"
    )
    parser.add_argument(
        "--amp",
        choices=flags_of(FINETUNE)["amp"].choices,
        help="precision of the network (default: that of the run)",
    )
    return parser.parse_args(argv)


def build(checkpoint: Checkpoint, given: dict[str, Any]) -> tuple[Settings, TrainableModel, Any]:
    """Return settings, model and criterion of the run, in training mode."""
    script = checkpoint.args["script"]
    settings = resolve(given, settings_from_checkpoint(checkpoint, given, script), script)
    model, criterion, _ = build_model(settings, settings.num_classes, checkpoint.things)
    load_strict(model, checkpoint)
    model.load_frozen(checkpoint.frozen or {}, checkpoint.source)
    device = torch.device(settings.device)
    model.to(device).to(memory_format=torch.channels_last).train()
    return settings, model, criterion.to(device).train()


def replay(
    model: TrainableModel, criterion: SetCriterion, batch: dict[str, Any], settings: Settings
) -> tuple[dict[str, float], torch.Tensor]:
    """Return the losses of a batch by name, and the total loss with its graph."""
    device, normalization = torch.device(settings.device), model.normalization
    packed = PackedTargets(batch["targets"], batch["counts"])
    transfer = Transfer(device, normalization)
    samples, targets = transfer(PackedImages(**batch["images"]), packed)
    torch.set_rng_state(batch["random_states"]["cpu"])
    if device.type == "cuda" and "cuda" in batch["random_states"]:
        torch.cuda.set_rng_state(batch["random_states"]["cuda"], device)
    amp = AMP_DTYPES[settings.amp]
    _, losses, total = engine.forward_losses(
        model, criterion, samples, targets, amp, batch["num_targets"]
    )
    return to_host(losses), total


def describe(batch: dict[str, Any], losses: dict[str, float]) -> str:
    """Return the table of a batch: its boxes, and losses then and now."""
    lines = [f"images {batch['image_ids']}"]
    for number, boxes in enumerate(batch["boxes"]):
        lines.append(f"  image {number} of the batch: {boxes['objects']} objects")
        for end in ("min", "max"):
            if end in boxes:
                values = ", ".join(f"{value:.6g}" for value in boxes[end])
                lines.append(f"    {end} of (cx, cy, w, h): {values}")
    lines.append(f"  {'loss':32} {'in the run':>14} {'now':>14}")
    for name, value in losses.items():
        lines.append(f"  {name:32} {batch['losses'].get(name, float('nan')):14.7g} {value:14.7g}")
    return "\n".join(lines)


def main(args: Namespace) -> None:
    check_device(args.device)
    checkpoint = load_checkpoint(args.file)
    record = checkpoint.extra.get(ENTRY)
    if not isinstance(record, dict) or "script" not in checkpoint.args:
        raise UserError(
            f"{args.file} has no batch of a skipped step: give a file that a run wrote to nonfinite/"
        )
    given = {"resume": args.file, "device": args.device, "amp": args.amp}
    given = {name: value for name, value in given.items() if value is not None}
    settings, model, criterion = build(checkpoint, given)
    log.info("%s: step %d, %s", args.file, record["step"], record["reason"])
    for batch in record["batches"]:
        losses, total = replay(model, criterion, batch, settings)
        (total / len(record["batches"])).backward()  # a step averages the batches it accumulates
        log.info("%s", describe(batch, losses))
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    log.info("gradient norm now: %.7g", torch.nn.utils.get_total_norm(gradients))


if __name__ == "__main__":
    run_script(main, parse)
