"""Read a folder of VOC XML files as `--dataset_file custom` does, with their polygons."""

import os

from datasets.images.image_folder import NO_SIZE
from datasets.images.listing import list_folder
from datasets.labelled.file_names import ImageIndex
from datasets.labelled.voc import XML_EXTENSIONS, image_of_xml, read_xml
from tools.conversion.export import Dropped, Export, LabelledImage, LabelledObject
from util.errors import UserError


def read_voc_folder(images: str, annotations: str, dropped: Dropped) -> Export:
    """Read all XML files of a folder tree. A file that can't be read is dropped.

    Raises:
        UserError: the folder has no XML file.
    """
    names = list(list_folder(annotations, XML_EXTENSIONS).images)
    if not names:
        raise UserError(f"{annotations} has no .xml file: give the folder of VOC's XML files")

    index = ImageIndex(images)
    found: dict[str, LabelledImage] = {}
    for name in names:
        path = os.path.join(annotations, name)
        try:
            record = read_xml(path)
        except UserError as error:
            dropped.add("annotation file unreadable", name, detail=str(error))
            continue
        file, _ = image_of_xml(name, record["file"], index)
        file = index.match(file) or ""
        if not file:
            dropped.add("image missing", name, record["file"], f"not in {images}")
        elif file in found:
            dropped.add("image listed twice", name, file, f"also in {found[file].source}")
        else:
            found[file] = LabelledImage(images, file, path, _objects(record))
            found[file].size_hw = record["size_hw"] if all(record["size_hw"]) else NO_SIZE
    others = sorted(index.files - set(found))
    for name in others:
        dropped.add("image without annotations", name, detail="no XML file names it")
    return Export(list(found.values()))


def _objects(record: dict) -> list[LabelledObject]:
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
