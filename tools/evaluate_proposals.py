"""How well boxes cover the annotated objects, whatever their class: of a pre-trained model, or of a proposal method.

    python tools/evaluate_proposals.py --coco_path COCO --checkpoint outputs/pretrain/checkpoint.pth
    python tools/evaluate_proposals.py --coco_path COCO --proposals selective_search

Prints AP, AP50, AP75 (best 100 boxes of an image) and the average recall of the best 1, 10, 100 and 1000 boxes on the
validation images, as DETReg reports them; `--output_dir` keeps them in `proposal_metrics.json` and the boxes in
`proposals.json`, COCO's results. The metrics named `_swapped` are those of the boxes of another image: what is not
above them has not looked at the image.
"""

import sys
from argparse import Namespace
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

sys.path.insert(
    0, str(Path(__file__).resolve().parent.parent)
)  # `python tools/NAME.py` works from any directory

from datasets import build_dataset, init_worker
from datasets.evaluators.proposals import OBJECT_ID, ProposalEvaluator
from datasets.images.image_folder import read_image
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
    "image_size",
    "max_size",
    "coco_evaluator",
)
RUN_FLAGS = ("device", "batch_size", "num_workers", "amp", "seed")
METHOD_FLAGS = ("proposals", "cache_path", "ss_resize", "edge_model", "max_prop")
MAX_BOXES = 1000  # of an image, the first ones


def parse(argv: list[str]) -> Namespace:
    parser = Parser("tools/evaluate_proposals.py", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--checkpoint",
        metavar="PATH|URL",
        help="of pre-training or of a trained detector; not with --proposals",
    )
    parser.add_argument(
        "--output_dir", metavar="DIR", help="where metrics and boxes are written; empty: nowhere"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace what an earlier evaluation wrote there"
    )
    add_flags(parser, FINETUNE, DATA_FLAGS + RUN_FLAGS)
    add_flags(parser, PRETRAIN, METHOD_FLAGS)
    return parser.parse_args(argv)


def select_flags(args: Namespace, names: tuple[str, ...]) -> dict[str, object]:
    return {name: getattr(args, name) for name in names}


class ProposalDataset(Dataset):
    """(image id, boxes [N, 4]) of each image, as it is on disk; None for one that can't be read."""

    def __init__(self, dataset: SampleDataset, proposals: Proposals, seed: int) -> None:
        self.dataset, self.proposals, self.seed = dataset, proposals, seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[int, Tensor | None]:
        annotations = self.dataset.annotations
        image_id = int(annotations.image_ids[index])
        try:
            image = read_image(self.dataset.path(index))
            return image_id, self.proposals(
                image, SampleRNG.from_key(self.seed, 0, index), annotations.file_names[index]
            )
        except BadImageError as error:
            log.warning("skipped %s: %s", self.dataset.path(index), error)
            return image_id, None


def evaluate_proposal_method(args: Namespace, validation: Settings) -> ProposalEvaluator:
    """Boxes of a method have no comparable scores in general: the order in which it gives them counts."""
    flags = {**select_flags(args, METHOD_FLAGS), "max_prop": args.max_prop or MAX_BOXES}
    method = settings(PRETRAIN, pretext="region_prior", **flags)
    dataset = build_dataset("val", validation, allow_any_num_classes=True)
    evaluator = ProposalEvaluator(dataset.ground_truth, validation.coco_evaluator)
    boxes_of = ProposalDataset(dataset, build_proposals(method), validation.seed)
    loader = DataLoader(
        boxes_of, batch_size=None, num_workers=validation.num_workers, worker_init_fn=init_worker
    )
    bar, count = Progress(len(dataset), "proposals"), 0
    for image_id, boxes in loader:
        if boxes is not None:
            boxes = boxes[: args.max_prop]  # None: all
            count += len(boxes)
            boxes = boxes[:MAX_BOXES]
            scores = torch.linspace(1, 0, len(boxes) + 1)[:-1]
            labels = torch.full((len(boxes),), OBJECT_ID)
            evaluator.update({image_id: {"scores": scores, "labels": labels, "boxes": boxes}})
        bar.step()
    log.info("%.1f boxes per image", count / max(len(dataset), 1))
    return evaluator


def main(args: Namespace) -> dict[str, float]:
    """Returns the metrics by name."""
    if bool(args.checkpoint) == bool(args.proposals):
        both = ", not both" if args.proposals else ""
        raise UserError(
            f"give --checkpoint PATH for a model, or --proposals NAME for a method{both}"
        )
    folder = (
        make_folder(args.output_dir, PROPOSAL_OUTPUTS, args.overwrite) if args.output_dir else None
    )
    session = start_session(select_flags(args, DATA_FLAGS + RUN_FLAGS), FINETUNE)
    validation = session.settings
    if args.checkpoint:
        device = str(session.device)
        predictor = Predictor.from_checkpoint(
            args.checkpoint, device=device, amp=validation.amp, class_agnostic=True
        )
        return evaluate_class_agnostic(predictor, validation, folder)
    evaluator = evaluate_proposal_method(args, validation)
    metrics = evaluator.summarize()
    what = {"proposals": args.proposals, "cache_path": args.cache_path}
    save_proposal_metrics(folder, what, metrics, evaluator)
    return metrics


if __name__ == "__main__":
    run_script(main, parse)
