"""Samples per second of one dataloader worker: decoding, augmentation, proposals, patches, and making a batch.

Without --imagenet_path or --coco_path the images are generated: JPEG files of 500 x 375 pixels, or of --source_size.
Contenders must draw the same boxes and sizes; pixels may differ by rounding, and with --reduced_decode a little more.
"""

import argparse
import json
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from datasets import build_dataset
from datasets.collate import collate
from tools.benchmarks import step, work
from tools.benchmarks.measure import Comparison, Local
from tools.benchmarks.work import Case
from util.settings import settings
from util.settings.registry import PRETEXTS

SOURCE_SIZE = 375, 500  # (height, width) of most images of ImageNet
NUM_IMAGES = 32
MAX_PIXELS = 48_000_000  # of all images together: of large ones there are fewer
BATCH = 8
# (cells along each side, contrast in gray levels) of the noise. Sizes above the image's are left out.
NOISE = ((8, 60), (32, 40), (128, 20), (512, 10), (2048, 5))


def write_images(folder: Path, size_hw: Sequence[int] = SOURCE_SIZE) -> None:
    """Write generated JPEG files as a COCO dataset: train2017/ and its annotations, 7 objects per image."""
    height, width = size_hw
    num_images = max(min(NUM_IMAGES, MAX_PIXELS // (height * width)), 1)
    rng = np.random.default_rng(0)
    (folder / "train2017").mkdir(parents=True)
    (folder / "annotations").mkdir()
    images, annotations = [], []
    for i in range(1, num_images + 1):
        # Noise at several scales: JPEG size and decoding time are about those of a photo.
        pixels = np.zeros((height, width, 3), np.float32)
        for size, contrast in NOISE:
            if size > max(size_hw):
                break
            noise = rng.integers(0, 255, (size, size, 3), dtype=np.uint8)
            large = Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)
            pixels += (np.asarray(large, np.float32) / 255 - 0.5) * contrast * 2
        name = f"{i:012d}.jpg"
        picture = Image.fromarray((pixels + 128).clip(0, 255).astype(np.uint8))
        picture.save(folder / "train2017" / name, quality=90)
        images.append({"id": i, "file_name": name, "width": width, "height": height})
        for _ in range(work.NUM_BOXES):
            x, y, w, h = rng.random(4) * [width * 0.5, height * 0.5, width * 0.4, height * 0.4]
            box = [float(x), float(y), float(w) + 8, float(h) + 8]
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": i,
                    "category_id": 1 + int(rng.integers(80)),
                    "bbox": box,
                    "area": box[2] * box[3],
                    "iscrowd": 0,
                }
            )
    categories = [{"id": i, "name": f"class {i}"} for i in range(1, 81)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    path = folder / "annotations" / "instances_train2017.json"
    path.write_text(json.dumps(content))


def build(case: Case) -> Local:
    """Return a contender that loads one batch per call, each from the next images."""
    flags = {**case["flags"], "device": "cpu", "num_workers": 0}
    dataset = build_dataset("train", settings(work.script_of(flags), **flags))
    position = types.SimpleNamespace(next=0)

    def load() -> Any:
        first = position.next
        position.next += case["batch_size"]
        keys = [(i // len(dataset), i % len(dataset)) for i in range(first, position.next)]
        return collate([dataset[key] for key in keys])

    def outputs() -> list[Tensor]:
        position.next = 0
        samples, targets = load()
        position.next = 0
        sizes = torch.tensor(samples.tensors.shape)
        return [sizes, targets.tensors["boxes"], targets.tensors["labels"]]

    return Local(load, outputs, torch.device("cpu"))


def comparisons(args: argparse.Namespace, bench: Any) -> Iterator[Comparison]:
    """Yield one comparison per pretext, and one for labelled data (`detection`)."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in a worker
    try:
        for model in args.models:
            yield compare(model, args, bench)
    finally:
        torch.set_num_threads(threads)


def compare(model: str, args: argparse.Namespace, bench: Any) -> Comparison:
    flags: dict[str, Any] = dict(args.flags)
    if not ({"coco_path", "imagenet_path"} & set(flags)):
        folder = bench.scratch / "images"
        if not folder.exists():
            write_images(folder, args.source_size)
        flags["coco_path"] = str(folder)
    if model != "detection":
        flags = {"pretext": model, **work.PRETEXT_FLAGS[model], "proposals": "random", **flags}
    case: Case = {"flags": flags, "batch_size": args.batch_size}
    comparison = Comparison(model, {"ours": build(case)}, 1e-4, items=args.batch_size)
    bench.add_variants(comparison, "loader", case, args, 1e-4)
    return comparison


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--models",
        nargs="+",
        default=["detection", *PRETEXTS],
        choices=["detection", *PRETEXTS],
        help="what is loaded",
    )
    parser.add_argument(
        "--batch_size", type=int, default=BATCH, metavar="N", help="number of samples per batch"
    )
    parser.add_argument(
        "--source_size",
        nargs=2,
        type=int,
        default=list(SOURCE_SIZE),
        metavar=("HEIGHT", "WIDTH"),
        help="of the generated files, in pixels",
    )
    step.variant_argument(parser)
    step.against_argument(parser)
