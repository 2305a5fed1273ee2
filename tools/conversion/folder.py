"""Read a folder tree with an annotation file for each image, as VOC's XML files and labelme's JSON files."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from datasets.images.listing import list_folder
from datasets.labelled.file_names import ImageIndex
from tools.conversion.export import Dropped, Export, LabelledImage, LabelledObject
from util.errors import UserError

Content = dict[str, Any]
Size = tuple[int, int]


@dataclass(frozen=True)
class FolderFormat:
    """A format with a file for each image.

    Attributes:
        extension: of the files, such as ".xml".
        title: what the folder has, for messages, such as "VOC's XML files".
        read: path -> content; raises UserError for a file that can't be used.
        find_image: (name of the file, its content, images) -> (image that it lists, the image in the folder or None).
        find_objects: (content, name of the file, what is dropped) -> objects.
        size_hw: content -> (height, width); NO_SIZE if it does not say.
    """

    extension: str
    title: str
    read: Callable[[str], Content]
    find_image: Callable[[str, Content, ImageIndex], tuple[str, str | None]]
    find_objects: Callable[[Content, str, Dropped], list[LabelledObject]]
    size_hw: Callable[[Content], Size]


def read_folder(layout: FolderFormat, images: str, annotations: str, dropped: Dropped) -> Export:
    """Read all annotation files of a folder tree. A file that can't be read is dropped.

    Raises:
        UserError: the folder has no such file.
    """
    names = list(list_folder(annotations, frozenset({layout.extension})).images)
    if not names:
        raise UserError(
            f"{annotations} has no {layout.extension} file: give the folder of {layout.title}"
        )
    index = ImageIndex(images)
    found: dict[str, LabelledImage] = {}
    for name in names:
        try:
            content = layout.read(os.path.join(annotations, name))
        except UserError as error:
            dropped.add("annotation file unreadable", name, detail=str(error))
            continue
        listed, file = layout.find_image(name, content, index)
        if file is None:
            dropped.add("image missing", name, listed, f"not in {images}")
        elif file in found:
            dropped.add("image listed twice", name, file, f"also in {found[file].source}")
        else:
            objects = layout.find_objects(content, name, dropped)
            found[file] = LabelledImage(images, file, name, objects, layout.size_hw(content))
    kind = layout.extension[1:].upper()
    for file in sorted(index.files - set(found)):
        dropped.add("image without annotations", file, detail=f"no {kind} file names it")
    return Export(list(found.values()))
