"""Matching and losses against reference implementations.

The references loop over layers, images, queries and targets, directly from the formulas.
"""

import math

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from models.classification import Classification, sigmoid_focal_loss, summed_focal_loss
from models.criterion import SetCriterion, expand_weight_dict
from models.matcher import HungarianMatcher, NonFinitePrediction
from tests.tiny import make_targets
from util.box_ops import box_cxcywh_to_xyxy, box_xyxy_to_cxcywh, generalized_box_iou, paired_giou
from util.packed_targets import PackedTargets

KINDS = ("softmax", "focal")
NUM_CLASSES, FEATURES = 6, 7
WEIGHTS = {"loss_ce": 2.0, "loss_bbox": 5.0, "loss_giou": 3.0, "loss_feature": 0.5}


def classes(kind: str, **costs: float) -> Classification:
    return Classification(
        kind, NUM_CLASSES, **{"cost_class": 1.5, "cost_bbox": 5.0, "cost_giou": 2.0, **costs}
    )


def predictions(
    kind: str, layers: int, batch: int, queries: int, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Random logits [L, B, Q, C] and boxes [L, B, Q, 4] in float64, with gradients."""
    generator = torch.Generator().manual_seed(seed)
    shape, num_outputs = (layers, batch, queries), NUM_CLASSES + (kind == "softmax")
    logits = torch.randn(*shape, num_outputs, generator=generator, dtype=torch.float64)
    center = torch.rand(*shape, 2, generator=generator, dtype=torch.float64) * 0.6 + 0.2
    size = torch.rand(*shape, 2, generator=generator, dtype=torch.float64) * 0.5 + 0.02
    return logits.requires_grad_(), torch.cat([center, size], -1).requires_grad_()


def as_outputs(logits: Tensor, boxes: Tensor) -> dict:
    aux = [
        {"pred_logits": a, "pred_boxes": b} for a, b in zip(logits[:-1], boxes[:-1], strict=True)
    ]
    return {"pred_logits": logits[-1], "pred_boxes": boxes[-1], "aux_outputs": aux}


def with_features(outputs: dict, num_targets: int, seed: int = 0) -> dict:
    generator = torch.Generator().manual_seed(seed)
    for layer in (*outputs["aux_outputs"], outputs):
        layer["pred_features"] = torch.randn(
            *layer["pred_logits"].shape[:2], FEATURES, generator=generator, dtype=torch.float64
        )
        layer["pred_features"].requires_grad_()
    target_features = torch.randn(num_targets, FEATURES, generator=generator, dtype=torch.float64)
    return {**outputs, "target_features": target_features}


def double(targets: list[dict]) -> list[dict]:
    return [{**target, "boxes": target["boxes"].double()} for target in targets]


# ---- references ----


def reference_giou(a: list[float], b: list[float]) -> float:
    """Generalized IoU of two boxes (cx, cy, w, h)."""
    ax0, ay0, ax1, ay1 = a[0] - a[2] / 2, a[1] - a[3] / 2, a[0] + a[2] / 2, a[1] + a[3] / 2
    bx0, by0, bx1, by1 = b[0] - b[2] / 2, b[1] - b[3] / 2, b[0] + b[2] / 2, b[1] + b[3] / 2
    inter = max(min(ax1, bx1) - max(ax0, bx0), 0) * max(min(ay1, by1) - max(ay0, by0), 0)
    union = a[2] * a[3] + b[2] * b[3] - inter
    hull = (max(ax1, bx1) - min(ax0, bx0)) * (max(ay1, by1) - min(ay0, by0))
    return inter / union - (hull - union) / hull


def reference_cost(
    how: Classification, logits: list[float], box: list[float], label: int, true_box: list[float]
) -> float:
    if how.kind == "softmax":
        class_cost = -math.exp(logits[label]) / sum(math.exp(x) for x in logits)
    else:
        p = 1 / (1 + math.exp(-logits[label]))
        class_cost = 0.25 * (1 - p) ** 2 * -math.log(p + 1e-8) - 0.75 * p**2 * -math.log(
            1 - p + 1e-8
        )
    l1 = sum(abs(x - y) for x, y in zip(box, true_box, strict=True))
    return (
        how.cost_bbox * l1
        + how.cost_class * class_cost
        - how.cost_giou * reference_giou(box, true_box)
    )


def reference_match(
    how: Classification, logits: Tensor, boxes: Tensor, target: dict
) -> list[tuple[int, int]]:
    """(query, target) pairs of one layer and image, from the full cost matrix."""
    labels, target_boxes = target["labels"].tolist(), target["boxes"].tolist()
    cost = [
        [reference_cost(how, q, b, k, t) for k, t in zip(labels, target_boxes, strict=True)]
        for q, b in zip(logits.tolist(), boxes.tolist(), strict=True)
    ]
    rows, columns = linear_sum_assignment(np.asarray(cost).reshape(len(logits), len(labels)))
    return list(zip(rows.tolist(), columns.tolist(), strict=True))


def reference_losses(
    how: Classification,
    layer: dict,
    targets: list[dict],
    eos_coef: float,
    alpha: float,
    features: Tensor,
) -> dict[str, float]:
    """The published losses of one layer."""
    num_boxes = max(sum(len(t["labels"]) for t in targets), 1)
    matches = [
        reference_match(how, layer["pred_logits"][i], layer["pred_boxes"][i], t)
        for i, t in enumerate(targets)
    ]
    ce = weight_sum = l1 = giou = feature = cardinality = 0.0
    for i, target in enumerate(targets):
        label_of, reports = {q: int(target["labels"][t]) for q, t in matches[i]}, 0
        for q, logits in enumerate(layer["pred_logits"][i].tolist()):
            if how.kind == "softmax":
                label = label_of.get(q, NUM_CLASSES)
                weight = eos_coef if label == NUM_CLASSES else 1.0
                ce += weight * (math.log(sum(math.exp(x) for x in logits)) - logits[label])
                weight_sum += weight
                reports += max(range(len(logits)), key=logits.__getitem__) != NUM_CLASSES
            else:
                for k, x in enumerate(logits):
                    p, positive = 1 / (1 + math.exp(-x)), label_of.get(q) == k
                    ce += (
                        alpha * (1 - p) ** 2 * -math.log(p)
                        if positive
                        else (1 - alpha) * p**2 * -math.log(1 - p)
                    )
                reports += max(logits) > 0
        cardinality += abs(reports - len(target["labels"])) / len(targets)
        for q, t in matches[i]:
            box, true_box = layer["pred_boxes"][i, q].tolist(), target["boxes"][t].tolist()
            l1 += sum(abs(x - y) for x, y in zip(box, true_box, strict=True))
            giou += 1 - reference_giou(box, true_box)
            a = layer["pred_features"][i, q].detach()
            b = features[sum(len(t["labels"]) for t in targets[:i]) + t]
            feature += 2 - 2 * float(a @ b / a.norm() / b.norm())
    return {
        "loss_ce": ce / weight_sum if how.kind == "softmax" else ce / num_boxes,
        "loss_bbox": l1 / num_boxes,
        "loss_giou": giou / num_boxes,
        "loss_feature": feature / num_boxes,
        "cardinality_error": cardinality,
    }


# ---- matching ----


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(8))
def test_matches_equal_reference(kind: str, seed: int) -> None:
    rng = np.random.RandomState(seed)
    layers, batch, queries = rng.randint(1, 4), rng.randint(1, 5), rng.randint(1, 12)
    # Includes images without targets, and with more targets than queries.
    counts = [int(rng.randint(0, 9)) for _ in range(batch)]
    logits, boxes = predictions(kind, layers, batch, queries, seed)
    targets, how = double(make_targets(counts, NUM_CLASSES, seed)), classes(kind)
    matches = HungarianMatcher(how)(logits, boxes, targets)
    source, target_index, offsets = [], [], np.cumsum([0, *counts])
    for layer in range(layers):
        for i in range(batch):
            expected = reference_match(how, logits[layer, i], boxes[layer, i], targets[i])
            found = [side.tolist() for side in matches.pairs[layer][i]]
            assert list(zip(*found, strict=True)) == expected
            assert len(expected) == min(counts[i], queries)
            source += [(layer * batch + i) * queries + q for q, _ in expected]
            target_index += [int(offsets[i]) + t for _, t in expected]
    assert matches.source.tolist() == source
    assert matches.target.tolist() == target_index


@pytest.mark.parametrize("kind", KINDS)
def test_costs_equal_reference(kind: str) -> None:
    logits, boxes = predictions(kind, 2, 3, 5)
    targets, how = double(make_targets([3, 1, 4], NUM_CLASSES)), classes(kind)
    cost = HungarianMatcher(how).cost_matrix(logits.detach(), boxes.detach(), targets)
    assert cost.shape == (2, 3 + 1 + 4, 5)
    rows = [
        (i, label, box)
        for i, target in enumerate(targets)
        for label, box in zip(target["labels"].tolist(), target["boxes"].tolist(), strict=True)
    ]
    for layer, t, q in np.ndindex(2, 8, 5):
        i, label, box = rows[t]
        expected = reference_cost(
            how, logits[layer, i, q].tolist(), boxes[layer, i, q].tolist(), label, box
        )
        assert float(cost[layer, t, q]) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("weights", [(1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)])
def test_each_cost_has_its_own_weight(weights: tuple[float, float, float]) -> None:
    how = classes("softmax", cost_class=weights[0], cost_bbox=weights[1], cost_giou=weights[2])
    logits, boxes = predictions("softmax", 1, 1, 6, seed=3)
    target = {
        **double(make_targets([4], NUM_CLASSES, seed=3))[0],
        "labels": torch.tensor([4, 0, 3, 1]),
    }
    pairs = HungarianMatcher(how)(logits, boxes, [target]).pairs[0][0]
    assert list(zip(*(side.tolist() for side in pairs), strict=True)) == reference_match(
        how, logits[0, 0], boxes[0, 0], target
    )


@pytest.mark.parametrize("kind", KINDS)
def test_order_of_queries_and_targets_does_not_matter(kind: str) -> None:
    counts, queries = [4, 2, 0], 7
    logits, boxes = predictions(kind, 2, 3, queries, seed=5)
    targets, how = double(make_targets(counts, NUM_CLASSES, seed=5)), classes(kind)
    criterion = SetCriterion(how, expand_weight_dict(WEIGHTS, 1))
    query_order = torch.randperm(queries)
    target_orders = [torch.randperm(count) for count in counts]
    shuffled = [
        {name: value[order] if name != "image_id" else value for name, value in target.items()}
        for target, order in zip(targets, target_orders, strict=True)
    ]
    plain = criterion(as_outputs(logits, boxes), targets)
    moved = criterion(as_outputs(logits[:, :, query_order], boxes[:, :, query_order]), shuffled)
    for name in plain:
        torch.testing.assert_close(moved[name], plain[name], rtol=1e-12, atol=1e-12)
    for layer, image in np.ndindex(2, 3):
        after = zip(*moved.matches.pairs[layer][image], strict=True)
        original = set(
            zip(*(side.tolist() for side in plain.matches.pairs[layer][image]), strict=True)
        )
        assert {(int(query_order[q]), int(target_orders[image][t])) for q, t in after} == original


@pytest.mark.parametrize("kind", KINDS)
def test_images_are_matched_independently(kind: str) -> None:
    """An image is matched the same alone and next to images with more targets, which pad its costs."""
    logits, boxes = predictions(kind, 2, 3, 6, seed=7)
    targets = double(make_targets([2, 9, 0], NUM_CLASSES, seed=7))
    matcher = HungarianMatcher(classes(kind))
    together = matcher(logits, boxes, targets)
    for i in range(3):
        alone = matcher(logits[:, i : i + 1], boxes[:, i : i + 1], targets[i : i + 1])
        for layer in range(2):
            for a, b in zip(alone.pairs[layer][0], together.pairs[layer][i], strict=True):
                assert np.array_equal(a, b)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["logits", "boxes"])
@pytest.mark.parametrize("kind", KINDS)
def test_non_finite_predictions_name_layer_and_images(kind: str, where: str, value: float) -> None:
    logits, boxes = (x.detach().clone() for x in predictions(kind, 3, 4, 5))
    targets = double(make_targets([2, 0, 3, 1], NUM_CLASSES))
    if where == "logits":
        # NaN for both values: an infinite logit is a certain class, not an error.
        logits[1, 2, 4] = logits[1, 3, 0] = math.nan
    else:
        boxes[1, 2, 4, 0], boxes[1, 3, 0, 3] = value, value
    with pytest.raises(NonFinitePrediction, match=r"layer 1 .*\[102, 103\]"):
        SetCriterion(classes(kind), WEIGHTS).eval()(as_outputs(logits, boxes), targets)
    # Training skips a step with such a loss.
    losses = SetCriterion(classes(kind), WEIGHTS)(as_outputs(logits, boxes), targets)
    of_layer = [value for name, value in losses.items() if name.endswith("_1")]
    assert not all(map(math.isfinite, of_layer))


@pytest.mark.parametrize("kind", KINDS)
def test_non_finite_padding_of_the_cost_is_no_error(kind: str) -> None:
    """An image without targets has no costs: the loss sees its predictions, not the matcher."""
    logits, boxes = (x.detach().clone() for x in predictions(kind, 1, 2, 5))
    boxes[0, 1] = math.nan
    matches = HungarianMatcher(classes(kind))(
        logits, boxes, double(make_targets([2, 0], NUM_CLASSES))
    )
    assert len(matches.source) == 2


@pytest.mark.parametrize("alpha", [0.25, 0.4, -1.0])
def test_focal_loss_of_few_positives_equals_the_dense_one(alpha: float) -> None:
    generator = torch.Generator().manual_seed(3)
    logits = 20 * torch.randn(3, 4, 5, 6, generator=generator, dtype=torch.float64)
    logits.requires_grad_()
    positives = torch.tensor([7, 100, 119, 130, 239, 200, 250, 359, 300])  # three per layer
    dense = torch.zeros_like(logits).flatten()
    dense[positives] = 1
    expected = sigmoid_focal_loss(logits, dense.view_as(logits), alpha).flatten(1).sum(1)
    ours = summed_focal_loss(logits, positives, alpha)
    torch.testing.assert_close(ours, expected)
    weights = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    for a, b in zip(
        torch.autograd.grad(ours @ weights, logits),
        torch.autograd.grad(expected @ weights, logits),
        strict=True,
    ):
        torch.testing.assert_close(a, b)
    assert torch.isfinite(summed_focal_loss(100 * logits, positives, alpha)).all()


# ---- losses ----


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("counts", [[3, 0, 5], [1], [8, 2], [0, 0]])
def test_losses_equal_reference(kind: str, counts: list[int]) -> None:
    layers, queries, eos_coef, alpha = 3, 6, 0.25, 0.3
    logits, boxes = predictions(kind, layers, len(counts), queries, seed=11)
    targets, how = double(make_targets(counts, NUM_CLASSES, seed=11)), classes(kind)
    outputs = with_features(as_outputs(logits, boxes), sum(counts))
    names = ("labels", "boxes", "cardinality", "features")
    losses = SetCriterion(how, WEIGHTS, losses=names, eos_coef=eos_coef, focal_alpha=alpha)(
        outputs, targets
    )
    expected = {}
    for i, layer in enumerate([*outputs["aux_outputs"], outputs]):
        suffix = f"_{i}" if i < layers - 1 else ""
        values = reference_losses(how, layer, targets, eos_coef, alpha, outputs["target_features"])
        expected.update({f"{name}{suffix}": value for name, value in values.items()})
    assert set(losses) == {*expected, "class_error"}
    for name, value in expected.items():
        assert losses[name].item() == pytest.approx(value, rel=1e-9, abs=1e-12), name


@pytest.mark.parametrize("kind", KINDS)
def test_class_error_is_the_percentage_of_wrong_classes(kind: str) -> None:
    logits, boxes = (x.detach() for x in predictions(kind, 1, 1, 4))
    target = double(make_targets([4], NUM_CLASSES))[0]
    logits = logits * 0
    for q in range(4):  # each query has the box of its target, three of them the right class
        logits[0, 0, q, target["labels"][q] if q < 3 else 0] = 3.0
    losses = SetCriterion(classes(kind, cost_class=0.0), WEIGHTS)(
        as_outputs(logits, target["boxes"][None, None]), [target]
    )
    assert float(losses["class_error"]) == pytest.approx(25.0)
    assert float(losses["loss_bbox"]) == pytest.approx(0.0)
    assert float(losses["loss_giou"]) == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_all_layers_at_once_equal_layer_by_layer(kind: str) -> None:
    counts, layers = [3, 0, 2], 4
    logits, boxes = predictions(kind, layers, 3, 5, seed=2)
    targets = double(make_targets(counts, NUM_CLASSES, seed=2))
    outputs = with_features(as_outputs(logits, boxes), sum(counts))
    criterion = SetCriterion(
        classes(kind),
        expand_weight_dict(WEIGHTS, layers - 1),
        losses=("labels", "boxes", "cardinality", "features"),
    )
    together = criterion(outputs, targets)
    gradients = torch.autograd.grad(criterion.total_loss(together), [logits, boxes])
    total = 0.0
    for i, layer in enumerate([*outputs["aux_outputs"], outputs]):
        single = {**layer, "target_features": outputs["target_features"]}
        single.pop("aux_outputs", None)
        alone = criterion(single, targets)
        suffix = f"_{i}" if i < layers - 1 else ""
        for name, value in alone.items():
            if name != "class_error" or not suffix:
                torch.testing.assert_close(together[name + suffix], value, rtol=1e-12, atol=1e-12)
        total = total + sum(alone[name] * weight for name, weight in WEIGHTS.items())
    torch.testing.assert_close(criterion.total_loss(together), total)
    for a, b in zip(gradients, torch.autograd.grad(total, [logits, boxes]), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", KINDS)
def test_every_loss_exists_and_has_gradients_without_targets(kind: str) -> None:
    """A rank without objects takes part in every collective, with gradients for the same parameters."""
    logits, boxes = predictions(kind, 3, 2, 5)
    criterion = SetCriterion(
        classes(kind),
        expand_weight_dict(WEIGHTS, 2),
        losses=("labels", "boxes", "cardinality", "features"),
    )
    with_targets = criterion(
        with_features(as_outputs(logits, boxes), 3), double(make_targets([1, 2], NUM_CLASSES))
    )
    outputs = with_features(as_outputs(logits, boxes), 0)
    none = criterion(outputs, double(make_targets([0, 0], NUM_CLASSES)))
    assert set(none) == set(with_targets)
    assert set(criterion.weight_dict) <= set(none)
    for name in criterion.weight_dict:
        assert none[name].requires_grad, name
        assert none[name].shape == (), name
        assert torch.isfinite(none[name]), name
        if "loss_ce" not in name:
            assert none[name] == 0
    assert none["class_error"] == 100
    leaves = [
        logits,
        boxes,
        *(layer["pred_features"] for layer in (*outputs["aux_outputs"], outputs)),
    ]
    gradients = torch.autograd.grad(criterion.total_loss(none), leaves)
    assert all(gradient is not None and torch.isfinite(gradient).all() for gradient in gradients)
    assert gradients[0].abs().sum() > 0
    assert all(gradient.abs().sum() == 0 for gradient in gradients[1:])


@pytest.mark.parametrize("kind", KINDS)
def test_packed_targets_give_the_losses_of_a_list(kind: str) -> None:
    """Bit-exact, also for encoder proposals, which ignore classes."""
    logits, boxes = predictions(kind, 2, 3, 7, seed=4)
    targets = double(make_targets([4, 2, 0], NUM_CLASSES, seed=4))
    packed = PackedTargets.pack(targets)
    outputs = {**as_outputs(logits, boxes), "enc_outputs": as_outputs(logits[:1], boxes[:1])}
    criterion = SetCriterion(classes(kind), expand_weight_dict(WEIGHTS, 1, proposals=True))
    listed, fast = criterion(outputs, targets), criterion(outputs, packed)
    assert "loss_ce_enc" in fast
    assert "class_error_enc" not in fast
    assert {name: value.item() for name, value in fast.items()} == {
        name: v.item() for name, v in listed.items()
    }
    assert torch.equal(
        packed.tensors["labels"], torch.cat([target["labels"] for target in targets])
    )
    for one, other in (
        (listed.matches, fast.matches),
        (listed.proposal_matches, fast.proposal_matches),
    ):
        assert torch.equal(one.source, other.source)
        assert torch.equal(one.target, other.target)


@pytest.mark.parametrize("kind", KINDS)
def test_more_targets_than_queries(kind: str) -> None:
    logits, boxes = predictions(kind, 2, 2, 3)
    criterion = SetCriterion(classes(kind), expand_weight_dict(WEIGHTS, 1))
    losses = criterion(as_outputs(logits, boxes), double(make_targets([8, 1], NUM_CLASSES)))
    assert [len(pair[0]) for pair in losses.matches.pairs[0]] == [3, 1]
    assert losses.num_pairs == 4
    assert all(torch.isfinite(value) for value in losses.values())


def test_total_loss_weights() -> None:
    assert expand_weight_dict({"a": 1.0, "b": 2.0}, 2) == {
        "a": 1.0,
        "b": 2.0,
        "a_0": 1.0,
        "b_0": 2.0,
        "a_1": 1.0,
        "b_1": 2.0,
    }
    assert expand_weight_dict({"a": 1.0}, 0) == {"a": 1.0}
    criterion = SetCriterion(
        classes("softmax"), {"loss_ce": 2.0, "loss_bbox": 10.0, "loss_missing": 7.0}
    )
    losses = {
        "loss_ce": torch.tensor(3.0),
        "loss_bbox": torch.tensor(0.5),
        "class_error": torch.tensor(50.0),
    }
    assert float(criterion.total_loss(losses)) == 11.0


def test_criterion_state_dict_is_empty() -> None:
    """Published checkpoints have no buffer of the criterion."""
    assert SetCriterion(classes("softmax"), WEIGHTS).state_dict() == {}


def test_published_cardinality_error_of_focal_outputs_on_request() -> None:
    logits, boxes = (x.detach() for x in predictions("focal", 1, 1, 4))
    logits = torch.full_like(logits, -5.0)
    logits[0, 0, 0, 1], logits[0, 0, 1, NUM_CLASSES - 1] = 2.0, 2.0
    targets = double(make_targets([2], NUM_CLASSES))
    ours = SetCriterion(classes("focal"), WEIGHTS)(as_outputs(logits, boxes), targets)
    published = SetCriterion(classes("focal"), WEIGHTS, reproduce_published=True)(
        as_outputs(logits, boxes), targets
    )
    assert float(ours["cardinality_error"]) == 0  # two scores above 0.5, two targets
    # Three queries whose best class is not the last one.
    assert float(published["cardinality_error"]) == 1


def test_half_precision_predictions_are_scored_in_float32() -> None:
    logits, boxes = (x.detach() for x in predictions("softmax", 2, 1, 5))
    targets = make_targets([2], NUM_CLASSES)
    half = SetCriterion(classes("softmax"), WEIGHTS)(
        as_outputs(logits.bfloat16(), boxes.bfloat16()), targets
    )
    full = SetCriterion(classes("softmax"), WEIGHTS)(
        as_outputs(logits.bfloat16().float(), boxes.bfloat16().float()), targets
    )
    assert all(
        half[name].dtype == torch.float32 and torch.equal(half[name], full[name]) for name in half
    )


def test_costs_may_not_all_be_zero() -> None:
    with pytest.raises(ValueError, match="set_cost_class"):
        classes("softmax", cost_class=0, cost_bbox=0, cost_giou=0)
    with pytest.raises(ValueError, match="softmax or focal"):
        classes("hinge")


# ---- boxes ----


def test_box_formats_are_inverse() -> None:
    boxes = torch.rand(2, 5, 4, dtype=torch.float64)
    torch.testing.assert_close(box_xyxy_to_cxcywh(box_cxcywh_to_xyxy(boxes)), boxes)
    assert box_cxcywh_to_xyxy(torch.tensor([0.5, 0.4, 0.2, 0.4])).tolist() == pytest.approx(
        [0.4, 0.2, 0.6, 0.6]
    )


def test_generalized_iou_equals_reference() -> None:
    a, b = (predictions("focal", 1, 1, 9, seed=seed)[1].detach()[0, 0] for seed in (1, 2))
    pairwise = generalized_box_iou(box_cxcywh_to_xyxy(a), box_cxcywh_to_xyxy(b))
    paired = paired_giou(box_cxcywh_to_xyxy(a), box_cxcywh_to_xyxy(b))
    for i, j in np.ndindex(9, 9):
        assert float(pairwise[i, j]) == pytest.approx(
            reference_giou(a[i].tolist(), b[j].tolist()), abs=1e-12
        )
    torch.testing.assert_close(paired, pairwise.diagonal())


def test_boxes_without_area_are_finite() -> None:
    points = torch.tensor([[0.5, 0.5, 0.5, 0.5], [0.2, 0.2, 0.2, 0.6]], requires_grad=True)
    overlap = generalized_box_iou(points, points)
    assert torch.isfinite(overlap).all()
    overlap.sum().backward()
    assert torch.isfinite(points.grad).all()
