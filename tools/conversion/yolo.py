"""Read YOLO's text files, from folders or from a `data.yaml` with its splits. supervision parses the lines."""

import os
from pathlib import Path
from typing import Any

from datasets.images.image_folder import image_extensions, read_header
from datasets.images.listing import list_folder
from datasets.images.pixels import swaps_sides
from datasets.sample import BadImageError
from tools.conversion.export import (
    Dropped,
    Export,
    LabelledImage,
    LabelledObject,
    import_supervision,
)
from util.errors import UserError
from util.files import read_lines

TEXT_EXTENSIONS = frozenset({".txt"})
# Lists of class names that CVAT, Label Studio and LabelImg write, next to the labels or one folder above.
NAME_FILES = ("data.yaml", "classes.txt", "obj.names")
NO_LABELS = {*NAME_FILES, "train.txt", "valid.txt", "val.txt", "test.txt"}
POLYGON_WORDS = 7  # in a line: the class and three points
SPLITS = {"train": ("train",), "val": ("val", "valid")}


def read_yolo_yaml(path: str, dropped: Dropped) -> dict[str, Export]:
    """Read `train` and `val` of a `data.yaml`, as Ultralytics and Roboflow write it.

    Returns:
        "train", and "val" if the file has it. Images of `test` are dropped: training does not use them.

    Raises:
        UserError: the file or one of its folders can't be used.
    """
    content = _read_yaml(path)
    names, pose = _class_names(content, path), _pose_values(content)
    exports = {}
    for split, keys in SPLITS.items():
        places = next((content[key] for key in keys if content.get(key)), None)
        if places is not None:
            exports[split] = _read_places(path, content, places, names, pose, dropped)
    if "train" not in exports:
        raise UserError(f"{path} has no 'train': give the folder or the list of its images there")
    if content.get("test"):
        dropped.add("split not used", path, "test", str(content["test"]))
    return exports


def read_yolo_folder(images: str, labels: str, class_names: str | None, dropped: Dropped) -> Export:
    """Read a folder of images with a folder of label files of the same names. They may be the same folder.

    An image without label file has no objects, as in YOLO itself.

    Args:
        class_names: file with the class names, one per line, or a data.yaml. None: it is searched next to the labels.

    Raises:
        UserError: there are no images, or the class names are missing.
    """
    file = class_names or _find_class_names(labels)
    names, pose = _read_class_names(file)
    return _read_folder(images, labels, names, pose, dropped)


def _read_folder(
    images: str, labels: str, names: dict[int, str], pose: int, dropped: Dropped
) -> Export:
    files = list(list_folder(images, image_extensions()).images)
    if not files:
        raise UserError(f"{images} has no images: give the folder of the images that were labelled")
    texts = list(list_folder(labels, TEXT_EXTENSIONS).images) if os.path.isdir(labels) else []
    by_stem = {os.path.splitext(name)[0]: name for name in texts}
    found = []
    for file in files:
        label = by_stem.pop(os.path.splitext(file)[0], None)
        source = os.path.join(labels, label) if label else ""
        found.append(_read_image(images, file, source, names, pose, dropped))
    for name in by_stem.values():
        if os.path.basename(name) not in NO_LABELS:
            dropped.add("image missing", name, detail=f"no image of this name in {images}")
    return Export(found, {name: class_id for class_id, name in names.items()})


def _read_image(
    folder: str, file: str, source: str, names: dict[int, str], pose: int, dropped: Dropped
) -> LabelledImage:
    image = LabelledImage(folder, file, source, [])
    try:
        size_hw, orientation, _ = read_header(os.path.join(folder, file))
    except (BadImageError, OSError):
        return image  # reported when the images are decoded
    # Coordinates are fractions of the image as labelling tools show it, rotated by its EXIF orientation.
    image.size_hw = size_hw[::-1] if swaps_sides(orientation) else size_hw
    for number, line in enumerate(_lines(source, dropped), start=1):
        found = _parse_line(line, number, image, names, pose, dropped) if line.strip() else None
        image.objects += [found] if found else []
    return image


def _lines(source: str, dropped: Dropped) -> list[str]:
    if not source:
        return []
    try:
        return read_lines(source)
    except (OSError, UnicodeDecodeError) as error:
        dropped.add("annotation file unreadable", source, detail=str(error))
        return []


def _parse_line(
    line: str,
    number: int,
    image: LabelledImage,
    names: dict[int, str],
    pose: int,
    dropped: Dropped,
) -> LabelledObject | None:
    place = f"line {number}"
    words = line.split()
    if pose and len(words) == 5 + pose:
        words = words[:5]
    height, width = image.size_hw
    try:
        # Without masks: supervision would fill polygons on whole pixels, which makes small objects too large.
        found = import_supervision("yolo").yolo_annotations_to_detections(
            [" ".join(words)], (width, height), with_masks=False
        )
    except ValueError as error:
        dropped.add("line unreadable", image.source, place, str(error))
        return None
    class_id = int(found.class_id[0])
    if class_id not in names:
        dropped.add(
            "object of a class that is not listed", image.source, place, f"class {class_id}"
        )
        return None
    box = tuple(found.xyxy[0].tolist())
    return LabelledObject(names[class_id], box, place, _polygon(words, width, height))


def _polygon(words: list[str], width: int, height: int) -> list[list[float]] | None:
    """Return the polygon of a line in pixels, as written; None if it has a box."""
    if len(words) < POLYGON_WORDS:
        return None
    numbers = [float(word) for word in words[1:]]
    numbers = numbers[: len(numbers) // 2 * 2]  # without a confidence
    return [[value * (height if i % 2 else width) for i, value in enumerate(numbers)]]


# -------------------------------------------------------------------------------------------------------- class names


def _find_class_names(labels: str) -> str:
    folders = (Path(labels), Path(labels).parent, Path(labels).parent.parent)
    for path in (folder / name for folder in folders for name in NAME_FILES):
        if path.is_file():
            return str(path)
    raise UserError(
        f"{labels} has no {' or '.join(NAME_FILES)}, and the folders above neither: give the class names with "
        "--class_names FILE"
    )


def _read_class_names(path: str) -> tuple[dict[int, str], int]:
    """Return (class -> name, number of keypoint values in a line)."""
    if path.endswith((".yaml", ".yml")):
        content = _read_yaml(path)
        return _class_names(content, path), _pose_values(content)
    try:
        lines = [line.strip() for line in read_lines(path)]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} can't be read ({error}): give a list of class names") from error
    # The number of a line is the class: an empty line in the middle is a class without name.
    return _check_names({i: name for i, name in enumerate(lines) if name}, path), 0


def _class_names(content: dict[str, Any], path: str) -> dict[int, str]:
    names = content.get("names")
    rows = list(enumerate(names)) if isinstance(names, list) else names
    try:
        found = {int(class_id): str(name) for class_id, name in dict(rows).items()}
    except (TypeError, ValueError) as error:
        raise UserError(
            f"{path}: 'names' must be a list of class names, or class number: name"
        ) from error
    return _check_names(found, path)


def _check_names(names: dict[int, str], path: str) -> dict[int, str]:
    if not names:
        raise UserError(f"{path} lists no class names: write one per class")
    twice = sorted({name for name in names.values() if list(names.values()).count(name) > 1})
    if twice:
        raise UserError(f"{path} has two classes '{twice[0]}': rename one of them")
    return names


def _pose_values(content: dict[str, Any]) -> int:
    """Return the number of keypoint values after the box; 0 in a dataset without keypoints."""
    shape = content.get("kpt_shape")
    is_valid = isinstance(shape, list) and len(shape) == 2 and {*map(type, shape)} == {int}
    return shape[0] * shape[1] if is_valid else 0


def _read_yaml(path: str) -> dict[str, Any]:
    import_supervision("yolo")  # it brings PyYAML
    import yaml

    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path} can't be read ({' '.join(str(error).split())})") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is no data.yaml: it has no keys, such as 'train' and 'names'")
    return content


# -------------------------------------------------------------------------------------------------- places of a split


def _read_places(
    path: str,
    content: dict[str, Any],
    places: Any,
    names: dict[int, str],
    pose: int,
    dropped: Dropped,
) -> Export:
    """Read a split of a data.yaml: a folder, a list of image paths, or several of them."""
    images: list[LabelledImage] = []
    for place in places if isinstance(places, list) else [places]:
        found = _find_place(path, content, str(place))
        if found.is_dir():
            images += _read_folder(str(found), str(_labels_of(found)), names, pose, dropped).images
        else:
            images += _read_list(found, names, pose, dropped)
    # Two folders may have images of the same name: paths from the folder above both tell them apart.
    root = os.path.commonpath([image.folder for image in images]) if images else ""
    for image in images:
        image.file = os.path.relpath(os.path.join(image.folder, image.file), root)
        image.folder = root
    return Export(images, {name: class_id for class_id, name in names.items()})


def _find_place(path: str, content: dict[str, Any], place: str) -> Path:
    """Return the folder or list that a data.yaml names. Roboflow's ../train/images is next to the file in its zip."""
    base = Path(path).resolve().parent
    roots = [base / str(content.get("path") or "."), base]
    shortened = place.removeprefix("../")
    candidates = [root / name for root in roots for name in (place, shortened)]
    for candidate in candidates:
        if candidate.exists():
            return candidate.resolve()
    raise UserError(
        f"{path} names {place}, but {candidates[0]} does not exist: correct 'path' or the split there"
    )


def _labels_of(folder: Path) -> Path:
    """Return the label folder that YOLO expects: the last folder called images in the path becomes labels."""
    parts = list(folder.parts)
    if "images" not in parts:
        return folder
    last = len(parts) - 1 - parts[::-1].index("images")
    return Path(*parts[:last], "labels", *parts[last + 1 :])


def _read_list(
    path: Path, names: dict[int, str], pose: int, dropped: Dropped
) -> list[LabelledImage]:
    """Read a text file with one image per line, relative to its folder, as CVAT writes it.

    Raises:
        UserError: it is no text file.
    """
    try:
        lines = read_lines(path)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path} can't be read as a list of image paths ({error}): give a folder or such a list in data.yaml"
        ) from error
    found = []
    for line in filter(str.strip, lines):
        file = Path(path.parent, line.strip())
        if (
            not file.is_file()
        ):  # CVAT writes data/obj_train_data/1.jpg, and has obj_train_data next to the list
            file = Path(path.parent, *Path(line.strip()).parts[1:])
        if not file.is_file():
            dropped.add("image missing", str(path), line.strip())
            continue
        label = _labels_of(file.parent) / f"{file.stem}.txt"
        source = str(label) if label.is_file() else ""
        found.append(_read_image(str(file.parent), file.name, source, names, pose, dropped))
    return found
