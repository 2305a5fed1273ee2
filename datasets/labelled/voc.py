"""PASCAL VOC as published: the folders of VOCdevkit with their XML files and lists of images."""

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
from datasets.labelled.annotations import Annotations, from_columns
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
    """Images of VOC; labels are places in CLASSES, which are the category ids too. Evaluated as VOC defines it."""

    def evaluator(self, settings: Settings) -> VocEvaluator:
        return VocEvaluator(
            self.annotations, settings.voc_metric, reproduce_published=settings.reproduce_published
        )


def build_voc(image_set: str, settings: Settings, classes: Classes | None = None) -> VocDetection:
    """The images of `--voc_train` or `--voc_val` below `--voc_path`, those with `difficult` objects included.

    Raises:
        UserError: folders, lists or files are missing or can't be used.
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
    """The images of the same lists for pre-training; XML files are not read.

    Raises:
        UserError: folder or lists are missing, or name no image.
    """
    root = voc_root(settings.voc_path, settings.data_root)
    image_sets = settings.voc_train if image_set == "train" else settings.voc_val
    names = sorted({f"VOC{year}/JPEGImages/{name}.jpg" for year, name in _listed(root, image_sets)})
    return ListedImages(root, PackedStrings(names), f"{root} ({' '.join(image_sets)})")


def voc_root(voc_path: str | None, data_root: str | None) -> str:
    """The folder that holds VOC2007 and VOC2012: `voc_path`, or `pascal/VOCdevkit` in `data_root`.

    Raises:
        UserError: it does not exist.
    """
    given = voc_path or os.path.join(data_root or "", "pascal", "VOCdevkit")
    inside = os.path.join(given, "VOCdevkit")
    root = inside if os.path.isdir(inside) else given
    if not os.path.isdir(root):
        raise UserError(
            f"{root} is no folder: --voc_path takes VOCdevkit, with VOC2007 and VOC2012 in it"
        )
    return root


def read_voc(root: str, image_sets: Sequence[str]) -> Annotations:
    """The images of several lists, such as `2007_trainval`, once each, with their objects.

    Image ids are DETReg's: 2021 and the digits of the name.

    Raises:
        UserError: a list or an XML file is missing or can't be used.
    """
    by_id = _by_id(root, image_sets)
    if not by_id:
        raise UserError(f"{root}: {' '.join(image_sets)} list no image")
    ids = sorted(by_id)
    files = [
        os.path.join(root, f"VOC{by_id[i][0]}", "Annotations", f"{by_id[i][1]}.xml") for i in ids
    ]
    images = PackedStrings(f"VOC{by_id[i][0]}/JPEGImages/{by_id[i][1]}.jpg" for i in ids)
    return annotations_of(
        [read_xml(file) for file in files],
        f"{root} ({' '.join(image_sets)})",
        images,
        ids,
        CLASSES,
        files,
    )


def _by_id(root: str, image_sets: Sequence[str]) -> dict[int, tuple[str, str]]:
    """Image id -> (year, name) of all lists. The years from 2008 on hold the same images under the same names, which
    begin with a year.
    """
    places: dict[int, tuple[str, str]] = {}
    for year, name in _listed(root, image_sets):
        number = image_id(name)
        other_year, other = places.get(number, (year, name))
        if other != name or other_year != year and not re.match(r"20\d\d_", name):
            raise UserError(
                f"{root}: VOC{other_year} lists {other} and VOC{year} lists {name}, which get the same image id "
                f"{number}: give them names with different digits"
            )
        places[number] = year, name
    return places


def read_xml_folder(folder: str) -> Annotations:
    """All XML files of a folder but hidden ones, in the order of their names, with ids from 1 on; classes are the names
    that occur, in order.

    An image's file is its <filename>, or the name of the XML file with .jpg.

    Raises:
        UserError: no such file there, or one can't be used.
    """
    files = sorted(
        str(path) for path in Path(folder).glob("[!.]*.xml")
    )  # macOS writes ._1.xml beside 1.xml
    if not files:
        raise UserError(
            f"{folder} has no .xml file: give a folder of VOC's XML files, or a COCO file"
        )
    records = [read_xml(file) for file in files]
    classes = sorted({name for record in records for name, *_ in record["objects"]})
    images = PackedStrings(
        record["file"] or f"{Path(file).stem}.jpg"
        for record, file in zip(records, files, strict=True)
    )
    return annotations_of(records, folder, images, range(1, len(files) + 1), classes, files)


def image_id(name: str) -> int:
    """2007_000027 -> 20212007000027.

    Raises:
        UserError: the name has no such number.
    """
    digits = name.replace("_", "")
    if not digits.isascii() or not digits.isdigit() or len(digits) > 11:
        raise UserError(
            f"VOC image {name}: names are numbers, such as 000005 or 2008_000002; own images go with "
            f"--dataset_file custom"
        )
    return int(f"2021{digits}")


def _listed(root: str, image_sets: Sequence[str]) -> Iterable[tuple[str, str]]:
    """(year, image name) of the lists ImageSets/Main/SET.txt."""
    for image_set in image_sets:
        year, _, part = image_set.partition("_")
        path = Path(root, f"VOC{year}", "ImageSets", "Main", f"{part}.txt")
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"{path} can't be read: {image_set} needs this list of images; choose others by --voc_train and "
                "--voc_val, such as 2012_trainval"
            ) from error
        yield from ((year, line.split()[0]) for line in lines if line.strip())


def read_xml(path: str) -> dict[str, Any]:
    """One file: {"file": its <filename>, "size_hw", "objects": [(name, box (x0, y0, x1, y1) in pixels, difficult),
    ...]}.

    Corners are written from 1 on, the right and lower ones included: here the left and upper ones are 1 less.

    Raises:
        UserError: it is missing, no XML, or an object has no name or no numbers for its corners.
    """
    try:
        with open(path, "rb") as file:
            root = ElementTree.fromstring(file.read())
    except OSError as error:
        raise UserError(
            f"{path} can't be read ({error.strerror}): each image needs its file in Annotations"
        ) from error
    except ElementTree.ParseError as error:
        raise UserError(f"{path} is no valid XML ({error}): is the download complete?") from error
    try:
        objects = [_object(element) for element in root.findall("object")]
        size = tuple(int(float(root.findtext(f"size/{name}") or 0)) for name in ("height", "width"))
    except (TypeError, ValueError, OverflowError) as error:
        raise UserError(
            f"{path}: an object needs <name> and <bndbox> with numbers for {', '.join(CORNERS)}, and <size> whole "
            f"numbers ({error}): correct it"
        ) from error
    return {"file": (root.findtext("filename") or "").strip(), "size_hw": size, "objects": objects}


def _object(element: ElementTree.Element) -> tuple[str, tuple[float, ...], bool]:
    name = element.findtext("name")
    if name is None:
        raise ValueError("no name")
    x0, y0, x1, y1 = (float(element.findtext(f"bndbox/{corner}")) for corner in CORNERS)
    return name.strip(), (x0 - 1, y0 - 1, x1, y1), bool(int(element.findtext("difficult") or 0))


def annotations_of(
    records: Sequence[dict[str, Any]],
    source: str,
    images: PackedStrings,
    ids: Sequence[int],
    classes: Sequence[str],
    files: Sequence[str],
) -> Annotations:
    """Arrays from what `read_xml` gave of each file; an object's id, for messages, is its number in its file.

    Raises:
        UserError: an object of a class that is not in `classes`.
    """
    rows = {name: row for row, name in enumerate(classes)}
    flat = [
        (i, number, *found)
        for i, record in enumerate(records)
        for number, found in enumerate(record["objects"], start=1)
    ]
    for i, number, name, *_ in flat:
        if name not in rows:
            raise UserError(
                f"{files[i]}: object {number} is of class '{name}', which VOC does not have; own classes go with "
                "--dataset_file custom"
            )
    image_ids = np.array(ids, dtype=np.int64)
    box = np.array([box for _, _, _, box, _ in flat], dtype=np.float32).reshape(-1, 4)
    columns = {
        "id": np.array([number for _, number, *_ in flat], dtype=np.int64),
        "image": image_ids[[i for i, *_ in flat]] if flat else np.zeros(0, np.int64),
        "label": np.array([rows[name] for _, _, name, *_ in flat], dtype=np.int64),
        "crowd": np.zeros(len(flat), dtype=bool),
        "box": box,
        "area": (box[:, 2:] - box[:, :2]).prod(1),
        "difficult": np.array([difficult for *_, difficult in flat], dtype=bool),
    }
    sizes = np.array([record["size_hw"] for record in records], dtype=np.int64).reshape(-1, 2)
    return from_columns(columns, source, images, image_ids, sizes, dict(enumerate(classes)))
