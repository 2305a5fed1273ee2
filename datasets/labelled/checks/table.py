"""The table of all checks: a kind of finding, how bad it is, which function finds it, and what to do."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

from datasets.labelled.checks import (
    annotations,
    boxes,
    classes,
    formats,
    image_files,
    masks,
    shared_images,
)
from datasets.labelled.checks.finding import Finding
from datasets.labelled.checks.split import Split


class Check(NamedTuple):
    """A row of the table.

    Attributes:
        kind: name of the finding.
        severity: "problem": wrong metrics, or data that is skipped. "warning": worth a look. "info": only counted.
        find: yields the findings of a split, or of the training and the validation split. None if the parser of the
            annotations has recorded them (`findings_of_parser`).
        meaning: what the finding means for training or evaluation, and the remedy.
    """

    kind: str
    severity: str
    find: Callable[..., Iterator[Finding]] | None
    meaning: str


IMAGE_CHECKS = (
    Check(
        kind="image unreadable",
        severity="problem",
        find=image_files.find_unreadable_images,
        meaning="can't be decoded; training uses the next image instead",
    ),
    Check(
        kind="size differs",
        severity="problem",
        find=image_files.find_size_mismatches,
        meaning="not the size in the annotations; training skips the image",
    ),
    Check(
        kind="duplicate image",
        severity="warning",
        find=image_files.find_duplicate_images,
        meaning="the same pixels twice in a split",
    ),
    Check(
        kind="rotated by EXIF",
        severity="warning",
        find=image_files.find_undecided_orientations,
        meaning="used as stored, since no size tells how it was annotated: look at samples.png, and give --exif ignore "
        "if the boxes fit, else --exif apply",
    ),
    Check(
        kind="one color",
        severity="warning",
        find=image_files.find_images_of_one_color,
        meaning="almost no contrast in 8 bits: check the files; save images of more bits, and masks, as 8 bit with "
        "their full range",
    ),
    Check(
        kind="fewer than 16 bits",
        severity="warning",
        find=image_files.find_unused_bits,
        meaning="16-bit gray whose largest value needs fewer bits, which are scaled to 8: save all images as 8 bit if "
        "brightness must be comparable",
    ),
    Check(
        kind="narrow range",
        severity="warning",
        find=image_files.find_narrow_ranges,
        meaning="16-bit gray, scaled to 8 bits by its largest value, becomes almost flat: save it as 8 bit, with the "
        "range that it uses stretched",
    ),
    Check(
        kind="transparent",
        severity="warning",
        find=image_files.find_transparent_images,
        meaning="shown on white, as in viewers: save without the fourth channel if it is something else",
    ),
    Check(
        kind="several frames",
        severity="info",
        find=image_files.find_several_frames,
        meaning="an animation or several pages: the first one is used",
    ),
    Check(
        kind="metadata damaged",
        severity="info",
        find=image_files.find_damaged_metadata,
        meaning="the pixels are read; an EXIF orientation, if there is one, may be lost",
    ),
    Check(
        kind="EXIF orientation",
        severity="info",
        find=image_files.find_decided_orientations,
        meaning="used as the sizes in the annotations or --exif say",
    ),
)
ANNOTATION_CHECKS = (
    Check(
        kind="unusable",
        severity="problem",
        find=None,
        meaning="the dataset can't be read",
    ),
    Check(
        kind="image absent",
        severity="problem",
        find=None,
        meaning="listed, but the file does not exist",
    ),
    Check(
        kind="image not listed",
        severity="problem",
        find=None,
        meaning="an annotation of an image that the file does not list",
    ),
    Check(
        kind="box not finite",
        severity="problem",
        find=None,
        meaning="NaN or infinity in a box; the box is skipped",
    ),
    Check(
        kind="box without area",
        severity="problem",
        find=None,
        meaning="width or height of 0 or less; the box is skipped",
    ),
    Check(
        kind="box outside image",
        severity="problem",
        find=None,
        meaning="the whole box is outside its image; the box is skipped",
    ),
    Check(
        kind="segmentation broken",
        severity="problem",
        find=partial(masks.find_mask_faults, "segmentation broken"),
        meaning="with --masks, training skips the image: polygons are lists [x, y, x, y, ...] in pixels, RLE is of the "
        "size of the image",
    ),
    Check(
        kind="no panoptic segments",
        severity="problem",
        find=None,
        meaning="no PNG, or no annotation of the image; training skips it, evaluation refuses it",
    ),
    Check(
        kind="panoptic PNG unusable",
        severity="problem",
        find=partial(masks.find_mask_faults, "panoptic PNG unusable"),
        meaning="damaged, or of another size than the image; training skips the image",
    ),
    Check(
        kind="segment without pixels",
        severity="problem",
        find=partial(masks.find_mask_faults, "segment without pixels"),
        meaning="listed in segments_info, but not in the PNG: skipped in training",
    ),
    Check(
        kind="segment not listed",
        severity="problem",
        find=partial(masks.find_mask_faults, "segment not listed"),
        meaning="pixels of the PNG with an id that segments_info lacks: no object in training; PQ can't be computed",
    ),
    Check(
        kind="mask empty",
        severity="warning",
        find=partial(masks.find_mask_faults, "mask empty"),
        meaning="the mask has no pixel in the image, and is trained on as such: draw it again or remove the object",
    ),
    Check(
        kind="mask differs from box",
        severity="warning",
        find=partial(masks.find_mask_faults, "mask differs from box"),
        meaning="the box around the mask is far from bbox: one of them may belong to another object",
    ),
    Check(
        kind="category not listed",
        severity="problem",
        find=None,
        meaning="not evaluated; --dataset_file custom refuses the file",
    ),
    Check(
        kind="category out of range",
        severity="problem",
        find=classes.find_labels_out_of_range,
        meaning="no row in the class head: --dataset_file custom numbers the classes from 0; or a larger --num_classes",
    ),
    Check(
        kind="box in fractions",
        severity="problem",
        find=formats.find_fraction_boxes,
        meaning="boxes look like fractions: bbox is in pixels, so scale them by the width and height of the image",
    ),
    Check(
        kind="boxes in percent",
        severity="problem",
        find=formats.find_percent_boxes,
        meaning="boxes look like percentages: bbox is in pixels, so scale them by the image's size / 100",
    ),
    Check(
        kind="boxes as corners",
        severity="problem",
        find=formats.find_corner_boxes,
        meaning="boxes look like [x0, y0, x1, y1]: bbox is [x, y, width, height], so subtract x0 and y0",
    ),
    Check(
        kind="box outside file",
        severity="problem",
        find=boxes.find_boxes_outside_files,
        meaning="no image size is listed, and the box is outside the pixels of the file: it is skipped in training "
        "and counts as missed in evaluation; boxes must be in pixels of the image file",
    ),
    Check(
        kind="many crowds",
        severity="warning",
        find=None,
        meaning="iscrowd 1: not trained on and not counted in AP. Single objects, such as CVAT's masks, need iscrowd 0",
    ),
    Check(
        kind="marked ignore",
        severity="warning",
        find=None,
        meaning="ignore 1: treated as a crowd, not trained on and not counted in AP",
    ),
    Check(
        kind="rotated box",
        severity="warning",
        find=None,
        meaning="attributes.rotation of CVAT: the upright box around the rotated rectangle is used",
    ),
    Check(
        kind="area unusable",
        severity="warning",
        find=None,
        meaning="not finite, 0 or less, or larger than the box: AP by size uses the area of the box",
    ),
    Check(
        kind="no segmentation",
        severity="warning",
        find=masks.find_unsegmented_objects,
        meaning="with --masks, the whole box of such an object is its mask, in training and in evaluation: add "
        "polygons or RLE, or remove the object",
    ),
    Check(
        kind="more objects than queries",
        severity="problem",
        find=annotations.find_more_objects_than_queries,
        meaning="needs a larger --num_queries to detect them all",
    ),
    Check(
        kind="box partly outside",
        severity="warning",
        find=boxes.find_boxes_partly_outside,
        meaning="clipped to its image in training; if there are many, is bbox [x, y, width, height] in pixels?",
    ),
    Check(
        kind="counted from 0",
        severity="warning",
        find=partial(annotations.findings_of_parser, "counted from 0"),
        meaning="boxes of XML files are read as counted from 1, so that these are one pixel off: negligible, unless "
        "objects are tiny",
    ),
    Check(
        kind="boxes in another format",
        severity="warning",
        find=formats.find_boxes_in_another_format,
        meaning="nothing is converted: correct these boxes",
    ),
    Check(
        kind="box twice",
        severity="warning",
        find=boxes.find_duplicate_boxes,
        meaning="the same class and box twice in an image",
    ),
    Check(
        kind="file name twice",
        severity="warning",
        find=annotations.find_duplicate_file_names,
        meaning="several images list the same file: keep one entry",
    ),
    Check(
        kind="file name differs",
        severity="warning",
        find=partial(annotations.find_noted_images, "file name differs"),
        meaning="the only file that the listed name can mean is used: correct the name",
    ),
    Check(
        kind="XML names another image",
        severity="warning",
        find=partial(annotations.find_noted_images, "XML names another image"),
        meaning="the image with the XML file's own name is used: correct <filename>",
    ),
    Check(
        kind="class name broken",
        severity="warning",
        find=classes.find_broken_class_names,
        meaning="not valid Unicode, shown with its code: correct it",
    ),
    Check(
        kind="class names alike",
        severity="warning",
        find=classes.find_similar_class_names,
        meaning="two classes differ only in case, spaces or accents' encoding: merge them if they are one",
    ),
    Check(
        kind="image without XML file",
        severity="info",
        find=partial(annotations.findings_of_parser, "image without XML file"),
        meaning="in the image folder, but no XML file is about it; not used",
    ),
    Check(
        kind="no objects",
        severity="info",
        find=annotations.find_images_without_objects,
        meaning="an image without boxes",
    ),
    Check(
        kind="crowd",
        severity="info",
        find=None,
        meaning="iscrowd 1: not trained on, and not counted in AP",
    ),
    Check(
        kind="category without boxes",
        severity="info",
        find=classes.find_categories_without_boxes,
        meaning="can't be learned: remove it from the categories if it is not a class",
    ),
    Check(
        kind="size not listed",
        severity="info",
        find=annotations.find_unlisted_sizes,
        meaning="no width and height, or 0: those of the file are used",
    ),
)
PAIR_CHECKS = (
    Check(
        kind="shared image",
        severity="problem",
        find=shared_images.find_shared_images,
        meaning="in both splits, which makes AP too high: remove it from one",
    ),
    Check(
        kind="similar image",
        severity="warning",
        find=shared_images.find_similar_images,
        meaning="looks like one of the other split: a re-encoded or resized copy, or a frame of the same video, makes "
        "AP too high: remove it from one split",
    ),
    Check(
        kind="classes differ",
        severity="warning",
        find=classes.find_class_mismatches,
        meaning="AP means little: use the same list of categories",
    ),
)
SEVERITIES = ("problem", "warning", "info")  # the worst first
CHECKS = sorted(
    (*IMAGE_CHECKS, *ANNOTATION_CHECKS, *PAIR_CHECKS),
    key=lambda check: SEVERITIES.index(check.severity),
)
KINDS = {check.kind: check for check in CHECKS}


def run_checks(splits: Sequence[Split], checks: Sequence[Check] = CHECKS) -> list[Finding]:
    """Return all findings, the worst kinds first. Image checks find nothing in a split without `image_infos`."""
    labelled = [split for split in splits if split.annotations is not None]
    findings = []
    for check in checks:
        if check in PAIR_CHECKS:
            calls = [labelled] if len(labelled) == 2 else []
        elif check in IMAGE_CHECKS:
            calls = [[split] for split in splits]
        else:
            calls = [[split] for split in labelled]

        for arguments in calls:
            if check.find is None:
                found = annotations.findings_of_parser(check.kind, *arguments)
            else:
                found = check.find(*arguments)
            findings += [finding._replace(kind=check.kind) for finding in found]
    return findings
