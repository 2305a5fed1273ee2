"""Pictures of a pretext: what it sees of images, and what a pre-trained model makes of them.

    python tools/visualize_pretext.py --pretext region_prior --imagenet_path PHOTOGRAPHS --output_dir pictures
    python tools/visualize_pretext.py --checkpoint outputs/pretrain/checkpoint.pth --imagenet_path PHOTOGRAPHS
    --output_dir pictures
    python tools/visualize_pretext.py --checkpoint CHECKPOINT --imagenet_path cat.jpg --boxes 10 20 200 180 --output_dir
    pictures

`samples.png`: training samples as the model gets them. With a checkpoint also `patches.png`, where each query patch was
found (UP-DETR) or each region of one view in the other (Siamese DETR), or `objects.png`, proposals and the model's most
object-like boxes beside them (DETReg), and the true boxes where `--truth_path` gives labels.
It takes all flags of main.py; those of a checkpoint's run are known from it.
"""

import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # `python tools/NAME.py` works from any directory

from datasets import build_dataset
from datasets.collate import collate, to_device
from datasets.labelled.coco import coco_root
from datasets.proposals import Selected, build_proposals
from datasets.sample import SampleDataset
from datasets.sample_page import SHOWN, draw_found_patches, draw_samples
from evaluation import BoxFinder
from models import build_model
from tools.evaluate_proposals import load_detector
from tools.evaluate_proposals import parse as parse_evaluation
from util.box_ops import box_cxcywh_to_xyxy
from util.checkpoints.checkpoint import load_exactly
from util.distributed import is_main_process
from util.errors import UserError
from util.files import make_folder
from util.logger import log
from util.plots.pages import panel_page
from util.random_state import SampleRandom
from util.runs.session import prepare_checkpoint, run_script, start_session
from util.settings.arguments import Parser, make_parser
from util.settings.flags import PRETRAIN, positive

PICTURES = ("samples.png", "patches.png", "objects.png")
FEW = 10  # boxes that are drawn where nothing says how many objects there are


def parse(argv: list[str]) -> Namespace:
    parser = Parser("tools/visualize_pretext.py", parents=[make_parser(PRETRAIN)], description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", metavar="PATH|URL", help="of pre-training; without one only samples are drawn")
    parser.add_argument(
        "--truth_path", metavar="DIR", help="COCO folder: its validation images with their objects, for objects.png"
    )
    parser.add_argument("--count", type=positive(), default=SHOWN, help=f"images ({SHOWN})")
    parser.add_argument(
        "--boxes", type=float, nargs="+", metavar="PIXEL", help="x0 y0 x1 y1 of patches, chosen by hand for one image"
    )
    return parser.parse_args(argv)


class ChosenBoxes:
    """The same boxes for every image, as a proposal method."""

    def __init__(self, boxes_xyxy_abs: list[float]) -> None:
        self.boxes = torch.tensor(boxes_xyxy_abs).view(-1, 4)

    def __call__(self, image: Tensor, rng: SampleRandom, name: str = "") -> Tensor:
        """Raises UserError for a box that does not lie in the image."""
        height, width = image.shape[-2:]
        inside = (self.boxes[:, :2] >= 0).all(1) & (self.boxes[:, 2:] <= torch.tensor([width, height])).all(1)
        if not (inside & (self.boxes[:, 2:] - self.boxes[:, :2] >= 1).all(1)).all():
            raise UserError(
                f"--boxes: each box needs x0 < x1 <= {width} and y0 < y1 <= {height}, the size of {name}, in pixels"
            )
        return self.boxes


def prepare(args: Namespace) -> tuple[SampleDataset, Path]:
    """The pretext's images, without augmentation where boxes are chosen by hand, and the folder for the pictures."""
    if not args.output_dir:
        raise UserError("give --output_dir DIR for the pictures")
    if args.boxes and len(args.boxes) % 4:
        raise UserError(f"--boxes has {len(args.boxes)} numbers: each box is x0 y0 x1 y1")
    dataset = build_dataset("val" if args.boxes else "train", args)
    if args.boxes:
        if not hasattr(dataset, "proposals"):
            raise UserError(f"--boxes: --pretext {args.pretext} takes no boxes from outside")
        dataset.proposals = ChosenBoxes(args.boxes)
        dataset[0]  # says what is wrong with the boxes
    return dataset, make_folder(args.output_dir, PICTURES, args.overwrite)


def object_rows(args: Namespace) -> list[list[tuple]]:
    """DETReg's panels for `args.count` images: proposals, the model's boxes that look most like objects, the true boxes
    if known.

    As many boxes are drawn as the image has objects.
    """
    flags = ["--checkpoint", args.checkpoint, "--device", args.device, "--num_workers", "0"]
    model, label, settings, device = load_detector(parse_evaluation(flags))
    finder = BoxFinder(model, label, device, settings.amp == "bf16")
    labelled = bool(args.truth_path)
    source = (
        Namespace(
            **{
                **vars(args),
                "pretext": None,
                "dataset_file": "coco",
                "classes": None,
                "num_classes": None,
                "max_size": None,
                "image_size": settings.image_size,
                "eval": True,
                "coco_path": args.truth_path,
            }
        )
        if labelled
        else args
    )
    dataset = build_dataset("val", source)
    proposals = Selected(build_proposals(Namespace(**{**vars(args), "cache_path": ""})), args.strategy, args.max_prop)
    backbone = finder.model.backbone[0]
    rows = []
    for index in range(min(args.count, len(dataset))):
        image, target = dataset[index]
        inputs, targets = to_device(*collate([(image, target)]), finder.device, backbone.mean, backbone.std)
        size = torch.tensor([image.shape[1:]])
        (found,) = finder(inputs, size.to(finder.device))
        truth = box_cxcywh_to_xyxy(target["boxes"]) * torch.tensor([image.shape[2], image.shape[1]] * 2)
        count = max(len(truth), 1) if labelled else FEW
        pixels = image.permute(1, 2, 0).numpy()
        name = dataset.annotations.file_names[index] if labelled else dataset.images.name(index)
        boxes = proposals(image, SampleRandom.of(args.seed, 0, index), name)[:count]
        row = [
            ("proposals", pixels, _boxes(boxes)),
            ("most object-like", pixels, _boxes(found["boxes"][:count], found["scores"][:count])),
        ]
        rows.append(row + ([("truth", pixels, _boxes(truth))] if labelled else []))
    return rows


def draw_objects(args: Namespace) -> None:
    """objects.png in `args.output_dir` of the checkpoint `args.resume` and COCO's validation images; `args` are those
    of main.py.

    Every process calls it, the first one writes.

    Raises:
        UserError: no folder, no checkpoint, or no such images.
    """
    if not args.output_dir:
        raise UserError("--viz: give --output_dir DIR for the pictures")
    start_session(args)
    prepare_checkpoint(args)
    args.checkpoint, args.truth_path, args.count = args.resume, coco_root(args), SHOWN
    rows = object_rows(args)
    if is_main_process():
        log.info(
            "proposals, the model's boxes and the true ones: %s",
            panel_page(rows, Path(args.output_dir) / "objects.png"),
        )


def _boxes(boxes_xyxy_abs: Tensor, scores: Tensor | None = None) -> dict:
    return {"boxes": np.asarray(boxes_xyxy_abs), "labels": None, "scores": None if scores is None else scores.tolist()}


def main(args: Namespace) -> None:
    args.resume = args.checkpoint or ""
    device = start_session(args)
    checkpoint = prepare_checkpoint(args)
    dataset, folder = prepare(args)
    model, _, _ = build_model(args)
    normalization = {"mean": list(model.detector.backbone[0].mean), "std": list(model.detector.backbone[0].std)}
    draw_samples(folder, dataset, args.batch_size, 0, normalization, args.count)
    if checkpoint:
        load_exactly(model, checkpoint)
        model.load_frozen(checkpoint.get("frozen", {}), checkpoint.source)
        draw_found_patches(folder, model.to(device), dataset, normalization, device, args.count)
        if "max_prop" in vars(args) and not hasattr(model, "patch_boxes"):
            panel_page(object_rows(args), folder / "objects.png")
    log.info("in %s: %s", folder, ", ".join(name for name in PICTURES if (folder / name).exists()))


if __name__ == "__main__":
    run_script(main, parse)
