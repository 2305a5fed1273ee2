"""PASCAL VOC as published: VOCdevkit with its XML files and image sets. Also custom folders of such XML files.

Shapes: I images, A objects, as in `datasets.labelled.annotations`.
"""

import codecs
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np

from datasets.evaluators.voc import VocEvaluator
from datasets.images.listing import list_folder
from datasets.images.packed_strings import PackedStrings
from datasets.images.unlabelled import ListedImages
from datasets.labelled.annotations import Annotations
from datasets.labelled.coco import ConvertedDetection, filter_annotations, labelled_transforms
from datasets.labelled.coco_parser import box_around_rotated
from datasets.labelled.file_names import ImageIndex, folded, folded_stem, spellings
from datasets.labelled.object_filter import annotations_from_columns
from util.checkpoints.classes import Classes
from util.errors import UserError
from util.files import read_lines
from util.logger import log
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
VOC_TAGS = ("object", "size", "filename")  # of which an annotation has at least one
XML_EXTENSIONS = frozenset({".xml"})
TRUE_WORDS = {"true", "yes", "y", "t"}
# VOC itself writes Unspecified for a pose or a truncation that nobody has noted.
FALSE_WORDS = {"", "false", "no", "n", "f", "unspecified", "none", "null", "nan"}


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
    refuse_masks(settings, "VOC's XML files")
    root = voc_root(settings.voc_path, settings.data_root)
    annotations = read_voc(root, settings.voc_train if image_set == "train" else settings.voc_val)
    return VocDetection(
        root,
        filter_annotations(annotations, root, image_set, settings),
        labelled_transforms(image_set, settings),
        num_classes=len(CLASSES),
        seed=settings.seed,
    )


def refuse_masks(settings: Settings, what: str) -> None:
    """Raise a UserError with `--masks`: `what` has boxes only."""
    if settings.masks:
        raise UserError(
            f"--masks: {what} have boxes only; omit it, or give a COCO file with segmentations with --dataset_file "
            "custom"
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
    folders = {image_set[:4]: year_folder(root, image_set[:4]) for image_set in image_sets}
    names = sorted({f"{folders[year]}/JPEGImages/{name}.jpg" for year, name in listed})
    return ListedImages(root, PackedStrings(names), f"{root} ({' '.join(image_sets)})")


def voc_root(voc_path: str | None, data_root: str | None) -> str:
    """Return the folder with VOC2007 and VOC2012: `voc_path`, or `pascal/VOCdevkit` in `data_root`.

    The parent folder of VOCdevkit is accepted, too, and Siamese DETR's folder with one VOCdevkit per year.

    Raises:
        UserError: the folder does not exist.
    """
    given = voc_path or os.path.join(data_root or "", "pascal", "VOCdevkit")
    inside = os.path.join(given, "VOCdevkit")
    by_year = any(Path(given).glob("20[0-9][0-9]/VOCdevkit"))
    root = inside if os.path.isdir(inside) and not by_year else given
    if not os.path.isdir(root):
        raise UserError(
            f"{root} is not a folder: --voc_path takes VOCdevkit, with VOC2007 and VOC2012 in it"
        )
    return root


def year_folder(root: str, year: str) -> str:
    """Return the folder of a year, relative to the root: VOC2007, or in Siamese DETR's layout 2007/VOCdevkit/VOC2007.

    In that layout, `VOCdevkit/VOC2012` is next to `2007`.
    """
    name = f"VOC{year}"
    for folder in (f"{year}/VOCdevkit/{name}", f"VOCdevkit/{name}"):
        if os.path.isdir(os.path.join(root, folder)):
            return folder
    return name


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
    folders = {year: year_folder(root, year) for year, _ in year_and_name.values()}
    files, images = [], []
    for image_id in ids:
        year, name = year_and_name[image_id]
        files.append(os.path.join(root, folders[year], "Annotations", f"{name}.xml"))
        images.append(f"{folders[year]}/JPEGImages/{name}.jpg")
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
        path = Path(root, year_folder(root, year), "ImageSets", "Main", f"{part}.txt")
        try:
            lines = read_lines(path)
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"{path} can't be read: {image_set} needs this list of images; choose others with --voc_train and "
                "--voc_val, such as 2012_trainval"
            ) from error
        # The lists of a single class have a second column.
        yield from ((year, _image_name(line.split()[0])) for line in lines if line.strip())


def _image_name(word: str) -> str:
    """Return the name in a line of an image set. Other programs write it with folder and extension."""
    return re.sub(r"(?i)\.(jpe?g|png|xml)$", "", word.replace("\\", "/").rpartition("/")[2])


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


def read_xml_folder(folder: str, image_folder: str = "") -> Annotations:
    """Read all XML files of a folder tree, sorted by name.

    Image ids start at 1; the classes are the sorted class names. The image of a file is its <filename>. If the image
    folder has another image with the name of the XML file, that one is used: whoever renames both files rarely edits
    <filename>.

    Args:
        image_folder: empty: <filename> is used in any case, or the name of the XML file with .jpg.

    Raises:
        UserError: the folder has no XML file, or one is malformed.
    """
    # Hidden files are skipped: macOS writes ._1.xml next to 1.xml.
    names = list(list_folder(folder, XML_EXTENSIONS).images)
    if not names:
        raise UserError(
            f"{folder} has no .xml file: give a folder of VOC XML files, or a COCO file"
        )
    files = [os.path.join(folder, name) for name in names]
    records = [read_xml(file) for file in files]
    classes = sorted({name for record in records for name, *_ in record["objects"]})

    index = ImageIndex(image_folder) if image_folder else None
    images, notes = [], {}
    for i, (name, record) in enumerate(zip(names, records, strict=True), start=1):
        image, is_other = image_of_xml(name, record["file"], index)
        images.append(image)
        if is_other:
            notes[i] = f"<filename> of {name} is {record['file']}"

    annotations = annotations_from_xml(
        records,
        source=folder,
        images=PackedStrings(images),
        image_ids=range(1, len(files) + 1),
        classes=classes,
        files=files,
    )
    if notes:
        annotations.image_notes["XML names another image"] = notes
    _record_counting_from_0(annotations, records, names)
    if index is not None:
        _record_other_images(annotations, index)
    return annotations


def image_of_xml(name: str, listed: str, index: ImageIndex | None) -> tuple[str, bool]:
    """Return (image file of an XML file, whether this is another image than its <filename>).

    Args:
        name: of the XML file, relative to the folder of annotations.
        listed: its <filename>, perhaps empty.
    """
    folder, base = os.path.split(name)
    stem = os.path.splitext(base)[0]
    default = listed or f"{stem}.jpg"
    # Almost always the two names agree, and no other file has to be looked at.
    agree = os.path.join(folder, default) == os.path.join(
        folder, stem + os.path.splitext(default)[1]
    )
    if index is None or (agree and not folder and default in index.files):
        return default, False

    # A tree of XML files often mirrors the tree of images.
    listed_files = [
        index.match(os.path.join(part, default)) for part in dict.fromkeys((folder, ""))
    ]
    named = next(filter(None, listed_files), None)
    own = index.with_stem(os.path.join(folder, stem)) or index.with_stem(stem)
    if named in own:
        return named, False
    if len(own) > 1:  # such as a photo and its mask
        extension = os.path.splitext(default)[1].lower()
        own = [file for file in own if os.path.splitext(file)[1].lower() == extension]
    if len(own) != 1:
        return named or default, False
    stems = {folded_stem(os.path.basename(spelling)) for spelling in spellings(listed)}
    return own[0], bool(listed) and folded(f"{stem}.") not in stems


def _record_counting_from_0(
    annotations: Annotations, records: Sequence[dict[str, Any]], names: Sequence[str]
) -> None:
    """Record once that boxes begin at pixel 0: whoever wrote the files counts from 0, VOC from 1."""
    boxes = [
        (name, box[:2])
        for name, record in zip(names, records, strict=True)
        for _, box, _ in record["objects"]
    ]
    # `read_xml` has subtracted 1.
    found = [name for name, corner in boxes if -1 <= min(corner) < 0]
    if found:
        annotations.findings["counted from 0"] = (np.full((1, 2), -1), PackedStrings([""]))
        annotations.image_notes["counted from 0"] = {
            -1: f"{len(found)} of {len(boxes)} boxes have xmin or ymin 0, the first is in {found[0]}"
        }


def _record_other_images(annotations: Annotations, index: ImageIndex) -> None:
    """Record the images of the folder that no XML file is about."""
    others = sorted(index.files - set(annotations.file_names))
    if others:
        ids = np.full((len(others), 2), -1)  # [K, 2]
        annotations.findings["image without XML file"] = (ids, PackedStrings(others))
        log.info(
            "%s: %d of %d images in %s have no XML file and are not used, the first is %s",
            annotations.source,
            len(others),
            len(index.names),
            index.folder,
            others[0],
        )


def read_xml(path: str) -> dict[str, Any]:
    """Read one XML file.

    VOC counts pixels from 1, and xmax and ymax are the last pixel of the object. A box here spans the area of these
    pixels, so xmin and ymin are reduced by 1.

    Returns:
        {"file": its <filename>, "size_hw": (height, width), "objects": [(name, box, difficult), ...], "rotations":
        CVAT's angle of each box in degrees, 0 if it has none, "polygons": those of each object, often none}, where a
        box is (x0, y0, x1, y1) and a polygon [x, y, x, y, ...] in pixels.

    Raises:
        UserError: the file is missing or not XML, or an object has no name or no numbers for its corners.
    """
    try:
        with open(path, "rb") as file:
            root = _parse_xml(file.read(), path)
    except OSError as error:
        raise UserError(
            f"{path} can't be read ({error.strerror}): each image needs its file in Annotations"
        ) from error

    # Tags of a namespace read {http://...}object, and some programs write <Object> or <bndBox>.
    for element in root.iter():
        if isinstance(element.tag, str):  # comments have none
            element.tag = element.tag.rpartition("}")[2].lower()
    if root.tag != "annotation" and not any(root.find(tag) is not None for tag in VOC_TAGS):
        raise UserError(
            f"{path} is not an annotation of VOC (its outermost element is <{root.tag}>): give a folder of VOC XML "
            "files, one per image"
        )

    try:
        # At any depth: some programs put them into <objects>.
        elements = list(root.iter("object"))
        objects = [_parse_object(element) for element in elements]
        rotations = [_parse_rotation(element) for element in elements]
        polygons = [_parse_polygons(element) for element in elements]
        size = tuple(_parse_side(root.findtext(f"size/{name}")) for name in ("height", "width"))
    except (TypeError, ValueError, OverflowError) as error:
        raise UserError(
            f"{path}: an object needs <name> and <bndbox> with numbers for {', '.join(CORNERS)}, and <size> whole "
            f"numbers ({error}): correct it"
        ) from error
    # The file name may be on a line of its own.
    file = (root.findtext("filename") or "").strip()
    return {
        "file": file,
        "size_hw": size,
        "objects": objects,
        "rotations": rotations,
        "polygons": polygons,
    }


def _parse_xml(content: bytes, path: str) -> ElementTree.Element:
    """Return the outermost element of an XML file.

    Raises:
        UserError: it is not XML, or in an encoding that can't be read.
    """
    try:
        return ElementTree.fromstring(content)
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        failure = error
    # Python's parser knows few encodings, and wants the declaration at the very start of the file. Decoding the content
    # first helps against both. If the content is not XML either way, the first error has the right position.
    if not content.strip():
        raise UserError(f"{path} is empty: copy it again, or remove it")
    text = _decode_xml(content, path)
    try:
        return ElementTree.fromstring(text)
    except (ElementTree.ParseError, ValueError) as error:
        reason = failure if isinstance(failure, ElementTree.ParseError) else error
        raise UserError(
            f"{path} is not valid XML ({reason}): correct it; is the download complete?"
        ) from error


def _decode_xml(content: bytes, path: str) -> str:
    """Return the text of an XML file in the encoding that it declares, without byte order mark and leading spaces.

    Raises:
        UserError: Python does not know the encoding, or the content is not in it.
    """
    declared = re.match(rb"""[^<]*<\?xml[^>]*?encoding\s*=\s*["']([\w.:-]+)["']""", content)
    encoding = codec = declared[1].decode().lower() if declared else "utf-8"
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        codec = "utf-16"
    elif declared and re.fullmatch(r"utf-?(16|32)(le|be)?", encoding):
        # The declaration could be read byte by byte, so the content is not in UTF-16, as .NET programs claim.
        codec = "utf-8"
    elif re.fullmatch(r"gb_?2312(-80)?|gbk|euc[-_]?cn", encoding):
        codec = "gb18030"  # contains the others, which programs mix up
    try:
        return _decode(content, codec)
    except LookupError as error:
        raise UserError(
            f"{path} declares the encoding {encoding}, which is not known: save it as UTF-8"
        ) from error
    except UnicodeError as error:
        says = "declares" if declared else "declares no encoding, which means"
        raise UserError(
            f"{path} {says} {encoding}, but its content is in another encoding ({error}): declare that one, or save "
            "the file as UTF-8"
        ) from error


def _decode(content: bytes, codec: str) -> str:
    """Decode the content of an XML file, in UTF-8 if it can't be in `codec`."""
    try:
        text = content.decode(codec)
    except UnicodeError:
        try:
            text = content.decode("utf-8")
        except UnicodeError:
            text = ""
        if not text:
            raise
    return text.lstrip("\ufeff \t\r\n")


def _parse_object(element: ElementTree.Element) -> tuple[str, tuple[float, ...], bool]:
    name = (element.findtext("name") or "").strip()
    if not name:
        raise ValueError("no name")
    texts = [element.findtext(f"bndbox/{corner}") for corner in CORNERS]
    if None in texts:  # such as a polygon
        raise ValueError(f"'{name}' has no {CORNERS[texts.index(None)]} in a <bndbox>")
    x0, y0, x1, y1 = map(float, texts)
    return name, (x0 - 1, y0 - 1, x1, y1), _parse_flag(element.findtext("difficult") or "0")


def _parse_flag(text: str) -> bool:
    """Return a mark such as <difficult>, which programs write as 0 and 1 or in words.

    Raises:
        ValueError: neither.
    """
    word = text.strip().lower()
    if word in TRUE_WORDS or word in FALSE_WORDS:
        return word in TRUE_WORDS
    try:
        return bool(float(word))
    except ValueError as error:
        raise ValueError(f"<difficult> is {word!r} instead of 0 or 1") from error


def _parse_polygons(element: ElementTree.Element) -> list[list[float]]:
    """Return the polygons of Roboflow and supervision, <polygon><x1>, <y1>, <x2>, ..., also counted from 1.

    Training does not use them, so that numbers which can't be read become NaN instead of an error.
    """
    polygons = []
    for polygon in element.findall("polygon"):
        points = [point.text or "" for point in polygon if re.fullmatch(r"[xy]\d+", str(point.tag))]
        try:
            polygons.append([float(text) - 1 for text in points])
        except ValueError:
            polygons.append([float("nan")] * len(points))
    return [points for points in polygons if points]


def _parse_side(text: str | None) -> int:
    """Return the height or width of an image in pixels; 0 if the file does not say."""
    side = int(float(text or 0))
    if abs(side) >= 2**31:
        raise ValueError(f"<size> has {side:.0e} pixels")
    return side


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
    # Values too large for float32 become infinite. Such boxes are skipped later.
    with np.errstate(over="ignore", invalid="ignore"):
        box = np.array([box for _, _, _, box, _ in objects], dtype=np.float32).reshape(-1, 4)
        rotated, box = _rotate_boxes(box, records)  # [A], [A, 4]
        area = (box[:, 2:] - box[:, :2]).prod(1)  # [A]
    columns = {
        "id": np.array([number for _, number, *_ in objects], dtype=np.int64),
        "image": image_of_object,
        "label": np.array([labels[name] for _, _, name, *_ in objects], dtype=np.int64),
        "crowd": np.zeros(len(objects), dtype=bool),
        "box": box,
        "rotated": rotated,
        "area": area,
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
