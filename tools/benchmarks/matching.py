"""Matching and losses of all decoder layers, forward and backward, against the published per-layer form.

The published form (Carion et al. 2020, Zhu et al. 2021) handles one decoder layer after another. For each it computes
the cost of every query of the batch for every target of the batch, copies that matrix to the host, keeps the blocks
where both are of one image, and solves those; its GIoU loss is the diagonal of another full matrix.
"""

import argparse
from collections.abc import Callable, Iterator
from typing import Any

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn import functional

from models.classification import Classification, sigmoid_focal_loss
from models.criterion import SetCriterion, expand_weight_dict
from tools.benchmarks.measure import Comparison, Local
from tools.benchmarks.work import NUM_BOXES
from util.box_ops import box_cxcywh_to_xyxy, generalized_box_iou

NUM_CLASSES, NO_OBJECT_WEIGHT = 91, 0.1
KINDS = {"softmax": 1.0, "focal": 2.0}  # weight of the classes in cost and loss, as published
Targets = list[dict[str, Tensor]]


class PublishedCriterion:
    """The published losses of boxes and classes, layer by layer."""

    def __init__(self, kind: str, weights: dict[str, float]) -> None:
        self.kind, self.weights, self.class_weight = kind, weights, KINDS[kind]

    def total(self, outputs: dict[str, Any], targets: Targets) -> Tensor:
        num_boxes = max(sum(len(target["labels"]) for target in targets), 1)
        last = len(outputs["aux_outputs"])
        losses = {}
        for layer, output in enumerate([*outputs["aux_outputs"], outputs]):
            suffix = "" if layer == last else f"_{layer}"
            pairs = self._match(output["pred_logits"], output["pred_boxes"], targets)
            found = {
                "loss_ce": self._class_loss(output["pred_logits"], targets, pairs, num_boxes),
                **self._box_losses(output["pred_boxes"], targets, pairs, num_boxes),
            }
            losses |= {name + suffix: value for name, value in found.items()}
            self._cardinality(output["pred_logits"], targets)
        return torch.stack([losses[name] * w for name, w in self.weights.items()]).sum()

    @torch.no_grad()
    def _match(self, logits: Tensor, boxes: Tensor, targets: Targets) -> list[tuple]:
        flat, all_boxes = logits.flatten(0, 1), boxes.flatten(0, 1)
        labels = torch.cat([target["labels"] for target in targets])
        wanted = torch.cat([target["boxes"] for target in targets])
        if self.kind == "softmax":
            class_cost = -flat.softmax(-1)[:, labels]
        else:
            p = flat.sigmoid()
            negative = 0.75 * p**2 * -(1 - p + 1e-8).log()
            positive = 0.25 * (1 - p) ** 2 * -(p + 1e-8).log()
            class_cost = positive[:, labels] - negative[:, labels]
        distance = torch.cdist(all_boxes, wanted, p=1)
        overlap = generalized_box_iou(box_cxcywh_to_xyxy(all_boxes), box_cxcywh_to_xyxy(wanted))
        cost = 5 * distance + self.class_weight * class_cost - 2 * overlap
        cost = cost.view(*logits.shape[:2], -1).cpu()  # [B, Q, all targets]
        blocks = cost.split([len(target["labels"]) for target in targets], -1)
        solved = [linear_sum_assignment(block[i]) for i, block in enumerate(blocks)]
        return [(torch.as_tensor(a), torch.as_tensor(b)) for a, b in solved]

    @staticmethod
    def _index(pairs: list[tuple]) -> tuple[Tensor, Tensor]:
        image = torch.cat([torch.full_like(query, i) for i, (query, _) in enumerate(pairs)])
        return image, torch.cat([query for query, _ in pairs])

    def _class_loss(
        self, logits: Tensor, targets: Targets, pairs: list[tuple], num_boxes: int
    ) -> Tensor:
        index = self._index(pairs)
        matched = torch.cat([t["labels"][j] for t, (_, j) in zip(targets, pairs, strict=True)])
        classes = torch.full(logits.shape[:2], NUM_CLASSES, device=logits.device)
        classes[index] = matched
        logits[index].argmax(-1).eq(matched).float().mean().item()  # class_error, for the log
        if self.kind == "softmax":
            weight = torch.ones(NUM_CLASSES + 1, device=logits.device)
            weight[-1] = NO_OBJECT_WEIGHT
            return functional.cross_entropy(logits.transpose(1, 2), classes, weight)
        one_hot = functional.one_hot(classes, NUM_CLASSES + 1)[..., :-1].to(logits.dtype)
        loss = sigmoid_focal_loss(logits, one_hot)
        return loss.mean(1).sum() / num_boxes * logits.shape[1]

    def _box_losses(
        self, boxes: Tensor, targets: Targets, pairs: list[tuple], num_boxes: int
    ) -> dict[str, Tensor]:
        predicted = boxes[self._index(pairs)]
        wanted = torch.cat([t["boxes"][j] for t, (_, j) in zip(targets, pairs, strict=True)])
        full = generalized_box_iou(box_cxcywh_to_xyxy(predicted), box_cxcywh_to_xyxy(wanted))
        return {
            "loss_bbox": functional.l1_loss(predicted, wanted, reduction="sum") / num_boxes,
            "loss_giou": (1 - full.diag()).sum() / num_boxes,
        }

    @torch.no_grad()
    def _cardinality(self, logits: Tensor, targets: Targets) -> Tensor:
        counts = torch.as_tensor([len(t["labels"]) for t in targets], device=logits.device)
        found = (logits.argmax(-1) != logits.shape[-1] - 1).sum(1)
        return functional.l1_loss(found.float(), counts.float())


def build(case: dict[str, Any]) -> Local:
    """Return our criterion as a contender."""
    device = torch.device(case["device"])
    inputs, targets = make_inputs(case, device)
    kind = case["kind"]
    cost = KINDS[kind]
    criterion = SetCriterion(
        Classification(kind, NUM_CLASSES, cost_class=cost), loss_weights(case)
    ).to(device)

    def total(outputs: dict[str, Any]) -> Tensor:
        return criterion.total_loss(criterion(outputs, targets))

    return as_contender(total, inputs, device)


def published(case: dict[str, Any]) -> Local:
    device = torch.device(case["device"])
    inputs, targets = make_inputs(case, device)
    criterion = PublishedCriterion(case["kind"], loss_weights(case))
    return as_contender(lambda outputs: criterion.total(outputs, targets), inputs, device)


def loss_weights(case: dict[str, Any]) -> dict[str, float]:
    weights = {"loss_ce": KINDS[case["kind"]], "loss_bbox": 5.0, "loss_giou": 2.0}
    return expand_weight_dict(weights, case["layers"] - 1)


def as_contender(
    total: Callable[[dict[str, Any]], Tensor], inputs: tuple[Tensor, Tensor], device: torch.device
) -> Local:
    """Return a contender that computes the total loss and the gradients of logits and boxes."""
    leaves = [tensor.requires_grad_() for tensor in inputs]

    def run() -> list[Tensor]:
        logits, boxes = leaves
        layers = [
            {"pred_logits": a, "pred_boxes": b}
            for a, b in zip(logits.unbind(), boxes.unbind(), strict=True)
        ]
        loss = total({**layers[-1], "aux_outputs": layers[:-1]})
        return [loss.detach(), *torch.autograd.grad(loss, leaves)]

    return Local(run, run, device)


def make_inputs(
    case: dict[str, Any], device: torch.device
) -> tuple[tuple[Tensor, Tensor], Targets]:
    """Return (logits [L, B, Q, C], boxes [L, B, Q, 4]) and targets with 1 to 13 boxes, 7 on average."""
    generator = torch.Generator().manual_seed(0)
    size = case["layers"], case["batch_size"], case["queries"]
    outputs = NUM_CLASSES + (case["kind"] == "softmax")
    logits = torch.randn(*size, outputs, generator=generator)
    boxes = torch.rand(*size, 4, generator=generator) * 0.4 + 0.2
    targets = []
    for i in range(case["batch_size"]):
        count = 1 + i % (2 * NUM_BOXES - 1)
        wanted = torch.rand(count, 4, generator=generator) * 0.4 + 0.2
        labels = torch.randint(1, NUM_CLASSES, (count,), generator=generator)
        targets.append({"boxes": wanted.to(device), "labels": labels.to(device)})
    return (logits.to(device), boxes.to(device)), targets


def comparisons(args: argparse.Namespace, bench: Any) -> Iterator[Comparison]:
    for kind in KINDS:
        case = {
            "kind": kind,
            "device": args.device,
            "layers": args.layers,
            "batch_size": args.batch_size,
            "queries": args.queries,
            "flags": {},
        }
        comparison = Comparison(
            f"{kind}, {args.layers} layers x {args.batch_size} images x {args.queries} queries",
            {"ours": build(case), "published form": published(case)},
            1e-4,
            items=args.batch_size,
        )
        bench.add_variants(comparison, "matching", case, args, 1e-4)
        yield comparison


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from tools.benchmarks.step import against_argument

    parser.add_argument(
        "--layers", type=int, default=6, metavar="N", help="number of decoder layers"
    )
    parser.add_argument(
        "--batch_size", type=int, default=32, metavar="N", help="number of images per batch"
    )
    parser.add_argument("--queries", type=int, default=100, metavar="N", help="queries per image")
    against_argument(parser)
    parser.set_defaults(variant=[])
