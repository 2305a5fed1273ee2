"""The checks at the start of a run: those that need only the annotations, and a few images."""

import time
from collections.abc import Sequence
from itertools import groupby

import numpy as np

from datasets.images.pixels import ROTATED
from datasets.labelled.annotations import Annotations
from datasets.labelled.checks.boxes import are_outside_files, find_boxes_outside_files
from datasets.labelled.checks.finding import Finding
from datasets.labelled.checks.formats import (
    are_fractions,
    boxes_with_sizes,
    describe_format,
    misfit_finding,
)
from datasets.labelled.checks.image_files import sample_images
from datasets.labelled.checks.shared_images import find_evaluated_training_images
from datasets.labelled.checks.split import Split, evenly_spaced
from datasets.labelled.checks.table import CHECKS, IMAGE_CHECKS, KINDS, Check, run_checks
from datasets.sample import BadImageError, SampleDataset, TooFewProposalsError
from util.errors import UserError
from util.logger import log
from util.random_state import SampleRNG
from util.settings import Settings

PROBED_IMAGES = 8  # images of each split that are loaded at the start of a run
PROBE_SECONDS = 2.0  # stop loading them after this time
OTHER_PROPOSALS = "use other --proposals"
MIN_BOXES_TO_REFUSE = 4  # of fewer boxes, most may be unusable by chance: they are only warned of
# What a sample of the images shows at the start of a run. `probe_images` reports unreadable images and wrong sizes.
SAMPLE_KINDS = ("rotated by EXIF", "one color", "fewer than 16 bits", "narrow range", "transparent")
# The parser logs the boxes that it skips since they can't be used. What it only records is logged here.
LOGGED_BY_PARSER = {check.kind for check in CHECKS if check.find is None} - {
    "box partly outside",
    "many crowds",
    "marked ignore",
    "rotated box",
    "area unusable",
    "crowd",
}


def run_startup_checks(
    train: SampleDataset | None, val: SampleDataset | None, settings: Settings
) -> dict[str, object]:
    """Check the annotations and a few images, and log one line per kind of finding.

    A dataset without the attribute `annotations` only has a few images loaded.

    Args:
        train: None in evaluation.
        val: None in pre-training.

    Returns:
        Statistics of the data, which the run records in its settings file.

    Raises:
        UserError: none of the images that were loaded can be used, most boxes of a split are skipped, or the training
            set has no box in pixels of its images.
    """
    splits = [
        Split(name, dataset, settings.num_queries, getattr(dataset, "num_classes", 0))
        for name, dataset in (("train", train), ("val", val))
        if dataset is not None
    ]
    record: dict[str, object] = {split.name: {"images": len(split.images)} for split in splits}
    warned = [line for split in splits for line in probe_images(split.images, split.name)]
    for split in splits:
        split.sample_infos = sample_images(split)
        if split.annotations is not None:
            record[split.name].update(summarize_annotations(split.annotations))
            warned += _check_boxes(split, settings)

    _log_rotations(splits, record)
    warned += _warn_of_findings(splits)
    if train is None and val is not None:
        warned += _warn_of_training_images(splits[0], settings)

    for line in warned:
        log.warning("%s", line)
    _log_summary(len(warned) + sum(_num_logged_by_parser(split) for split in splits))
    return {**record, "warnings": warned}


def _check_boxes(split: Split, settings: Settings) -> list[str]:
    """Return warnings about the boxes of a whole split.

    Raises:
        UserError: most of them can't be used, or a training set has none.
    """
    _refuse_skipped_boxes(split)
    warned = _check_has_boxes(split, settings)
    if split.name == "train":
        _refuse_unusable_boxes(split)
    return warned


def _warn_of_findings(splits: Sequence[Split]) -> list[str]:
    """Return one line for each kind of finding that was not logged before and is worth a warning."""
    skipped = LOGGED_BY_PARSER | ({check.kind for check in IMAGE_CHECKS} - set(SAMPLE_KINDS))
    checks = [check for check in CHECKS if check.severity != "info" and check.kind not in skipped]
    warned = []
    for kind, group in groupby(run_checks(splits, checks), key=lambda finding: finding.kind):
        tried = _count_tried(splits, kind) if kind in SAMPLE_KINDS else 0
        warned.append(_format_findings(KINDS[kind], list(group), tried))
    return warned


def _warn_of_training_images(val: Split, settings: Settings) -> list[str]:
    """Return a warning if images of an evaluation are training images of the checkpoint."""
    kind = KINDS["shared image"]
    shared = [
        finding._replace(kind=kind.kind)
        for finding in find_evaluated_training_images(val, settings)
    ]
    return [_format_findings(kind, shared)] if shared else []


def _num_logged_by_parser(split: Split) -> int:
    """Return the number of kinds of findings that the parser of the annotations logged."""
    if split.annotations is None:
        return 0
    return len(split.annotations.findings.keys() & LOGGED_BY_PARSER)


def _log_rotations(splits: Sequence[Split], record: dict[str, object]) -> None:
    """Log and record that images are rotated because the annotations list their rotated size."""
    for split in splits:
        num_rotated = sum(info.rotation == ROTATED for info in split.sample_infos.values())
        if num_rotated and split.exif is None and split.annotations is not None:
            record["exif"] = "apply"
            log.info(
                "%s images are rotated as their EXIF orientation says where the annotations list the rotated size: %d "
                "of %d that were tried",
                split.name,
                num_rotated,
                len(split.sample_infos),
            )


def _count_tried(splits: Sequence[Split], kind: str) -> int:
    """Return the number of images in the samples that could show this kind of finding."""
    infos = [info for split in splits for info in split.sample_infos.values()]
    # The header of an image tells its orientation, but not what its pixels show.
    return len(infos) if kind == "rotated by EXIF" else sum(bool(info.digest) for info in infos)


def _format_findings(check: Check, findings: Sequence[Finding], tried: int = 0) -> str:
    """tried: number of images in a sample; 0: all were checked."""
    of_sample = f" of {tried} images that were tried" if tried else ""
    return f"{check.kind}: {len(findings)}{of_sample} ({check.meaning}), the first: {findings[0]}"


def _log_summary(num_warnings: int) -> None:
    if num_warnings:
        log.info(
            "data check: %d warning(s); python tools/check_dataset.py reads every image and lists all findings",
            num_warnings,
        )
    else:
        log.info("data check: no warnings")


def probe_images(dataset: SampleDataset, image_set: str = "train") -> list[str]:
    """Load a few evenly spaced images, for at most PROBE_SECONDS.

    image_set: "train" or "val", which tells what happens to images that can't be used.

    Returns:
        A warning if some of them can't be used, and one if some have too few proposals.

    Raises:
        UserError: none of them can be used.
    """
    num_probed = min(len(dataset), PROBED_IMAGES)
    tried, bad, boxless = _try_images(dataset)
    # If the time was up after a single slow image, that image says nothing about a large dataset.
    if len(bad) + len(boxless) == tried and (tried == num_probed or tried > 1):
        has_sizes = getattr(dataset, "annotations", None) is not None
        remedy_of_bad = f"check the image folder{' and the listed sizes' if has_sizes else ''}"
        first, remedy = (bad[0], remedy_of_bad) if bad else (boxless[0], OTHER_PROPOSALS)
        raise UserError(
            f"none of {tried} images that were tried can be used, the first is {first}; {remedy}"
        )
    warned = []
    if bad:
        is_train = image_set == "train"
        effect = "other images are used instead" if is_train else "their objects count as missed"
        warned.append(
            f"{len(bad)} of {tried} images that were tried can't be used, the first is {bad[0]}; {effect}"
        )
    if boxless:
        warned.append(
            f"{len(boxless)} of {tried} images that were tried have too few proposals, the first is {boxless[0]}; the "
            f"next image is used instead: leave them out, or {OTHER_PROPOSALS}"
        )
    return warned


def _try_images(dataset: SampleDataset) -> tuple[int, list[str], list[str]]:
    """Load a few images.

    Returns:
        (number of images, errors of bad images, errors of images with too few proposals); an error names its image.
    """
    start = time.monotonic()
    tried = 0
    bad: list[str] = []
    boxless: list[str] = []
    for index in evenly_spaced(len(dataset), PROBED_IMAGES):
        if tried and time.monotonic() - start > PROBE_SECONDS:
            break
        tried += 1
        try:
            dataset.load(index, SampleRNG.from_key(dataset.seed, 0, index))
        except TooFewProposalsError as error:
            boxless.append(f"{dataset.path(index)}: {error}")
        except BadImageError as error:
            bad.append(f"{dataset.path(index)}: {error}")
    return tried, bad, boxless


def summarize_annotations(annotations: Annotations) -> dict[str, object]:
    """Return statistics of a split, which a run records."""
    counts = np.diff(annotations.offsets)  # objects of each image
    return {
        "boxes": len(annotations.labels),
        "classes": len(annotations.class_names),
        "images_without_objects": int((counts == 0).sum()),
        "most_objects_in_an_image": int(counts.max(initial=0)),
        "found": {kind: len(ids) for kind, (ids, _) in annotations.findings.items()},
    }


def _check_has_boxes(split: Split, settings: Settings) -> list[str]:
    """Return a warning if a validation set has no box.

    Raises:
        UserError: a training set has no box.
    """
    source = split.annotations.source
    if len(split.annotations.labels):
        return []
    if split.name == "train":
        raise UserError(
            f"{source} has no box that can be trained on: check its annotations, or pre-train without labels with "
            "main.py"
        )
    if settings.eval:
        return [f"{source} has no box: results.json gets the detections, there is no AP"]
    return [f"{source} has no box: AP will be -1"]


def _refuse_skipped_boxes(split: Split) -> None:
    """Check that most boxes of the whole file have an area inside their image. Otherwise the others are wrong, too.

    Raises:
        UserError: more than half of them are skipped, and they are not just a few.
    """
    annotations, misfits = split.annotations, split.annotations.misfits
    count = int(misfits.skipped.sum())
    if misfits.total < MIN_BOXES_TO_REFUSE or count <= misfits.total / 2:
        return
    if annotations.difficult is None:
        wanted = "bbox must be [x, y, width, height]"
    else:
        wanted = "<bndbox> must have the corners xmin, ymin, xmax, ymax"
    guess = describe_format(split)
    first = misfit_finding(split, int(np.flatnonzero(misfits.skipped)[0]))
    raise UserError(
        f"{annotations.source}: {count} of {misfits.total} boxes are outside their image or have no area, the first: "
        f"{first}; {wanted} in pixels of the image, not scaled to 0..1000 or another image size"
        f"{f' ({guess})' if guess else ''}: correct the boxes, or the listed image sizes"
    )


def _refuse_unusable_boxes(split: Split) -> None:
    """Check that some boxes are in pixels of the image files.

    Raises:
        UserError: all boxes are fractions, or most are outside their files.
    """
    source, count = split.annotations.source, len(split.annotations.labels)
    if are_fractions(split.annotations).all():
        raise UserError(
            f"{source}: all {count} boxes look like fractions, the first is {split.box_finding(0)}: bbox is in pixels, "
            "so scale them by the width and height of the image"
        )
    rows, _ = boxes_with_sizes(split)
    outside = are_outside_files(split)[rows]
    if outside.sum() > len(rows) / 2:  # then the others are in wrong places, too
        raise UserError(
            f"{source}: {outside.sum()} of {len(rows)} boxes that were tried are outside the pixels of their image "
            f"files, the first: {next(find_boxes_outside_files(split))}; give boxes in pixels of the files"
        )
