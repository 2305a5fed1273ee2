"""Read a whole dataset and list everything that is wrong with it.

    python tools/check_dataset.py --coco_path data/MSCoco --output_dir check
    python tools/check_dataset.py --dataset_file custom --train_images images --train_annotations boxes.json
    python tools/check_dataset.py --imagenet_path images

Every image is decoded as in training, and with `--masks` or panoptic data every mask. `--output_dir` writes
`problems.csv` (each finding with its file and ids), `check.json` (numbers of findings, images, boxes and classes) and
`dataset.png` (image sizes, objects per image, box sizes and classes).

Exit status: 0 if there are no problems (there may be warnings), 1 for problems or data that can't be read, 2 for wrong
flags.
"""

import csv
import io
import json
import signal
import sys
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import repeat
from pathlib import Path

import numpy as np

# `python tools/NAME.py` works from any directory.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from datasets import classes_of_dataset
from datasets.images.image_folder import ImageFolder
from datasets.images.image_info import ImageInfo, inspect_image
from datasets.labelled.checks.finding import Finding
from datasets.labelled.checks.mask_faults import MaskFault, inspect_masks
from datasets.labelled.checks.masks import has_masks, mask_source
from datasets.labelled.checks.split import Split
from datasets.labelled.checks.startup import summarize_annotations
from datasets.labelled.checks.table import KINDS, run_checks
from util.errors import UserError
from util.files import check_outside_images, make_folder, write_atomically, write_text
from util.logger import Progress, log
from util.plots.boxes import PALETTE
from util.plots.curves import figure_classes
from util.plots.fonts import class_text, escape, set_fonts
from util.runs.session import run_script
from util.settings import FINETUNE, PRETRAIN, Parser, Settings, add_flags, resolve
from util.settings.registry import DATASETS, import_object, lookup

# The flags of finetune_main.py that select the data or set what the detector can predict.
SHARED_FLAGS = (
    "coco_path",
    "coco_panoptic_path",
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
    "exif",
    "filter_pct",
    "split_file",
    "detector",
    "num_queries",
    "num_classes",
    "masks",
    "num_workers",
    "seed",
)
PROBLEMS, SUMMARY, PLOTS = FILES = ("problems.csv", "check.json", "dataset.png")
COLUMNS = ("kind", "split", "file", "image_id", "annotation_id", "detail")
MAX_PLOTTED_CLASSES = 30
CHUNK = 16  # files that a worker process gets at once


def parse(argv: list[str]) -> Namespace:
    parser = Parser("tools/check_dataset.py", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--output_dir",
        metavar="DIR",
        help="folder for problems.csv, check.json and dataset.png; empty: nothing is written",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace the files of an earlier check"
    )
    add_flags(parser, PRETRAIN, ["imagenet_path"])
    add_flags(parser, FINETUNE, SHARED_FLAGS)
    return parser.parse_args(argv)


# ----------------------------------------------------------------------------------------------------- reading the data


def open_splits(settings: Settings) -> tuple[list[Split], list[Finding]]:
    """Return (the splits that can be read, a finding for each one that can't)."""
    if settings.imagenet_path:
        images = ImageFolder(settings.imagenet_path)
        images.exif = settings.exif
        return [Split("train", images)], []

    # `build_dataset` would validate the data and raise at the first problem. The builder alone lets all be listed.
    builder = import_object(lookup(DATASETS, "--dataset_file", settings.dataset_file).builder)
    splits, findings, classes = [], [], None
    for name in _split_names(settings):
        try:
            dataset = builder(name, settings, classes)
        except UserError as error:
            findings.append(Finding("unusable", name, "", str(error)))
            continue
        dataset.exif = settings.exif
        # As in training, the first split decides the labels.
        classes = classes or classes_of_dataset(dataset)
        limit = settings.num_classes if settings.was_given("num_classes") else dataset.num_classes
        splits.append(Split(name, dataset, settings.num_queries, limit))
    return splits, findings


def _split_names(settings: Settings) -> list[str]:
    names = ["train", "val"]
    if settings.dataset_file != "custom":
        return names
    # Either split of a custom dataset may be checked on its own.
    given = [
        name
        for name in names
        if getattr(settings, f"{name}_images") or getattr(settings, f"{name}_annotations")
    ]
    return given or ["train"]  # without any flag, the builder says which ones are missing


def inspect_images(split: Split, num_workers: int) -> list[ImageInfo]:
    """Decode every image of a split, in at most `num_workers` processes (0: in this one)."""
    indices = range(len(split.images))
    files = [split.file(index) for index in indices]
    options = repeat(split.exif), map(split.listed_hw, indices)
    return map_images(
        inspect_image, files, *options, num_workers=num_workers, what=f"{split.name} images"
    )


def inspect_all_masks(split: Split, num_workers: int) -> list[list[MaskFault]]:
    """Decode every mask of a split, after `inspect_images`. Empty if it has none."""
    if not has_masks(split):
        return []
    sources = [mask_source(split, index) for index in range(len(split.images))]
    return map_images(inspect_masks, sources, num_workers=num_workers, what=f"{split.name} masks")


def map_images(
    function: Callable, images: Sequence, *options: Iterable, num_workers: int, what: str
) -> list:
    """Call a function for each image, in at most `num_workers` processes (0: in this one)."""
    num_workers = min(num_workers, len(images) // CHUNK)
    bar = Progress(len(images), what)

    def advance(result: object) -> object:
        bar.step()
        return result

    if not num_workers:
        return [advance(result) for result in map(function, images, *options)]
    try:
        with ProcessPoolExecutor(num_workers, initializer=_ignore_ctrl_c) as pool:
            results = pool.map(function, images, *options, chunksize=CHUNK)
            return [advance(result) for result in results]
    except BrokenProcessPool as error:
        raise UserError(
            "a process that decoded images died (not enough memory, or a file that crashes a decoder): "
            "--num_workers 0 shows where"
        ) from error


def _ignore_ctrl_c() -> None:
    """Let the main process end its workers. Otherwise each of them would print a traceback."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


# ----------------------------------------------------------------------------------------------------------- the report


def table(findings: Sequence[Finding], splits: Sequence[Split]) -> str:
    """Return one line per kind, the worst first: its number in each split, its meaning and the first finding."""
    counts = Counter((finding.kind, finding.split) for finding in findings)
    first = {finding.kind: str(finding) for finding in reversed(findings)}
    # Each split can be unusable for a reason of its own: show all of them.
    unusable = [finding.detail for finding in findings if finding.kind == "unusable"]
    first["unusable"] = f"\n{'':17}".join(unusable)

    lines = []
    for kind, check in KINDS.items():
        if first.get(kind):
            cells = [f"{counts[kind, split]:>8}" for split in ("train", "val")]
            lines.append(f"{check.severity:8} {kind:26} {' '.join(cells)}  {check.meaning}")
            lines.append(f"{'':10}first: {first[kind]}")
    if lines:
        lines.insert(0, f"{'':8} {'':26} {'train':>8} {'val':>8}")

    images = ", ".join(f"{len(split.images)} {split.name} images" for split in splits)
    severities = Counter(KINDS[finding.kind].severity for finding in findings)
    lines.append(
        f"{images or 'no images'}: {severities['problem']} problems, {severities['warning']} warnings"
    )
    return "\n".join(lines)


def summarize_split(split: Split) -> dict[str, object]:
    """Return the statistics of a split and of its classes."""
    sizes = [info.size_hw for info in split.image_infos if not info.error]
    summary = {"images": len(split.images), "readable": len(sizes)}
    if sizes:
        summary["median_size_hw"] = np.median(np.array(sizes), 0).astype(int).tolist()
    if split.annotations is not None:
        summary.update(summarize_annotations(split.annotations))
        images, boxes = count_classes(split)
        names = split.annotations.class_names
        summary["classes"] = {
            names[label]: {"images": images[label], "boxes": boxes[label]} for label in names
        }
    return summary


def count_classes(split: Split) -> tuple[Counter, Counter]:
    """Return (label -> number of images, label -> number of boxes)."""
    annotations = split.annotations
    pairs = np.column_stack([annotations.image_indices, annotations.labels])  # [A, 2]
    per_image = np.unique(pairs, axis=0)  # each label once per image
    return Counter(per_image[:, 1].tolist()), Counter(pairs[:, 1].tolist())


def write_report(folder: Path, findings: Sequence[Finding], splits: Sequence[Split]) -> None:
    """Write problems.csv, check.json and, if matplotlib is installed, dataset.png."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["severity", *COLUMNS])
    for finding in findings:
        values = [getattr(finding, name) for name in COLUMNS]
        writer.writerow([KINDS[finding.kind].severity, *values])
    # File names need not be valid UTF-8.
    write_text(folder / PROBLEMS, text.getvalue().encode("utf-8", "backslashreplace").decode())

    found: dict[str, dict[str, int]] = {}
    counts = Counter((finding.kind, finding.split) for finding in findings)
    for (kind, split), count in counts.items():
        found.setdefault(kind, {})[split] = count
    summary = {"found": found, **{split.name: summarize_split(split) for split in splits}}
    write_text(folder / SUMMARY, json.dumps(summary, indent=1) + "\n")

    try:
        if splits:
            draw_summary(splits, folder / PLOTS)
    except UserError as error:
        log.warning("no %s: %s", PLOTS, error)


def draw_summary(splits: Sequence[Split], path: Path) -> None:
    """Write a PNG with plots of image sizes and, for labelled splits, of objects, boxes and classes.

    Raises:
        UserError: matplotlib is not installed, or the file can't be written.
    """
    figure_class, canvas = figure_classes()
    labelled = [split for split in splits if split.annotations is not None]
    if labelled:
        rows, columns, size = 2, 2, (12, 8.5)
    else:
        rows, columns, size = 1, 1, (6.5, 4.5)

    figure = figure_class(figsize=size, layout="constrained", dpi=110)
    canvas(figure)
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
    """Draw a circle for each image size; its area is the fraction of images with this size."""
    axes.set(title="image sizes", xlabel="width (pixels)", ylabel="height (pixels)")
    for split in splits:
        counts = Counter(info.size_hw for info in split.image_infos if not info.error)
        if counts:
            heights, widths = np.array(list(counts)).T
            fractions = np.array(list(counts.values())) / len(split.images)
            axes.scatter(
                widths,
                heights,
                s=8 + 400 * fractions,  # a single image stays visible
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
        fractions = np.bincount(counts) / max(len(counts), 1)
        axes.step(
            np.arange(len(fractions)),
            fractions,
            where="mid",
            color=colors[split.name],
            label=f"{split.name}: mean {counts.mean():.1f}",
        )


def _draw_box_sizes(axes, splits: Sequence[Split], colors: dict) -> None:
    """Draw histograms, with lines at the limits of COCO's small, medium and large objects."""
    axes.set(
        title="box sizes",
        xlabel="square root of the area (pixels)",
        ylabel="fraction of boxes",
        xscale="log",
    )
    for split in splits:
        boxes = split.annotations.boxes_xyxy_abs
        sides = np.sqrt(np.prod(boxes[:, 2:] - boxes[:, :2], axis=1, dtype=np.float64))  # [A]
        sides = sides[sides > 0]  # the axis is logarithmic
        if len(sides):
            # Boxes in fractions of the image may all be below half a pixel.
            first = min(max(sides.min(), 0.5), sides.max())
            bins = np.geomspace(first, sides.max() * 1.01, 40)
            axes.hist(
                sides,
                bins,
                weights=np.full(len(sides), 1 / len(sides)),  # fractions instead of counts
                histtype="step",
                color=colors[split.name],
                label=f"{split.name}: {len(sides)} boxes",
            )
    for limit in (32, 96):
        axes.axvline(limit, color="0.7", linewidth=0.8)


def _draw_classes(axes, splits: Sequence[Split], colors: dict) -> None:
    """Draw the classes with the most training boxes: boxes as light bars, images that contain them as dark bars."""
    counts = {split.name: count_classes(split) for split in splits}
    names = splits[0].annotations.class_names
    _, first_boxes = counts[splits[0].name]
    order = sorted(names, key=lambda label: -first_boxes[label])[:MAX_PLOTTED_CLASSES]

    positions, width = np.arange(len(order)), 0.8 / len(splits)
    for number, (split, (images, boxes)) in enumerate(counts.items()):
        at = positions + (number - (len(splits) - 1) / 2) * width
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
    shown = f" ({len(order)} of {len(names)})" if len(order) < len(names) else ""
    axes.set(title=f"classes{shown}", yscale="symlog", ylabel="count", xticks=positions)
    texts = [escape(class_text(names[label], label)[:16]) for label in order]
    axes.set_xticklabels(texts, rotation=90, fontsize=7)
    set_fonts(axes.get_xticklabels())


# ---------------------------------------------------------------------------------------------------------- the command


def prepare_folder(args: Namespace) -> Path | None:
    """Create the output folder and delete the files of an earlier check. None without `--output_dir`.

    Raises:
        UserError: the folder can't be written, is inside the image folder, or has files of an earlier check and
            `--overwrite` is not given.
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
        split.image_infos = inspect_images(split, settings.num_workers)
        split.mask_faults = inspect_all_masks(split, settings.num_workers)
    findings += run_checks(splits)

    log.info("%s", table(findings, splits))
    if folder is not None:
        write_report(folder, findings, splits)
        written = [str(folder / name) for name in FILES if (folder / name).exists()]
        log.info("wrote all findings, statistics and plots: %s", ", ".join(written))
    elif findings:
        log.info("--output_dir DIR writes all findings to a file")

    if any(KINDS[finding.kind].severity == "problem" for finding in findings):
        sys.exit(1)


if __name__ == "__main__":
    run_script(main, parse)
