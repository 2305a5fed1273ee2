"""Writes the page of a demo: `python -m tools.demo.page DEMO_DIR`.

One HTML file with its pictures inside (they are also beside it): AP of both runs, their curves, what the queries of the
pre-trained detector find, boxes on held-out images, the commands and their time. page.html.j2 holds the markup. The
last line of output is the path of the page.
"""

import argparse
import json
from argparse import Namespace
from pathlib import Path

import torch

from datasets import build_dataset
from datasets.labelled.coco import coco_files
from models import build_model
from util.box_ops import box_iou
from util.checkpoints.loading import load_exactly
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
from visualization import Found, find_patches

TEMPLATE = Path(__file__).with_name("page.html.j2")
MARKER = "demo.json"
RUNS = {
    "finetune_pretrained": "pre-trained, then fine-tuned",
    "finetune_scratch": "without pre-training",
}
SHOWN_IMAGES = 6
MEASURED_IMAGES = 60


def find_in_held_out(checkpoint_path: Path, images: str, limit: int) -> list[Found]:
    """Runs a pre-trained model on images that it has not seen, with patches cut from them at random.

    As in UP-DETR's demonstration, each patch has the box of the most confident query of its group.
    """
    given = {"resume": str(checkpoint_path), "eval": True, "imagenet_path": images, "device": "cpu"}
    session = start_session(given, PRETRAIN)
    model, _, _ = build_model(session.settings)
    load_exactly(model, session.checkpoint)
    dataset = build_dataset("val", session.settings)
    count = min(limit, len(dataset))
    return [
        find_patches(model.eval(), dataset[index], model.normalization, session.device)[0]
        for index in progress(range(count), "patch queries")
    ]


def patch_overlap(found: list[Found]) -> tuple[float, float]:
    """Mean IoU of the found boxes with the place of their own patch and, for comparison, with that of another patch in
    the image.
    """
    own, other = [], []
    for item in found:
        iou = box_iou(item.found_xyxy_abs, item.boxes_xyxy_abs)[0]
        own.append(iou.diagonal())
        other.append(iou.roll(1, 1).diagonal())
    return float(torch.cat(own).mean()), float(torch.cat(other).mean())


def draw_pictures(folder: Path, images: str) -> tuple[dict[str, Path], tuple[float, float]]:
    """Writes the page's pictures; name -> file, and `patch_overlap`."""
    runs = {title: folder / name for name, title in RUNS.items()}
    found = find_in_held_out(folder / "pretrain" / "checkpoint.pth", images, MEASURED_IMAGES)
    pictures = {
        "curves": plot_curves(runs, folder / "curves.png"),
        "pretraining": folder / "pretrain" / "curves.png",
        "patches": patch_page(
            [item.row() for item in found[:SHOWN_IMAGES]], folder / "patch_queries.png"
        ),
        **{name: folder / name / "predictions.png" for name in RUNS},
    }
    return pictures, patch_overlap(found)


def results(folder: Path) -> Rows:
    """AP, AP50 and AP75 of each run's last evaluation, and its best AP.

    Raises:
        UserError: a run has no evaluation.
    """
    rows = []
    for name, title in RUNS.items():
        evaluated = evaluations(read_log(folder / name))
        if not evaluated:
            raise UserError(f"{folder / name} has no evaluation yet: run the demo to its end")
        best = max(stats[0] for _, stats in evaluated)
        rows.append((title, [f"{value:.3f}" for value in (*evaluated[-1][1][:3], best)]))
    return rows


def write_page(
    folder: Path, facts: dict, pictures: dict[str, Path], overlap: tuple[float, float]
) -> Path:
    """`result.html`, with the pictures inside."""
    text = render(
        TEMPLATE,
        title="PreDETR demo",
        facts=facts,
        head=[*BBOX_STATS[:3], "best AP"],
        results=results(folder),
        own_iou=overlap[0],
        other_iou=overlap[1],
        pictures=pictures,
        runs=RUNS,
    )
    return write_text(folder / PAGE, text)


def gather_facts(folder: Path) -> dict:
    """What the page says about data, machine and time; UserError if the folder holds no finished demo."""
    try:
        stages = json.loads((folder / MARKER).read_text(encoding="utf-8"))["stages"]
        record = json.loads((folder / "finetune_scratch" / "args.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{folder} holds no finished demo ({error}): run bash tools/demo.sh"
        ) from error
    settings, environment = record["settings"], record["environment"]
    on_scenes = stages[0]["name"] == "scenes"
    train, val = record["images"]
    data = f"{train} labelled images, {val} held out."
    if on_scenes:
        data = f"Sample scenes: {data} The held-out scenes are made from other photographs than the training ones."
    device = (
        environment["gpu"]
        if settings["device"].startswith("cuda")
        else f"CPU, {environment['cpu_threads']} threads"
    )
    total = format_seconds(sum(stage["seconds"] for stage in stages))
    return {
        "stages": stages,
        "coco_path": settings["coco_path"],
        "data": data,
        "machine": f"{device}, torch {environment['torch']}; {total} for all stages together.",
        "caution": "Shapes on photographs are far easier than real images." if on_scenes else "",
        "measured": min(val, MEASURED_IMAGES),
    }


def parse(argv: list[str]) -> Namespace:
    parser = argparse.ArgumentParser("tools.demo.page", description="Write the page of a demo")
    parser.add_argument("folder", type=Path, help="the demo's --output_dir")
    return parser.parse_args(argv)


def main(args: Namespace) -> None:
    folder = args.folder
    facts = gather_facts(folder)
    images = coco_files(facts["coco_path"], "val")[0]
    pictures, overlap = draw_pictures(folder, images)
    path = write_page(folder, facts, pictures, overlap)
    for name, title in RUNS.items():
        _, stats = evaluations(read_log(folder / name))[-1]
        log.info("%s: AP %.3f, AP50 %.3f", title, stats[0], stats[1])
    log.info("%s", path.resolve())


if __name__ == "__main__":
    run_script(main, parse)
