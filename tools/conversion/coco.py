"""Read a COCO file: nothing is changed in an annotation that is kept."""

import json
from typing import Any

from datasets.images.image_folder import NO_SIZE
from datasets.labelled.coco_json import read_json
from datasets.labelled.file_names import ImageIndex
from datasets.labelled.segmentations import SegmentationTexts
from tools.conversion.export import Dropped, Export, LabelledImage, LabelledObject
from util.errors import UserError


def read_coco(images: str, annotations: str, dropped: Dropped) -> Export:
    """Read the images and objects of a COCO file.

    Args:
        images: the folder that `file_name` is relative to.
        annotations: the file.

    Raises:
        UserError: it can't be read, is no COCO file, or has two images with the same id.
    """
    texts = SegmentationTexts()  # polygons as text: as Python objects they would fill the memory
    content = read_json(annotations, texts)
    if not isinstance(content, dict) or not all(
        isinstance(content.get(key), list) for key in ("images", "annotations", "categories")
    ):
        raise UserError(
            f"{annotations} is no COCO file: it needs the lists 'images', 'annotations' and 'categories'"
        )
    try:
        return _parse(content, annotations, ImageIndex(images), texts, dropped)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{annotations}: an entry of 'images', 'annotations' or 'categories' can't be read "
            f"({type(error).__name__}: {error}): ids of images and categories are whole numbers, and sizes are numbers"
        ) from error


def _parse(
    content: dict[str, Any],
    source: str,
    index: ImageIndex,
    texts: SegmentationTexts,
    dropped: Dropped,
) -> Export:
    names = {_id(row): str(row.get("name") or row["id"]) for row in content["categories"]}
    # Classes are matched by name. Of two categories with one name, the first gives the id.
    class_ids: dict[str, int] = {}
    for category_id, name in sorted(names.items()):
        class_ids.setdefault(name, category_id)

    by_id = _images_by_id(content["images"], source, index, dropped)
    listed = {_id(row) for row in content["images"]}
    for row in content["annotations"]:
        place = f"annotation {row.get('id')}"
        image = by_id.get(row.get("image_id"))
        if row.get("image_id") not in listed:
            detail = f"image {row.get('image_id')}"
            dropped.add("object of an image that is not listed", source, place, detail)
        elif image is not None:
            found = _to_object(row, names, place, texts, image, dropped)
            image.objects += [found] if found else []
    return Export(list(by_id.values()), class_ids)


def _id(row: dict[str, Any]) -> int:
    """Return the id of an image or a category. Training refuses others than whole numbers.

    Raises:
        KeyError, TypeError: it has no such id.
    """
    if not isinstance(row["id"], int):
        raise TypeError(f"id {row['id']!r}")
    return row["id"]


def _images_by_id(
    rows: list[dict[str, Any]], source: str, index: ImageIndex, dropped: Dropped
) -> dict[Any, LabelledImage]:
    by_id: dict[Any, LabelledImage] = {}
    files: dict[str, Any] = {}
    for row in rows:
        image_id, listed = row["id"], str(row.get("file_name", ""))
        if image_id in by_id:
            raise UserError(
                f"{source}: two images have the id {image_id}, so their objects can't be told apart: number them"
            )
        file = index.match(listed)
        if file is None:
            suggested = index.suggest(listed)
            hint = f"did you mean {suggested}?" if suggested else f"not in {index.folder}"
            dropped.add("image missing", source, listed, hint)
        elif file in files:
            dropped.add(
                "image listed twice", source, listed, f"images {files[file]} and {image_id}"
            )
        else:
            files[file] = image_id
            by_id[image_id] = LabelledImage(
                index.folder, file, source, [], _listed_size(row), record=row
            )
    return by_id


def _listed_size(row: dict[str, Any]) -> tuple[int, int]:
    height, width = row.get("height"), row.get("width")
    return (int(height), int(width)) if height and width else NO_SIZE


def _to_object(
    row: dict[str, Any],
    names: dict[int, str],
    place: str,
    texts: SegmentationTexts,
    image: LabelledImage,
    dropped: Dropped,
) -> LabelledObject | None:
    category = row.get("category_id")
    if category not in names:
        detail = f"category_id {category}"
        dropped.add("object of a class that is not listed", image.file, place, detail)
        return None
    try:
        x, y, width, height = map(float, row["bbox"])
    except (KeyError, TypeError, ValueError):
        detail = f"bbox {str(row.get('bbox'))[:60]}"
        dropped.add("box is not four numbers", image.file, place, detail)
        return None
    text = texts.text(row.pop("segmentation", None))
    return LabelledObject(
        names[category], (x, y, x + width, y + height), place, _parse_segmentation(text), row
    )


def _parse_segmentation(text: str | None) -> Any:
    """Return the value of a segmentation; None for an empty one, as detection files of some programs have it."""
    return (json.loads(text) or None) if text is not None else None
