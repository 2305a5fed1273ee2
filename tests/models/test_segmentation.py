"""The mask head on every detector, its losses, and post-processing of instance and panoptic segmentation."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import engine
from models import build_model
from models.classification import Classification
from models.criterion import dice_loss
from models.segmentation import QUERIES_PER_CHUNK, SegmentationDetector, SegmentationOutputs
from models.segmentation_postprocess import PostProcessPanoptic, PostProcessSegm
from tests.tiny import make_batch, make_targets, tiny_args
from util.errors import UserError
from util.masks import decode_masks
from util.settings import FINETUNE
from util.settings.registry import DETECTORS

SIZES = [(64, 96), (80, 64)]  # of the images in a batch with padding
VARIANTS = {
    "detr": ["--detector", "detr"],
    "dilation": ["--detector", "detr", "--backbone", "resnet50", "--dilation"],
    "conditional_detr": ["--detector", "conditional_detr"],
    "deformable_detr": ["--detector", "deformable_detr"],
    "one level": ["--detector", "deformable_detr", "--num_feature_levels", "1"],
    "two levels": ["--detector", "deformable_detr", "--num_feature_levels", "2"],
    "two stages": ["--detector", "deformable_detr", "--with_box_refine", "--two_stage"],
}


def build(*flags: str) -> tuple[SegmentationDetector, torch.nn.Module, dict]:
    torch.manual_seed(0)
    model, criterion, postprocessors = build_model(tiny_args(FINETUNE, "--masks", *flags), 5)
    return model, criterion.train(), postprocessors


def with_masks(targets: list[dict], seed: int = 0) -> list[dict]:
    generator = torch.Generator().manual_seed(seed)
    for target, (height, width) in zip(targets, SIZES, strict=True):
        noise = torch.rand(len(target["labels"]), height, width, generator=generator)
        target["masks"] = noise > 0.5
    return targets


def plain(outputs: SegmentationOutputs) -> dict:
    """Return the outputs with the masks of all queries, as the published code computes them."""
    return {**outputs, "pred_masks": outputs["pred_masks"]}


@pytest.mark.parametrize("flags", VARIANTS.values(), ids=VARIANTS)
def test_masks_of_matched_queries_train_as_masks_of_all(flags: list[str]) -> None:
    model, criterion, _ = build(*flags, "--dropout", "0")
    samples, targets = make_batch(SIZES), with_masks(make_targets([3, 2]))
    gradients, totals = [], []
    for form in (lambda outputs: outputs, plain):
        total = criterion.total_loss(criterion(form(model(samples)), targets))
        model.zero_grad()
        total.backward()
        totals.append(total.detach())
        gradients.append(
            {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
        )
    torch.testing.assert_close(totals[0], totals[1], rtol=1e-6, atol=1e-6)
    largest = max(float(gradient.norm()) for gradient in gradients[1].values())
    for name, gradient in gradients[1].items():
        difference = float((gradients[0][name] - gradient).norm())
        assert difference <= 1e-5 * largest, name


@pytest.mark.parametrize("detector", DETECTORS)
def test_only_matched_queries_reach_the_head_in_training(detector: str) -> None:
    model, criterion, _ = build("--detector", detector)
    seen: list[int] = []
    model.mask_head.register_forward_hook(lambda module, inputs, out: seen.append(len(inputs[0])))
    criterion(model(make_batch(SIZES)), with_masks(make_targets([3, 2])))
    assert seen == [5]


@torch.no_grad()
def test_chunks_of_queries_give_the_same_masks() -> None:
    model, _, _ = build("--num_queries", str(QUERIES_PER_CHUNK + 3))
    outputs = model.eval()(make_batch(SIZES))
    every = outputs["pred_masks"]
    assert every.shape == (2, QUERIES_PER_CHUNK + 3, 20, 24)  # stride 4 of 80 x 96
    assert "pred_masks" in outputs  # kept, not computed again
    image, query = torch.tensor([1, 0, 1]), torch.tensor([QUERIES_PER_CHUNK + 2, 4, 0])
    chosen = outputs.predict_masks(image, query)
    torch.testing.assert_close(chosen, every[image, query], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("detector", DETECTORS)
def test_every_parameter_has_a_gradient_without_targets(detector: str) -> None:
    model, criterion, _ = build("--detector", detector)
    targets = with_masks(make_targets([0, 0]))
    losses = criterion(model(make_batch(SIZES)), targets)
    assert losses["loss_mask"] == losses["loss_dice"] == 0
    criterion.total_loss(losses).backward()
    assert not [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]


@pytest.mark.parametrize("detector", DETECTORS)
def test_losses_in_float32_under_bf16(detector: str) -> None:
    model, criterion, _ = build("--detector", detector, "--dropout", "0")
    samples, targets = make_batch(SIZES), with_masks(make_targets([3, 2]))
    dtypes = []
    model.mask_head.lay3.register_forward_hook(lambda module, inputs, out: dtypes.append(out.dtype))
    half, full = (
        engine.forward_losses(model, criterion, samples, targets, amp)[1]
        for amp in (torch.bfloat16, None)
    )
    assert dtypes == [torch.bfloat16, torch.float32]  # the head runs inside of the criterion
    for name in ("loss_mask", "loss_dice"):
        assert half[name].dtype == torch.float32
        torch.testing.assert_close(half[name], full[name], rtol=0.05, atol=0.02)


def test_padding_of_the_batch_does_not_change_masks() -> None:
    """The head's convolutions see the padding at the border only; attention does not see it at all."""
    model, _, _ = build()
    samples = make_batch([(64, 64), (64, 128)])
    with torch.no_grad():
        attention = model.eval()(samples).predict_masks.attention  # [2, Q, H, 2, 4]
    assert (attention[0, ..., 2:] == 0).all()
    torch.testing.assert_close(attention.flatten(2).sum(-1), torch.ones(2, 20))


def test_dice_loss_by_hand() -> None:
    logits = torch.tensor([[20.0, 20.0, -20.0, -20.0], [-20.0] * 4])
    targets = torch.tensor([[1.0, 0.0, 1.0, 0.0], [0.0] * 4])
    # |P T| = 1, |P| = |T| = 2: 1 - 3 / 5; and both empty: 1 - 1 / 1.
    torch.testing.assert_close(
        dice_loss(logits, targets), torch.tensor([0.4, 0.0]), atol=1e-6, rtol=0
    )


def test_targets_without_masks() -> None:
    model, criterion, _ = build()
    with pytest.raises(ValueError, match="needs `masks` in the targets"):
        criterion(model(make_batch(SIZES)), make_targets([1, 1]))


# -------------------------------------------------------------------------------------------------------------- frozen


def test_frozen_detector_is_fixed_and_in_evaluation_mode() -> None:
    model, criterion, _ = build("--frozen_weights", "box.pth", "--dropout", "0.5")
    model.train()
    assert not model.detr.training
    assert model.mask_head.training
    trainable = {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {"bbox_attention", "mask_head"}
    samples = make_batch(SIZES)
    first, second = model(samples), model(samples)
    assert torch.equal(first["pred_logits"], second["pred_logits"])  # no dropout
    assert not first["pred_logits"].requires_grad
    criterion.total_loss(criterion(first, with_masks(make_targets([3, 2])))).backward()


def test_published_frozen_detector_has_dropout() -> None:
    model, _, _ = build("--frozen_weights", "box.pth", "--dropout", "0.5", "--reproduce_published")
    model.train()
    assert model.detr.training
    samples = make_batch(SIZES)
    assert not torch.equal(model(samples)["pred_logits"], model(samples)["pred_logits"])


# ------------------------------------------------------------------------------------------------------ post-processing


@torch.no_grad()
@pytest.mark.parametrize("detector", DETECTORS)
def test_masks_follow_their_query(detector: str) -> None:
    model, _, postprocessors = build("--detector", detector)
    outputs = model.eval()(make_batch(SIZES))
    sizes, orig_sizes = torch.tensor(SIZES), torch.tensor([[50, 75], [100, 80]])
    results = engine.postprocess(postprocessors, outputs, orig_sizes, sizes)
    padded = torch.nn.functional.interpolate(outputs["pred_masks"], (80, 96), mode="bilinear")
    for i, result in enumerate(results):
        height, width = SIZES[i]
        every = (padded[i, :, :height, :width].sigmoid() > 0.5).float()  # [Q, h, w]
        every = torch.nn.functional.interpolate(every[:, None], tuple(orig_sizes[i].tolist()))[:, 0]
        expected = every[
            result["queries"]
        ].numpy()  # the masks of the queries that the results are of
        actual = decode_masks(result["masks"])
        assert actual.shape == (len(result["scores"]), *orig_sizes[i].tolist())
        assert (actual != expected).mean() < 1e-4


@torch.no_grad()
def test_threshold_makes_masks_of_good_results_only() -> None:
    model, _, postprocessors = build()
    outputs = model.eval()(make_batch(SIZES))
    sizes = torch.tensor(SIZES)
    scores = engine.postprocess(postprocessors, outputs, sizes, sizes)[0]["scores"]
    threshold = float(scores.sort().values[-3])
    seen: list[int] = []
    model.mask_head.register_forward_hook(lambda module, inputs, out: seen.append(len(inputs[0])))
    results = engine.postprocess(postprocessors, outputs, sizes, sizes, threshold)
    assert len(results[0]["masks"]) == len(results[0]["scores"]) == 3
    assert sum(seen) == sum(len(result["scores"]) for result in results)


def test_published_interface_of_the_segm_postprocessor() -> None:
    outputs = {"pred_masks": torch.full((1, 2, 4, 4), -9.0)}
    outputs["pred_masks"][0, 1, :, :2] = 9
    results = [{"queries": torch.tensor([1, 0, 1])}]
    PostProcessSegm()(results, outputs, torch.tensor([[8, 16]]), torch.tensor([[16, 16]]))
    masks = results[0]["masks"]
    assert masks.shape == (3, 1, 8, 16)
    assert masks.dtype == torch.uint8
    assert masks[0, 0].sum() == 64  # the left half
    assert masks[1].sum() == 0
    assert torch.equal(masks[0], masks[2])


def panoptic_outputs(labels: list[int], masks: Tensor, num_classes: int = 4) -> dict:
    """Outputs with one confident query per label, and one query of "no object"; masks [Q, h, w]."""
    logits = torch.full((1, len(labels) + 1, num_classes + 1), -9.0)
    for query, label in enumerate([*labels, num_classes]):
        logits[0, query, label] = 9
    empty = torch.full_like(masks[:1], 99)  # it would win everywhere if it took part
    return {"pred_logits": logits, "pred_masks": torch.cat([masks, empty])[None]}


def stripes(height: int, *widths: int) -> Tensor:
    """Logits of masks side by side: [number of widths, height, sum of widths]."""
    masks = torch.full((len(widths), height, sum(widths)), -5.0)
    left = 0
    for i, width in enumerate(widths):
        masks[i, :, left : left + width] = 5
        left += width
    return masks


THINGS = {0: False, 1: True, 2: True, 3: False}


def segment(outputs: dict, size: tuple[int, int], **options: bool) -> dict:
    postprocess = PostProcessPanoptic(Classification("softmax", 4, cost_class=1), THINGS, **options)
    sizes = torch.tensor([list(size)])
    return postprocess.segment(outputs, sizes, sizes)[0]


def test_things_stay_apart_and_stuff_is_merged() -> None:
    # Two things of class 1, two masks of the stuff class 3.
    result = segment(panoptic_outputs([1, 3, 1, 3], stripes(8, 4, 4, 4, 4)), (8, 16))
    assert torch.equal(result["ids"][0], torch.tensor([0] * 4 + [1] * 4 + [2] * 4 + [1] * 4))
    rows = [
        (row["id"], row["category_id"], row["isthing"], row["area"])
        for row in result["segments_info"]
    ]
    assert rows == [(0, 1, True, 32), (1, 3, False, 64), (2, 1, True, 32)]


def test_published_merge_of_stuff_is_undone() -> None:
    """The merged mask has no pixels of its own, is dropped as small, and its pixels go to another mask."""
    masks = stripes(8, 4, 4, 4, 4)
    masks[2, :, 12:] = 4  # the thing is the second best where the second mask of class 3 is
    outputs = panoptic_outputs([1, 3, 1, 3], masks)
    ours = segment(outputs, (8, 16))["segments_info"]
    published = segment(outputs, (8, 16), reproduce_published=True)["segments_info"]
    assert [row["area"] for row in ours] == [32, 64, 32]
    assert [row["area"] for row in published] == [32, 32, 64]


def test_small_segments_are_dropped() -> None:
    result = segment(panoptic_outputs([1, 2], stripes(4, 15, 1)), (4, 16))
    assert [(row["category_id"], row["area"]) for row in result["segments_info"]] == [(1, 64)]


def test_only_small_segments() -> None:
    result = segment(panoptic_outputs([1, 2], stripes(2, 2, 2)), (2, 4))
    assert result["segments_info"] == []
    assert (result["ids"] == -1).all()


def test_no_segment() -> None:
    outputs = panoptic_outputs([], torch.zeros(0, 4, 4))
    result = segment(outputs, (5, 7))
    assert result["segments_info"] == []
    assert (result["ids"] == -1).all()
    assert result["ids"].shape == (5, 7)
    postprocess = PostProcessPanoptic(Classification("softmax", 4, cost_class=1), THINGS)
    published = postprocess(outputs, torch.tensor([[5, 7]]))[0]
    assert not np.array(Image.open(io.BytesIO(published["png_string"]))).any()


def test_scores_at_the_threshold_and_focal_heads() -> None:
    masks = stripes(4, 8, 8)
    logits = torch.full((1, 2, 4), -9.0)
    logits[0, 0, 1], logits[0, 1, 2] = 0.1, -0.1  # sigmoid scores just above and below 0.5
    postprocess = PostProcessPanoptic(Classification("focal", 4, cost_class=2), THINGS)
    sizes = torch.tensor([[4, 16]])
    outputs = {"pred_logits": logits, "pred_masks": masks[None]}
    rows = postprocess.segment(outputs, sizes, sizes)[0]["segments_info"]
    assert [row["category_id"] for row in rows] == [1]
    assert rows[0]["score"] == pytest.approx(0.525, abs=1e-3)


def test_panoptic_cuts_the_padding_off() -> None:
    """In a padded batch masks are of the padded image. The published code spreads them over the unpadded one."""
    masks = stripes(4, 2, 2)  # of a batch of 16 x 16: the right half of the image is padding
    outputs = panoptic_outputs([1, 2], masks)
    wide = {key: value.repeat(2, *[1] * (value.ndim - 1)) for key, value in outputs.items()}
    sizes = torch.tensor([[16, 8], [16, 16]])
    postprocess = PostProcessPanoptic(Classification("softmax", 4, cost_class=1), THINGS)
    first, second = postprocess.segment(wide, sizes, sizes)
    assert [row["category_id"] for row in first["segments_info"]] == [1]
    assert [row["category_id"] for row in second["segments_info"]] == [1, 2]
    published = PostProcessPanoptic(
        Classification("softmax", 4, cost_class=1), THINGS, reproduce_published=True
    )
    first = published.segment(wide, sizes, sizes)[0]
    assert [row["category_id"] for row in first["segments_info"]] == [1, 2]


def reference_panoptic(
    logits: Tensor, labels: list[int], size: tuple[int, int]
) -> tuple[np.ndarray, list[int]]:
    """The published steps, one after the other, with Pillow's resizing; logits [n, h, w] at the processed size."""

    def assign(kept: list[int], merge: bool) -> tuple[np.ndarray, list[int]]:
        ids = logits[kept].argmax(0).numpy()
        if merge:
            for label in {labels[k] for k in kept if not THINGS[labels[k]]}:
                same = [i for i, k in enumerate(kept) if labels[k] == label]
                ids[np.isin(ids, same)] = same[0]
        resized = Image.fromarray(ids.astype(np.uint8)).resize(size[::-1], Image.Resampling.NEAREST)
        ids = np.array(resized)
        return ids, [int((ids == i).sum()) for i in range(len(kept))]

    kept = list(range(len(labels)))
    ids, areas = assign(kept, merge=True)
    while any(area <= 4 for area in areas):
        kept = [k for k, area in zip(kept, areas, strict=True) if area > 4]
        ids, areas = assign(kept, merge=False)
    return ids, [labels[k] for k in kept]


@pytest.mark.parametrize("seed", range(8))
def test_published_panoptic_steps(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 4, (9,), generator=generator).tolist()
    logits = torch.randn(9, 6, 8, generator=generator)
    outputs = panoptic_outputs(labels, logits)
    processed, target = torch.tensor([[24, 32]]), torch.tensor([[37, 51]])
    postprocess = PostProcessPanoptic(
        Classification("softmax", 4, cost_class=1), THINGS, reproduce_published=True
    )
    result = postprocess.segment(outputs, processed, target)[0]
    upsampled = torch.nn.functional.interpolate(logits[:, None], (24, 32), mode="bilinear")[:, 0]
    ids, kept_labels = reference_panoptic(upsampled, labels, (37, 51))
    assert np.array_equal(result["ids"].numpy(), ids)
    assert [row["category_id"] for row in result["segments_info"]] == kept_labels


# ---------------------------------------------------------------------------------------------------------- resolving


def test_masks_are_needed() -> None:
    for flag, value in (("--frozen_weights", "box.pth"), ("--mask_loss_coef", "2")):
        with pytest.raises(UserError, match=f"{flag} .* has no effect without --masks"):
            tiny_args(FINETUNE, flag, value)
    with pytest.raises(UserError, match="--pretrain and --frozen_weights both give"):
        tiny_args(FINETUNE, "--masks", "--frozen_weights", "a.pth", "--pretrain", "b.pth")
