"""Inference on a batch of uint8 images: normalization, detector and post-processing, as `Predictor` does them.

Contenders of other packages replace the detector alone; normalization and post-processing stay ours. Loading and
resizing images is not in it.
"""

import argparse
import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

import engine
from datasets.collate import collate, normalize
from predictor import Predictor
from tools.benchmarks import roof, step, work
from tools.benchmarks.measure import Comparison, Local
from tools.benchmarks.work import BF16_TOLERANCE, Case
from util.checkpoints.classes import Classes
from util.checkpoints.hub_models import HUB_MODELS
from util.errors import UserError

TOLERANCE = 1e-3
ZOO_SIZE = (800, 1066)  # of a usual COCO image in evaluation


class Inference:
    """A predictor and a batch for it.

    Attributes:
        predictor: with the weights of the case.
        samples: uint8 images.
        sizes: int64 [B, 2], (height, width) of the images.
    """

    def __init__(self, case: Case) -> None:
        model, _, postprocessors, settings = work.build_calibrated(case)
        classes = Classes({}, {}, settings.num_classes, "random weights")
        self.predictor = Predictor(
            model, postprocessors, classes, settings, device=torch.device(case["device"])
        )
        samples = work.load_samples(case).samples
        self.samples, _ = collate(samples)
        self.sizes = torch.stack([target["size"] for _, target in samples])

    def run(self) -> Any:
        return self.predictor.predict_batch(self.samples, self.sizes, self.sizes)

    @torch.no_grad()
    def outputs(self) -> list[Tensor]:
        """Return class logits and boxes of the batch."""
        predictor = self.predictor
        normalized = normalize(self.samples.to(predictor.device), **predictor.model.normalization)
        with engine.autocast(predictor.device, predictor.amp):
            outputs = predictor.model(normalized)
        return [outputs["pred_logits"].float(), outputs["pred_boxes"].float()]

    def with_model(self, model: Any) -> "Inference":
        """Return the same with another detector, a module that takes and returns what ours does."""
        other = copy.copy(self)
        other.predictor = copy.copy(self.predictor)
        model.normalization = self.predictor.model.normalization
        other.predictor.model = model
        return other

    def contender(self) -> Local:
        return Local(self.run, self.outputs, self.predictor.device)


def build(case: Case) -> Local:
    """Return the contender of a case."""
    return Inference(case).contender()


def comparisons(args: argparse.Namespace, bench: Any) -> Iterator[Comparison]:
    """Yield one comparison per model and batch size."""
    default = ZOO_SIZE if "zoo" in args.models else (480, 640)
    for model in expand_models(args.models):
        for batch_size in args.batch_sizes:
            yield compare(model, batch_size, args.size or default, args, bench)


def expand_models(names: list[str]) -> list[str]:
    """Return detectors and names of published models; `zoo`: all published detectors of boxes."""
    zoo = [name for name, hub in HUB_MODELS.items() if not hub.settings["masks"]]
    found: list[str] = []
    for name in names:
        if name == "zoo":
            found += zoo
        elif name in HUB_MODELS:
            found.append(name)
        else:
            found += work.expand_models([name])
    if any("/" in name for name in found):
        raise UserError("--models: a pretext has no inference; give detectors or published models")
    return found


def compare(
    model: str, batch_size: int, size: Sequence[int], args: argparse.Namespace, bench: Any
) -> Comparison:
    from tools.benchmarks import peers

    known = HUB_MODELS[model].settings if model in HUB_MODELS else work.model_flags(model)
    case: Case = {
        "flags": {**known, **args.flags},
        "device": args.device,
        "batch_size": batch_size,
        "size": list(size),
        "padded": args.padded,
    }
    case = work.save_case(case, bench.scratch, work.calibrated_weights(case))
    ours = Inference(case)
    height, width = size
    is_bf16 = case["flags"].get("amp") == "bf16"
    comparison = Comparison(
        f"{model}, {batch_size} x {height} x {width}{', bfloat16' if is_bf16 else ''}",
        {"ours": ours.contender()},
        BF16_TOLERANCE if is_bf16 else TOLERANCE,
        items=batch_size,
    )
    bench.add_variants(comparison, "inference", case, args, BF16_TOLERANCE)
    if args.peers:
        peers.add_inference_peers(comparison, case, ours)

    def finish() -> dict[str, Any]:
        facts: dict[str, Any] = {"model": model}
        if args.roof:
            dtype = torch.bfloat16 if is_bf16 else torch.float32
            facts["roof"] = roof.of_call(ours.run, ours.predictor.device, dtype)
        return facts

    comparison.finish = finish
    return comparison


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--models",
        nargs="+",
        default=["detr"],
        metavar="NAME",
        help="detectors, published models such as detr_resnet50, `finetuning` (all detectors) or `zoo` (all published "
        "models, at 800 x 1066)",
    )
    parser.add_argument(
        "--batch_sizes", nargs="+", type=int, default=[1], metavar="N", help="images per batch"
    )
    step.work_arguments(parser)
    parser.set_defaults(size=None)
