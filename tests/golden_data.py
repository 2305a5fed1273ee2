"""Checks of the data side of golden cases: transforms, annotations, evaluation, query patches.

`CHECKS[case](case, case_json, npz, golden_dir)` asserts with the tolerances of the golden files: integers and pixels
exact, floats 1e-6 relative, AP and AR 1e-9 absolute. tests/golden_parts.py checks the model side of the same cases.
Segmentation masks of `coco_prepare` are not loaded.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from datasets.collate import normalize_images
from datasets.evaluators.coco import BACKENDS, CocoEvaluator, build_ground_truth
from datasets.evaluators.voc import VocEvaluator, ap_11point, ap_area
from datasets.images.image_folder import to_tensor
from datasets.images.packed_strings import PackedStrings
from datasets.labelled.annotations import Annotations
from datasets.labelled.coco_parser import parse_coco
from datasets.labelled.object_filter import annotations_from_columns
from datasets.pretext.random_query_patch import query_target
from datasets.proposals.base import to_pixels
from datasets.proposals.random import RandomProposals
from datasets.proposals.selective_search import xywh_to_xyxy
from datasets.transforms import (
    PatchAugmentation,
    RandomResize,
    ToSample,
    crop,
    detection_transforms,
    hflip,
    query_patch_transforms,
    resize,
    resized_size,
)
from util.random_state import SampleRNG

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
Arrays = Mapping[str, np.ndarray]


def _close(actual: Any, expected: Any, what: str) -> None:
    np.testing.assert_allclose(
        np.asarray(actual), np.asarray(expected), rtol=1e-6, atol=1e-6, err_msg=what
    )


def _transform_input(npz: Arrays) -> tuple[Image.Image, dict[str, torch.Tensor]]:
    boxes = torch.from_numpy(npz["tf/boxes"])
    return Image.fromarray(npz["tf/image_uint8"]), {
        "boxes": boxes,
        "labels": torch.arange(1, len(boxes) + 1),
        "area": (boxes[:, 2:] - boxes[:, :2]).prod(1),
        "iscrowd": torch.zeros(len(boxes), dtype=torch.int64),
        "masks": torch.from_numpy(npz["tf/masks"]),
        "orig_size": torch.tensor([60, 80]),
        "size": torch.tensor([60, 80]),
    }


def check_transforms(case_json: Mapping[str, Any], npz: Arrays) -> None:
    """Check each transform alone, on a PIL image; pixels, masks and integers are exact."""
    rng = SampleRNG.from_seeds()
    region = case_json["transforms"]["crop_region_top_left_h_w"]
    operations = {
        "hflip": hflip,
        "resize_48": lambda image, target: RandomResize([48])(image, target, rng),
        "resize_100_max90": lambda image, target: RandomResize([100], 90)(image, target, rng),
        "resize_60": lambda image, target: RandomResize([60])(image, target, rng),
        "resize_wh_33x47": lambda image, target: resize(image, target, (47, 33)),
        "crop": lambda image, target: crop(image, target, tuple(region)),
        "totensor_normalize": lambda image, target: ToSample().apply(image, target, None),
    }
    for name, operation in operations.items():
        image, target = operation(*_transform_input(npz))
        if name == "totensor_normalize":
            _close(normalize_images(image, MEAN, STD), npz[f"tf/{name}/image"], name)
        else:
            np.testing.assert_array_equal(np.asarray(image), npz[f"tf/{name}/image"], err_msg=name)
        for key in ("boxes", "area"):
            _close(target[key], npz[f"tf/{name}/{key}"], f"{name}/{key}")
        for key in ("labels", "iscrowd", "orig_size", "size", "masks"):
            np.testing.assert_array_equal(
                target[key].numpy(), npz[f"tf/{name}/{key}"], err_msg=f"{name}/{key}"
            )


def check_resize_sizes(case_json: Mapping[str, Any]) -> None:
    for width, height, short_side, max_size, out_width, out_height in case_json[
        "resize_sizes_w_h_size_max_outw_outh"
    ]:
        size = resized_size((height, width), short_side, max_size)
        assert size == (out_height, out_width), (width, height, short_side, max_size)


def check_train_pipeline(case_json: Mapping[str, Any], npz: Arrays) -> None:
    """Check the whole augmentation, with seeds of `random` and torch: draws are in the published order."""
    transforms = detection_transforms("train")
    for expected in case_json["train_pipeline"]["results"]:
        image, target = _transform_input(npz)
        image = Image.fromarray(np.asarray(image).repeat(8, 0).repeat(8, 1))
        target = {key: value for key, value in target.items() if key != "masks"}
        target = {**target, "boxes": target["boxes"] * 8}
        rng = SampleRNG.from_seeds(python=expected["random_seed"], torch=expected["torch_seed"])
        image, target = transforms(image, target, rng)
        assert list(image.shape) == expected["shape"]
        assert target["size"].tolist() == expected["size"]
        assert target["labels"].tolist() == expected["labels"]
        _close(target["boxes"], expected["boxes"], "boxes")
        normalized = normalize_images(image, MEAN, STD)
        _close(
            [normalized.mean(), normalized.std()],
            [expected["mean"], expected["std"]],
            "mean and standard deviation",
        )


def check_coco_prepare(case_json: Mapping[str, Any], npz: Arrays) -> None:
    """Check that crowds and degenerate boxes are dropped, boxes clipped, and category ids kept."""
    image_id = int(npz["coco_prepare/image_id"][0])
    annotations = [
        {"id": i, "image_id": image_id, **record}
        for i, record in enumerate(case_json["coco_prepare_annotations"])
    ]
    content = {
        "images": [{"id": image_id, "width": 80, "height": 60, "file_name": "image.jpg"}],
        "annotations": annotations,
        "categories": [{"id": i, "name": str(i)} for i in range(1, 91)],
    }
    target = parse_coco(content, "golden").target(0, (60, 80))
    for key in ("boxes", "area"):
        _close(target[key], npz[f"coco_prepare/{key}"], key)
    for key in ("labels", "image_id", "iscrowd", "orig_size", "size"):
        np.testing.assert_array_equal(target[key].numpy(), npz[f"coco_prepare/{key}"], err_msg=key)


def detections_by_image(results: list[dict[str, Any]]) -> dict[int, dict[str, torch.Tensor]]:
    """Convert COCO results to an evaluator's input, in float64 so that values stay those of the file."""
    by_image: dict[int, list[dict[str, Any]]] = {}
    for result in results:
        by_image.setdefault(result["image_id"], []).append(result)
    predictions = {}
    for image_id, rows in by_image.items():
        boxes = torch.tensor([row["bbox"] for row in rows], dtype=torch.float64)
        boxes[:, 2:] += boxes[:, :2]
        predictions[image_id] = {
            "boxes": boxes,
            "scores": torch.tensor([row["score"] for row in rows], dtype=torch.float64),
            "labels": torch.tensor([row["category_id"] for row in rows]),
        }
    return predictions


def check_coco_eval(case_json: Mapping[str, Any], golden_dir: Path) -> None:
    expected = case_json["coco_eval"]
    case = json.loads((Path(golden_dir) / expected["file"]).read_text())
    for backend in BACKENDS:
        evaluator = CocoEvaluator(build_ground_truth(case["gt"]), backend)
        evaluator.update(detections_by_image(case["dt"]))
        summary = evaluator.summarize()
        np.testing.assert_allclose(
            summary["stats"], expected["stats_bbox_pycocotools"], rtol=0, atol=1e-9
        )
        per_class = [value for value in expected["per_class_AP"] if value > -1]
        np.testing.assert_allclose(
            [row["AP"] for row in summary["per_class"]], per_class, rtol=0, atol=1e-9
        )


def check_data_detr(case: str, case_json: Mapping[str, Any], npz: Arrays, golden_dir: Path) -> None:
    """Check transforms, sizes, training pipeline, annotations, COCO AP and AR."""
    check_transforms(case_json, npz)
    check_resize_sizes(case_json)
    check_train_pipeline(case_json, npz)
    check_coco_prepare(case_json, npz)
    check_coco_eval(case_json, golden_dir)


def check_data_updetr(
    case: str, case_json: Mapping[str, Any], npz: Arrays, golden_dir: Path
) -> None:
    """Check random boxes, and the transforms of patches and image without augmentation, on a PIL image."""
    image = Image.fromarray(npz["image_uint8"])
    size = (image.height, image.width)
    rng = SampleRNG.from_seeds(numpy=case_json["random_patches"]["np_random_seed"])
    boxes = RandomProposals(len(npz["random_patches_xywh"]))(to_tensor(image), rng)
    boxes_xywh = torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], 1)
    np.testing.assert_array_equal(boxes_xywh.long().numpy(), npz["random_patches_xywh"])
    patch_transform = PatchAugmentation(128, augment=False)
    for i in range(2):
        patch, _ = patch_transform(image.crop(tuple(boxes[i].int().tolist())), {}, rng)
        normalized = normalize_images(to_tensor(patch), MEAN, STD)
        _close(normalized[:, ::4, ::4], npz[f"query_val_patch{i}_stride4"], f"patch {i}")
    resized, target = query_patch_transforms("val")(image, query_target(boxes, 0, size), rng)
    _close(normalize_images(resized, MEAN, STD)[:, ::8, ::8], npz["det_val/image_stride8"], "image")
    _close(target["boxes"], npz["det_val/boxes"], "boxes")
    _close(target["area"], npz["det_val/area"], "area")
    assert target["size"].tolist() == npz["det_val/size"].tolist()


def voc_annotations(case: Mapping[str, Any]) -> Annotations:
    """Build annotations from a case. As in VOC's XML files, corners start at 1 and are inclusive."""
    ids = sorted(map(int, case["annotations"]))
    objects = [(i, item) for i in ids for item in case["annotations"][f"{i:06d}"]]
    boxes = np.array([item["bbox"] for _, item in objects], dtype=np.float32) - np.array(
        [1, 1, 0, 0], dtype=np.float32
    )
    columns = {
        "id": np.arange(len(objects)),
        "image": np.array([i for i, _ in objects]),
        "box": boxes,
        "label": np.array([case["classes"].index(item["name"]) for _, item in objects]),
        "crowd": np.zeros(len(objects), bool),
        "area": np.ones(len(objects), np.float32),
        "difficult": np.array([bool(item["difficult"]) for _, item in objects]),
    }
    names = PackedStrings(f"{i:06d}.jpg" for i in ids)
    return annotations_from_columns(
        columns,
        source="golden",
        file_names=names,
        image_ids=np.array(ids),
        sizes_hw=np.zeros((len(ids), 2), int),
        class_names=dict(enumerate(case["classes"])),
    )


def check_voc_eval(case_json: Mapping[str, Any], npz: Arrays, golden_dir: Path) -> None:
    """Check AP of each class and threshold and their means, by both metrics, as in DETReg."""
    case = json.loads((Path(golden_dir) / case_json["voc_eval"]["file"]).read_text())
    annotations = voc_annotations(case)
    for metric, published in (("11point", "metric07"), ("area", "area")):
        expected = case_json["voc_eval"]["results"][published]
        evaluator = VocEvaluator(annotations, metric, reproduce_published=True)
        evaluator.update(
            {
                int(image): {
                    "boxes": torch.tensor(found["boxes"], dtype=torch.float64).reshape(-1, 4),
                    "labels": torch.tensor(found["labels"]),
                    "scores": torch.tensor(found["scores"], dtype=torch.float64),
                }
                for image, found in case["predictions"].items()
            }
        )
        summary, tables = evaluator.summarize(), evaluator.ap_tables()
        ap50, ap75, ap = expected["mAP50_mAP75_mAP"]
        np.testing.assert_allclose(summary["stats"], [ap, ap50, ap75], rtol=0, atol=1e-12)
        np.testing.assert_allclose(
            [tables[row][metric] for row in range(3)],
            expected["AP_class_by_threshold"],
            rtol=0,
            atol=1e-12,
        )
        recall, precision = evaluator.precision_recall(0, 0.5)
        np.testing.assert_allclose(recall, npz[f"voc/{published}/cat_rec"], rtol=0, atol=1e-12)
        np.testing.assert_allclose(precision, npz[f"voc/{published}/cat_prec"], rtol=0, atol=1e-12)
    known = case_json["voc_ap"]
    recall, precision = np.array(known["rec"]), np.array(known["prec"])
    assert abs(ap_11point(recall, precision, published=True) - known["metric07"]) < 1e-12
    assert abs(ap_area(recall, precision) - known["area"]) < 1e-12


def check_data_detreg(
    case: str, case_json: Mapping[str, Any], npz: Arrays, golden_dir: Path
) -> None:
    """Check VOC AP, and selective search boxes from OpenCV's integers to pixels."""
    check_voc_eval(case_json, npz, golden_dir)
    boxes = xywh_to_xyxy(npz["ss/raw_xywh_in_128x128"])
    np.testing.assert_array_equal(
        to_pixels(boxes, 128, (90, 140)).numpy(), npz["ss/boxes_xyxy_h90_w140"]
    )
    np.testing.assert_array_equal(
        to_pixels(boxes, 0, (90, 140)).numpy(), npz["ss/boxes_xyxy_noresize"]
    )


CHECKS = {
    "data_detr": check_data_detr,
    "data_updetr": check_data_updetr,
    "data_detreg": check_data_detreg,
}
