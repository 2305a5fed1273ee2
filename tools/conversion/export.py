"""What an annotation export contains, whatever its format, and the list of what was dropped from it."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from datasets.images.image_folder import NO_SIZE
from util.errors import UserError

Segmentation = list[list[float]] | dict[str, Any]  # polygons [x, y, x, y, ...] in pixels, or RLE


@dataclass
class LabelledObject:
    """One object of an image.

    Attributes:
        class_name: its class.
        box_xyxy_abs: (x0, y0, x1, y1) in pixels, not checked yet.
        place: where it is in its file, such as "line 3".
        segmentation: None if it has a box only.
        record: its annotation, if the format is COCO: further keys are kept.
    """

    class_name: str
    box_xyxy_abs: tuple[float, float, float, float]
    place: str
    segmentation: Segmentation | None = None
    record: dict[str, Any] = field(default_factory=dict)


@dataclass
class LabelledImage:
    """One image with its objects.

    Attributes:
        folder, file: the image folder, and the path in it with slashes.
        source: the file with its annotations.
        size_hw: (height, width) that the annotations list; NO_SIZE if they do not.
        undecided: it has an EXIF orientation, and the listed size does not tell whether it is applied.
        record: its entry in `images`, if the format is COCO: further keys are kept.
    """

    folder: str
    file: str
    source: str
    objects: list[LabelledObject]
    size_hw: tuple[int, int] = NO_SIZE
    undecided: bool = False
    record: dict[str, Any] = field(default_factory=dict)


@dataclass
class Export:
    """The images of one split, and its classes.

    Attributes:
        class_ids: name -> id. Empty if the format numbers no classes.
    """

    images: list[LabelledImage]
    class_ids: dict[str, int] = field(default_factory=dict)


class Drop(NamedTuple):
    """A row of dropped.csv: what was dropped (`kind`), where, and why."""

    kind: str
    file: str
    place: str
    detail: str


class Dropped:
    """Collects everything that is not converted."""

    def __init__(self) -> None:
        self.rows: list[Drop] = []

    def add(self, kind: str, file: str, place: str = "", detail: str = "") -> None:
        self.rows.append(Drop(kind, file, place, " ".join(detail.split())))

    def counts(self) -> Counter[str]:
        return Counter(row.kind for row in self.rows)


def import_supervision(format_name: str) -> Any:
    """Return supervision's module for a format, `yolo` or `labelme`.

    Raises:
        UserError: supervision is not installed.
    """
    try:
        if format_name == "yolo":
            from supervision.dataset.formats import yolo as module
        else:
            from supervision.dataset.formats import labelme as module
    except ImportError as error:
        raise UserError(
            f"--format {format_name} needs the package supervision: pip install 'supervision>=0.31' (in "
            f"requirements-extras.txt; {error})"
        ) from error
    return module
