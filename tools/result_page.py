"""Writes the page of a demo: `python -m tools.result_page DEMO_DIR`.

One HTML file with its pictures inside (they also lie beside it): AP of both runs, their curves, what the queries of the
pre-trained detector find, boxes on held-out images, the commands and their time. The last line of output names it.
"""
import argparse
import base64
import html
import json
import shlex
import sys
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from datasets import build_dataset
from datasets.coco import coco_files
from datasets.collate import collate
from engine import to_device
from models import build_model
from util.box_ops import box_cxcywh_to_xyxy, box_iou
from util.checkpoint import load_checkpoint
from util.files import write_text
from util.logger import UserError, format_seconds, log, progress, setup_logger
from util.plot_utils import BBOX_STATS, patch_page, plot_curves, read_log

MARKER, PAGE = "demo.json", "result.html"
RUNS = {"finetune_pretrained": "pre-trained, then fine-tuned", "finetune_scratch": "without pre-training"}
SHOWN_IMAGES = 6
MEASURED_IMAGES = 60


@dataclass
class Found:
    """What the patch queries find in one image.

    image uint8 [H, W, 3]; patches M of uint8 [S, S, 3]; boxes_xyxy_abs [M, 4], where the patches are from, and
    found_xyxy_abs [M, 4], in pixels of the image; scores [M].
    """

    image: np.ndarray
    patches: list[np.ndarray]
    boxes_xyxy_abs: Tensor
    found_xyxy_abs: Tensor
    scores: Tensor


@torch.no_grad()
def find_patches(checkpoint_path: Path, images: str, limit: int) -> list[Found]:
    """Runs a pre-trained model on images that it has not seen, with patches cut from them at random.

    As in UP-DETR's demonstration, each patch has the box of the most confident query of its group.
    """
    checkpoint = load_checkpoint(checkpoint_path)
    settings = {**checkpoint["args"], "imagenet_path": images, "backbone_weights": "none", "device": "cpu", "resolved": True}
    args = Namespace(**settings)
    model, _, _ = build_model(args)
    model.load_state_dict(checkpoint["model"])
    model.eval()
    dataset = build_dataset("val", args)
    count = min(limit, len(dataset))
    mean, std = checkpoint["normalization"]["mean"], checkpoint["normalization"]["std"]
    return [_find(model, dataset[index], mean, std) for index in progress(range(count), count, "patch queries")]


def _find(model: torch.nn.Module, sample: tuple, mean: list, std: list) -> Found:
    image, target = sample
    inputs, targets = to_device(*collate([sample]), torch.device("cpu"), mean, std)
    outputs = model(inputs, targets)
    num_patches = len(target["patches"])
    scores = outputs["pred_logits"][0].softmax(-1)[:, :-1].amax(-1).view(num_patches, -1)
    best = scores.argmax(1)
    boxes = outputs["pred_boxes"][0].view(num_patches, -1, 4)[torch.arange(num_patches), best]
    size = torch.tensor([image.shape[2], image.shape[1]] * 2)
    patches = [patch.permute(1, 2, 0).numpy() for patch in target["patches"]]
    places, found = (box_cxcywh_to_xyxy(b) * size for b in (target["boxes"], boxes))
    return Found(image.permute(1, 2, 0).numpy(), patches, places, found, scores.amax(1))


def patch_overlap(found: list[Found]) -> tuple[float, float]:
    """Mean IoU of the found boxes with their patch's place, and, for comparison, with another patch's place of the image."""
    own, other = [], []
    for item in found:
        iou = box_iou(item.found_xyxy_abs, item.boxes_xyxy_abs)[0]
        own.append(iou.diagonal())
        other.append(iou.roll(1, 1).diagonal())
    return float(torch.cat(own).mean()), float(torch.cat(other).mean())


def draw_pictures(folder: Path, images: str) -> tuple[dict[str, Path], tuple[float, float]]:
    """Writes the page's pictures; name -> file, and `patch_overlap`."""
    runs = {title: folder / name for name, title in RUNS.items()}
    found = find_patches(folder / "pretrain" / "checkpoint.pth", images, MEASURED_IMAGES)
    rows = [
        (item.image, item.patches, item.boxes_xyxy_abs, {"boxes": item.found_xyxy_abs, "scores": item.scores})
        for item in found[:SHOWN_IMAGES]
    ]
    pictures = {
        "curves": plot_curves(runs, folder / "curves.png"),
        "pretraining": folder / "pretrain" / "curves.png",
        "patches": patch_page(rows, folder / "patch_queries.png"),
        **{name: folder / name / "predictions.png" for name in RUNS},
    }
    return pictures, patch_overlap(found)


def results_table(folder: Path) -> str:
    """The last evaluation of each run and its best AP, as HTML."""
    rows = []
    for name, title in RUNS.items():
        evaluations = [e["test_coco_eval_bbox"] for e in read_log(folder / name) if "test_coco_eval_bbox" in e]
        if not evaluations:
            raise UserError(f"{folder / name} has no evaluation yet: run the demo to its end")
        cells = "".join(f"<td>{value:.3f}</td>" for value in evaluations[-1][:3])
        rows.append(f"<tr><th>{title}</th>{cells}<td>{max(e[0] for e in evaluations):.3f}</td></tr>")
    head = "".join(f"<th>{name}</th>" for name in BBOX_STATS[:3])
    return f"<table><tr><th></th>{head}<th>best AP</th></tr>{''.join(rows)}</table>"


STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 1180px; margin: 2em auto; padding: 0 1.2em }
h1 { margin-bottom: 0 } h2 { margin-top: 2em; border-bottom: 1px solid #ddd; padding-bottom: .2em }
img { max-width: 100%; display: block; margin: 1em 0 }
table { border-collapse: collapse } td, th { padding: .35em 1em; text-align: right; border-bottom: 1px solid #ddd }
th:first-child { text-align: left } pre { background: #f5f5f5; padding: .8em 1em; overflow-x: auto; white-space: pre-wrap }
.note { color: #555 }
"""


def write_page(folder: Path, facts: dict, pictures: dict[str, Path], overlap: tuple[float, float]) -> Path:
    """`result.html`, with the pictures inside."""

    def picture(name: str, alt: str) -> str:
        if not pictures[name].is_file():
            return ""
        data = base64.b64encode(pictures[name].read_bytes()).decode("ascii")
        return f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{data}">'

    body = f"""
<h1>PreDETR demo</h1>
<p class="note">{html.escape(facts["data"])} {html.escape(facts["machine"])}</p>
<h2>Average precision on held-out images</h2>
{results_table(folder)}
<p>AP over IoU 0.50 to 0.95, at 0.50 and at 0.75, after the last epoch; both runs have the same data, settings and number
of epochs, and start from the same ImageNet weights of the backbone.</p>
<p class="note">One run each, with one seed and minutes of training: a difference between the two says nothing about
pre-training in general. {html.escape(facts["caution"])}</p>
{picture("curves", "loss, AP and AP50 of both runs")}
<h2>What the pre-trained detector finds, without a label</h2>
<p>Patches are cut at random from held-out images; the detector is asked where they come from. Each patch and the box of
its most confident query have one colour; numbers are scores. Over {facts["measured"]} images the boxes overlap their own
patch's place by a mean IoU of {overlap[0]:.2f}, another patch's place in the same image by {overlap[1]:.2f}.
{_overlap_in_words(*overlap)}</p>
{picture("patches", "patches and the boxes found")}
{picture("pretraining", "losses of pre-training")}
<h2>Boxes on held-out images</h2>
{"".join(f"<h3>{title}</h3>" + picture(name, f"predictions beside the truth, {title}") for name, title in RUNS.items())}
<h2>Commands and time</h2>
{"".join(_stage_html(stage) for stage in facts["stages"])}
<p class="note">In the project's folder, with its environment active (<code>source .venv/bin/activate</code>).</p>
"""
    page = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>PreDETR demo</title><style>{STYLE}</style>{body}</html>'
    return write_text(folder / PAGE, page)


def _overlap_in_words(own: float, other: float) -> str:
    if own - other > 0.05:
        return "So the patches say where to look."
    return (
        "So the patches hardly say yet where to look: the published pre-training shows its detector 1.28 million images "
        "60 times, a demo some thousands."
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
    device = environment["gpu"] if settings["device"].startswith("cuda") else f"CPU, {environment['cpu_threads']} threads"
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
        stats = [e["test_coco_eval_bbox"] for e in read_log(folder / name) if "test_coco_eval_bbox" in e][-1]
        log.info("%s: AP %.3f, AP50 %.3f", title, stats[0], stats[1])
    log.info("%s", page.resolve())


if __name__ == "__main__":
    setup_logger()
    parser = argparse.ArgumentParser("tools.result_page", description="Write the page of a demo")
    parser.add_argument("folder", type=Path, help="the demo's --output_dir")
    try:
        main(parser.parse_args().folder)
    except UserError as error:
        log.error("error: %s", error)
        sys.exit(1)
