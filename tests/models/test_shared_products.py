"""What decoder layers share is computed once: heads, keys, and the product of offsets and weights. Values and gradients
are those of each layer by itself."""

import pytest
import torch
from torch import Tensor, nn

from models import build_model
from models.deformable_transformer import DeformableAttention, apply_box_deltas
from models.detector import Detector, Memory, States
from models.detr import DETR
from tests.models.test_frozen_norm import Operations
from tests.tiny import tiny_args
from util.settings import FINETUNE

DEFORMABLE = ("--detector", "deformable_detr")
MODELS = [
    ("--detector", "detr"),
    ("--detector", "detr", "--pre_norm"),
    ("--detector", "conditional_detr"),
    DEFORMABLE,
    (*DEFORMABLE, "--with_box_refine"),
    (*DEFORMABLE, "--two_stage"),
    (*DEFORMABLE, "--with_box_refine", "--two_stage"),
]
LAYERS = 3


def build(*flags: str) -> Detector:
    """Build a detector in float64 whose heads have no zero weights, which would hide errors."""
    torch.manual_seed(0)
    model, _, _ = build_model(tiny_args(FINETUNE, *flags, "--dec_layers", str(LAYERS)))
    for parameter in model.bbox_embed.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.double().eval()


def random_states(flags: tuple[str, ...]) -> States:
    """Return states of the decoder, as leaves that collect gradients, with references as of these flags."""
    layers = torch.randn(LAYERS, 2, 20, 32, dtype=torch.float64, requires_grad=True)
    if "detr" in flags:
        return States(layers)
    references = [
        torch.rand(2, 20, 4 if "--two_stage" in flags or i else 2, dtype=torch.float64)
        for i in range(LAYERS)
    ]
    if "--with_box_refine" not in flags:
        references = [references[0]] * LAYERS
    proposals = {"pred_logits": torch.zeros(2, 50, 3)} if "--two_stage" in flags else None
    return States(layers, references, proposals)


def head_of_layer(heads: nn.Module, i: int) -> nn.Module:
    return heads[i] if isinstance(heads, nn.ModuleList) else heads


def predicted_by_layer(model: Detector, states: States) -> list[tuple[Tensor, Tensor]]:
    """Return logits and boxes of each layer, by its own calls of the heads."""
    found = []
    for i, layer in enumerate(states.layers):
        logits = head_of_layer(model.class_embed, i)(layer)  # [B, Q, C]
        deltas = head_of_layer(model.bbox_embed, i)(layer)  # [B, Q, 4]
        if states.references is None:
            boxes = deltas.sigmoid()
        else:
            boxes = apply_box_deltas(deltas, states.references[i])
        found.append((logits, boxes))
    return found


def gradients(model: Detector, states: States, outputs: list[tuple[Tensor, Tensor]]) -> list:
    """Return the gradients of states and heads. Each layer and output has another weight."""
    total = sum(
        (i + 1) * (logits.square().sum() + 3 * boxes.square().sum())
        for i, (logits, boxes) in enumerate(outputs)
    )
    heads = {*model.class_embed.parameters(), *model.bbox_embed.parameters()}
    used = [p for p in model.parameters() if p in heads]
    return list(torch.autograd.grad(total, [states.layers, *used], allow_unused=True))


@pytest.mark.parametrize("flags", MODELS, ids=lambda flags: " ".join(flags[1:]))
def test_heads_of_all_layers_in_one_call_equal_each_layer(flags: tuple[str, ...]) -> None:
    model = build(*flags)
    states = random_states(flags)
    with Operations() as operations:
        outputs = model.predict(states)
    # One layer of the class head and three of the box head.
    assert operations.counts["addmm"] == 4 * (LAYERS if "--with_box_refine" in flags else 1)
    layers = [
        (layer["pred_logits"], layer["pred_boxes"]) for layer in [*outputs["aux_outputs"], outputs]
    ]
    expected = predicted_by_layer(model, states)
    assert len(layers) == len(expected) == LAYERS
    found = [*sum(layers, ()), *gradients(model, states, layers)]
    plain = [*sum(expected, ()), *gradients(model, states, expected)]
    for ours, theirs in zip(found, plain, strict=True):
        assert (ours is None) is (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    if "--two_stage" in flags:
        assert outputs["enc_outputs"] is states.encoder_proposals


def test_decoder_layers_share_the_key_of_the_memory() -> None:
    """Tokens and positions are added once, not in each layer."""
    model = build("--detector", "detr")
    assert isinstance(model, DETR)
    tokens, key_position = torch.randn(2, 2, 6, 32, dtype=torch.float64)  # [B, S, D] each
    content, position = torch.randn(2, 2, 20, 32, dtype=torch.float64)  # [B, Q, D] each
    padding_mask = torch.tensor([[False] * 6, [False] * 4 + [True] * 2])
    decoder = model.transformer.decoder
    weights = torch.randn(LAYERS, *content.shape, dtype=torch.float64)

    def run(shared: bool) -> list[Tensor]:
        memory = Memory(
            [],
            tokens=tokens.clone().requires_grad_(),
            position=key_position.clone().requires_grad_(),
            padding_mask=padding_mask,
            shapes=[(2, 3)],
            projected_map=torch.empty(0),
        )
        if shared:
            layers = decoder(content, position, memory, 1)
        else:
            x, outputs = content, []
            for layer in decoder.layers:
                x = layer(x, position, memory, memory.tokens + memory.position, 1)
                outputs.append(decoder.norm(x))
            layers = torch.stack(outputs)
        inputs = [memory.tokens, memory.position, *decoder.parameters()]
        return [layers, *torch.autograd.grad((layers * weights).sum(), inputs)]

    for ours, theirs in zip(run(True), run(False), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_offsets_and_weights_come_from_one_product() -> None:
    torch.manual_seed(0)
    attention = DeformableAttention(16, num_heads=2, num_levels=3, num_points=2).double()
    for parameter in attention.parameters():
        nn.init.normal_(parameter, std=0.5)
    query = torch.randn(2, 5, 16, dtype=torch.float64, requires_grad=True)
    with Operations() as operations:
        found = attention._predict_samples(query).split([24, 12], -1)  # 2 x 3 x 2 points
    assert operations.counts["addmm"] == 1
    layers = (attention.sampling_offsets, attention.attention_weights)
    expected = [layer(query) for layer in layers]
    inputs = [query, *(p for layer in layers for p in layer.parameters())]

    def with_gradients(outputs) -> list[Tensor]:
        offsets, weights = outputs
        total = offsets.square().sum() + 2 * weights.softmax(-1).square().sum()
        return [offsets, weights, *torch.autograd.grad(total, inputs)]

    for ours, theirs in zip(with_gradients(found), with_gradients(expected), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
