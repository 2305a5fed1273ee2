"""`record_attention` against plain computations, and the mapping between cells and pixels."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from datasets.collate import collate
from models import attention as attention_module
from models import build_model
from models.attention_maps import record_attention
from models.detector import Detector
from predictor import Predictor, preprocess
from tests.tiny import make_batch, make_targets, tiny_args
from util.checkpoints.classes import Classes
from util.errors import UserError
from util.nested_tensor import NestedTensor
from util.runs.compilation import Compilation
from util.settings import FINETUNE, PRETRAIN
from util.settings.registry import DETECTORS

QUERIES, HEADS = 20, 4  # of the small model
SINGLE_SCALE = ("detr", "conditional_detr")


def build(*flags: str) -> Detector:
    torch.manual_seed(0)
    return build_model(tiny_args(FINETUNE, *flags))[0].eval()


def padded_batch() -> NestedTensor:
    return make_batch([(64, 96), (48, 64)])


class Calls:
    """The arguments and the output of each call of a module."""

    def __init__(self, module: nn.Module) -> None:
        self.all: list[tuple[tuple, dict[str, Any], Tensor]] = []
        forward = module.forward

        def recorded(*args: Any, **kwargs: Any) -> Any:
            out = forward(*args, **kwargs)
            self.all.append((args, kwargs, out))
            return out

        module.forward = recorded


def plain_weights(query: Tensor, key: Tensor, padding_mask: Tensor | None) -> Tensor:
    """Return softmax(q k / sqrt(d)) of each image and head, [B, H, Q, S]."""
    batch, num_queries, width = query.shape
    d = width // HEADS
    weights = torch.zeros(batch, HEADS, num_queries, key.shape[1])
    for b in range(batch):
        for h in range(HEADS):
            logits = query[b, :, h * d : (h + 1) * d] @ key[b, :, h * d : (h + 1) * d].T / d**0.5
            if padding_mask is not None:
                logits[:, padding_mask[b]] = float("-inf")
            weights[b, h] = logits.softmax(-1)
    return weights


def test_detr_has_the_weights_of_pytorchs_attention() -> None:
    model = build("--detector", "detr", "--enc_layers", "2")
    transformer = model.transformer
    groups = [
        [layer.self_attn for layer in transformer.encoder.layers],
        [layer.self_attn for layer in transformer.decoder.layers],
        [layer.multihead_attn for layer in transformer.decoder.layers],
    ]
    calls = [[Calls(module) for module in modules] for modules in groups]
    with torch.no_grad(), record_attention(model) as attention:
        model(padded_batch())

    recorded = (attention.encoder, attention.decoder_self, attention.decoder_cross)
    for modules, seen, ours in zip(groups, calls, recorded, strict=True):
        assert len(ours) == len(modules) == 2
        for module, of_module, weights in zip(modules, seen, ours, strict=True):
            (query, key, value, *mask), kwargs, _ = of_module.all[0]
            padding = mask[0] if mask else kwargs.get("padding_mask")
            theirs = nn.MultiheadAttention(32, HEADS, batch_first=True)
            theirs.load_state_dict(module.state_dict())
            expected = theirs(
                query, key, value, key_padding_mask=padding, average_attn_weights=False
            )[1]
            torch.testing.assert_close(weights, expected)


def test_conditional_cross_attention_is_a_softmax_of_content_and_position() -> None:
    model = build("--detector", "conditional_detr")
    calls = [Calls(layer.cross_attn) for layer in model.transformer.decoder.layers]
    with torch.no_grad(), record_attention(model) as attention:
        model(padded_batch())
    for seen, weights in zip(calls, attention.decoder_cross, strict=True):
        query, key, _, padding = seen.all[0][0]
        assert query.shape[-1] == 2 * 32  # content and position
        torch.testing.assert_close(weights, plain_weights(query, key, padding))
        assert not weights[1][..., padding[1]].any()


def test_deformable_samples_give_the_output_of_the_module() -> None:
    """The recorded points and weights, read with bilinear samples, are the output of each layer."""
    model = build("--detector", "deformable_detr")
    layers = model.transformer.decoder.layers
    calls = [Calls(layer.cross_attn) for layer in layers]
    with torch.no_grad(), record_attention(model) as attention:
        outputs = model(padded_batch())
        queries = model.learned_queries(2)
        references = model.transformer.reference_points(queries.position).sigmoid()  # [B, Q, 2]

    assert outputs["pred_boxes"].shape == (2, QUERIES, 4)
    for layer, seen, sampled in zip(layers, calls, attention.decoder_cross, strict=True):
        _, _, tokens, memory = seen.all[0][0]
        value = layer.cross_attn.value_proj(tokens).masked_fill(memory.padding_mask[..., None], 0)
        out = torch.zeros(2, QUERIES, 32)
        start = 0
        for level, (h, w) in enumerate(attention.shapes):
            level_map = value[:, start : start + h * w].transpose(1, 2).unflatten(2, (h, w))
            start += h * w
            for head in range(HEADS):
                channels = slice(head * 8, head * 8 + 8)
                grid = 2 * sampled.locations[:, :, head, level] - 1  # [B, Q, P, 2]
                samples = functional.grid_sample(
                    level_map[:, channels], grid, align_corners=False
                )  # [B, 8, Q, P]
                weights = sampled.weights[:, :, head, level]  # [B, Q, P]
                out[..., channels] += (samples * weights[:, None]).sum(-1).transpose(1, 2)
        torch.testing.assert_close(layer.cross_attn.output_proj(out), seen.all[0][2])

        expected = references[:, :, None] * memory.valid_ratios[:, None]  # [B, Q, L, 2]
        torch.testing.assert_close(sampled.references, expected)

    # In pixels of the second image, whose padding is not part of it.
    seen = attention.image(1, (480, 640))
    samples = seen.decoder_samples(3)
    torch.testing.assert_close(
        samples.reference_xy, (references[1, 3] * torch.tensor([640.0, 480])).expand(4, 2)
    )
    assert samples.points_xy.shape == (HEADS, 4, 4, 2)
    torch.testing.assert_close(samples.weights.sum((1, 2)), torch.ones(HEADS))
    # A token's reference is the center of its cell: 6 x 8 valid cells of 80 x 80 pixels.
    assert seen.map_size() == (6, 8)
    torch.testing.assert_close(
        seen.encoder_samples(100, 200).reference_xy, torch.tensor([[120.0, 200.0]] * 4)
    )


def test_box_references_are_in_pixels() -> None:
    model = build("--detector", "deformable_detr", "--with_box_refine")
    with torch.no_grad(), record_attention(model) as attention:
        outputs = model(padded_batch())
    refined = outputs["aux_outputs"][0]["pred_boxes"][1, 5]  # (cx, cy, w, h) of the first layer
    reference = attention.image(1, (480, 640)).decoder_samples(5).reference_xy  # [L, 4]
    expected = refined * torch.tensor([640.0, 480, 640, 480])
    torch.testing.assert_close(reference, expected.expand(4, 4))


@pytest.mark.parametrize("detector", DETECTORS)
def test_without_the_context_nothing_is_computed(
    detector: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch = build("--detector", detector), padded_batch()
    with torch.no_grad():
        with record_attention(model):
            recorded = model(batch)
        monkeypatch.setattr(attention_module, "attention_weights", None)  # a call would fail
        plain = model(batch)
    assert torch.equal(plain["pred_logits"], recorded["pred_logits"])
    assert torch.equal(plain["pred_boxes"], recorded["pred_boxes"])
    assert all(getattr(module, "record", None) is None for module in model.modules())


@pytest.mark.parametrize("detector", SINGLE_SCALE)
def test_maps_cover_the_image_without_padding(detector: str) -> None:
    """Alone or padded in a batch, the map of an image has the same cells; the weights are nearly the same."""
    model = build("--detector", detector)
    images = padded_batch()
    alone = NestedTensor(
        images.tensors[1:, :, :64, :64], torch.zeros(1, 64, 64, dtype=torch.bool), False
    )
    with torch.no_grad():
        with record_attention(model) as attention:
            model(images)
        seen = attention.image(1, (480, 640))
        assert attention.shapes == [(2, 3)]
        assert attention.valid_sizes_hw.tolist() == [[[2, 3]], [[2, 2]]]
        with record_attention(model) as single:
            model(alone)
        assert single.image(0, (480, 640)).map_size() == seen.map_size() == (2, 2)

    assert [seen.cell(x, y) for x, y in ((0, 0), (319, 239), (320, 240), (639, 479))] == [
        (0, 0), (0, 0), (1, 1), (1, 1),
    ]  # fmt: skip
    # Cell (1, 0) is token 3: rows of the padded map have three cells.
    of_token = attention.encoder[-1][1, 2, 3].view(2, 3)[:, :2]
    assert torch.equal(seen.encoder_map(10, 470, head=2), of_token)
    mean = attention.decoder_cross[0][1, :, 7].mean(0).view(2, 3)[:, :2]
    assert torch.equal(seen.decoder_map(7, layer=0), mean)
    torch.testing.assert_close(seen.decoder_map(7).sum(), torch.tensor(1.0))
    with pytest.raises(UserError, match=r"point \(640, 3\) is outside.*x is in 0..639"):
        seen.cell(640, 3)
    with pytest.raises(UserError, match="no sampling points: use decoder_map"):
        seen.decoder_samples(0)


def test_layers_that_were_asked_for() -> None:
    model = build("--detector", "deformable_detr", "--dec_layers", "3", "--enc_layers", "3")
    with torch.no_grad(), record_attention(model, layers=[-1, 0]) as attention:
        model(make_batch(1))
    for part in (attention.encoder, attention.decoder_self, attention.decoder_cross):
        assert [value is not None for value in part] == [True, False, True]
    seen = attention.image(0, (64, 64))
    with pytest.raises(UserError, match="layer 1 was not recorded"):
        seen.decoder_samples(0, layer=1)
    with pytest.raises(UserError, match="deformable attention has sampling points"):
        seen.decoder_map(0)
    for call in (lambda: seen.decoder_samples(0, layer=3), record_attention(model, [3]).__enter__):
        with pytest.raises(UserError, match="layer 3: this model has 3; give 0 to 2"):
            call()


def test_what_can_not_be_recorded() -> None:
    model = build("--detector", "detr")
    with record_attention(model) as attention:
        with pytest.raises(UserError, match="no attention was recorded"):
            attention.image(0, (4, 4))
        with pytest.raises(ValueError, match="already"), record_attention(model):
            pass
    with (
        pytest.raises(UserError, match="before torch.compile"),
        record_attention(torch.compile(model, backend="eager")),
    ):
        pass
    Compilation(model, "eager")
    with pytest.raises(UserError, match="build it without --compile"), record_attention(model):
        pass
    model = build("--detector", "detr")
    model.transformer.encoder.layers[0].self_attn = nn.MultiheadAttention(32, HEADS)
    with pytest.raises(UserError, match="EncoderLayer.self_attn is no"), record_attention(model):
        pass


def test_pretext_with_query_groups_and_mask_head() -> None:
    pretext = build_model(tiny_args(PRETRAIN, "--pretext", "random_query_patch"))[0].eval()
    with torch.no_grad(), record_attention(pretext) as attention:
        pretext(make_batch(2), make_targets([5, 5], patches=5))
    assert attention.decoder_self[-1].shape == (2 * 5, HEADS, 20 // 5, 20 // 5)
    assert attention.decoder_cross[-1].shape == (2, HEADS, 20, 4)
    segmenter = build("--detector", "detr", "--masks")
    with torch.no_grad(), record_attention(segmenter) as attention:
        segmenter(make_batch(1))
    assert attention.encoder[0].shape == (1, HEADS, 4, 4)


@pytest.mark.parametrize("kind", ["softmax", "focal", "class-agnostic"])
def test_predictor_maps_attention_to_the_image(kind: str) -> None:
    """Objects know their query, and maps are those of the model on the resized image."""
    detector = "deformable_detr" if kind == "focal" else "detr"
    settings = tiny_args(FINETUNE, "--detector", detector)
    torch.manual_seed(0)
    model, _, postprocessors = build_model(settings)
    if kind == "class-agnostic":
        from models.postprocess import ClassAgnosticPostProcess

        postprocessors = {"bbox": ClassAgnosticPostProcess(model.classification)}
    classes = Classes({}, {}, 91, "a test")
    predictor = Predictor(model, postprocessors, classes, settings, device=torch.device("cpu"))
    image = torch.randint(0, 256, (3, 100, 150), dtype=torch.uint8)
    prediction, seen = predictor.attention(image, threshold=0.0)
    assert seen.size_hw == (100, 150)
    plain = predictor(image, threshold=0.0)
    assert torch.equal(plain.boxes, prediction.boxes)

    resized = preprocess(image, predictor.transforms)
    samples = collate([resized])[0]
    mean, std = (torch.tensor(model.normalization[key])[:, None, None] for key in ("mean", "std"))
    with torch.no_grad(), record_attention(model) as attention:
        outputs = model((samples.tensors / 255 - mean) / std)
    centers = outputs["pred_boxes"][0, prediction.queries, :2] * torch.tensor([150, 100])
    inside = (prediction.boxes > 0).all(1) & (prediction.boxes < torch.tensor([150, 100] * 2)).all(
        1
    )
    assert inside.any()
    ours = (prediction.boxes[:, :2] + prediction.boxes[:, 2:]) / 2
    torch.testing.assert_close(ours[inside], centers[inside], atol=1e-3, rtol=1e-4)
    kept = prediction.above(float(prediction.scores[3]))
    assert torch.equal(kept.queries, prediction.queries[: len(kept)])

    query = int(prediction.queries[0])
    if detector == "detr":
        expected = attention.decoder_cross[-1][0, 1, query].view(seen.map_size())
        torch.testing.assert_close(seen.decoder_map(query, head=1), expected, atol=1e-5, rtol=1e-4)
    else:
        points = attention.decoder_cross[-1].locations[0, query] * torch.tensor([150, 100])
        torch.testing.assert_close(
            seen.decoder_samples(query).points_xy, points, atol=1e-3, rtol=1e-4
        )


def test_hooks_of_the_detr_notebook() -> None:
    """Carion et al.'s notebook, "DETR's hands on Colab": weights [1, Q, HW], averaged over the heads."""
    model = build("--detector", "detr")
    enc_attn_weights, dec_attn_weights = [], []
    hooks = [
        model.transformer.encoder.layers[-1].self_attn.register_forward_hook(
            lambda self, input, output: enc_attn_weights.append(output[1])
        ),
        model.transformer.decoder.layers[-1].multihead_attn.register_forward_hook(
            lambda self, input, output: dec_attn_weights.append(output[1])
        ),
    ]
    with torch.no_grad(), record_attention(model) as attention:
        model(torch.rand(1, 3, 64, 96))
    for hook in hooks:
        hook.remove()
    assert dec_attn_weights[0].shape == (1, QUERIES, 6)
    torch.testing.assert_close(enc_attn_weights[0], attention.encoder[-1].mean(1))
    torch.testing.assert_close(dec_attn_weights[0], attention.decoder_cross[-1].mean(1))


def test_half_precision_gives_float32_weights() -> None:
    model = build("--detector", "detr")
    with (
        torch.no_grad(),
        torch.autocast("cpu", dtype=torch.bfloat16),
        record_attention(model) as attention,
    ):
        model(padded_batch())
    assert attention.encoder[0].dtype == torch.float32
    sums = attention.decoder_cross[-1].sum(-1)
    torch.testing.assert_close(sums, torch.ones_like(sums))
