"""Reads a data set whole and lists everything that is wrong with it.

    python tools/check_dataset.py --coco_path data/MSCoco --output_dir check
    python tools/check_dataset.py --dataset_file custom --train_images photographs --train_annotations boxes.json
    python tools/check_dataset.py --imagenet_path photographs

Every image is decoded as in training. With `--output_dir` it writes `problems.csv` (each finding with its file and
ids), `check.json` (their numbers, and those of images, boxes and classes) and `dataset.png` (image sizes, objects an
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
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # `python tools/NAME.py` works from any directory

from datasets import build_dataset, classes_in
from datasets.images.image_folder import ImageFile, ImageFolder
from datasets.labelled.checks import (
    KINDS,
    ImageFacts,
    Problem,
    annotation_problems,
    compare_classes,
    describe,
    duplicates,
    image_problems,
    inspect_image,
)
from datasets.labelled.coco import PUBLISHED_NUM_CLASSES
from util.errors import UserError
from util.files import check_apart, make_folder, write_atomically, write_text
from util.logger import Progress, log
from util.plots.boxes import PALETTE
from util.plots.curves import figure_classes
from util.runs.session import run_script
from util.settings.arguments import Parser, make_parser, resolve, was_given
from util.settings.flags import FINETUNE, PRETRAIN

SHARED_FLAGS = (  # as the entry scripts declare them
    "imagenet_path",
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
CHUNK = 16  # files that a process gets at once


def parse(argv: list[str]) -> Namespace:
    parser = Parser("tools/check_dataset.py", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--output_dir",
        metavar="DIR",
        help="where problems.csv, check.json and dataset.png go; empty: nothing is written",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace those of an earlier check")
    known = {action.dest: action for script in (PRETRAIN, FINETUNE) for action in make_parser(script)._actions}
    for name in SHARED_FLAGS:
        parser._add_action(known[name])
    return parser.parse_args(argv)


@dataclass
class Split:
    """The images of a split: their paths, what reading them showed, and the data set behind them where it is labelled.

    files: what is read, where that is not the path.
    """

    name: str
    paths: Sequence[str]
    dataset: object | None = None
    facts: list[ImageFacts] = field(default_factory=list)
    files: Sequence[ImageFile] | None = None

    def image_id(self, index: int) -> int | None:
        return int(self.dataset.annotations.image_ids[index]) if self.dataset else None

    def listed_hw(self, index: int) -> tuple[int, int]:
        return tuple(self.dataset.annotations.sizes_hw[index].tolist()) if self.dataset else (0, 0)


# ---------------------------------------------------------------------------------------------------- what is read


def settings_from(args: Namespace) -> Namespace:
    """All flags as a training would have them; builders go on where training would stop at a missing image."""
    settings = make_parser(FINETUNE).parse_args([])
    for name in SHARED_FLAGS:
        setattr(settings, name, getattr(args, name))
    resolve(settings)
    settings.check_only = True
    return settings


def open_splits(settings: Namespace) -> tuple[list[Split], list[Problem]]:
    """The splits that can be read, and a problem for each that can't."""
    if settings.imagenet_path:
        images = ImageFolder(settings.imagenet_path)
        numbers = range(len(images))
        return [Split("train", [images.path(i) for i in numbers], files=[images.file(i) for i in numbers])], []
    names = ["train", "val"]
    if settings.dataset_file == "custom":  # one of both may be checked alone
        names = [
            name for name in names if getattr(settings, f"{name}_images") or getattr(settings, f"{name}_annotations")
        ] or names
    limit = settings.num_classes
    if settings.dataset_file == "coco":
        settings.num_classes = None  # ids beyond the classes are listed one by one
    settings.classes = None
    splits, problems = [], []
    for name in names:
        try:
            dataset = build_dataset(name, settings)
        except UserError as error:
            problems.append(Problem("unusable", name, "", str(error)))
            continue
        settings.classes = settings.classes or classes_in(dataset)
        splits.append(Split(name, [dataset.path(i) for i in range(len(dataset))], dataset))
    settings.num_classes = limit
    return splits, problems


def read_images(split: Split, workers: int) -> list[ImageFacts]:
    """Decodes every image of a split in as many as `workers` processes (0: in this one)."""
    workers = min(workers, len(split.paths) // CHUNK)
    bar = Progress(len(split.paths), f"{split.name} images")

    def counted(found: Iterable[ImageFacts]) -> list[ImageFacts]:
        facts = []
        for fact in found:
            facts.append(fact)
            bar.step()
        return facts

    if not workers:
        return counted(map(inspect_image, split.files or split.paths))
    try:
        with ProcessPoolExecutor(workers, initializer=_leave_ctrl_c_to_the_main_process) as pool:
            return counted(pool.map(inspect_image, split.files or split.paths, chunksize=CHUNK))
    except BrokenProcessPool as error:
        raise UserError(
            "a process that decoded images died (not enough memory, or a file that a decoder can't stand): "
            "--num_workers 0 shows where"
        ) from error


def _leave_ctrl_c_to_the_main_process() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


# ---------------------------------------------------------------------------------------------------- what is wrong


def find_problems(splits: Sequence[Split], settings: Namespace) -> Iterator[Problem]:
    """Everything about images whose `facts` are there, their boxes, and two splits together."""
    for split in splits:
        for index, facts in enumerate(split.facts):
            yield from image_problems(
                facts, split.paths[index], split.name, split.listed_hw(index), split.image_id(index)
            )
        if split.dataset:
            yield from annotation_problems(
                split.dataset, split.name, settings.num_queries, _class_limit(split, settings)
            )
        for first, *others in duplicates(split.facts).values():
            for other in others:
                yield Problem(
                    "duplicate image", split.name, split.paths[other], f"as {split.paths[first]}", split.image_id(other)
                )
    if len(splits) == 2:
        train, val = splits
        for text in compare_classes(train.dataset, val.dataset):
            yield Problem("classes differ", "val", val.dataset.annotation_file, text)
        in_train = duplicates(train.facts)
        for digest, indices in duplicates(val.facts).items():
            for index in indices if digest in in_train else ():
                first = in_train[digest][0]
                detail = f"as {train.paths[first]} (image {train.image_id(first)})"
                yield Problem("shared image", "val", val.paths[index], detail, val.image_id(index))


def _class_limit(split: Split, settings: Namespace) -> int:
    """Other data than COCO's count their classes themselves."""
    if settings.dataset_file != "coco":
        return split.dataset.num_classes
    return settings.num_classes if was_given(settings, "num_classes") else PUBLISHED_NUM_CLASSES


# ---------------------------------------------------------------------------------------------------- what is told


def table(problems: Sequence[Problem], splits: Sequence[Split]) -> str:
    """A line a kind, the worst first: how many in each split, what it means and the first of them."""
    numbers = Counter((problem.kind, problem.split) for problem in problems)
    first = {problem.kind: _where(problem) for problem in reversed(problems)}
    unusable = [problem.detail for problem in problems if problem.kind == "unusable"]
    if unusable:
        first["unusable"] = f"\n{'':17}".join(unusable)
    lines = [f"{'':8} {'':26} {'train':>8} {'val':>8}"]
    for kind, (severity, meaning) in KINDS.items():
        if kind in first:
            counts = [f"{numbers[kind, split]:>8}" for split in ("train", "val")]
            lines.append(f"{severity:8} {kind:26} {' '.join(counts)}  {meaning}\n{'':10}first: {first[kind]}")
    images = ", ".join(f"{len(split.paths)} {split.name} images" for split in splits)
    severities = Counter(problem.severity for problem in problems)
    total = f"{images or 'no image'}: {severities['problem']} problems, {severities['warning']} warnings"
    return "\n".join([*(lines if len(lines) > 1 else []), total])


def _where(problem: Problem) -> str:
    ids = {"image": problem.image_id, "annotation": problem.annotation_id}
    parts = [problem.file, *(f"{name} {number}" for name, number in ids.items() if number is not None), problem.detail]
    return ", ".join(part for part in parts if part)


def numbers_of(split: Split) -> dict[str, object]:
    """Counts of a split, and of its classes."""
    sizes = np.array([facts.size_hw for facts in split.facts if not facts.error]).reshape(-1, 2)
    numbers = {"images": len(split.paths), "readable": len(sizes)}
    if len(sizes):
        numbers["median_size_hw"] = np.median(sizes, 0).astype(int).tolist()
    if split.dataset:
        numbers.update(describe(split.dataset.annotations))
        images, boxes = count_classes(split)
        names = split.dataset.class_names
        numbers["classes"] = {names[label]: {"images": images[label], "boxes": boxes[label]} for label in names}
    return numbers


def count_classes(split: Split) -> tuple[Counter, Counter]:
    """(images, boxes) of each label."""
    annotations = split.dataset.annotations
    image_of = np.repeat(np.arange(len(annotations)), np.diff(annotations.offsets))
    pairs = np.unique(np.column_stack([image_of, annotations.labels]), axis=0)
    return Counter(pairs[:, 1].tolist()), Counter(annotations.labels.tolist())


def write_report(folder: Path, problems: Sequence[Problem], splits: Sequence[Split]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows([getattr(problem, name) for name in COLUMNS] for problem in problems)
    # Names of files need not be UTF-8.
    write_text(folder / PROBLEMS, text.getvalue().encode("utf-8", "backslashreplace").decode())
    counts = Counter((problem.kind, problem.split) for problem in problems)
    found = {kind: {split: counts[kind, split] for split in ("train", "val") if counts[kind, split]} for kind in KINDS}
    summary = {
        "found": {kind: number for kind, number in found.items() if number},
        **{split.name: numbers_of(split) for split in splits},
    }
    write_text(folder / SUMMARY, json.dumps(summary, indent=1) + "\n")
    try:
        if splits:
            draw_summary(splits, folder / PICTURE)
    except UserError as error:
        log.warning("no %s: %s", PICTURE, error)


# ---------------------------------------------------------------------------------------------------- the picture


def draw_summary(splits: Sequence[Split], path: Path) -> None:
    """Image sizes; of labelled images also objects an image, box sizes, and images and boxes a class.

    Raises:
        UserError: matplotlib is not installed, or the file can't be written.
    """
    figure_class, canvas = figure_classes()
    labelled = [split for split in splits if split.dataset]
    figure = figure_class(figsize=(12, 8.5) if labelled else (6.5, 4.5), layout="constrained", dpi=110)
    canvas(figure)
    rows, columns = (2, 2) if labelled else (1, 1)
    axes = [figure.add_subplot(rows, columns, number + 1) for number in range(rows * columns)]
    colours = {split.name: np.divide(PALETTE[number], 255) for number, split in enumerate(splits)}
    _draw_image_sizes(axes[0], splits, colours)
    if labelled:
        _draw_objects(axes[1], labelled, colours)
        _draw_box_sizes(axes[2], labelled, colours)
        _draw_classes(axes[3], labelled, colours)
    for one in axes:
        one.spines[["top", "right"]].set_visible(False)
        if one.get_legend_handles_labels()[0]:
            one.legend(fontsize=8, frameon=False)
    write_atomically(path, lambda file: figure.savefig(file, format="png"))


def _draw_image_sizes(axes, splits: Sequence[Split], colours: dict) -> None:
    axes.set(title="image sizes", xlabel="width (pixels)", ylabel="height (pixels)")
    for split in splits:
        sizes = Counter(facts.size_hw for facts in split.facts if not facts.error)
        if sizes:
            heights, widths = np.array(list(sizes)).T
            area = 8 + 400 * np.array(list(sizes.values())) / len(split.paths)
            axes.scatter(
                widths, heights, s=area, color=colours[split.name], alpha=0.5, label=f"{split.name}: {len(split.paths)}"
            )
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)


def _draw_objects(axes, splits: Sequence[Split], colours: dict) -> None:
    axes.set(title="objects an image", xlabel="objects", ylabel="share of images")
    for split in splits:
        counts = np.diff(split.dataset.annotations.offsets)
        share = np.bincount(counts) / max(len(counts), 1)
        axes.step(
            np.arange(len(share)),
            share,
            where="mid",
            color=colours[split.name],
            label=f"{split.name}: mean {counts.mean():.1f}",
        )


def _draw_box_sizes(axes, splits: Sequence[Split], colours: dict) -> None:
    """The borders of COCO's small, medium and large are drawn."""
    axes.set(title="box sizes", xlabel="square root of the area (pixels)", ylabel="share of boxes", xscale="log")
    for split in splits:
        boxes = split.dataset.annotations.boxes_xyxy_abs
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
                color=colours[split.name],
                label=f"{split.name}: {len(sides)} boxes",
            )
    for border in (32, 96):
        axes.axvline(border, color="0.7", linewidth=0.8)


def _draw_classes(axes, splits: Sequence[Split], colours: dict) -> None:
    """Those with the most training boxes, the light bars, and the images that they are in, the dark ones."""
    counts = {split.name: count_classes(split) for split in splits}
    names = splits[0].dataset.class_names
    order = sorted(names, key=lambda label: -counts[splits[0].name][1][label])[:SHOWN_CLASSES]
    places, width = np.arange(len(order)), 0.8 / len(splits)
    for number, (split, (images, boxes)) in enumerate(counts.items()):
        at = places + (number - (len(splits) - 1) / 2) * width
        axes.bar(at, [boxes[label] for label in order], width, color=colours[split], alpha=0.4, label=f"{split}: boxes")
        axes.bar(at, [images[label] for label in order], width / 2, color=colours[split], label=f"{split}: images")
    more = f" ({len(order)} of {len(names)})" if len(order) < len(names) else ""
    axes.set(title=f"classes{more}", yscale="symlog", ylabel="number", xticks=places)
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
    check_apart(args.output_dir, args.imagenet_path or "")
    folder = make_folder(args.output_dir, FILES, args.overwrite)
    for name in FILES:
        (folder / name).unlink(missing_ok=True)
    return folder


def main(args: Namespace) -> None:
    folder = prepare_folder(args)
    settings = settings_from(args)
    splits, problems = open_splits(settings)
    for split in splits:
        split.facts = read_images(split, settings.num_workers)
    problems += find_problems(splits, settings)
    problems.sort(key=lambda problem: list(KINDS).index(problem.kind))
    log.info("%s", table(problems, splits))
    if folder is not None:
        write_report(folder, problems, splits)
        written = [str(folder / name) for name in FILES if (folder / name).exists()]
        log.info("every finding, numbers, picture: %s", ", ".join(written))
    elif problems:
        log.info("--output_dir DIR writes every finding to a file")
    if any(problem.severity == "problem" for problem in problems):
        sys.exit(1)


if __name__ == "__main__":
    run_script(main, parse)
