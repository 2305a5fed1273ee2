"""`--activation_checkpoint`: equal gradients from fewer stored bytes."""

import copy

import pytest
import torch

from models import build_model
from models.activation_checkpoint import checkpoint_activations
from tests.tiny import make_batch, make_targets, tiny_args
from util.runs.memory import counting_saved_bytes
from util.settings import FINETUNE
from util.settings.registry import DETECTORS


def train_once(model, criterion, seed: int = 1) -> tuple[dict[str, torch.Tensor], int]:
    """Return the gradients of a step, and the bytes that the forward pass kept."""
    torch.manual_seed(seed)
    model.zero_grad()
    with counting_saved_bytes(model) as saved:
        total = criterion.total_loss(criterion(model(make_batch()), make_targets([2, 1])))
        kept = saved.total
    total.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, kept


@pytest.mark.parametrize("detector", DETECTORS)
def test_equal_gradients_from_less_memory(detector: str) -> None:
    """Also with dropout, whose random state is restored for the second forward pass."""
    torch.manual_seed(0)
    flags = ("--detector", detector, "--backbone_norm", "frozen", "--dropout", "0.3")
    model, criterion, _ = build_model(tiny_args(FINETUNE, *flags, "--enc_layers", "2"))
    model.train()
    names = list(model.state_dict())
    expected, plain = train_once(model, criterion)
    assert checkpoint_activations(model) == 2 + 6  # encoder layers, blocks of layer2 to layer4
    assert list(model.state_dict()) == names

    found, kept = train_once(model, criterion)
    assert kept < 0.8 * plain
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=0, msg=name)


def test_a_copy_runs_its_own_weights() -> None:
    model, _, _ = build_model(tiny_args(FINETUNE, "--backbone_norm", "frozen"))
    checkpoint_activations(model)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.transformer.encoder.parameters():
            parameter.zero_()
    layer = copied.transformer.encoder.layers[0]
    x = torch.rand(1, 4, 32)
    assert not torch.equal(layer(x, x, None), model.transformer.encoder.layers[0](x, x, None))
    assert layer.forward.args[0].__self__ is layer


def test_live_batch_norm_is_left_alone() -> None:
    """Its statistics would count each batch twice."""
    model, _, _ = build_model(tiny_args(FINETUNE, "--backbone_norm", "live"))
    assert checkpoint_activations(model) == 1  # the encoder layer
