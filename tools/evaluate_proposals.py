"""Evaluate boxes class-agnostically: those of a pre-trained model, a trained detector or a proposal method.

    python tools/evaluate_proposals.py --coco_path COCO --checkpoint outputs/pretrain/checkpoint.pth
    python tools/evaluate_proposals.py --coco_path COCO --proposals selective_search

Prints AP, AP50 and AP75 (of the best 100 boxes of an image) and average recall (of the best 1, 10, 100 and 1000) on the
validation images, as DETReg reports them. `--output_dir` saves the metrics as `proposal_metrics.json` and the boxes as
`proposals.json`, in COCO's results format.

Metrics with the suffix `_swapped` evaluate each image with the boxes of another one. A method that is not above them
does not look at the image.
"""

import sys
from argparse import Namespace
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

# So that `python tools/NAME.py` works from any directory.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from datasets import build_dataset, init_worker
from datasets.evaluators.proposals import OBJECT_ID, ProposalEvaluator
from datasets.proposals import Proposals, build_proposals
from datasets.sample import BadImageError, SampleDataset
from evaluation import PROPOSAL_OUTPUTS, evaluate_class_agnostic, save_proposal_metrics
from predictor import Predictor
from util.errors import UserError
from util.files import make_folder
from util.logger import Progress, log
from util.random_state import SampleRNG
from util.runs.session import run_script, start_session
from util.settings import FINETUNE, PRETRAIN, Parser, Settings, add_flags, settings

DATA_FLAGS = (
    "coco_path",
    "data_root",
    "dataset_file",
    "voc_path",
    "voc_val",
    "airbus_path",
    "val_images",
    "val_annotations",
    "exif",
    "image_size",
    "max_size",
    "coco_evaluator",
)
RUN_FLAGS = ("device", "batch_size", "num_workers", "amp", "seed")
METHOD_FLAGS = ("proposals", "cache_path", "ss_resize", "ss_rank", "edge_model", "max_prop")
MAX_BOXES = 1000  # per image, for AR1000


def parse(argv: list[str]) -> Namespace:
    parser = Parser("tools/evaluate_proposals.py", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--checkpoint",
        metavar="PATH|URL",
        help="evaluate this pre-trained model or trained detector; not with --proposals (default: none)",
    )
    parser.add_argument(
        "--output_dir",
        metavar="DIR",
        help="folder for proposal_metrics.json and proposals.json (default: metrics are only printed)",
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace an earlier evaluation in --output_dir (default: off)",
    )
    add_flags(parser, FINETUNE, DATA_FLAGS + RUN_FLAGS)
    add_flags(parser, PRETRAIN, METHOD_FLAGS)
    return parser.parse_args(argv)


def select_flags(args: Namespace, names: tuple[str, ...]) -> dict[str, object]:
    return {name: getattr(args, name) for name in names}


class ProposalDataset(Dataset):
    """Yields (image id, boxes [N, 4] of a proposal method) for each image; the boxes are None for an unreadable one.

    Boxes are (x0, y0, x1, y1) in pixels of the image file.
    """

    def __init__(self, dataset: SampleDataset, proposals: Proposals, seed: int) -> None:
        self.dataset, self.proposals, self.seed = dataset, proposals, seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[int, Tensor | None]:
        annotations = self.dataset.annotations
        image_id = int(annotations.image_ids[index])
        try:
            image = self.dataset.read(index)
            # Random boxes depend on (seed, index) only, not on the number of workers.
            rng = SampleRNG.from_key(self.seed, 0, index)
            return image_id, self.proposals(image, rng, annotations.file_names[index])
        except BadImageError as error:
            log.warning("skipped %s: %s", self.dataset.path(index), error)
            return image_id, None


def evaluate_proposal_method(args: Namespace, validation: Settings) -> ProposalEvaluator:
    """Return an evaluator with the boxes of `--proposals` for all validation images."""
    flags = {**select_flags(args, METHOD_FLAGS), "max_prop": args.max_prop or MAX_BOXES}
    method = build_proposals(settings(PRETRAIN, pretext="region_prior", **flags))
    dataset = build_dataset("val", validation, allow_any_num_classes=True)
    evaluator = ProposalEvaluator(dataset.ground_truth, validation.coco_evaluator)
    loader = DataLoader(
        ProposalDataset(dataset, method, validation.seed),
        batch_size=None,
        num_workers=validation.num_workers,
        worker_init_fn=init_worker,
    )

    bar, num_boxes = Progress(len(dataset), "proposals"), 0
    for image_id, boxes in loader:
        if boxes is not None:
            boxes = boxes[: args.max_prop]  # None: all
            num_boxes += len(boxes)
            boxes = boxes[:MAX_BOXES]  # [N, 4]
            # The order of the boxes is their ranking: most methods have no scores that compare across images.
            scores = torch.linspace(1, 0, len(boxes) + 1)[:-1]  # [N]
            labels = torch.full((len(boxes),), OBJECT_ID)  # [N]
            evaluator.update({image_id: {"scores": scores, "labels": labels, "boxes": boxes}})
        bar.step()
    log.info("%.1f boxes per image", num_boxes / max(len(dataset), 1))
    return evaluator


def warn_of_another_size(args: Namespace, predictor: Predictor, validation: Settings) -> None:
    """Warn if the images are larger or smaller than those of the checkpoint's run, and no flag says so.

    The usual size stays the default: how a checkpoint was trained must not change its metrics.
    """
    trained = predictor.settings.image_size
    if trained != validation.image_size and args.image_size is None:
        log.warning(
            "%s was trained at --image_size %d and is evaluated at %d: add --image_size to choose",
            args.checkpoint,
            trained,
            validation.image_size,
        )


def main(args: Namespace) -> dict[str, float]:
    """Return the metrics by name."""
    if bool(args.checkpoint) == bool(args.proposals):
        both = ", not both" if args.proposals else ""
        raise UserError(
            f"give --checkpoint PATH for a model, or --proposals NAME for a proposal method{both}"
        )
    folder = None
    if args.output_dir:
        folder = make_folder(args.output_dir, PROPOSAL_OUTPUTS, args.overwrite)

    session = start_session(select_flags(args, DATA_FLAGS + RUN_FLAGS), FINETUNE)
    validation = session.settings
    if args.checkpoint:
        predictor = Predictor.from_checkpoint(
            args.checkpoint,
            device=str(session.device),
            amp=validation.amp,
            class_agnostic=True,
        )
        warn_of_another_size(args, predictor, validation)
        return evaluate_class_agnostic(predictor, validation, folder)

    evaluator = evaluate_proposal_method(args, validation)
    metrics = evaluator.summarize()
    source = {"proposals": args.proposals, "cache_path": args.cache_path}
    save_proposal_metrics(folder, source, metrics, evaluator)
    return metrics


if __name__ == "__main__":
    run_script(main, parse)
