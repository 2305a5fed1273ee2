"""Reads a whole dataset and lists everything that is wrong with it.

    python tools/check_dataset.py --coco_path data/MSCoco --output_dir check
    python tools/check_dataset.py --dataset_file custom --train_images images --train_annotations boxes.json
    python tools/check_dataset.py --imagenet_path images

Every image is decoded as in training. With `--output_dir` it writes `problems.csv` (each finding with its file and
ids), `check.json` (counts of them, and of images, boxes and classes) and `dataset.png` (image sizes, objects per
image, box sizes, classes). Exit status: 0 nothing wrong (there may be warnings), 1 problems or data that can't be read,
2 flags.
"""

import csv
import io
import json
import signal
import sys
from argparse import Namespace
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np

sys.path.insert(
    0, str(Path(__file__).resolve().parent.parent)
)  # `python tools/NAME.py` works from any directory

from datasets import classes_of_dataset
from datasets.images.image_folder import ImageFolder
from datasets.labelled.checks import (
    KINDS,
    Finding,
    ImageInfo,
    Split,
    inspect_image,
    run_checks,
    summarize_annotations,
)
from util.errors import UserError
from util.files import check_outside_images, make_folder, write_atomically, write_text
from util.logger import Progress, log
from util.plots.boxes import PALETTE
from util.plots.curves import figure_classes
from util.runs.session import run_script
from util.settings import FINETUNE, PRETRAIN, Parser, Settings, add_flags, resolve
from util.settings.registry import DATASETS, import_object, lookup

SHARED_FLAGS = (  # as finetune_main.py has them
    "coco_path",
    "data_root",
    "dataset_file",
    "dataset",
    "train_images",
    "train_annotations",
    "val_images",
    "val_annotations",
    "voc_path",
    "voc_train",
    "voc_val",
    "airbus_path",
    "filter_pct",
    "split_file",
    "detector",
    "num_queries",
    "num_classes",
    "num_workers",
    "seed",
)
PROBLEMS, SUMMARY, PICTURE = FILES = ("problems.csv", "check.json", "dataset.png")
COLUMNS = ("severity", "kind", "split", "file", "image_id", "annotation_id", "detail")
SHOWN_CLASSES = 30
CHUNK = 16  # files that a worker process gets at once


def parse(argv: list[str]) -> Namespace:
    parser = Parser("tools/check_dataset.py", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--output_dir",
        metavar="DIR",
        help="where problems.csv, check.json and dataset.png go; empty: nothing is written",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace those of an earlier check"
    )
    add_flags(parser, PRETRAIN, ["imagenet_path"])
    add_flags(parser, FINETUNE, SHARED_FLAGS)
    return parser.parse_args(argv)


# ---------------------------------------------------------------------------------------------------- what is read


def open_splits(settings: Settings) -> tuple[list[Split], list[Finding]]:
    """The splits that can be read, and a finding for each that can't. It calls the builder alone: `build_dataset` would
    refuse what is to be listed.
    """
    if settings.imagenet_path:
        return [Split("train", ImageFolder(settings.imagenet_path))], []
    names = ["train", "val"]
    if settings.dataset_file == "custom":  # one of both may be checked alone
        names = [
            name
            for name in names
            if getattr(settings, f"{name}_images") or getattr(settings, f"{name}_annotations")
        ]
    builder = import_object(lookup(DATASETS, "--dataset_file", settings.dataset_file).builder)
    splits, findings, classes = [], [], None
    for name in names or ["train"]:
        try:
            dataset = builder(name, settings, classes)
        except UserError as error:
            findings.append(Finding("unusable", name, "", str(error)))
            continue
        classes = classes or classes_of_dataset(dataset)
        limit = settings.num_classes if settings.was_given("num_classes") else dataset.num_classes
        splits.append(Split(name, dataset, settings.num_queries, limit))
    return splits, findings


def inspect_images(split: Split, workers: int) -> list[ImageInfo]:
    """Decodes every image of a split in as many as `workers` processes (0: in this one)."""
    files = [split.file(index) for index in range(len(split.images))]
    workers = min(workers, len(files) // CHUNK)
    bar = Progress(len(files), f"{split.name} images")

    def counted(facts: ImageInfo) -> ImageInfo:
        bar.step()
        return facts

    if not workers:
        return [counted(inspect_image(file)) for file in files]
    try:
        with ProcessPoolExecutor(workers, initializer=_ignore_ctrl_c) as pool:
            return [counted(facts) for facts in pool.map(inspect_image, files, chunksize=CHUNK)]
    except BrokenProcessPool as error:
        raise UserError(
            "a process that decoded images died (not enough memory, or a file that crashes a decoder): "
            "--num_workers 0 shows where"
        ) from error


def _ignore_ctrl_c() -> None:
    """The main process ends its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


# ---------------------------------------------------------------------------------------------------- the report


def table(findings: Sequence[Finding], splits: Sequence[Split]) -> str:
    """A line per kind, the worst first: how many in each split, what it means and the first of them."""
    counts = Counter((finding.kind, finding.split) for finding in findings)
    first = {finding.kind: str(finding) for finding in reversed(findings)}
    first["unusable"] = f"\n{'':17}".join(
        finding.detail for finding in findings if finding.kind == "unusable"
    )
    lines = [f"{'':8} {'':26} {'train':>8} {'val':>8}"]
    for kind, check in KINDS.items():
        if first.get(kind):
            cells = [f"{counts[kind, split]:>8}" for split in ("train", "val")]
            lines.append(
                f"{check.severity:8} {kind:26} {' '.join(cells)}  {check.meaning}\n{'':10}first: {first[kind]}"
            )
    images = ", ".join(f"{len(split.images)} {split.name} images" for split in splits)
    severities = Counter(finding.severity for finding in findings)
    total = f"{images or 'no image'}: {severities['problem']} problems, {severities['warning']} warnings"
    return "\n".join([*(lines if len(lines) > 1 else []), total])


def summarize_split(split: Split) -> dict[str, object]:
    """Counts of a split, and of its classes."""
    sizes = np.array([facts.size_hw for facts in split.facts if not facts.error]).reshape(-1, 2)
    counts = {"images": len(split.images), "readable": len(sizes)}
    if len(sizes):
        counts["median_size_hw"] = np.median(sizes, 0).astype(int).tolist()
    if split.annotations is not None:
        counts.update(summarize_annotations(split.annotations))
        images, boxes = count_classes(split)
        names = split.annotations.class_names
        counts["classes"] = {
            names[label]: {"images": images[label], "boxes": boxes[label]} for label in names
        }
    return counts


def count_classes(split: Split) -> tuple[Counter, Counter]:
    """(images, boxes) of each label."""
    pairs = np.column_stack([split.annotations.image_indices, split.annotations.labels])
    return Counter(np.unique(pairs, axis=0)[:, 1].tolist()), Counter(pairs[:, 1].tolist())


def write_report(folder: Path, findings: Sequence[Finding], splits: Sequence[Split]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows([getattr(finding, name) for name in COLUMNS] for finding in findings)
    # File names need not be UTF-8.
    write_text(folder / PROBLEMS, text.getvalue().encode("utf-8", "backslashreplace").decode())
    found: dict[str, dict[str, int]] = {}
    for (kind, split), count in Counter(
        (finding.kind, finding.split) for finding in findings
    ).items():
        found.setdefault(kind, {})[split] = count
    summary = {"found": found, **{split.name: summarize_split(split) for split in splits}}
    write_text(folder / SUMMARY, json.dumps(summary, indent=1) + "\n")
    try:
        if splits:
            draw_summary(splits, folder / PICTURE)
    except UserError as error:
        log.warning("no %s: %s", PICTURE, error)


# ---------------------------------------------------------------------------------------------------- the picture


def draw_summary(splits: Sequence[Split], path: Path) -> None:
    """Image sizes; of labelled images also objects per image, box sizes, and images and boxes of each class.

    Raises:
        UserError: matplotlib is not installed, or the file can't be written.
    """
    figure_class, canvas = figure_classes()
    labelled = [split for split in splits if split.annotations is not None]
    figure = figure_class(
        figsize=(12, 8.5) if labelled else (6.5, 4.5), layout="constrained", dpi=110
    )
    canvas(figure)
    rows, columns = (2, 2) if labelled else (1, 1)
    axes = [figure.add_subplot(rows, columns, number + 1) for number in range(rows * columns)]
    colors = {split.name: np.divide(PALETTE[number], 255) for number, split in enumerate(splits)}
    _draw_image_sizes(axes[0], splits, colors)
    if labelled:
        _draw_objects(axes[1], labelled, colors)
        _draw_box_sizes(axes[2], labelled, colors)
        _draw_classes(axes[3], labelled, colors)
    for one in axes:
        one.spines[["top", "right"]].set_visible(False)
        if one.get_legend_handles_labels()[0]:
            one.legend(fontsize=8, frameon=False)
    write_atomically(path, lambda file: figure.savefig(file, format="png"))


def _draw_image_sizes(axes, splits: Sequence[Split], colors: dict) -> None:
    axes.set(title="image sizes", xlabel="width (pixels)", ylabel="height (pixels)")
    for split in splits:
        sizes = Counter(facts.size_hw for facts in split.facts if not facts.error)
        if sizes:
            heights, widths = np.array(list(sizes)).T
            area = 8 + 400 * np.array(list(sizes.values())) / len(split.images)
            axes.scatter(
                widths,
                heights,
                s=area,
                color=colors[split.name],
                alpha=0.5,
                label=f"{split.name}: {len(split.images)}",
            )
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)


def _draw_objects(axes, splits: Sequence[Split], colors: dict) -> None:
    axes.set(title="objects per image", xlabel="objects", ylabel="fraction of images")
    for split in splits:
        counts = np.diff(split.annotations.offsets)
        share = np.bincount(counts) / max(len(counts), 1)
        axes.step(
            np.arange(len(share)),
            share,
            where="mid",
            color=colors[split.name],
            label=f"{split.name}: mean {counts.mean():.1f}",
        )


def _draw_box_sizes(axes, splits: Sequence[Split], colors: dict) -> None:
    """The borders of COCO's small, medium and large are drawn."""
    axes.set(
        title="box sizes",
        xlabel="square root of the area (pixels)",
        ylabel="fraction of boxes",
        xscale="log",
    )
    for split in splits:
        boxes = split.annotations.boxes_xyxy_abs
        sides = np.sqrt(np.prod(boxes[:, 2:] - boxes[:, :2], axis=1, dtype=np.float64))
        sides = sides[sides > 0]
        if len(sides):
            bins = np.geomspace(max(sides.min(), 0.5), sides.max() * 1.01, 40)
            weights = np.full(len(sides), 1 / len(sides))
            axes.hist(
                sides,
                bins,
                weights=weights,
                histtype="step",
                color=colors[split.name],
                label=f"{split.name}: {len(sides)} boxes",
            )
    for border in (32, 96):
        axes.axvline(border, color="0.7", linewidth=0.8)


def _draw_classes(axes, splits: Sequence[Split], colors: dict) -> None:
    """Those with the most training boxes, the light bars, and the images that they are in, the dark ones."""
    counts = {split.name: count_classes(split) for split in splits}
    names = splits[0].annotations.class_names
    order = sorted(names, key=lambda label: -counts[splits[0].name][1][label])[:SHOWN_CLASSES]
    places, width = np.arange(len(order)), 0.8 / len(splits)
    for number, (split, (images, boxes)) in enumerate(counts.items()):
        at = places + (number - (len(splits) - 1) / 2) * width
        axes.bar(
            at,
            [boxes[label] for label in order],
            width,
            color=colors[split],
            alpha=0.4,
            label=f"{split}: boxes",
        )
        axes.bar(
            at,
            [images[label] for label in order],
            width / 2,
            color=colors[split],
            label=f"{split}: images",
        )
    more = f" ({len(order)} of {len(names)})" if len(order) < len(names) else ""
    axes.set(title=f"classes{more}", yscale="symlog", ylabel="count", xticks=places)
    axes.set_xticklabels([names[label][:16] for label in order], rotation=90, fontsize=7)


# ---------------------------------------------------------------------------------------------------- the command


def prepare_folder(args: Namespace) -> Path | None:
    """
    Raises:
        UserError: the folder can't be written, lies among the images, or holds an earlier check and `--overwrite` was
            not given.
    """
    if not args.output_dir:
        return None
    check_outside_images(args.output_dir, args.imagenet_path or "")
    folder = make_folder(args.output_dir, FILES, args.overwrite)
    for name in FILES:
        (folder / name).unlink(missing_ok=True)
    return folder


def main(args: Namespace) -> None:
    folder = prepare_folder(args)
    settings = resolve(args)
    splits, findings = open_splits(settings)
    for split in splits:
        split.facts = inspect_images(split, settings.num_workers)
    findings += run_checks(splits)
    log.info("%s", table(findings, splits))
    if folder is not None:
        write_report(folder, findings, splits)
        written = [str(folder / name) for name in FILES if (folder / name).exists()]
        log.info("all findings, counts, picture: %s", ", ".join(written))
    elif findings:
        log.info("--output_dir DIR writes all findings to a file")
    if any(finding.severity == "problem" for finding in findings):
        sys.exit(1)


if __name__ == "__main__":
    run_script(main, parse)
