"""Read labelme's JSON files, one per image. supervision checks the shapes and joins those of one group."""

import os
from collections.abc import Iterator
from typing import Any

from datasets.images.image_folder import NO_SIZE
from datasets.labelled.coco_json import read_json
from datasets.labelled.file_names import ImageIndex
from tools.conversion.export import (
    Dropped,
    LabelledObject,
    import_supervision,
)
from tools.conversion.folder import FolderFormat
from util.errors import UserError


def _read_file(path: str) -> dict[str, Any]:
    """Return the content of a JSON file.

    Raises:
        UserError: it can't be read, or is not labelme's.
    """
    content = read_json(path)
    if isinstance(content, dict) and isinstance(content.get("shapes"), list):
        return content
    raise UserError("no labelme file: it has no 'shapes'")


def _listed_size(content: dict[str, Any]) -> tuple[int, int]:
    height, width = content.get("imageHeight"), content.get("imageWidth")
    known = isinstance(height, int) and isinstance(width, int) and height > 0 and width > 0
    return (height, width) if known else NO_SIZE


def _find_image(name: str, content: dict[str, Any], index: ImageIndex) -> tuple[str, str | None]:
    """Return the imagePath of a JSON file, and its image: the one of that path, or of the same name as the file.

    The path is relative to the file.
    """
    listed = str(content.get("imagePath") or "")
    folder, base = os.path.split(name)
    plain = listed.replace("\\", "/")
    for candidate in (os.path.join(folder, plain), os.path.join(folder, os.path.basename(plain))):
        if plain and (file := index.match(candidate)):
            return listed, file
    own = index.with_stem(os.path.join(folder, os.path.splitext(base)[0]))
    return listed, own[0] if len(own) == 1 else None


def _find_objects(content: dict[str, Any], name: str, dropped: Dropped) -> list[LabelledObject]:
    return list(_objects(content["shapes"], name, dropped))


def _objects(shapes: list[Any], name: str, dropped: Dropped) -> Iterator[LabelledObject]:
    supervision = import_supervision("labelme")
    known = []
    for number, shape in enumerate(shapes, start=1):
        kind = str(shape.get("shape_type")) if isinstance(shape, dict) else "no shape"
        if kind in supervision.SUPPORTED_SHAPE_TYPES:
            known.append((number, shape))
        else:
            dropped.add("shape is no box or polygon", name, f"shape {number}", kind)

    for number, group in _groups(known):
        place, label = f"shape {number}", group[0].get("label")
        try:
            # Without masks: supervision would fill polygons on whole pixels, which makes small objects too large.
            found = supervision.labelme_shapes_to_detections(
                group, {label: 0}, (0, 0), with_masks=False
            )
        except (TypeError, ValueError) as error:
            dropped.add("shape unreadable", name, place, str(error))
            continue
        polygons = None  # a box, alone or in the group
        if all(shape["shape_type"] == "polygon" for shape in group):
            polygons = [[float(x) for point in shape["points"] for x in point] for shape in group]
        yield LabelledObject(str(label), tuple(found.xyxy[0].tolist()), place, polygons)


def _groups(shapes: list[tuple[int, dict[str, Any]]]) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    """Yield (number of the first shape, shapes of one object): those of one class and group_id, or a single one."""
    groups: dict[Any, tuple[int, list[dict[str, Any]]]] = {}
    for number, shape in shapes:
        group_id = shape.get("group_id")
        key = number if group_id is None else (str(shape.get("label")), str(group_id))
        groups.setdefault(key, (number, []))[1].append(shape)
    yield from groups.values()


LABELME = FolderFormat(
    extension=".json",
    title="labelme's JSON files",
    read=_read_file,
    find_image=_find_image,
    find_objects=_find_objects,
    size_hw=_listed_size,
)
