"""Read VOC XML files as `--dataset_file custom` does, with their polygons."""

from typing import Any

from datasets.images.image_folder import NO_SIZE
from datasets.labelled.file_names import ImageIndex
from datasets.labelled.voc import image_of_xml, read_xml
from tools.conversion.export import Dropped, LabelledObject
from tools.conversion.folder import FolderFormat, Size


def _find_image(name: str, record: dict[str, Any], index: ImageIndex) -> tuple[str, str | None]:
    """Return the image that an XML file lists, and its image in the folder."""
    file, _ = image_of_xml(name, record["file"], index)
    return record["file"], index.match(file) or None


def _find_objects(record: dict[str, Any], name: str, dropped: Dropped) -> list[LabelledObject]:
    rows = zip(record["objects"], record["polygons"], record["rotations"], strict=True)
    return [
        LabelledObject(
            name,
            box,
            f"object {number}",
            polygons or None,
            {"attributes": {"rotation": degrees}} if degrees else {},
        )
        for number, ((name, box, _), polygons, degrees) in enumerate(rows, start=1)
    ]


def _listed_size(record: dict[str, Any]) -> Size:
    return record["size_hw"] if all(record["size_hw"]) else NO_SIZE


VOC = FolderFormat(
    extension=".xml",
    title="VOC's XML files",
    read=read_xml,
    find_image=_find_image,
    find_objects=_find_objects,
    size_hw=_listed_size,
)
