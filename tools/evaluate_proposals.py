"""How well boxes cover the annotated objects, whatever their class: of a pre-trained model, or of a proposal method.

    python tools/evaluate_proposals.py --coco_path COCO --checkpoint outputs/pretrain/checkpoint.pth
    python tools/evaluate_proposals.py --coco_path COCO --proposals selective_search

Prints AP, AP50, AP75 (best 100 boxes of an image) and the average recall of the best 1, 10, 100 and 1000 boxes on the
validation images, as DETReg reports them; `--output_dir` keeps them in `proposal_metrics.json` and the boxes in
`proposals.json`, COCO's results. The numbers named `_swapped` are those of the boxes of another image: what is not
above them has not looked at the image.
"""

import json
import sys
from argparse import Namespace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # `python tools/NAME.py` works from any directory

from datasets import build_dataset, init_worker
from datasets.evaluators.proposals import OBJECT, ProposalEvaluator
from datasets.images.image_folder import read_image
from datasets.proposals import build_proposals
from datasets.sample import BadImageError, SampleDataset
from evaluation import MOST_BOXES, ClassAgnosticEvaluation, shown_metrics
from models import build_model
from util.checkpoints.checkpoint import Checkpoint, is_pretext, load_exactly, pretext_parts
from util.checkpoints.classes import class_rows, head_kind
from util.distributed import is_main_process
from util.errors import UserError
from util.files import make_folder, write_text
from util.logger import Progress, log
from util.random_state import SampleRandom
from util.runs.session import prepare_checkpoint, run_script, start_session
from util.settings.arguments import Parser, make_parser, resolve
from util.settings.flags import FINETUNE, PRETRAIN
from util.settings.registry import PRETEXTS

DATA_FLAGS = (
    "coco_path",
    "data_root",
    "dataset_file",
    "voc_path",
    "voc_val",
    "airbus_path",
    "val_images",
    "val_annotations",
    "image_size",
    "max_size",
    "coco_evaluator",
)
RUN_FLAGS = ("device", "batch_size", "num_workers", "amp", "seed")
# Those that main.py has too: what it was given says which data a pretext is evaluated on.
SHARED_FLAGS = (
    "coco_path",
    "data_root",
    "dataset_file",
    "voc_path",
    "voc_val",
    "airbus_path",
    "image_size",
    "max_size",
    *RUN_FLAGS,
)
METHOD_FLAGS = ("proposals", "cache_path", "ss_resize", "edge_model", "max_prop")
FILES = ("proposal_metrics.json", "proposals.json")


def parse(argv: list[str]) -> Namespace:
    parser = Parser("tools/evaluate_proposals.py", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--checkpoint", metavar="PATH|URL", help="of pre-training or of a trained detector; not with --proposals"
    )
    parser.add_argument("--output_dir", metavar="DIR", help="where numbers and boxes are written; empty: nowhere")
    parser.add_argument("--overwrite", action="store_true", help="replace what an earlier evaluation wrote there")
    for script, flags in ((FINETUNE, DATA_FLAGS + RUN_FLAGS), (PRETRAIN, METHOD_FLAGS)):
        for action in make_parser(script)._actions:
            if action.dest in flags:
                parser._add_action(action)
    return parser.parse_args(argv)


def load_detector(args: Namespace) -> tuple[nn.Module, int | None, Namespace, torch.device]:
    """The detector inside a checkpoint, its class output that says "object" (None: the best of all classes), the
    settings that its images need, and the device.

    Raises:
        UserError: the file holds no detector.
    """
    settings = _settings(args, "--pretrain", args.checkpoint)
    device = start_session(settings)
    checkpoint = prepare_checkpoint(settings)
    settings.classification = head_kind(checkpoint)
    settings.num_classes = class_rows(checkpoint["model"], settings.classification)
    model, _, _ = build_model(settings)
    load_exactly(model, _without_pretext(checkpoint))
    model.to(device, memory_format=torch.channels_last).eval()
    label = min(OBJECT, settings.num_classes - 1) if is_pretext(checkpoint) else None
    settings.num_classes = None  # from here on of the data, whose classes do not matter
    return model, label, settings, device


def _settings(args: Namespace, *flags: str) -> Namespace:
    """Those of `finetune_main.py`, and of a proposal method."""
    settings = make_parser(FINETUNE).parse_args(flags)
    for name in DATA_FLAGS + RUN_FLAGS + METHOD_FLAGS:
        setattr(settings, name, getattr(args, name))
    return settings


def _without_pretext(checkpoint: Checkpoint) -> Checkpoint:
    kept = Checkpoint(
        checkpoint,
        model={key: value for key, value in checkpoint["model"].items() if not key.startswith(pretext_parts())},
    )
    kept.source = checkpoint.source
    return kept


def evaluate_model(args: Namespace) -> ProposalEvaluator:
    model, label, settings, device = load_detector(args)
    dataset = build_dataset("val", settings)
    evaluator = args.coco_evaluator or "auto"
    return ClassAgnosticEvaluation(settings, dataset, label=label, device=device, evaluator=evaluator).evaluate(model)


def while_training(args: Namespace, device: torch.device) -> ClassAgnosticEvaluation:
    """For `trainer.Run.evaluate`: `test_object_AP` and the other numbers of a pretext's detector, on validation images:
    those of COCO, or of the labelled data set whose images it is pre-trained on.

    args: those of main.py, resolved. Images have the size that evaluation usually has, unless the run has a size of its
    own.

    Raises:
        UserError: no such images.
    """
    settings = _settings(args)
    settings.dataset_file = (
        "coco" if args.dataset_file == "custom" else args.dataset_file
    )  # whose flags main.py does not have all
    if args.image_size == PRETEXTS[args.pretext].defaults["image_size"]:
        settings.image_size = None
    resolve(settings).num_classes = None  # of the data, whose classes do not matter
    dataset = build_dataset("val", settings)
    label = min(OBJECT, args.num_classes - 1)
    return ClassAgnosticEvaluation(settings, dataset, label=label, device=device, evaluator=args.coco_evaluator)


class ProposedBoxes(Dataset):
    """(image id, boxes [N, 4]) of each image, as it is on disk; None for one that can't be read."""

    def __init__(self, dataset: SampleDataset, args: Namespace) -> None:
        self.dataset, self.seed = dataset, args.seed
        self.proposals = build_proposals(args)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[int, Tensor | None]:
        annotations = self.dataset.annotations
        image_id = int(annotations.image_ids[index])
        try:
            image = read_image(self.dataset.path(index))
            return image_id, self.proposals(image, SampleRandom.of(self.seed, 0, index), annotations.file_names[index])
        except BadImageError as error:
            log.warning("%s: %s", self.dataset.path(index), error)
            return image_id, None


def evaluate_method(args: Namespace) -> ProposalEvaluator:
    """Boxes of a method have no comparable scores in general: the order in which it gives them counts."""
    settings = _settings(args)
    start_session(settings)
    settings.max_prop = settings.max_prop or MOST_BOXES
    resolve(settings).num_classes = None  # of the data, whose classes do not matter
    dataset = build_dataset("val", settings)
    evaluator = ProposalEvaluator(dataset.truth(), args.coco_evaluator or "auto")
    settings.pretext = "region_prior"  # which takes `--max_prop` boxes
    boxes_of = ProposedBoxes(dataset, settings)
    loader = DataLoader(boxes_of, batch_size=None, num_workers=settings.num_workers, worker_init_fn=init_worker)
    bar, count = Progress(len(dataset), "proposals"), 0
    for image_id, boxes in loader:
        if boxes is not None:
            boxes = boxes[: args.max_prop]  # None: all
            count += len(boxes)
            boxes = boxes[:MOST_BOXES]
            scores = torch.linspace(1, 0, len(boxes) + 1)[:-1]
            evaluator.update(
                {image_id: {"scores": scores, "labels": torch.full((len(boxes),), OBJECT), "boxes": boxes}}
            )
        bar.step()
    log.info("%.1f boxes an image", count / max(len(dataset), 1))
    return evaluator


def main(args: Namespace) -> dict[str, float]:
    """Returns the numbers by name."""
    if bool(args.checkpoint) == bool(args.proposals):
        raise UserError(
            "give --checkpoint PATH for a model, or --proposals NAME for a method"
            + (", not both" if args.proposals else "")
        )
    folder = make_folder(args.output_dir, FILES, args.overwrite) if args.output_dir else None

    evaluator = (evaluate_model if args.checkpoint else evaluate_method)(args)
    numbers = evaluator.summarize()
    log.info("class-agnostic: %s", shown_metrics(numbers))
    if folder is not None and is_main_process():
        what = (
            {"checkpoint": args.checkpoint}
            if args.checkpoint
            else {"proposals": args.proposals, "cache_path": args.cache_path}
        )
        write_text(folder / FILES[0], json.dumps({**what, **numbers}, indent=1) + "\n")
        write_text(folder / FILES[1], json.dumps(evaluator.results()))
    return numbers


if __name__ == "__main__":
    run_script(main, parse)
