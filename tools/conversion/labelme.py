"""Read labelme's JSON files, one per image. supervision checks the shapes and joins those of one group."""

import os
from collections.abc import Iterator
from typing import Any

from datasets.images.image_folder import NO_SIZE
from datasets.images.listing import list_folder
from datasets.labelled.coco_json import read_json
from datasets.labelled.file_names import ImageIndex
from tools.conversion.export import (
    Dropped,
    Export,
    LabelledImage,
    LabelledObject,
    import_supervision,
)
from util.errors import UserError

JSON_EXTENSIONS = frozenset({".json"})


def read_labelme_folder(images: str, annotations: str, dropped: Dropped) -> Export:
    """Read all JSON files of a folder tree. A file that can't be read is dropped.

    Raises:
        UserError: the folder has no JSON file.
    """
    names = list(list_folder(annotations, JSON_EXTENSIONS).images)
    if not names:
        raise UserError(f"{annotations} has no .json file: give the folder of labelme's JSON files")

    index = ImageIndex(images)
    found: dict[str, LabelledImage] = {}
    for name in names:
        content = _read_file(os.path.join(annotations, name), name, dropped)
        if content is None:
            continue
        file = _image_of(name, str(content.get("imagePath") or ""), index)
        if file is None:
            detail = f"{content.get('imagePath')} is not in {images}"
            dropped.add("image missing", name, detail=detail)
        elif file in found:
            dropped.add("image listed twice", name, file, f"also in {found[file].source}")
        else:
            objects = list(_objects(content["shapes"], name, dropped))
            found[file] = LabelledImage(images, file, name, objects, _listed_size(content))
    for file in sorted(index.files - set(found)):
        dropped.add("image without annotations", file, detail="no JSON file names it")
    return Export(list(found.values()))


def _read_file(path: str, name: str, dropped: Dropped) -> dict[str, Any] | None:
    try:
        content = read_json(path)
    except (UserError, OSError) as error:
        dropped.add("annotation file unreadable", name, detail=str(error))
        return None
    if isinstance(content, dict) and isinstance(content.get("shapes"), list):
        return content
    dropped.add("annotation file unreadable", name, detail="no labelme file: it has no 'shapes'")
    return None


def _listed_size(content: dict[str, Any]) -> tuple[int, int]:
    height, width = content.get("imageHeight"), content.get("imageWidth")
    known = isinstance(height, int) and isinstance(width, int) and height > 0 and width > 0
    return (height, width) if known else NO_SIZE


def _image_of(name: str, listed: str, index: ImageIndex) -> str | None:
    """Return the image of a JSON file: its imagePath, which is relative to the file, or the image of the same name."""
    folder, base = os.path.split(name)
    plain = listed.replace("\\", "/")
    for candidate in (os.path.join(folder, plain), os.path.join(folder, os.path.basename(plain))):
        if plain and (file := index.match(candidate)):
            return file
    own = index.with_stem(os.path.join(folder, os.path.splitext(base)[0]))
    return own[0] if len(own) == 1 else None


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
