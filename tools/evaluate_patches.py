"""Evaluate whether a pre-trained model finds query patches (UP-DETR), or regions of one view in the other (Siamese).

    python tools/evaluate_patches.py --checkpoint outputs/updetr/checkpoint.pth --imagenet_path IMAGES

Prints the mean IoU of each patch's most confident box with the place where the patch was cut out, and the fraction of
patches that are found at an IoU of at least 0.5. `_swapped`: the same patches, searched in another image. What is not
above it is a prior over box positions: the model does not look at the image.

It takes all flags of main.py. Pretext, architecture and the flags of its run come from the checkpoint. Colors are not
augmented; Siamese views are drawn at random by `--seed`. `--output_dir` saves the metrics as `patch_metrics.json`.
"""

import sys
from argparse import Namespace
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import box_iou

# So that `python tools/NAME.py` works from any directory.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from datasets import build_dataset
from datasets.sample import BadImageError, SampleDataset
from models.trainable import TrainableModel
from tools.visualize_pretext import load_pretext
from util.errors import UserError
from util.files import make_folder, to_json, write_text
from util.logger import Progress, log
from util.runs.session import run_script, start_session
from util.settings import PRETRAIN, Parser, make_parser
from util.settings.value_types import positive
from visualization import evenly_spaced, predict_patches

METRICS = "patch_metrics.json"
FOUND_IOU = 0.5
Sample = tuple[Tensor, dict]


def parse(argv: list[str]) -> Namespace:
    parser = Parser(
        "tools/evaluate_patches.py",
        parents=[make_parser(PRETRAIN)],
        description=__doc__.splitlines()[0],
    )
    parser.add_argument(
        "--checkpoint", required=True, metavar="PATH|URL", help="pre-trained model (required)"
    )
    parser.add_argument(
        "--count",
        type=positive(),
        default=200,
        metavar="N",
        help="number of images, evenly spaced in the folder (default: 200)",
    )
    return parser.parse_args(argv)


@dataclass
class PatchIoU:
    """IoU of predicted and ground-truth boxes of patches, over images."""

    values: list[Tensor] = field(default_factory=list)

    def update(self, predicted_xyxy_abs: Tensor, boxes_xyxy_abs: Tensor) -> None:
        """Add the patches of an image: [M, 4] each, row i of both is patch i."""
        self.values.append(box_iou(predicted_xyxy_abs, boxes_xyxy_abs).diagonal())

    def summarize(self, suffix: str = "") -> dict[str, float]:
        iou = torch.cat(self.values)
        found = (iou >= FOUND_IOU).double().mean()
        return {f"mean_IoU{suffix}": iou.double().mean().item(), f"found{suffix}": found.item()}


def in_image_of(sample: Sample, other: Sample) -> Sample:
    """Return the sample with the pixels of another image; patches, boxes and a second view stay its own."""
    image, target = sample
    pixels, _ = other
    if image.ndim == 3:
        return pixels, target
    # Views of a sample have one size, and those of two samples may differ.
    resized = F.interpolate(pixels[:1].float(), image.shape[-2:], mode="bilinear", antialias=True)
    return torch.cat([resized.round().to(image.dtype), image[1:]]), target


def evaluate(
    model: TrainableModel, dataset: SampleDataset, device: torch.device, count: int
) -> dict[str, float]:
    """Return the metrics by name.

    Raises:
        UserError: fewer than two images can be used.
    """
    model.eval()
    own, swapped, skipped = PatchIoU(), PatchIoU(), 0
    indices = evenly_spaced(len(dataset), count)
    previous: Sample | None = None
    bar = Progress(len(indices), "images")
    for index in indices:
        bar.step()
        try:
            sample = dataset[(0, index)]
        except BadImageError as error:
            log.warning("skipped %s", error)
            skipped += 1
            continue

        if previous is not None:
            for metric, searched in ((own, sample), (swapped, in_image_of(sample, previous))):
                # Of two views the first one's: there the regions of the second one are searched.
                result = predict_patches(model, searched, model.normalization, device)[0]
                # IoU does not change with the width or height of the searched image.
                metric.update(result.predicted_xyxy_abs, result.boxes_xyxy_abs)
        previous = sample

    if not own.values:
        raise UserError(
            f"{len(indices) - skipped} usable images: two are needed; choose others by --imagenet_path"
        )
    return {
        **own.summarize(),
        **swapped.summarize("_swapped"),
        "patches": len(torch.cat(own.values)),
    }


def main(args: Namespace) -> dict[str, float]:
    """Return the metrics by name."""
    session = start_session({**vars(args), "resume": args.checkpoint})
    settings = session.settings
    model = load_pretext(settings, session.checkpoint).to(session.device)
    if not hasattr(model, "patch_boxes"):
        raise UserError(
            f"--checkpoint {args.checkpoint}: {settings.pretext} searches no patches; "
            "tools/evaluate_proposals.py evaluates its boxes"
        )
    folder = None
    if settings.output_dir:
        folder = make_folder(settings.output_dir, (METRICS,), settings.overwrite)

    metrics = evaluate(model, build_dataset("val", settings), session.device, args.count)
    text = "  ".join(f"{name} {value:.3f}" for name, value in metrics.items() if name != "patches")
    log.info("%d patches: %s", metrics["patches"], text)
    if folder:
        content = {"checkpoint": args.checkpoint, "count": args.count, **metrics}
        write_text(folder / METRICS, to_json(content))
    return metrics


if __name__ == "__main__":
    run_script(main, parse)
