"""PASCAL VOC as published: VOCdevkit with its XML files and image sets. Also custom folders of such XML files.

Shapes: I images, A objects, as in `datasets.labelled.annotations`.
"""

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np

from datasets.evaluators.voc import VocEvaluator
from datasets.images.packed_strings import PackedStrings
from datasets.images.unlabelled import ListedImages
from datasets.labelled.annotations import (
    Annotations,
    annotations_from_columns,
    box_around_rotated,
)
from datasets.labelled.coco import ConvertedDetection, filter_annotations, labelled_transforms
from util.checkpoints.classes import Classes
from util.errors import UserError
from util.settings import Settings

CLASSES = (
    "aeroplane",
    "bicycle",
    "bird",
    "boat",
    "bottle",
    "bus",
    "car",
    "cat",
    "chair",
    "cow",
    "diningtable",
    "dog",
    "horse",
    "motorbike",
    "person",
    "pottedplant",
    "sheep",
    "sofa",
    "train",
    "tvmonitor",
)
CORNERS = ("xmin", "ymin", "xmax", "ymax")


class VocDetection(ConvertedDetection):
    """Images of VOC, evaluated with VOC's own metric. Labels are indices into CLASSES, and also the category ids."""

    def evaluator(self, settings: Settings) -> VocEvaluator:
        return VocEvaluator(
            self.annotations, settings.voc_metric, reproduce_published=settings.reproduce_published
        )


def build_voc(image_set: str, settings: Settings, classes: Classes | None = None) -> VocDetection:
    """Build the dataset of `--voc_train` or `--voc_val` in `--voc_path`. Objects marked `difficult` are included.

    Raises:
        UserError: folders, image sets or files are missing or malformed.
    """
    root = voc_root(settings.voc_path, settings.data_root)
    annotations = read_voc(root, settings.voc_train if image_set == "train" else settings.voc_val)
    return VocDetection(
        root,
        filter_annotations(annotations, root, image_set, settings),
        labelled_transforms(image_set, settings),
        num_classes=len(CLASSES),
        seed=settings.seed,
    )


def voc_images(image_set: str, settings: Settings) -> ListedImages:
    """Return the images of the same image sets for pre-training. XML files are not read.

    Raises:
        UserError: the folder or an image set is missing, or no image is listed.
    """
    root = voc_root(settings.voc_path, settings.data_root)
    image_sets = settings.voc_train if image_set == "train" else settings.voc_val
    listed = _read_image_sets(root, image_sets)
    # A set drops images that are in several image sets.
    names = sorted({f"VOC{year}/JPEGImages/{name}.jpg" for year, name in listed})
    return ListedImages(root, PackedStrings(names), f"{root} ({' '.join(image_sets)})")


def voc_root(voc_path: str | None, data_root: str | None) -> str:
    """Return the folder with VOC2007 and VOC2012: `voc_path`, or `pascal/VOCdevkit` in `data_root`.

    The parent folder of VOCdevkit is accepted, too.

    Raises:
        UserError: the folder does not exist.
    """
    given = voc_path or os.path.join(data_root or "", "pascal", "VOCdevkit")
    inside = os.path.join(given, "VOCdevkit")
    root = inside if os.path.isdir(inside) else given
    if not os.path.isdir(root):
        raise UserError(
            f"{root} is not a folder: --voc_path takes VOCdevkit, with VOC2007 and VOC2012 in it"
        )
    return root


def read_voc(root: str, image_sets: Sequence[str]) -> Annotations:
    """Read the images of several image sets, such as `2007_trainval`, with their objects. Each image counts once.

    Image ids are those of DETReg: 2021, followed by the digits of the name.

    Raises:
        UserError: an image set or an XML file is missing or malformed.
    """
    year_and_name = _images_by_id(root, image_sets)
    if not year_and_name:
        raise UserError(
            f"{root}: {' '.join(image_sets)} list no images: choose others with --voc_train and --voc_val"
        )

    ids = sorted(year_and_name)
    files, images = [], []
    for image_id in ids:
        year, name = year_and_name[image_id]
        files.append(os.path.join(root, f"VOC{year}", "Annotations", f"{name}.xml"))
        images.append(f"VOC{year}/JPEGImages/{name}.jpg")
    return annotations_from_xml(
        [read_xml(file) for file in files],
        source=f"{root} ({' '.join(image_sets)})",
        images=PackedStrings(images),
        image_ids=ids,
        classes=CLASSES,
        files=files,
    )


def _images_by_id(root: str, image_sets: Sequence[str]) -> dict[int, tuple[str, str]]:
    """Return image id -> (year, name) of all image sets."""
    year_and_name: dict[int, tuple[str, str]] = {}
    for year, name in _read_image_sets(root, image_sets):
        image_id = detreg_image_id(name)
        other_year, other = year_and_name.get(image_id, (year, name))
        # The years from 2008 share images, under the same names, which begin with a year. Plain numbers as in 2007 are
        # different images in different years.
        if other != name or (other_year != year and not re.match(r"20\d\d_", name)):
            raise UserError(
                f"{root}: VOC{other_year} lists {other} and VOC{year} lists {name}, which get the same image id "
                f"{image_id}: give them names with different digits"
            )
        year_and_name[image_id] = year, name
    return year_and_name


def _read_image_sets(root: str, image_sets: Sequence[str]) -> Iterable[tuple[str, str]]:
    """Yield (year, image name) of each line in ImageSets/Main/SET.txt."""
    for image_set in image_sets:
        year, _, part = image_set.partition("_")
        path = Path(root, f"VOC{year}", "ImageSets", "Main", f"{part}.txt")
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"{path} can't be read: {image_set} needs this list of images; choose others with --voc_train and "
                "--voc_val, such as 2012_trainval"
            ) from error
        # The lists of a single class have a second column.
        yield from ((year, line.split()[0]) for line in lines if line.strip())


def detreg_image_id(name: str) -> int:
    """Return DETReg's image id: 2007_000027 -> 20212007000027.

    Raises:
        UserError: the name is not a number.
    """
    digits = name.replace("_", "")
    if not digits.isascii() or not digits.isdigit() or len(digits) > 11:
        raise UserError(
            f"VOC image {name}: names are numbers, such as 000005 or 2008_000002; use other images with "
            "--dataset_file custom"
        )
    return int(f"2021{digits}")


# --------------------------------------------------------------------------------------------------------- XML files


def read_xml_folder(folder: str) -> Annotations:
    """Read all XML files of a folder, sorted by name. Image ids start at 1; the classes are the sorted class names.

    The image of a file is its <filename>, or the name of the XML file with .jpg if that is empty.

    Raises:
        UserError: the folder has no XML file, or one is malformed.
    """
    # The pattern skips hidden files: macOS writes ._1.xml next to 1.xml.
    files = sorted(str(path) for path in Path(folder).glob("[!.]*.xml"))
    if not files:
        raise UserError(
            f"{folder} has no .xml file: give a folder of VOC XML files, or a COCO file"
        )

    records = [read_xml(file) for file in files]
    classes = sorted({name for record in records for name, *_ in record["objects"]})
    images = [
        record["file"] or f"{Path(file).stem}.jpg"
        for record, file in zip(records, files, strict=True)
    ]
    return annotations_from_xml(
        records,
        source=folder,
        images=PackedStrings(images),
        image_ids=range(1, len(files) + 1),
        classes=classes,
        files=files,
    )


def read_xml(path: str) -> dict[str, Any]:
    """Read one XML file.

    VOC counts pixels from 1, and xmax and ymax are the last pixel of the object. A box here spans the area of these
    pixels, so xmin and ymin are reduced by 1.

    Returns:
        {"file": its <filename>, "size_hw": (height, width), "objects": [(name, box, difficult), ...], "rotations":
        CVAT's angle of each box in degrees, 0 if it has none}, where a box is (x0, y0, x1, y1) in pixels.

    Raises:
        UserError: the file is missing or not XML, or an object has no name or no numbers for its corners.
    """
    try:
        with open(path, "rb") as file:
            root = ElementTree.fromstring(file.read())
    except OSError as error:
        raise UserError(
            f"{path} can't be read ({error.strerror}): each image needs its file in Annotations"
        ) from error
    except ElementTree.ParseError as error:
        raise UserError(f"{path} is not valid XML ({error}): is the download complete?") from error

    try:
        objects = [_parse_object(element) for element in root.findall("object")]
        rotations = [_parse_rotation(element) for element in root.findall("object")]
        size = tuple(int(float(root.findtext(f"size/{name}") or 0)) for name in ("height", "width"))
    except (TypeError, ValueError, OverflowError) as error:
        raise UserError(
            f"{path}: an object needs <name> and <bndbox> with numbers for {', '.join(CORNERS)}, and <size> whole "
            f"numbers ({error}): correct it"
        ) from error
    # The file name may be on a line of its own.
    file = (root.findtext("filename") or "").strip()
    return {"file": file, "size_hw": size, "objects": objects, "rotations": rotations}


def _parse_object(element: ElementTree.Element) -> tuple[str, tuple[float, ...], bool]:
    name = element.findtext("name")
    if name is None:
        raise ValueError("no name")
    x0, y0, x1, y1 = (float(element.findtext(f"bndbox/{corner}")) for corner in CORNERS)
    difficult = bool(int(element.findtext("difficult") or 0))
    return name.strip(), (x0 - 1, y0 - 1, x1, y1), difficult


def _parse_rotation(element: ElementTree.Element) -> float:
    degrees = float(element.findtext("attributes/attribute[name='rotation']/value") or 0)
    return degrees if np.isfinite(degrees) else 0.0


def _rotate_boxes(
    boxes_xyxy: np.ndarray, records: Sequence[dict[str, Any]]
) -> tuple[np.ndarray, np.ndarray]:
    """Return which boxes of XML files are rotated, bool [A], and all boxes, float32 [A, 4], with these replaced."""
    degrees = [angle for record in records for angle in record["rotations"]]
    rotated = np.array(degrees, dtype=np.float64) % 180 != 0  # [A]
    if not rotated.any():
        return rotated, boxes_xyxy
    boxes_xywh = boxes_xyxy.astype(np.float64)
    boxes_xywh[:, 2:] -= boxes_xywh[:, :2]
    around = box_around_rotated(boxes_xywh, np.array(degrees, dtype=np.float64))
    around[:, 2:] += around[:, :2]
    return rotated, around.astype(np.float32)


def annotations_from_xml(
    records: Sequence[dict[str, Any]],
    *,
    source: str,
    images: PackedStrings,
    image_ids: Sequence[int],
    classes: Sequence[str],
    files: Sequence[str],
) -> Annotations:
    """Build `Annotations` from XML files. The id of an object is its number in its file, starting at 1.

    Args:
        records: what `read_xml` returned for each image.
        images, image_ids, files: image file, id and XML file of each image.
        classes: names of the labels.

    Raises:
        UserError: the class of an object is not in `classes`.
    """
    labels = {name: label for label, name in enumerate(classes)}
    objects = [
        (i, number, *found)
        for i, record in enumerate(records)
        for number, found in enumerate(record["objects"], start=1)
    ]
    for i, number, name, *_ in objects:
        if name not in labels:
            raise UserError(
                f"{files[i]}: object {number} has the class '{name}', which VOC does not have; use other classes with "
                "--dataset_file custom"
            )

    ids = np.array(image_ids, dtype=np.int64)  # [I]
    image_of_object = ids[[i for i, *_ in objects]] if objects else np.zeros(0, np.int64)  # [A]
    box = np.array([box for _, _, _, box, _ in objects], dtype=np.float32).reshape(-1, 4)  # [A, 4]
    rotated, box = _rotate_boxes(box, records)
    columns = {
        "id": np.array([number for _, number, *_ in objects], dtype=np.int64),
        "image": image_of_object,
        "label": np.array([labels[name] for _, _, name, *_ in objects], dtype=np.int64),
        "crowd": np.zeros(len(objects), dtype=bool),
        "box": box,
        "rotated": rotated,
        "area": (box[:, 2:] - box[:, :2]).prod(1),
        "difficult": np.array([difficult for *_, difficult in objects], dtype=bool),
    }
    sizes = np.array([record["size_hw"] for record in records], dtype=np.int64).reshape(-1, 2)
    return annotations_from_columns(
        columns,
        source=source,
        file_names=images,
        image_ids=ids,
        sizes_hw=sizes,  # [I, 2]
        class_names=dict(enumerate(classes)),
    )
