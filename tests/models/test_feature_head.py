"""Features of matched queries only, against features of all queries."""

import pytest
import torch
from torch import Tensor

from models.classification import Classification
from models.criterion import SetCriterion, expand_weight_dict
from models.feature_head import add_features
from models.transformer import MLP
from tests.tiny import make_targets

LAYERS, IMAGES, QUERIES, DIM, FEATURES = 3, 2, 8, 6, 5


def outputs_of(head: MLP, layers: Tensor, num_targets: int) -> dict:
    generator = torch.Generator().manual_seed(1)
    shape = (LAYERS, IMAGES, QUERIES)
    logits = torch.randn(*shape, 3, generator=generator)
    boxes = torch.rand(*shape, 4, generator=generator) * 0.4 + 0.3
    *earlier, last = (
        {"pred_logits": a, "pred_boxes": b} for a, b in zip(logits, boxes, strict=True)
    )
    last["aux_outputs"] = earlier
    last["target_features"] = torch.randn(num_targets, FEATURES, generator=generator)
    return add_features(last, head, layers)


@pytest.mark.parametrize("counts", [[2, 0], [3, 9], [0, 0]])
@pytest.mark.parametrize("loss", ["features", "object_embedding"])
def test_matched_queries_equal_all_queries(loss: str, counts: list[int]) -> None:
    """Losses and gradients are the same, and without a match every weight of the head has a gradient, as DDP needs."""
    torch.manual_seed(0)
    head = MLP(DIM, DIM, FEATURES, num_layers=2)
    rows: list[int] = []
    head.layers[0].register_forward_hook(
        lambda module, inputs, _: rows.append(inputs[0].numel() // DIM)
    )
    states = torch.randn(LAYERS, IMAGES, QUERIES, DIM, requires_grad=True)
    used = states if loss == "features" else states[-1:]
    targets = make_targets(counts, 2)
    weights = {"loss_feature": 0.5, "loss_object_embedding": 2.0}
    criterion = SetCriterion(
        Classification("softmax", 2, cost_class=1.0),
        expand_weight_dict(weights, LAYERS - 1),
        losses=(loss,),
    )

    results = []
    for all_queries in (False, True):
        outputs = outputs_of(head, used, sum(counts))
        if all_queries:
            for layer in (outputs, *(outputs["aux_outputs"] if loss == "features" else [])):
                assert layer["pred_features"].shape == (IMAGES, QUERIES, FEATURES)
        rows.clear()
        losses = criterion(outputs, targets)
        num_layers = LAYERS if loss == "features" else 1
        assert rows == ([] if all_queries else [num_layers * losses.num_pairs])
        total = criterion.total_loss(losses)
        results.append([total, *torch.autograd.grad(total, [states, *head.parameters()])])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected)
    assert (results[0][0] > 0) == (sum(counts) > 0)
