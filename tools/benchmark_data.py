"""What `tools/benchmark.py data_start` times: finding many images, and reading their annotations, before the first step
of a run.

Files are made in a folder of their own among the temporary ones and removed at the end. They were written just before,
so that the system has them in memory, and nothing waits: CPU time is what counts. A cold disk is slower.
"""

import io
import json
import os
import random
import shutil
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

import finetune_main
from datasets import build_labelled, build_loader
from datasets.images.listing import list_folder
from datasets.images.tar_shards import open_shards
from datasets.labelled.annotations import Annotations, parse_coco, read_coco
from datasets.labelled.checks import check_at_start
from util.cache import cache_folder
from util.logger import Progress, log
from util.runs.session import seed_everything
from util.settings.arguments import resolve

Case = tuple[str, dict[str, Callable[[], list[Tensor]]]]
FOLDERS, IN_A_SHARD = 1000, 10_000
BOXES, CORNERS = 7, 22  # of an image; of a polygon, as in COCO
SIZE = 64, 48
LINKS = 10_000  # to one file: file systems have a limit
EXTENSIONS = frozenset([".jpg"])
LONG_AGO = 1e9, 1e9  # what has just changed is not remembered


def cases(files: int, annotated: int) -> Iterator[Case]:
    """(what is done, how -> a call that returns what must be equal). Leaves nothing behind, and keeps nothing in the
    user's cache.
    """
    folder, cache = Path(tempfile.mkdtemp(prefix="predetr_benchmark_")), os.environ.get("XDG_CACHE_HOME")
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    try:
        yield listing(folder / "images", files)
        yield shards(folder / "shards", annotated)
        for polygons in (False, True):
            root = folder / ("polygons" if polygons else "boxes")
            write_annotated(root, annotated, polygons)
            what = f"{annotated} images, {BOXES} boxes each, {'with' if polygons else 'no'} polygons"
            yield (
                f"annotations of {what}",
                {
                    "json.load": lambda root=root: summary(
                        parse_coco(json.loads(annotation_file(root).read_bytes()), "")
                    ),
                    "read_coco": lambda root=root: summary(read_coco(str(annotation_file(root)))),
                },
            )
            yield f"all before the first step, {what}", {"fine-tuning": lambda root=root: first_batch(root)}
            shutil.rmtree(root)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        del os.environ["XDG_CACHE_HOME"]
        if cache is not None:
            os.environ["XDG_CACHE_HOME"] = cache


# ---- unlabelled images ----


def listing(root: Path, files: int) -> Case:
    bar = Progress(FOLDERS, "making files")
    for folder in range(FOLDERS):
        inside = root / f"n{folder:08d}"
        inside.mkdir(parents=True)
        for number in range(folder, files, FOLDERS):
            os.close(os.open(inside / f"n{folder:08d}_{number:07d}.jpg", os.O_CREAT | os.O_WRONLY))
        os.utime(inside, LONG_AGO)
        bar.step()
    os.utime(root, LONG_AGO)
    names = list_folder(str(root), EXTENSIONS).images
    log.info("%d names: %.1f MiB in memory", len(names), sum(array.nbytes for array in names.arrays()) / 2**20)

    def first_time() -> list[Tensor]:
        shutil.rmtree(cache_folder(), ignore_errors=True)
        return later()

    def later() -> list[Tensor]:
        return _as_tensors(list_folder(str(root), EXTENSIONS, worth_keeping=0).images.digest())

    return f"listing {files} files in {FOLDERS} folders", {"first time": first_time, "later": later}


def shards(root: Path, images: int) -> Case:
    root.mkdir()
    content = _jpeg(0)
    bar = Progress(images, "making tar files")
    for first in range(0, images, IN_A_SHARD):
        path = root / f"train-{first // IN_A_SHARD:06d}.tar"
        with tarfile.open(path, "w") as tar:
            for number in range(first, min(first + IN_A_SHARD, images)):
                entry = tarfile.TarInfo(f"{number:07d}.jpg")
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
                bar.step()
        os.utime(path, LONG_AGO)
    names = sorted(os.listdir(root))

    def first_time() -> list[Tensor]:
        shutil.rmtree(cache_folder(), ignore_errors=True)
        return later()

    def later() -> list[Tensor]:
        found = open_shards(str(root), names, EXTENSIONS)
        return [torch.from_numpy(found.offsets), *_as_tensors(found.names.digest())]

    return f"opening {len(names)} tar files with {images} images", {"first time": first_time, "later": later}


def _as_tensors(digest: str) -> list[Tensor]:
    return [torch.tensor(list(bytes.fromhex(digest)))]


# ---- annotations ----


def write_annotated(root: Path, images: int, polygons: bool) -> None:
    """COCO's layout; the images are hard links to a few."""
    (root / "annotations").mkdir(parents=True)
    for name, count, first in (("train2017", images, 0), ("val2017", 8, images)):
        (root / name).mkdir()
        different = 8 + count // LINKS
        for number in range(different):
            (root / name / f"{number}.jpg").write_bytes(_jpeg(first + number))
        names = [f"{first + number:012d}.jpg" for number in range(count)]
        for number, image in enumerate(names):
            os.link(root / name / f"{number % different}.jpg", root / name / image)
        (root / "annotations" / f"instances_{name}.json").write_text(json.dumps(content(names, first, polygons)))


def annotation_file(root: Path) -> Path:
    return root / "annotations" / "instances_train2017.json"


def content(names: list[str], first: int, polygons: bool) -> dict:
    """Annotations with all fields of COCO's and random boxes."""
    rng = random.Random(0)
    width, height = SIZE
    boxes = []
    for image in range(first, first + len(names)):
        for _ in range(BOXES):
            x, y, w, h = (round(rng.uniform(low, high), 2) for low, high in ((0, 30), (0, 20), (4, 30), (4, 20)))
            corners = [round(rng.uniform(0, height), 2) for _ in range(2 * CORNERS if polygons else 0)]
            boxes.append(
                {
                    "segmentation": [corners],
                    "area": round(w * h, 4),
                    "iscrowd": 0,
                    "image_id": image,
                    "bbox": [x, y, w, h],
                    "category_id": rng.randint(1, 90),
                    "id": len(boxes) + 1,
                }
            )
    url = "http://images.cocodataset.org/train2017/"
    return {
        "images": [
            {
                "license": 3,
                "file_name": name,
                "coco_url": url + name,
                "height": height,
                "width": width,
                "id": first + i,
                "date_captured": "2013-11-14 11:18:45",
                "flickr_url": f"http://farm9.staticflickr.com/8186/{name}",
            }
            for i, name in enumerate(names)
        ],
        "annotations": boxes,
        "categories": [{"supercategory": "thing", "id": i, "name": f"class {i}"} for i in range(1, 91)],
    }


def _jpeg(seed: int) -> bytes:
    file = io.BytesIO()
    width, height = SIZE
    Image.frombytes("RGB", SIZE, random.Random(seed).randbytes(3 * width * height)).save(file, format="JPEG")
    return file.getvalue()


def summary(annotations: Annotations) -> list[Tensor]:
    return [
        torch.from_numpy(array) for array in (annotations.boxes_xyxy_abs, annotations.labels, annotations.image_ids)
    ]


def first_batch(root: Path) -> list[Tensor]:
    """All that the number of images can slow down between reading the flags and the first step; no model."""
    flags = [
        "--coco_path",
        str(root),
        "--device",
        "cpu",
        "--num_workers",
        "0",
        "--image_size",
        "64",
        "--batch_size",
        "2",
    ]
    args = resolve(finetune_main.parse(flags))
    seed_everything(args.seed)
    train_set, val_set = build_labelled(args)
    loader = build_loader(train_set, args, train=True)
    train_set.fingerprint()
    check_at_start(train_set, val_set, args)
    samples, _ = next(iter(loader))
    return [samples.tensors.float()]
