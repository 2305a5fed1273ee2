"""Writes the result page of a demo: `python -m tools.demo.page DEMO_DIR`.

One HTML file with its pictures inside (they are also next to it): AP of both runs, their curves, what the pre-trained
detector finds without any label, boxes on held-out images, where the fine-tuned detector looks, the commands and their
time. The last line of output is the path of the page. page.html.j2 has the markup.
"""

import argparse
import json
from argparse import Namespace
from pathlib import Path

from datasets.labelled.coco import coco_files
from evaluation import METRICS_FILE
from tools import visualize
from tools.demo.run import DEMO_FILE
from tools.demo.stages import FINETUNE, OBJECTS, PRETRAIN, SCENES, SCRATCH
from util.errors import UserError
from util.files import write_text
from util.logger import format_seconds, log
from util.plots.curves import BBOX_STATS, plot_curves
from util.runs.html import render
from util.runs.log import read_log
from util.runs.page import PAGE, Rows, evaluations
from util.runs.session import run_script
from util.settings import usable_cores
from util.settings.words import to_words

TEMPLATE = Path(__file__).with_name("page.html.j2")
RUNS = {  # folder -> title
    FINETUNE: "pre-trained, then fine-tuned",
    SCRATCH: "without pre-training",
}
NUM_SHOWN_BOXES = 3  # of the pre-trained detector in an image


def draw_pictures(folder: Path, images: str) -> dict[str, list[Path]]:
    """Draw the page's pictures of held-out images; return name -> files.

    Args:
        images: folder of the held-out images.
    """
    runs = {title: folder / name for name, title in RUNS.items()}
    common = {
        "images": images,
        "output_dir": folder / "pictures",
        "overwrite": True,
        "device": "cpu",
    }
    _draw(
        "class_agnostic",
        {"checkpoint": folder / PRETRAIN / "checkpoint.pth", "top": NUM_SHOWN_BOXES, **common},
    )
    _draw(
        "sampling",
        {
            "checkpoint": folder / FINETUNE / "checkpoint.pth",
            "count": 2,
            "threshold": 0.3,
            **common,
        },
    )
    return {
        "curves": [plot_curves(runs, folder / "curves.png")],
        "pretraining": [folder / PRETRAIN / "curves.png"],
        "class_agnostic": [folder / "pictures" / "class_agnostic.png"],
        "sampling": sorted((folder / "pictures").glob("sampling_*")),
        **{name: [folder / name / "predictions.png"] for name in RUNS},
    }


def _draw(command: str, flags: dict) -> None:
    visualize.main(visualize.parse([command, *to_words(flags)]))


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


def gains(folder: Path) -> list[float]:
    """Return by how much the pre-trained detector is ahead in AP50, at each evaluation of both."""
    with_pretraining, without = (
        dict(evaluations(read_log(folder / name))) for name in (FINETUNE, SCRATCH)
    )
    ap50 = BBOX_STATS.index("AP50")
    return [
        stats[ap50] - without[epoch][ap50]
        for epoch, stats in with_pretraining.items()
        if epoch in without
    ]


def write_page(folder: Path, facts: dict, pictures: dict[str, list[Path]]) -> Path:
    """Write `result.html`, with the pictures inside, and return its path."""
    text = render(
        TEMPLATE,
        title="Demo on synthetic images" if facts["is_synthetic"] else "Demo",
        facts=facts,
        head=[*BBOX_STATS[:3], "best AP"],
        results=results_table(folder),
        gains=gains(folder),
        pictures=pictures,
        runs=RUNS,
        num_boxes=NUM_SHOWN_BOXES,
    )
    return write_text(folder / PAGE, text)


def gather_facts(folder: Path) -> dict:
    """Return what the page says about data, hardware and time.

    Raises:
        UserError: the folder has no finished demo.
    """
    try:
        demo = json.loads((folder / DEMO_FILE).read_text(encoding="utf-8"))
        stages, wall_seconds = demo["stages"], demo["wall_seconds"]
        pretrained, record = (
            json.loads((folder / name / "args.json").read_text(encoding="utf-8"))
            for name in (PRETRAIN, SCRATCH)
        )
        objects = json.loads((folder / OBJECTS / METRICS_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{folder} has no finished demo ({error}): run bash tools/demo.sh"
        ) from error

    settings, environment = record["settings"], record["environment"]
    is_synthetic = stages[0]["name"] == SCENES
    num_train, num_val = record["images"]
    data = f"{pretrained['images']} unlabelled and {num_train} labelled images to train on, {num_val} held out."
    if is_synthetic:
        data += " Held-out images show other photos than the others."

    device = f"CPU, {usable_cores()} of its cores"
    if settings["device"].startswith("cuda"):
        device = environment["gpu"]
    return {
        "stages": stages,
        "coco_path": settings["coco_path"],
        "is_synthetic": is_synthetic,
        "data": data,
        "machine": f"{device}, torch {environment['torch']}; {format_seconds(wall_seconds)} for all stages together.",
        "object_ap50": objects["AP50"],
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
    path = write_page(folder, facts, draw_pictures(folder, images))

    for name, title in RUNS.items():
        _, stats = evaluations(read_log(folder / name))[-1]
        log.info("%s: AP %.3f, AP50 %.3f", title, stats[0], stats[1])
    log.info("%s", path.resolve())


if __name__ == "__main__":
    run_script(main, parse)
