"""COCO evaluation beyond inference: collect the detections of all images, and compute the metrics."""

import argparse
import importlib.util
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from datasets.evaluators.coco import CocoEvaluator, build_ground_truth
from tools.benchmarks.measure import Comparison, Local
from tools.benchmarks.work import NUM_BOXES

NUM_CLASSES, NUM_DETECTIONS, BATCH = 80, 100, 8
HEIGHT, WIDTH = 480, 640


def make_ground_truth(num_images: int) -> dict[str, Any]:
    """Return random annotations in COCO's format, always the same ones."""
    generator = torch.Generator().manual_seed(0)
    images = [{"id": i, "width": WIDTH, "height": HEIGHT} for i in range(1, num_images + 1)]
    rows = torch.rand(num_images, NUM_BOXES, 5, generator=generator).tolist()
    annotations = []
    for image, boxes in zip(images, rows, strict=True):
        for x, y, w, h, label in boxes:
            box = [x * 0.6 * WIDTH, y * 0.6 * HEIGHT, 8 + w * 0.3 * WIDTH, 8 + h * 0.3 * HEIGHT]
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image["id"],
                    "category_id": 1 + int(label * NUM_CLASSES),
                    "bbox": box,
                    "area": box[2] * box[3],
                    "iscrowd": 0,
                }
            )
    categories = [{"id": i, "name": f"class {i}"} for i in range(1, NUM_CLASSES + 1)]
    return {"images": images, "annotations": annotations, "categories": categories}


def make_detections(ground_truth: dict[str, Any]) -> list[dict[int, dict[str, Tensor]]]:
    """Return batches of predictions, 100 per image: its objects, shifted, and random boxes."""
    generator = torch.Generator().manual_seed(1)
    of_image: dict[int, list[dict[str, Any]]] = {i["id"]: [] for i in ground_truth["images"]}
    for annotation in ground_truth["annotations"]:
        of_image[annotation["image_id"]].append(annotation)

    predictions = {}
    for image_id, objects in of_image.items():
        count = NUM_DETECTIONS - len(objects)
        found = torch.tensor([o["bbox"] for o in objects])
        found = found + torch.randn(found.shape, generator=generator) * 6
        other = torch.rand(count, 4, generator=generator) * 200
        boxes = torch.cat([found, other])
        boxes[:, 2:] = boxes[:, 2:].clamp(min=1)
        boxes[:, 2:] += boxes[:, :2]  # (x0, y0, x1, y1)
        labels = torch.cat(
            [
                torch.tensor([o["category_id"] for o in objects]),
                torch.randint(1, NUM_CLASSES + 1, (count,), generator=generator),
            ]
        )
        scores = torch.rand(NUM_DETECTIONS, generator=generator)
        predictions[image_id] = {"boxes": boxes, "labels": labels, "scores": scores}
    ids = list(predictions)
    return [
        {image_id: predictions[image_id] for image_id in ids[start : start + BATCH]}
        for start in range(0, len(ids), BATCH)
    ]


def build(case: dict[str, Any]) -> Local:
    """Return one backend of the evaluator as a contender."""
    ground_truth = build_ground_truth(make_ground_truth(case["images"]))
    batches = make_detections(ground_truth)

    def run() -> list[Tensor]:
        evaluator = CocoEvaluator(ground_truth, case["backend"])
        for batch in batches:
            evaluator.update(batch)
        evaluator.synchronize_between_processes()
        return [torch.tensor(evaluator.summarize()["stats"])]

    # The metrics of a long evaluation are not computed twice: the last run's are compared.
    return Local(run, run, torch.device("cpu"))


def comparisons(args: argparse.Namespace, bench: Any) -> Iterator[Comparison]:
    comparison = Comparison(
        f"{args.images} images x {NUM_DETECTIONS} detections", {}, 1e-6, items=args.images
    )
    backends = ["hotcoco", "pycocotools"]
    if not importlib.util.find_spec("hotcoco"):
        comparison.skipped["ours, hotcoco"] = "not installed: pip install hotcoco"
        backends = ["pycocotools"]
    if args.no_pycocotools:
        backends = backends[:1]
    case: dict[str, Any] = {"images": args.images, "flags": {}}
    for backend in backends:
        comparison.contenders[f"ours, {backend}"] = build({**case, "backend": backend})
    bench.add_variants(comparison, "evaluation", {**case, "backend": backends[0]}, args, 1e-6)
    yield comparison


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from tools.benchmarks.step import against_argument

    parser.add_argument("--images", type=int, default=500, metavar="N", help="number of images")
    parser.add_argument(
        "--no_pycocotools",
        action="store_true",
        help="only the fastest backend; pycocotools takes minutes for thousands of images",
    )
    against_argument(parser)
    parser.set_defaults(variant=[])
