"""Writes the page of a demo: `python -m tools.demo.page DEMO_DIR`.

One HTML file with its pictures inside (they also lie beside it): AP of both runs, their curves, what the queries of the
pre-trained detector find, boxes on held-out images, the commands and their time. The last line of output names it.
"""

import argparse
import html
import json
import shlex
import sys
from argparse import Namespace
from pathlib import Path

import torch

from datasets import build_dataset
from datasets.labelled.coco import coco_files
from datasets.sample_page import Found, find_patches
from models import build_model
from util.box_ops import box_iou
from util.checkpoints.checkpoint import load_checkpoint
from util.errors import UserError
from util.files import write_text
from util.logger import format_seconds, log, progress, setup_logger
from util.plots.curves import BBOX_STATS, plot_curves
from util.plots.pages import patch_page
from util.runs.log import read_log
from util.runs.page import PAGE, evaluations, page, picture, table

MARKER = "demo.json"
RUNS = {"finetune_pretrained": "pre-trained, then fine-tuned", "finetune_scratch": "without pre-training"}
SHOWN_IMAGES = 6
MEASURED_IMAGES = 60


def find_in_held_out(checkpoint_path: Path, images: str, limit: int) -> list[Found]:
    """Runs a pre-trained model on images that it has not seen, with patches cut from them at random.

    As in UP-DETR's demonstration, each patch has the box of the most confident query of its group.
    """
    checkpoint = load_checkpoint(checkpoint_path)
    settings = {
        **checkpoint["args"],
        "imagenet_path": images,
        "backbone_weights": "none",
        "device": "cpu",
        "resolved": True,
    }
    args = Namespace(**settings)
    model, _, _ = build_model(args)
    model.load_state_dict(checkpoint["model"])
    model.eval()
    dataset = build_dataset("val", args)
    count = min(limit, len(dataset))
    device = torch.device("cpu")
    return [
        find_patches(model, dataset[index], checkpoint["normalization"], device)[0]
        for index in progress(range(count), count, "patch queries")
    ]


def patch_overlap(found: list[Found]) -> tuple[float, float]:
    """Mean IoU of the found boxes with their patch's place, and, for comparison, with another patch's place of the
    image.
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
        "patches": patch_page([item.row() for item in found[:SHOWN_IMAGES]], folder / "patch_queries.png"),
        **{name: folder / name / "predictions.png" for name in RUNS},
    }
    return pictures, patch_overlap(found)


def results_table(folder: Path) -> str:
    """The last evaluation of each run and its best AP, as HTML."""
    rows = []
    for name, title in RUNS.items():
        evaluated = evaluations(read_log(folder / name))
        if not evaluated:
            raise UserError(f"{folder / name} has no evaluation yet: run the demo to its end")
        best = max(stats[0] for _, stats in evaluated)
        rows.append((title, [f"{value:.3f}" for value in (*evaluated[-1][1][:3], best)]))
    return table([*BBOX_STATS[:3], "best AP"], rows)


def write_page(folder: Path, facts: dict, pictures: dict[str, Path], overlap: tuple[float, float]) -> Path:
    """`result.html`, with the pictures inside."""

    shown = {
        name: picture(pictures[name], alt)
        for name, alt in {
            "curves": "loss, AP and AP50 of both runs",
            "patches": "patches and the boxes found",
            "pretraining": "losses of pre-training",
            **{name: f"predictions beside the truth, {title}" for name, title in RUNS.items()},
        }.items()
    }
    body = f"""
<p class="note">{html.escape(facts["data"])} {html.escape(facts["machine"])}</p>
<h2>Average precision on held-out images</h2>
{results_table(folder)}
<p>AP over IoU 0.50 to 0.95, at 0.50 and at 0.75, after the last epoch; both runs have the same data, settings and
number of epochs, and start from the same ImageNet weights of the backbone.</p>
<p class="note">One run each, with one seed and minutes of training: a difference between the two says nothing about
pre-training in general. {html.escape(facts["caution"])}</p>
{shown["curves"]}
<h2>What the pre-trained detector finds, without a label</h2>
<p>Patches are cut at random from held-out images; the detector is asked where they come from. Each patch and the box of
its most confident query have one colour; numbers are scores. Over {facts["measured"]} images the boxes overlap
their own patch's place by a mean IoU of {overlap[0]:.2f}, another patch's place in the same image by {overlap[1]:.2f}.
{_overlap_in_words(*overlap)}</p>
{shown["patches"]}
{shown["pretraining"]}
<h2>Boxes on held-out images</h2>
{"".join(f"<h3>{title}</h3>{shown[name]}" for name, title in RUNS.items())}
<h2>Commands and time</h2>
{"".join(_stage_html(stage) for stage in facts["stages"])}
<p class="note">In the project's folder, with its environment active (<code>source .venv/bin/activate</code>).</p>
"""
    return write_text(folder / PAGE, page("PreDETR demo", body))


def _overlap_in_words(own: float, other: float) -> str:
    if own - other > 0.05:
        return "So the patches say where to look."
    return (
        "So the patches hardly say yet where to look: the published pre-training shows its detector 1.28 million "
        "images 60 times, a demo some thousands."
    )


def _stage_html(stage: dict) -> str:
    title, command = html.escape(stage["title"]), html.escape(shlex.join(stage["command"]))
    return f"<p>{title}: {format_seconds(stage['seconds'])}</p><pre>{command}</pre>"


def gather_facts(folder: Path) -> dict:
    """What the page says about data, machine and time; UserError if the folder holds no finished demo."""
    try:
        stages = json.loads((folder / MARKER).read_text(encoding="utf-8"))["stages"]
        record = json.loads((folder / "finetune_scratch" / "args.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{folder} holds no finished demo ({error}): run bash tools/demo.sh") from error
    settings, environment = record["settings"], record["environment"]
    on_scenes = stages[0]["name"] == "scenes"
    train, val = record["images"]
    data = f"{train} labelled images, {val} held out."
    if on_scenes:
        data = f"Sample scenes: {data} The held-out scenes are made from other photographs than those for training."
    device = (
        environment["gpu"] if settings["device"].startswith("cuda") else f"CPU, {environment['cpu_threads']} threads"
    )
    total = format_seconds(sum(stage["seconds"] for stage in stages))
    return {
        "stages": stages,
        "coco_path": settings["coco_path"],
        "data": data,
        "machine": f"{device}, torch {environment['torch']}; {total} for the stages together.",
        "caution": "Shapes on photographs are far easier than real images." if on_scenes else "",
        "measured": min(val, MEASURED_IMAGES),
    }


def main(folder: Path) -> None:
    facts = gather_facts(folder)
    images = coco_files(facts["coco_path"], "val")[0]
    pictures, overlap = draw_pictures(folder, images)
    page = write_page(folder, facts, pictures, overlap)
    for name, title in RUNS.items():
        _, stats = evaluations(read_log(folder / name))[-1]
        log.info("%s: AP %.3f, AP50 %.3f", title, stats[0], stats[1])
    log.info("%s", page.resolve())


if __name__ == "__main__":
    setup_logger()
    parser = argparse.ArgumentParser("tools.demo.page", description="Write the page of a demo")
    parser.add_argument("folder", type=Path, help="the demo's --output_dir")
    try:
        main(parser.parse_args().folder)
    except UserError as error:
        log.error("error: %s", error)
        sys.exit(1)
