"""Writes the result page of a demo: `python -m tools.demo.page DEMO_DIR`.

One HTML file with its pictures inside (they are also next to it): AP of both runs, their curves, what the patch queries
of the pre-trained detector find, boxes on held-out images, the commands and their time. The last line of output is the
path of the page. page.html.j2 has the markup.
"""

import argparse
import json
from argparse import Namespace
from pathlib import Path

import torch

from datasets import build_dataset
from datasets.labelled.coco import coco_files
from models import build_model
from tools.demo.run import DEMO_FILE, FINETUNE, SCENES, SCRATCH
from tools.demo.run import PRETRAIN as PRETRAIN_STAGE
from util.box_ops import box_iou
from util.checkpoints.loading import load_strict
from util.errors import UserError
from util.files import write_text
from util.logger import format_seconds, log, progress
from util.plots.curves import BBOX_STATS, plot_curves
from util.plots.pages import patch_page
from util.runs.html import render
from util.runs.log import read_log
from util.runs.page import PAGE, Rows, evaluations
from util.runs.session import run_script, start_session
from util.settings import PRETRAIN
from visualization import PatchPredictions, predict_patches

TEMPLATE = Path(__file__).with_name("page.html.j2")
RUNS = {  # folder -> title
    FINETUNE: "pre-trained, then fine-tuned",
    SCRATCH: "without pre-training",
}
NUM_SHOWN_IMAGES = 6
NUM_IOU_IMAGES = 60  # held-out images that the mean IoU of patch queries is over


def predict_patches_in_val(
    checkpoint_path: Path, images: str, limit: int
) -> list[PatchPredictions]:
    """Run a pre-trained model on held-out images, with patches cut from them at random.

    Each patch gets the box of the most confident query of its group, as in UP-DETR's demo.
    """
    flags = {"resume": str(checkpoint_path), "eval": True, "imagenet_path": images, "device": "cpu"}
    session = start_session(flags, PRETRAIN)
    model, _, _ = build_model(session.settings)
    load_strict(model, session.checkpoint)
    model.eval()

    dataset = build_dataset("val", session.settings)
    count = min(limit, len(dataset))
    # `predict_patches` returns one result per view; this pretext task has one view.
    return [
        predict_patches(model, dataset[index], model.normalization, session.device)[0]
        for index in progress(range(count), "patch queries")
    ]


def patch_iou(predictions: list[PatchPredictions]) -> tuple[float, float]:
    """Return the mean IoU of predicted boxes with their own patch and with another patch of the same image.

    The second is the baseline: boxes that ignore the patches reach it too.
    """
    own, other = [], []
    for item in predictions:
        iou = box_iou(item.predicted_xyxy_abs, item.boxes_xyxy_abs)[
            0
        ]  # [M, M], predictions x patches
        own.append(iou.diagonal())  # [M]
        other.append(iou.roll(1, 1).diagonal())  # each with the patch before its own
    return float(torch.cat(own).mean()), float(torch.cat(other).mean())


def draw_pictures(folder: Path, images: str) -> tuple[dict[str, Path], tuple[float, float]]:
    """Draw the page's pictures; return name -> file, and `patch_iou`."""
    checkpoint_path = folder / PRETRAIN_STAGE / "checkpoint.pth"
    predictions = predict_patches_in_val(checkpoint_path, images, NUM_IOU_IMAGES)
    shown = [item.row() for item in predictions[:NUM_SHOWN_IMAGES]]
    runs = {title: folder / name for name, title in RUNS.items()}
    pictures = {
        "curves": plot_curves(runs, folder / "curves.png"),
        "pretraining": folder / PRETRAIN_STAGE / "curves.png",
        "patches": patch_page(shown, folder / "patch_queries.png"),
        **{name: folder / name / "predictions.png" for name in RUNS},
    }
    return pictures, patch_iou(predictions)


def results_table(folder: Path) -> Rows:
    """Return AP, AP50 and AP75 of each run's last evaluation, and its best AP.

    Raises:
        UserError: a run has no evaluation.
    """
    rows = []
    for name, title in RUNS.items():
        evaluated = evaluations(read_log(folder / name))
        if not evaluated:
            raise UserError(
                f"{folder / name} has no evaluation yet: run bash tools/demo.sh to its end"
            )
        _, last = evaluated[-1]
        best_ap = max(stats[0] for _, stats in evaluated)
        rows.append((title, [f"{value:.3f}" for value in (*last[:3], best_ap)]))
    return rows


def write_page(
    folder: Path, facts: dict, pictures: dict[str, Path], ious: tuple[float, float]
) -> Path:
    """Write `result.html`, with the pictures inside, and return its path."""
    own_iou, other_iou = ious
    text = render(
        TEMPLATE,
        title="Demo on synthetic images" if facts["is_synthetic"] else "Demo",
        facts=facts,
        head=[*BBOX_STATS[:3], "best AP"],
        results=results_table(folder),
        own_iou=own_iou,
        other_iou=other_iou,
        pictures=pictures,
        runs=RUNS,
    )
    return write_text(folder / PAGE, text)


def gather_facts(folder: Path) -> dict:
    """Return what the page says about data, hardware and time.

    Raises:
        UserError: the folder has no finished demo.
    """
    try:
        stages = json.loads((folder / DEMO_FILE).read_text(encoding="utf-8"))["stages"]
        record = json.loads((folder / SCRATCH / "args.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{folder} has no finished demo ({error}): run bash tools/demo.sh"
        ) from error

    settings, environment = record["settings"], record["environment"]
    is_synthetic = stages[0]["name"] == SCENES
    num_train, num_val = record["images"]
    data = f"{num_train} labelled training images, {num_val} held out."
    if is_synthetic:
        data += " The held-out images are made from other photos than the training images."

    device = f"CPU, {environment['cpu_threads']} threads"
    if settings["device"].startswith("cuda"):
        device = environment["gpu"]
    total = format_seconds(sum(stage["seconds"] for stage in stages))
    return {
        "stages": stages,
        "coco_path": settings["coco_path"],
        "is_synthetic": is_synthetic,
        "data": data,
        "machine": f"{device}, torch {environment['torch']}; {total} for all stages together.",
        "num_measured": min(num_val, NUM_IOU_IMAGES),
    }


def parse(argv: list[str]) -> Namespace:
    parser = argparse.ArgumentParser(
        "tools.demo.page", description="Write the result page of a demo"
    )
    parser.add_argument(
        "folder", type=Path, metavar="DEMO_DIR", help="the demo's --output_dir (required)"
    )
    return parser.parse_args(argv)


def main(args: Namespace) -> None:
    folder = args.folder
    facts = gather_facts(folder)
    images, _ = coco_files(facts["coco_path"], "val")
    pictures, ious = draw_pictures(folder, images)
    path = write_page(folder, facts, pictures, ious)

    for name, title in RUNS.items():
        _, stats = evaluations(read_log(folder / name))[-1]
        log.info("%s: AP %.3f, AP50 %.3f", title, stats[0], stats[1])
    log.info("%s", path.resolve())


if __name__ == "__main__":
    run_script(main, parse)
