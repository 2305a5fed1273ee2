"""One finding of the checks."""

from typing import NamedTuple


class Finding(NamedTuple):
    """One finding.

    Attributes:
        kind: a key of `datasets.labelled.checks.table.KINDS`, which tells how bad it is.
        split: "train" or "val".
        file: image file or annotation file.
        detail: what was found, as text.
        image_id, annotation_id: ids in the annotation file, if known.
    """

    kind: str
    split: str
    file: str
    detail: str = ""
    image_id: int | None = None
    annotation_id: int | None = None

    def __str__(self) -> str:
        ids = {"image": self.image_id, "annotation": self.annotation_id}
        known = [f"{name} {value}" for name, value in ids.items() if value is not None]
        parts = [self.file, *known, self.detail]
        return ", ".join(part for part in parts if part)
