"""Inference: all input types give equal predictions, in pixels of the image."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask

from datasets.collate import collate, normalize
from datasets.images.image_folder import ImageFolder, decode_image, read_image
from models import build_model
from models.segmentation_postprocess import SCORE_THRESHOLDS
from predictor import Prediction, Predictor, exif_of_training, preprocess, to_uint8_tensor
from tests.documents import python_examples
from tests.tiny import (
    FROZEN,
    custom_dataset_flags,
    fine_tune,
    tiny_args,
    write_custom_dataset,
    write_images,
)
from util.checkpoints.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from util.checkpoints.classes import Classes
from util.coco import PANOPTIC_NAMES
from util.errors import UserError
from util.settings import FINETUNE, PRETRAIN


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = write_custom_dataset(tmp_path_factory.mktemp("own"))
    fine_tune(*custom_dataset_flags(root), "--output_dir", root / "run", "--epochs", 1, *FROZEN)
    return root


@pytest.fixture(scope="module")
def predictor(data: Path) -> Predictor:
    return Predictor.from_checkpoint(data / "run" / "checkpoint.pth", device="cpu")


@pytest.fixture(scope="module")
def path(data: Path) -> Path:
    return sorted((data / "held_out").iterdir())[0]


def assert_same(first: Prediction, second: Prediction) -> None:
    for name in ("scores", "labels", "boxes"):
        assert torch.equal(getattr(first, name), getattr(second, name)), name
    assert (first.names, first.category_ids, first.size_hw) == (
        second.names,
        second.category_ids,
        second.size_hw,
    )


def test_all_input_types_give_equal_predictions(predictor: Predictor, path: Path) -> None:
    pixels = np.asarray(Image.open(path).convert("RGB"))
    tensor = torch.from_numpy(pixels.copy()).permute(2, 0, 1)
    expected = predictor(path, threshold=0)
    assert len(expected) == 20
    for same in (
        str(path),
        Image.open(path),
        pixels,
        tensor,
        tensor.float() / 255,
        read_image(str(path)),
    ):
        assert_same(predictor(same, threshold=0), expected)
    several = predictor([path, pixels, tensor], threshold=0)
    assert isinstance(several, list)
    for one in several:
        assert_same(one, expected)


def test_boxes_are_in_image_pixels_and_sorted_by_score(predictor: Predictor, path: Path) -> None:
    found = predictor(path, threshold=0)
    with Image.open(path) as image:
        width, height = image.size
    assert found.size_hw == (height, width)
    assert found.scores.tolist() == sorted(found.scores.tolist(), reverse=True)
    assert (found.boxes >= 0).all()
    assert (found.boxes <= torch.tensor([width, height, width, height])).all()
    twice = predictor(
        Image.open(path).resize((2 * width, 2 * height), Image.Resampling.NEAREST), threshold=0
    )
    assert twice.size_hw == (2 * height, 2 * width)
    assert twice.boxes.max() > found.boxes.max()


def test_names_and_category_ids_match_training_data(predictor: Predictor, path: Path) -> None:
    found = predictor(path, threshold=0)
    names = {3: "green", 7: "red", 1000: "blue"}
    assert [names[number] for number in found.category_ids] == found.names
    rows = found.to_coco(5)
    assert [row["category_id"] for row in rows] == found.category_ids
    x, y, w, h = rows[0]["bbox"]
    np.testing.assert_allclose([x, y, x + w, y + h], found.boxes[0], rtol=1e-5, atol=1e-4)


def test_threshold_filters_by_score(predictor: Predictor, path: Path) -> None:
    found = predictor(path, threshold=0)
    threshold = float(found.scores[4])
    kept = predictor(path, threshold=threshold)
    assert (
        len(kept)
        == len(kept.names)
        == len(kept.category_ids)
        == int((found.scores >= threshold).sum())
    )
    assert_same(kept, found.above(threshold))
    # The best are a number of objects, also if their scores are equal, as bfloat16 makes them.
    assert torch.equal(found.best(5).boxes, found.boxes[:5])
    assert len(found.best(10_000)) == len(found)
    tied = replace(found, scores=torch.ones(len(found)))
    assert len(tied.best(3)) == len(tied.best(3).names) == 3


def test_batched_predictions_keep_order(predictor: Predictor, data: Path) -> None:
    paths = sorted((data / "held_out").iterdir())
    alone, batched = (
        predictor(paths, threshold=0),
        predictor(iter(paths), threshold=0, batch_size=2),
    )
    assert [one.size_hw for one in alone] == [one.size_hw for one in batched]
    for one, other in zip(alone, batched, strict=True):
        torch.testing.assert_close(one.scores[:3], other.scores[:3], atol=0.05, rtol=0)


def test_predict_files_decodes_once_and_reports_unreadable_files(
    predictor: Predictor, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = write_images(tmp_path / "images", count=3)
    (images / "b.jpg").write_bytes(b"broken")
    folder, reads = ImageFolder(str(images)), []
    monkeypatch.setattr(
        "predictor.decode_image", lambda file, exif: reads.append(file) or decode_image(file, exif)
    )
    results = list(predictor.predict_files(folder, threshold=0, batch_size=2))
    assert [result.index for result in results] == list(range(4))
    assert len(reads) == len(set(reads)) == 4
    broken = [result for result in results if result.error]
    assert [folder.name(result.index) for result in broken] == ["b.jpg"]
    assert broken[0].prediction is broken[0].image is None
    for result in results:
        if result.prediction is not None:
            assert result.prediction.size_hw == tuple(result.image.shape[1:])


@pytest.mark.parametrize(
    "wrong",
    [
        np.zeros((4, 4), np.uint8),
        np.zeros((4, 4, 3), np.float32),
        np.zeros((4, 4, 4), np.uint8),
        torch.zeros(1, 3, 4, 4),
        torch.zeros(4, 4, 3),
        torch.zeros(3, 4, 4, dtype=torch.int64),
        torch.full((3, 4, 4), 255.0),  # not divided by 255: all pixels would be white
        torch.full((3, 4, 4), -2.0),  # normalized
        torch.full((3, 4, 4), float("nan")),
    ],
)
def test_unsupported_shapes_and_dtypes_raise(wrong) -> None:
    with pytest.raises(ValueError, match="must be .*, got "):
        to_uint8_tensor(wrong)


def test_unreadable_file_raises_user_error(predictor: Predictor, tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"broken")
    with pytest.raises(UserError, match=r"a.jpg: can't be decoded"):
        predictor(tmp_path / "a.jpg")


def test_image_size_and_amp_override_checkpoint(data: Path, path: Path) -> None:
    source = data / "run" / "checkpoint.pth"
    small = Predictor.from_checkpoint(source, device="cpu", image_size=32, amp="bf16")
    assert (small.settings.image_size, small.amp) == (32, torch.bfloat16)
    assert small(path, threshold=0).scores.dtype == torch.float32
    read = Predictor.from_checkpoint(load_checkpoint(source), device="cpu")
    assert_same(
        read(path, threshold=0),
        Predictor.from_checkpoint(str(source), device="cpu")(path, threshold=0),
    )


def test_pretext_checkpoint_predicts_class_agnostic_only(tmp_path: Path, path: Path) -> None:
    args = tiny_args(PRETRAIN)
    model, _, _ = build_model(args)
    save_checkpoint({"model": model.state_dict(), "args": args.as_dict()}, tmp_path / "pretext.pth")
    with pytest.raises(UserError, match="has no object classes"):
        Predictor.from_checkpoint(tmp_path / "pretext.pth", device="cpu")
    finder = Predictor.from_checkpoint(tmp_path / "pretext.pth", device="cpu", class_agnostic=True)
    found = finder(path, threshold=0)
    assert len(found) == 20
    assert set(found.names) == {"object"}
    assert finder.postprocess.label == 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"device": "cuda:99"}, "--device cuda:99: (no CUDA GPU is visible|there are)"),
        ({"device": "gpu"}, "gpu is not supported: use cuda"),
        ({"amp": "fp8"}, "amp='fp8': choose one of no, bf16, fp16"),
        ({"image_size": 0}, "image_size=0: must be above 0"),
    ],
)
def test_bad_options_raise_user_error(data: Path, options: dict, said: str) -> None:
    with pytest.raises(UserError, match=said):
        Predictor.from_checkpoint(data / "run" / "checkpoint.pth", **options)


def test_published_model_without_download_names_remedy() -> None:
    with pytest.raises(UserError, match="download the file with a browser and give its path"):
        Predictor.from_checkpoint("deformable_detr_resnet50")


def test_examples_of_the_documents_run(
    data: Path,
    path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    checkpoint = f'from_checkpoint("{data / "run" / "checkpoint.pth"}")'
    Image.open(path).convert("RGB").save(tmp_path / "image.jpg")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(SCORE_THRESHOLDS, "softmax", 0.0)  # the weights are random
    mask_predictor(tmp_path, *PANOPTIC)  # writes the checkpoint
    for code in python_examples("import Predictor"):
        if "panoptic" in code:
            code = code.replace("detr_resnet50_panoptic", str(tmp_path / "masks.pth"))
            exec(compile(code, "example", "exec"), {})
            assert "False" in capsys.readouterr().out
            continue
        code = re.sub(r'from_checkpoint\("[^"]+"\)', checkpoint, code)
        code = re.sub(r"threshold=[\d.]+", "threshold=0", code)
        exec(compile(code, "example", "exec"), {})
        assert "tensor(" in capsys.readouterr().out


def test_exif_orientation_of_files_and_pillow_images(
    predictor: Predictor, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rotated images have the boxes of the upright ones. Without `exif` it is ignored, and files tell so."""
    with Image.open(path) as image:
        upright = image.convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6
    rotated = tmp_path / "rotated.png"
    upright.transpose(Image.Transpose.ROTATE_90).save(rotated, exif=exif)
    folder = ImageFolder(str(tmp_path))

    (result,) = predictor.predict_files(folder, threshold=0)
    assert result.ignored_orientation == 6
    assert result.prediction.size_hw == (upright.width, upright.height)

    monkeypatch.setattr(predictor, "exif", "apply")
    (result,) = predictor.predict_files(folder, threshold=0)
    expected = predictor(upright, threshold=0)
    with Image.open(rotated) as image:
        others = predictor(rotated, threshold=0), predictor(image, threshold=0)
        for found in (result.prediction, *others):
            assert found.size_hw == (upright.height, upright.width)
            assert torch.equal(found.boxes, expected.boxes)
    assert result.ignored_orientation == 1


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ({}, None),
        ({"exif": "ignore", "exif_of_training": "apply"}, "ignore"),
        ({"exif_of_training": "apply"}, "apply"),
    ],
)
def test_inference_uses_the_orientation_as_training_did(args: dict, expected: str | None) -> None:
    assert exif_of_training(Checkpoint(model={}, args={"exif": None, **args})) == expected


# ---------------------------------------------------------------------------------------------------------------- masks


def mask_predictor(tmp_path: Path, *flags: str, **options) -> Predictor:
    """Return a predictor with random weights and a mask head, from a file that has weights only, as published."""
    torch.manual_seed(0)
    args = tiny_args(FINETUNE, "--masks", "--backbone_norm", "frozen", "--nheads", "8", *flags)
    path = tmp_path / "masks.pth"
    save_checkpoint({"model": build_model(args)[0].state_dict()}, path)
    return Predictor.from_checkpoint(path, device="cpu", image_size=64, **options)


@pytest.mark.parametrize("detector", ["detr", "conditional_detr"])
def test_masks_are_those_of_the_objects_above_the_threshold(
    detector: str, path: Path, tmp_path: Path
) -> None:
    predictor = mask_predictor(tmp_path, "--detector", detector)
    found = predictor(path, threshold=0)
    assert found.panoptic is None
    assert found.masks.dtype == torch.bool
    assert found.masks.shape == (len(found), *found.size_hw)
    assert 0 < found.masks.float().mean() < 1

    threshold = float(found.scores[3])
    few = predictor(path, threshold=threshold)
    assert 0 < len(few) < len(found)
    assert len(few.rles) == len(few)
    for same in (found.masks[: len(few)], found.above(threshold).masks):
        assert torch.equal(few.masks, same)
    assert few.best_score == found.best_score == pytest.approx(float(found.scores[0]))

    none = predictor(path, threshold=1)
    assert none.masks.shape == (0, *none.size_hw)
    assert none.best_score == found.best_score


def test_masks_of_a_padded_batch_fit_their_images(path: Path, tmp_path: Path) -> None:
    """The published post-processing with its sizes gives the same masks."""
    predictor = mask_predictor(tmp_path)
    pixels = np.asarray(Image.open(path).convert("RGB"))
    images = [to_uint8_tensor(image) for image in (pixels, pixels[:30])]
    batch = [preprocess(image, predictor.transforms) for image in images]
    orig_sizes, sizes = (
        torch.stack([target[key] for _, target in batch]) for key in ("orig_size", "size")
    )
    samples = collate(batch)[0]
    assert samples.padded
    predictions = predictor.predict_batch(samples, orig_sizes, sizes)

    with torch.no_grad():
        outputs = predictor.model(normalize(samples, **predictor.model.normalization))
        results = predictor.postprocess(outputs, orig_sizes)
        expected = predictor.postprocessors["segm"](results, outputs, orig_sizes, sizes)
    for prediction, result in zip(predictions, expected, strict=True):
        order = result["scores"].argsort(descending=True, stable=True)
        assert torch.equal(prediction.masks, result["masks"][order, 0].bool())


def test_coco_results_have_segmentations(path: Path, tmp_path: Path) -> None:
    found = mask_predictor(tmp_path)(path, threshold=0)
    rows = json.loads(json.dumps(found.to_coco(3)))
    decoded = coco_mask.decode([row["segmentation"] for row in rows])  # [H, W, K]
    assert torch.equal(torch.from_numpy(decoded).permute(2, 0, 1).bool(), found.masks)


def test_class_agnostic_prediction_has_the_image_size_of_the_run(data: Path) -> None:
    """At the usual 800 pixels, a detector for small images would find little."""
    checkpoint = load_checkpoint(data / "run" / "checkpoint.pth")
    options = {"device": "cpu", "class_agnostic": True}
    trained = checkpoint.args["image_size"]
    assert trained != 800
    assert Predictor.from_checkpoint(checkpoint, **options).settings.image_size == trained
    given = Predictor.from_checkpoint(checkpoint, **options, image_size=48)
    assert given.settings.image_size == 48


def test_class_agnostic_prediction_leaves_the_mask_head_out(path: Path, tmp_path: Path) -> None:
    boxes = mask_predictor(tmp_path, class_agnostic=True)(path, threshold=0)
    assert len(boxes) == 20
    assert boxes.masks is boxes.panoptic is None
    assert "segmentation" not in boxes.to_coco(1)[0]


PANOPTIC = ("--num_classes", "250")


def test_panoptic_segmentation_in_cocos_convention(path: Path, tmp_path: Path) -> None:
    predictor = mask_predictor(tmp_path, *PANOPTIC, panoptic_threshold=0.0)
    assert predictor.classes.names[193] == "grass-merged"
    with torch.no_grad():  # things and stuff in turn
        bias = predictor.model.detr.class_embed.bias
        bias[[1, 2, 193]] += 4
    found = predictor(path, threshold=0.0)

    ids, segments = found.panoptic.ids, found.panoptic.segments
    assert ids.dtype == torch.int32
    assert ids.shape == found.size_hw
    assert [segment["id"] for segment in segments] == list(range(1, len(segments) + 1))
    assert [segment["area"] for segment in segments] == [
        int((ids == segment["id"]).sum()) for segment in segments
    ]
    for segment in segments:
        assert segment["name"] == PANOPTIC_NAMES[segment["category_id"]]
        assert segment["isthing"] is (segment["category_id"] <= 90)
    assert found.above(1.0).panoptic is found.panoptic

    predictor.postprocessors["panoptic"].threshold = 1.0
    nothing = predictor(path).panoptic
    assert nothing.segments == []
    assert not nothing.ids.any()


def test_panoptic_segments_have_the_category_ids_of_the_annotations(
    path: Path, tmp_path: Path
) -> None:
    predictor = mask_predictor(tmp_path, "--num_classes", "3")
    classes = Classes({2: "sky"}, {2: 187}, 3, "x")
    named = Predictor(
        predictor.model, {}, classes, predictor.settings, device=torch.device("cpu")
    )._panoptic({"ids": torch.zeros(2, 2), "segments_info": [{"id": 0, "category_id": 2}]})
    assert named.segments == [{"id": 1, "category_id": 187, "name": "sky"}]


@pytest.mark.parametrize(
    ("flags", "options", "said"),
    [
        ((), {"panoptic_threshold": 0.5}, "is not a panoptic detector: omit panoptic_threshold"),
        (PANOPTIC, {"panoptic_threshold": 2.0}, "panoptic_threshold=2.0: must be in"),
        (PANOPTIC, {"panoptic_threshold": 0.5, "class_agnostic": True}, "there are no segments"),
    ],
)
def test_panoptic_threshold_is_checked(
    flags: tuple[str, ...], options: dict, said: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=said):
        mask_predictor(tmp_path, *flags, **options)
