"""Which annotated objects are trained on, and what is wrong with the others.

Shapes: I images, A annotated objects (boxes) of all images.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from datasets.images.packed_strings import PackedStrings
from datasets.labelled.annotations import Annotations, Findings
from datasets.labelled.box_formats import Misfits, exceeds_image, has_visible_area
from datasets.labelled.segmentations import find_empty
from util.logger import log

# COCO marks 1.2 % of its objects as crowds. More than this fraction are probably single objects: some programs write
# `iscrowd` 1 for every mask that is run-length encoded.
MAX_CROWD_FRACTION = 0.1


def annotations_from_columns(
    columns: dict[str, np.ndarray],
    *,
    source: str,
    file_names: PackedStrings,
    image_ids: np.ndarray,
    sizes_hw: np.ndarray,
    class_names: dict[int, str],
    segmentation_texts: PackedStrings | None = None,
) -> Annotations:
    """Build `Annotations` from one array per field. Objects are skipped as in `parse_coco`.

    Args:
        columns: `id` int64 [A], annotation id, for messages; `image` int64 [A], image id; `label` int64 [A]; `crowd`
            bool [A]; `box` float32 [A, 4], (x0, y0, x1, y1) in pixels; `area` float32 [A], in square pixels;
            `difficult` bool [A], if the format has it. For findings, also optional, bool [A]: `ignored`, crowds that
            the file calls `ignore`; `rotated`, boxes around a rotated rectangle; `bad_area`, areas that were replaced.
            With masks also `segmentation` int64 [A], numbers in `segmentation_texts`. Crowds that are objects are
            marked in `kept_crowd` bool [A] instead of `crowd`.
        file_names, image_ids, sizes_hw: of the images, as in `Annotations`; sorted by id.
    """
    if segmentation_texts is not None:
        unsegmented = find_empty(segmentation_texts, columns["segmentation"])  # [A]
        columns["unsegmented"] = unsegmented
        columns["segmentation"] = np.where(unsegmented, -1, columns["segmentation"])
    category_ids = np.array(list(class_names), dtype=np.int64)
    columns, findings, misfits = _filter_objects(
        columns, image_ids, sizes_hw, file_names, category_ids, source
    )
    if len(columns["id"]):
        counts = np.bincount(columns["image"], minlength=len(image_ids))  # [I]
    else:
        counts = np.zeros(len(image_ids), int)

    return Annotations(
        source=source,
        file_names=file_names,
        image_ids=image_ids,
        sizes_hw=sizes_hw,
        offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),  # [I + 1]
        boxes_xyxy_abs=columns["box"],
        labels=columns["label"],
        areas=columns["area"],
        class_names=_add_unlisted_classes(class_names, columns["label"], source),
        findings=findings,
        misfits=misfits,
        difficult=columns.get("difficult"),
        ids=columns["id"],
        crowds=columns.get("kept_crowd"),
        segmentations=None if segmentation_texts is None else columns["segmentation"],
        segmentation_texts=PackedStrings([]) if segmentation_texts is None else segmentation_texts,
    )


@dataclass
class _Objects:
    """All objects of a file, each with its image.

    Attributes:
        columns: see `annotations_from_columns`.
        image: int64 [A], image index; of an unlisted image any index.
        listed: bool [A], whether the file lists the image.
        sizes_hw: [A, 2], of the image, in pixels; 0 if unknown.
    """

    columns: dict[str, np.ndarray]
    image: np.ndarray
    listed: np.ndarray
    sizes_hw: np.ndarray

    @property
    def boxes_xyxy_abs(self) -> np.ndarray:
        """[A, 4], in pixels."""
        return self.columns["box"]

    @cached_property
    def ids(self) -> np.ndarray:
        """Annotation id and image id, [A, 2]."""
        return np.column_stack([self.columns["id"], self.columns["image"]])

    @cached_property
    def finite(self) -> np.ndarray:
        return np.isfinite(self.boxes_xyxy_abs).all(1)  # [A]

    @cached_property
    def visible(self) -> np.ndarray:
        """Whether a part of the box is inside the image, bool [A]."""
        return has_visible_area(self.boxes_xyxy_abs, self.sizes_hw)

    @cached_property
    def candidates(self) -> np.ndarray:
        """Objects to train on if their box is visible, bool [A]."""
        return self.listed & self.finite & ~self.columns["crowd"]

    def marked(self, name: str) -> np.ndarray:
        """Return an optional column of marks, bool [A]."""
        return self.columns.get(name, np.zeros(len(self.image), bool))


def _filter_objects(
    columns: dict[str, np.ndarray],
    image_ids: np.ndarray,
    sizes_hw: np.ndarray,
    file_names: PackedStrings,
    category_ids: np.ndarray,
    source: str,
) -> tuple[dict[str, np.ndarray], Findings, Misfits]:
    """Return (columns of the objects to train on, findings, boxes that do not fit into their images).

    Log a warning for each kind of skipped object.

    The returned objects are grouped by image. Their column `image` has image indices instead of ids.
    """
    if not len(columns["id"]):
        return columns, {}, Misfits()
    objects = _match_images(columns, image_ids, sizes_hw)
    _warn_of_skipped(objects, source)
    masks = _masks_of_findings(objects, category_ids)
    findings = {
        kind: _record(objects, mask, file_names) for kind, mask in masks.items() if mask.any()
    }
    misfits = _collect_misfits(objects, masks["box partly outside"], file_names)
    return _trained_columns(objects), findings, misfits


def _match_images(
    columns: dict[str, np.ndarray], image_ids: np.ndarray, sizes_hw: np.ndarray
) -> _Objects:
    """Look up the image of each object by its id."""
    count = len(columns["id"])
    if not len(image_ids):
        return _Objects(columns, np.zeros(count, int), np.zeros(count, bool), np.zeros((count, 2)))
    # searchsorted returns I for ids above the last one: clip it to a valid index, then compare the ids.
    image = np.searchsorted(image_ids, columns["image"]).clip(max=len(image_ids) - 1)  # [A]
    return _Objects(columns, image, image_ids[image] == columns["image"], sizes_hw[image])


def _warn_of_skipped(objects: _Objects, source: str) -> None:
    listed = objects.listed
    for skipped, what in (
        (~listed, "of images that the file does not list"),
        (listed & ~objects.finite, "with a box that is not finite"),
        (
            objects.candidates & ~objects.visible,
            "with a box without area, or outside its image,",
        ),
    ):
        _warn_skipped(skipped, what, objects.ids, source)


def _masks_of_findings(objects: _Objects, category_ids: np.ndarray) -> dict[str, np.ndarray]:
    """Return kind of finding -> the objects that have it, bool [A]."""
    columns, boxes, listed = objects.columns, objects.boxes_xyxy_abs, objects.listed
    candidates, visible = objects.candidates, objects.visible
    trained = candidates & visible
    flat = ~(boxes[:, 2:] > boxes[:, :2]).all(1)
    ignored = objects.marked("ignored")
    crowd = listed & columns["crowd"] & ~ignored
    crowd_kind = "many crowds" if _are_many_crowds(crowd, columns["label"]) else "crowd"
    return {
        "image not listed": ~listed,
        "box not finite": listed & ~objects.finite,
        "box without area": candidates & flat,
        "box outside image": candidates & ~visible & ~flat,
        "box partly outside": trained & exceeds_image(boxes, objects.sizes_hw),
        "category not listed": candidates & ~np.isin(columns["label"], category_ids),
        crowd_kind: crowd,
        "marked ignore": listed & ignored,
        "rotated box": trained & objects.marked("rotated"),
        "area unusable": trained & objects.marked("bad_area"),
        "no segmentation": trained & objects.marked("unsegmented"),
    }


def _record(
    objects: _Objects, mask: np.ndarray, file_names: PackedStrings
) -> tuple[np.ndarray, PackedStrings]:
    """Return ids and file names of some objects: a finding of `Findings`."""
    names = (
        file_names[objects.image[row]] if objects.listed[row] else ""
        for row in np.flatnonzero(mask)
    )
    return objects.ids[mask], PackedStrings(names)


def _collect_misfits(
    objects: _Objects, partly_outside: np.ndarray, file_names: PackedStrings
) -> Misfits:
    """Return the boxes that are skipped, and those that are partly outside their image, bool [A]."""
    counted = objects.listed & ~objects.columns["crowd"]  # [A]
    skipped = counted & ~(objects.finite & objects.visible)
    misfit = skipped | partly_outside
    ids, files = _record(objects, misfit, file_names)
    return Misfits(
        total=int(counted.sum()),
        skipped=skipped[misfit],
        boxes_xyxy_abs=objects.boxes_xyxy_abs[misfit],
        sizes_hw=objects.sizes_hw[misfit],
        ids=ids,
        files=files,
    )


def _trained_columns(objects: _Objects) -> dict[str, np.ndarray]:
    """Return the columns of the objects to train on, grouped by image, with image indices in `image`."""
    # A stable sort keeps the objects of an image in the order of the file.
    rows = np.flatnonzero(objects.candidates & objects.visible)
    rows = rows[np.argsort(objects.image[rows], kind="stable")]
    columns = {**objects.columns, "image": objects.image}
    return {key: column[rows] for key, column in columns.items()}


def _are_many_crowds(crowd: np.ndarray, labels: np.ndarray) -> bool:
    """Return whether more objects are marked as crowds than in COCO: of all, or of one class.

    Args:
        crowd: bool [A].
        labels: int64 [A].
    """
    if not crowd.any():
        return False
    classes, inverse = np.unique(labels, return_inverse=True)  # [C], [A]
    objects = np.bincount(inverse, minlength=len(classes))  # [C]
    crowds = np.bincount(inverse[crowd], minlength=len(classes))  # [C]
    most_of_a_class = (
        (crowds > objects / 2) & (crowds > 1)
    ).any()  # a rare class may have one crowd
    return bool(crowd.mean() > MAX_CROWD_FRACTION or most_of_a_class)


def _warn_skipped(skipped: np.ndarray, what: str, ids: np.ndarray, source: str) -> None:
    if skipped.any():
        annotation_id, image_id = ids[np.flatnonzero(skipped)[0]]
        count = int(skipped.sum())
        log.warning(
            "%s: %d %s %s %s skipped, the first is annotation %d of image %d",
            source,
            count,
            "annotation" if count == 1 else "annotations",
            what,
            "is" if count == 1 else "are",
            annotation_id,
            image_id,
        )


def _add_unlisted_classes(names: dict[int, str], labels: np.ndarray, source: str) -> dict[int, str]:
    """Add the categories that are used but not listed. Their name is their id."""
    unlisted = sorted(set(np.unique(labels).tolist()) - set(names))
    if unlisted:
        log.warning(
            "%s: category ids %s are used but not listed: they are trained but not evaluated",
            source,
            unlisted,
        )
    return {**names, **{label: str(label) for label in unlisted}}
