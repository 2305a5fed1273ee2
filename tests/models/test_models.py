"""Detectors: output shapes, options, parameter names, padding, precision, trainable parameters."""

import json
import shlex
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

import finetune_main
import main
from models import build_model
from models.attention import MultiheadAttention
from models.backbone import Backbone, resize_mask
from models.classification import Classification
from models.detector import Detector, Queries
from models.position_encoding import POSITION_ENCODINGS, sine_embed_points
from models.postprocess import PostProcess
from models.resnet import LiveBatchNorm2d
from models.transformer import MLP
from tests.tiny import captured_log, make_batch, make_targets, tiny_args
from util.errors import UserError
from util.nested_tensor import NestedTensor, as_nested_tensor
from util.settings import FINETUNE, make_parser, resolve
from util.settings.registry import DETECTORS

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
LAYERS, QUERIES = 2, 20  # of the small model
# State-dict keys of the published models.
NUM_KEYS = {
    "detr_r50": 458,
    "detr_r50_prenorm": 460,
    "detr_r50_learned": 460,
    "detr_r50_dc5": 458,
    "detr_r101": 713,
    "cond_r50": 564,
    "cond_r50_dc5": 564,
    "updetr_r50": 466,
    "updetr_r50_norecon_postnorm": 460,
}


def build(*flags: str, seed: int = 0) -> Detector:
    torch.manual_seed(seed)
    return build_model(tiny_args(FINETUNE, *flags))[0]


def num_outputs(model: Detector) -> int:
    return 92 if model.classification.kind == "softmax" else 91


def check_layer(layer: dict, batch: int, queries: int, classes: int) -> None:
    assert layer["pred_logits"].shape == (batch, queries, classes)
    assert layer["pred_boxes"].shape == (batch, queries, 4)
    assert (layer["pred_boxes"] >= 0).all()
    assert (layer["pred_boxes"] <= 1).all()
    assert torch.isfinite(layer["pred_logits"]).all()


@pytest.mark.parametrize("detector", DETECTORS)
@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--num_queries", "7"],
        ["--position_embedding", "learned"],
        ["--position_embedding", "sine_shifted"],
        ["--enc_layers", "2"],
        ["--hidden_dim", "48", "--nheads", "2"],
        ["--classification", "focal"],
        ["--classification", "softmax"],
    ],
    ids=" ".join,
)
def test_outputs(detector: str, flags: list[str]) -> None:
    model = build("--detector", detector, *flags)
    outputs = model(make_batch([(64, 96), (40, 64)]))
    queries = int(flags[1]) if flags[:1] == ["--num_queries"] else QUERIES
    assert set(outputs) == {"pred_logits", "pred_boxes", "aux_outputs"}
    assert len(outputs["aux_outputs"]) == LAYERS - 1
    for layer in (*outputs["aux_outputs"], outputs):
        check_layer(layer, 2, queries, num_outputs(model))


@pytest.mark.parametrize("detector", DETECTORS)
def test_without_auxiliary_outputs(detector: str) -> None:
    torch.manual_seed(0)
    model, criterion, _ = build_model(tiny_args(FINETUNE, "--detector", detector, "--no_aux_loss"))
    outputs = model.eval()(make_batch())
    assert set(outputs) == {"pred_logits", "pred_boxes"}
    assert set(criterion.weight_dict) == {"loss_ce", "loss_bbox", "loss_giou"}
    whole = build("--detector", detector).eval()
    assert set(whole.state_dict()) == set(model.state_dict())
    assert torch.equal(whole(make_batch())["pred_boxes"], outputs["pred_boxes"])


@pytest.mark.parametrize("detector", DETECTORS)
def test_loss_weights_of_all_layers(detector: str) -> None:
    args = tiny_args(
        FINETUNE,
        "--detector",
        detector,
        *shlex.split("--dec_layers 3 --cls_loss_coef 4 --bbox_loss_coef 6"),
    )
    model, criterion, _ = build_model(args)
    expected = {
        f"{name}{suffix}": weight
        for suffix in ("", "_0", "_1")
        for name, weight in (("loss_ce", 4.0), ("loss_bbox", 6.0), ("loss_giou", 2.0))
    }
    assert criterion.weight_dict == expected
    losses = criterion(model(make_batch()), make_targets([2, 0]))
    assert set(expected) <= set(losses)


@pytest.mark.parametrize("detector", DETECTORS)
def test_encode_decode_predict_contract(detector: str) -> None:
    """`encode`, `decode` and `predict` in a row equal `forward`; queries can be given; query groups are independent."""
    model = build("--detector", detector).eval()
    samples = make_batch([(64, 64), (64, 96)])
    memory = model.encode(samples)
    tokens = sum(height * width for height, width in memory.shapes)
    assert memory.tokens.shape == memory.position.shape == (2, tokens, 32)
    assert memory.padding_mask.shape == (2, tokens)
    assert (2, 3) in memory.shapes
    assert memory.features[-1].tensor.shape == (2, 512, 2, 3)
    states = model.decode(memory)
    assert states.layers.shape == (LAYERS, 2, QUERIES, 32)
    outputs, plain = model.predict(states), model(samples)
    assert torch.equal(outputs["pred_boxes"], plain["pred_boxes"])
    assert torch.equal(outputs["pred_logits"], plain["pred_logits"])
    learned = model.learned_queries(2)
    assert torch.equal(
        model.predict(model.decode(memory, learned))["pred_boxes"], plain["pred_boxes"]
    )
    assert model.learned_queries(2, 5).position.shape == (2, 5, 32)
    grouped = model.decode(memory, learned, query_groups=4)
    for group in range(4):
        part = slice(group * 5, group * 5 + 5)
        content = None if learned.content is None else learned.content[:, part]
        alone = model.decode(memory, Queries(learned.position[:, part], content))
        torch.testing.assert_close(grouped.layers[:, :, part], alone.layers, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(grouped.layers, states.layers, atol=1e-3)


@pytest.mark.parametrize("detector", DETECTORS)
def test_samples_as_tensor_list_or_nested_tensor(detector: str) -> None:
    model = build("--detector", detector).eval()
    samples = make_batch()
    expected = model(samples)["pred_boxes"]
    for form in (
        samples.tensors,
        list(samples.tensors),
        NestedTensor(samples.tensors, samples.mask),
    ):
        torch.testing.assert_close(model(form)["pred_boxes"], expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=r"\[B, 3, H, W\]"):
        model(samples.tensors[0])
    with pytest.raises(ValueError, match=r"\[3, H, W\]"):
        as_nested_tensor([samples.tensors[:1]])


def test_pre_norm() -> None:
    model = build("--pre_norm")
    assert "transformer.encoder.norm.weight" in model.state_dict()
    assert "transformer.encoder.norm.weight" not in build().state_dict()
    check_layer(model(make_batch()), 2, QUERIES, 92)
    assert not torch.allclose(
        model.eval()(make_batch())["pred_boxes"],
        build().eval()(make_batch())["pred_boxes"],
        atol=1e-4,
    )


def test_pre_norm_is_refused_by_conditional_detr() -> None:
    with pytest.raises(UserError, match="--pre_norm.*post-norm only.*--detector detr"):
        build("--detector", "conditional_detr", "--pre_norm")


@pytest.mark.parametrize("detector", DETECTORS)
def test_dilation_halves_the_stride(detector: str) -> None:
    flags = ["--detector", detector, "--backbone", "resnet50"]
    if "num_feature_levels" in DETECTORS[detector].flags:
        flags += ["--num_feature_levels", "1"]
    plain, dilated = build(*flags), build(*flags, "--dilation")
    assert [plain.backbone[0].strides[-1], dilated.backbone[0].strides[-1]] == [32, 16]
    assert {k: v.shape for k, v in plain.state_dict().items()} == {
        k: v.shape for k, v in dilated.state_dict().items()
    }
    with torch.no_grad():
        assert dilated.encode(make_batch(1)).shapes == [(4, 4)]
        assert plain.encode(make_batch(1)).shapes == [(2, 2)]


def test_dilation_needs_bottlenecks() -> None:
    with pytest.raises(UserError, match="--dilation.*resnet50"):
        build("--dilation")
    with pytest.raises(UserError, match="--backbone resnet999.*timm:NAME"):
        build("--backbone", "resnet999")


# ---- names ----


@pytest.mark.parametrize("case", NUM_KEYS)
def test_parameter_names_match_published(case: str) -> None:
    js = json.loads((GOLDEN / f"{case}.json").read_text())
    script = "main.py" if "updetr" in case else FINETUNE
    args = make_parser(script).parse_args(
        ["--backbone_weights", "none", "--backbone_norm", "frozen", "--device", "cpu"]
    )
    args.detector = "conditional_detr" if "cond" in case else "detr"
    for name in (
        "backbone",
        "dilation",
        "pre_norm",
        "position_embedding",
        "num_queries",
        "num_patches",
        "feature_recon",
    ):
        setattr(args, name, js["args"].get(name))
    with torch.device("meta"):
        state = build_model(resolve(args))[0].state_dict()
    published = {key: entry["shape"] for key, entry in js["state_dict"].items()}
    assert {key: list(value.shape) for key, value in state.items()} == published
    assert len(state) == NUM_KEYS[case]


@pytest.mark.parametrize("detector", DETECTORS)
def test_trainable_parameters_at_published_sizes(detector: str) -> None:
    flags = ["--detector", detector, "--backbone_weights", "none", "--backbone_norm", "frozen"]
    with torch.device("meta"):
        model = build_model(resolve(make_parser(FINETUNE).parse_args(flags)))[0]
    expected = {
        "detr": 41_302_368,
        "conditional_detr": 43_196_001,
        "deformable_detr": 39_847_265,
    }
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == expected[detector]


@pytest.mark.parametrize("detector", DETECTORS)
def test_weights_load_strictly_and_give_equal_outputs(detector: str) -> None:
    model = build("--detector", detector, seed=0).eval()
    other = build("--detector", detector, seed=1).eval()
    assert not torch.equal(model(make_batch())["pred_boxes"], other(make_batch())["pred_boxes"])
    other.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(model(make_batch())["pred_boxes"], other(make_batch())["pred_boxes"])


# ---- initial values ----


def test_initial_values() -> None:
    """Layers start with equal biases and different matrices.

    Focal heads start at a probability of 0.01, boxes of Conditional DETR at their reference points.
    """
    model = build("--detector", "conditional_detr", "--enc_layers", "2")
    assert model.class_embed.bias.sigmoid().tolist() == pytest.approx([0.01] * 91)
    first, second = model.transformer.encoder.layers
    assert torch.equal(first.linear1.bias, second.linear1.bias)
    assert not torch.equal(first.linear1.weight, second.linear1.weight)
    model.eval()
    states = model.decode(model.encode(make_batch(1)))
    boxes = model.predict(states)["pred_boxes"]
    torch.testing.assert_close(boxes[..., :2], states.references[-1], rtol=1e-4, atol=1e-4)
    assert torch.equal(boxes[..., 2:], torch.full_like(boxes[..., 2:], 0.5))
    assert build().class_embed.bias.abs().max() < 0.5


# ---- padding ----


@pytest.mark.parametrize("detector", DETECTORS)
def test_padded_false_equals_an_empty_mask(detector: str) -> None:
    model = build("--detector", detector).eval()
    samples = make_batch([(64, 96)] * 2)
    assert samples.padded is False
    masked = NestedTensor(samples.tensors, samples.mask, padded=True)
    for name in ("pred_logits", "pred_boxes"):
        torch.testing.assert_close(model(samples)[name], model(masked)[name], rtol=1e-5, atol=1e-5)


class PatchBackbone(nn.Module):
    """A backbone whose cells read only their own pixels. A convolutional one also reads across the padding's border."""

    def __init__(self, maps: list[tuple[int, int]]) -> None:
        super().__init__()
        self.convs = nn.ModuleList(
            nn.Conv2d(3, channels, kernel_size=stride, stride=stride) for channels, stride in maps
        )

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return {str(i): conv(images) for i, conv in enumerate(self.convs)}


@pytest.mark.parametrize("positions", ["sine", "sine_shifted"])
@pytest.mark.parametrize("detector", DETECTORS)
def test_padding_does_not_change_outputs(detector: str, positions: str) -> None:
    """An image has the same outputs alone and next to a larger one, with a backbone that does not read padding.

    That covers positional encodings, attention masks and boxes.
    """
    model = build(
        "--detector", detector, "--position_embedding", positions, "--enc_layers", "2"
    ).eval()
    backbone = model.backbone[0]
    maps = list(zip(backbone.num_channels, backbone.strides, strict=True))
    backbone.body = PatchBackbone(maps)
    for module in model.modules():
        if isinstance(module, nn.GroupNorm):
            # Switched off: as published, its statistics are those of the padded map.
            module.forward = lambda x: x
        if isinstance(module, MLP):
            # Box heads of two detectors start at zero, where all boxes are alike.
            nn.init.normal_(module.layers[-1].weight, std=0.3)
    small, large = make_batch(1, seed=1).tensors[0], make_batch([(128, 192)], seed=2).tensors[0]
    alone, together = model([small]), model([small, large])
    assert as_nested_tensor([small, large]).padded is True
    for name in ("pred_logits", "pred_boxes"):
        torch.testing.assert_close(together[name][:1], alone[name], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(together[name][1:], model([large])[name], rtol=1e-4, atol=1e-5)
    no_mask = torch.zeros(2, 128, 192, dtype=torch.bool)
    unmasked = model(NestedTensor(as_nested_tensor([small, large]).tensors, no_mask))
    assert not torch.allclose(unmasked["pred_boxes"][:1], alone["pred_boxes"], atol=1e-3)


def test_mask_is_resized_by_floor() -> None:
    """80 columns, 64 of them valid, resized to 3: columns 0, 26 and 53 are read, all of them valid."""
    mask = torch.zeros(1, 32, 80, dtype=torch.bool)
    mask[..., 64:] = True
    assert not resize_mask(mask, (1, 3)).any()
    assert resize_mask(mask, (1, 5))[0, 0].tolist() == [False] * 4 + [True]


# ---- positions ----


def test_sine_positions_from_the_formula() -> None:
    mask = torch.zeros(1, 3, 4, dtype=torch.bool)
    mask[..., 3:] = True
    for name, shift in (("sine", 0.0), ("sine_shifted", 0.5)):
        encoding = POSITION_ENCODINGS[name](8)(mask)
        assert encoding.shape == (1, 8, 3, 4)
        y = (2 - shift) / 3 * 2 * torch.pi  # second row of three
        x = (1 - shift) / 3 * 2 * torch.pi  # first column of three valid ones
        expected = [
            f(torch.tensor(v / t))
            for v in (y, x)
            for t in (1.0, 10000**0.5)
            for f in (torch.sin, torch.cos)
        ]
        torch.testing.assert_close(
            encoding[0, :, 1, 0], torch.stack(expected), rtol=1e-4, atol=1e-4
        )


def test_sine_embedding_of_points_has_y_first() -> None:
    embedding = sine_embed_points(torch.tensor([[0.25, 0.0]]), 8)  # x = 1/4, y = 0
    torch.testing.assert_close(embedding[0, :4], torch.tensor([0.0, 1.0, 0.0, 1.0]))
    assert float(embedding[0, 4]) == pytest.approx(1.0)


def test_learned_positions_have_x_first_and_a_limit() -> None:
    encoding = POSITION_ENCODINGS["learned"](8)
    out = encoding(torch.zeros(2, 3, 5, dtype=torch.bool))
    assert torch.equal(out[1, :4, 2, 3], encoding.col_embed.weight[3])
    assert torch.equal(out[1, 4:, 2, 3], encoding.row_embed.weight[2])
    with pytest.raises(UserError, match="3 x 51.*--image_size"):
        encoding(torch.zeros(1, 3, 51, dtype=torch.bool))


# ---- precision ----


@pytest.mark.parametrize("detector", DETECTORS)
def test_bfloat16_keeps_heads_boxes_and_losses_in_float32(detector: str) -> None:
    torch.manual_seed(0)
    model, criterion, _ = build_model(tiny_args(FINETUNE, "--detector", detector, "--dropout", "0"))
    encoder_dtypes = []
    model.transformer.encoder.layers[0].linear1.register_forward_hook(
        lambda module, inputs, output: encoder_dtypes.append(output.dtype)
    )
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model(make_batch())
    assert encoder_dtypes == [torch.bfloat16]
    for layer in (outputs, *outputs["aux_outputs"]):
        assert layer["pred_boxes"].dtype == layer["pred_logits"].dtype == torch.float32
    losses = criterion(outputs, make_targets([2, 1]))
    assert {loss.dtype for loss in losses.values()} == {torch.float32}
    criterion.total_loss(losses).backward()
    assert all(
        torch.isfinite(p.grad).all() and p.grad.dtype == torch.float32
        for p in model.parameters()
        if p.grad is not None
    )
    plain = model(make_batch())
    torch.testing.assert_close(outputs["pred_boxes"], plain["pred_boxes"], rtol=0.1, atol=0.05)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "flags",
    [*([name] for name in DETECTORS), ["deformable_detr", "--with_box_refine", "--two_stage"]],
    ids=" ".join,
)
def test_model_in_half_precision(flags: list[str], dtype: torch.dtype) -> None:
    """For inference: `model.half()` takes half-precision images, and its boxes are close to the float32 ones."""
    model = build("--detector", *flags).eval()
    images = make_batch()
    with torch.no_grad():
        expected = model(images)
        found = model.to(dtype)(NestedTensor(images.tensors.to(dtype), images.mask))
    if "--two_stage" not in flags:  # rounding changes which proposals are selected
        torch.testing.assert_close(
            found["pred_boxes"].float(), expected["pred_boxes"], rtol=0, atol=0.05
        )
    results = PostProcess(model.classification)(found, torch.tensor([[64, 64]] * 2))
    assert all(
        result["boxes"].isfinite().all() and result["scores"].dtype == torch.float32
        for result in results
    )


# ---- trainable parts ----


@pytest.mark.parametrize("detector", DETECTORS)
def test_stem_and_first_stage_never_train(detector: str) -> None:
    torch.manual_seed(0)
    model, criterion, _ = build_model(
        tiny_args(FINETUNE, "--detector", detector, "--backbone_norm", "frozen", "--dropout", "0")
    )
    criterion.total_loss(criterion(model(make_batch()), make_targets([2, 1]))).backward()
    for name, parameter in model.named_parameters():
        early = name.startswith("backbone.") and not any(
            stage in name for stage in ("layer2", "layer3", "layer4")
        )
        assert parameter.requires_grad is not early, name
        assert (parameter.grad is None) is early, name
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.train()(make_batch(seed=1))
    assert all(torch.equal(before[name], buffer) for name, buffer in model.named_buffers())


def test_lr_backbone_0_freezes_the_backbone() -> None:
    model = build("--lr_backbone", "0", "--backbone_norm", "frozen")
    assert model.backbone[0].frozen
    assert all(p.requires_grad for name, p in model.named_parameters() if "backbone" not in name)


def test_random_weights_train_with_live_batch_norm() -> None:
    model = build()
    norms = [module for module in model.backbone.modules() if isinstance(module, nn.BatchNorm2d)]
    assert len(norms) == 20
    assert all(p.requires_grad for p in model.backbone.parameters())
    before = norms[0].running_mean.clone()
    model.eval()(make_batch())
    assert torch.equal(norms[0].running_mean, before)
    model.train()(make_batch())
    assert not torch.equal(norms[0].running_mean, before)


def test_live_and_frozen_batch_norm_have_the_same_names() -> None:
    live, frozen = build(), build("--backbone_norm", "frozen")
    assert {k: v.shape for k, v in live.state_dict().items()} == {
        k: v.shape for k, v in frozen.state_dict().items()
    }
    frozen.load_state_dict(live.state_dict(), strict=True)
    a, b = LiveBatchNorm2d(4).eval(), FrozenBatchNorm2d(4)
    a.load_state_dict(
        {
            "weight": torch.rand(4),
            "bias": torch.rand(4),
            "running_mean": torch.rand(4),
            "running_var": torch.rand(4),
        }
    )
    b.load_state_dict(a.state_dict())
    images = torch.randn(2, 4, 5, 5)
    torch.testing.assert_close(a(images), b(images))
    torch.testing.assert_close(
        live.eval()(make_batch())["pred_boxes"],
        frozen.eval()(make_batch())["pred_boxes"],
        rtol=1e-4,
        atol=1e-4,
    )


@pytest.mark.parametrize(
    ("name", "frozen_until"), [("tf_efficientnet_lite0", "blocks_2"), ("resnet18", "layer2")]
)
def test_timm_backbone(name: str, frozen_until: str) -> None:
    """Strides and channels as reported, norms frozen, and layers before stride 8 never train, as in a ResNet."""
    pytest.importorskip("timm", reason="timm is an extra")
    backbone = Backbone(f"timm:{name}", stages=(2, 3, 4))
    maps = backbone(torch.randn(1, 3, 64, 96))
    assert backbone.strides == [8, 16, 32]
    reported = zip(backbone.num_channels, backbone.strides, strict=True)
    assert [tuple(x.shape[1:]) for x in maps] == [
        (channels, 64 // stride, 96 // stride) for channels, stride in reported
    ]
    assert not any(isinstance(module, nn.BatchNorm2d) for module in backbone.modules())
    names = [key for key, _ in backbone.body.named_parameters()]
    first = next(i for i, key in enumerate(names) if key.replace(".", "_").startswith(frozen_until))
    trainable = [p.requires_grad for p in backbone.body.parameters()]
    assert trainable == [i >= first for i in range(len(names))]
    assert 0 < first < len(names)
    dilated = Backbone(f"timm:{name}", dilation=True)
    assert dilated.strides == [16]
    assert dilated(torch.randn(1, 3, 64, 64))[0].shape[-2:] == (4, 4)


@pytest.mark.parametrize("detector", DETECTORS)
def test_detector_on_a_timm_backbone(detector: str) -> None:
    pytest.importorskip("timm", reason="timm is an extra")
    model = build("--detector", detector, "--backbone", "timm:tf_efficientnet_lite0")
    check_layer(model.eval()(make_batch([(64, 64), (96, 64)])), 2, QUERIES, num_outputs(model))
    assert model.backbone[0].mean == (0.5, 0.5, 0.5)
    # Random weights get live norms.
    assert any(isinstance(module, nn.BatchNorm2d) for module in model.backbone.modules())


def test_unknown_timm_backbone() -> None:
    pytest.importorskip("timm", reason="timm is an extra")
    with pytest.raises(UserError, match="--backbone timm:no_such_net"):
        Backbone("timm:no_such_net")


# ---- post-processing ----


def test_softmax_gives_each_query_its_best_class() -> None:
    logits = torch.tensor([[[0.0, 2.0, 5.0], [1.0, 0.0, -1.0]]])  # two classes and "no object"
    boxes = torch.tensor([[[0.5, 0.5, 0.2, 0.4], [0.1, 0.2, 0.2, 0.2]]])
    result = PostProcess(Classification("softmax", 2, cost_class=1.0))(
        {"pred_logits": logits, "pred_boxes": boxes}, torch.tensor([[100, 200]])
    )[0]
    assert result["labels"].tolist() == [1, 0]
    torch.testing.assert_close(
        result["scores"], torch.stack([logits[0, 0].softmax(0)[1], logits[0, 1].softmax(0)[0]])
    )
    torch.testing.assert_close(
        result["boxes"], torch.tensor([[80.0, 30.0, 120.0, 70.0], [0.0, 10.0, 40.0, 30.0]])
    )


def test_focal_gives_the_best_query_class_pairs() -> None:
    logits = torch.tensor([[[0.0, 3.0], [2.0, 1.0], [-1.0, -2.0]]])
    boxes = torch.tensor([[[0.5, 0.5, 1.0, 1.0], [0.25, 0.25, 0.5, 0.5], [0.75, 0.75, 0.5, 0.5]]])
    outputs = {"pred_logits": logits, "pred_boxes": boxes}
    result = PostProcess(Classification("focal", 2, cost_class=1.0), top_k=4)(
        outputs, torch.tensor([[10, 20]])
    )[0]
    assert result["labels"].tolist() == [1, 0, 1, 0]
    torch.testing.assert_close(result["scores"], torch.tensor([3.0, 2.0, 1.0, 0.0]).sigmoid())
    assert result["boxes"].tolist() == [
        [0, 0, 20, 10],
        [0, 0, 10, 5],
        [0, 0, 10, 5],
        [0, 0, 20, 10],
    ]


def test_few_queries_give_fewer_results_than_top_k() -> None:
    outputs = {"pred_logits": torch.randn(1, 3, 2), "pred_boxes": torch.rand(1, 3, 4)}
    postprocess = PostProcess(Classification("focal", 2, cost_class=1.0))
    result = postprocess(outputs, torch.tensor([[9, 9]]))[0]
    assert len(result["scores"]) == 6  # 3 queries x 2 classes


def attention_modules(model: Detector) -> dict[str, nn.Module]:
    encoder, decoder = model.transformer.encoder.layers[-1], model.transformer.decoder.layers[-1]
    cross = decoder.multihead_attn if hasattr(decoder, "multihead_attn") else decoder.cross_attn
    return {"encoder": encoder.self_attn, "decoder": decoder.self_attn, "cross": cross}


@pytest.mark.parametrize("detector", DETECTORS)
def test_forward_hooks_get_attention_weights(detector: str) -> None:
    """Published code reads attention maps by `output[1]`; outputs of the model stay the same."""
    model = build("--detector", detector).eval()
    batch = make_batch([(64, 96), (48, 64)])  # the second image is padded
    with torch.no_grad():
        expected = model(batch)
        maps = {}
        for name, module in attention_modules(model).items():
            module.register_forward_hook(
                lambda _module, _inputs, output, name=name: maps.update({name: output[1]})
            )
        outputs = model(batch)
    assert torch.equal(outputs["pred_logits"], expected["pred_logits"])

    assert maps["decoder"].shape == (2, QUERIES, QUERIES)
    if detector == "deformable_detr":  # of the sampled points: heads, levels, points
        sums = {name: maps[name].sum((-1, -2)) for name in ("encoder", "cross")}
        assert maps["cross"].shape[:2] == (2, QUERIES)
    else:
        assert maps["encoder"].shape == (2, 6, 6)
        assert maps["cross"].shape == (2, QUERIES, 6)
        assert not maps["cross"][1, :, 2::3].any(), "the third column of the map is padding"
        sums = {name: maps[name].sum(-1) for name in ("encoder", "cross")}
    for total in (*sums.values(), maps["decoder"].sum(-1)):
        torch.testing.assert_close(total, torch.ones_like(total))


def test_hooked_weights_are_those_of_pytorch() -> None:
    torch.manual_seed(0)
    ours, theirs = MultiheadAttention(8, 2), nn.MultiheadAttention(8, 2, batch_first=True)
    theirs.load_state_dict(ours.state_dict())
    query, key, padding = torch.rand(2, 3, 8), torch.rand(2, 4, 8), torch.zeros(2, 4).bool()
    padding[1, 2:] = True
    seen = []
    ours.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    out = ours(query, key, key, padding)
    expected, weights = theirs(query, key, key, key_padding_mask=padding)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(seen[0][1], weights)


def test_tracing_deformable_detr_is_refused() -> None:
    """A trace has the map sizes as constants, and gives wrong outputs at other sizes."""
    model = build("--detector", "deformable_detr", "--no_aux_loss").eval()
    with pytest.raises(UserError, match=r"torch\.jit\.trace.*tools/export\.py"):
        torch.jit.trace(model, torch.rand(1, 3, 64, 64), strict=False)


def test_torchscript_is_refused_and_export_works() -> None:
    """As published, DETR's model and its transformer could be scripted."""
    for detector in reversed(DETECTORS):
        model = build("--detector", detector).eval()
        for module in (model, model.transformer):
            with pytest.raises(UserError, match=r"export with tools/export\.py"):
                torch.jit.script(module)
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        exported = torch.export.export(model, (images,)).module()(images)
        torch.testing.assert_close(exported["pred_boxes"], model(images)["pred_boxes"])


def test_parser_of_pre_training_gives_a_pretext_and_says_so() -> None:
    """In DETR's codebase `main.get_args_parser` is the parser of a detector."""
    flags = [
        "--backbone",
        "resnet18",
        "--backbone_weights",
        "none",
        "--device",
        "cpu",
        "--num_queries",
        "20",
    ]
    with captured_log() as lines, torch.device("meta"):
        build_model(main.get_args_parser().parse_args(flags))
    assert any("builds the pretext random_query_patch" in line for line in lines)
    with captured_log() as lines, torch.device("meta"):
        build_model(finetune_main.get_args_parser().parse_args(flags))
        build_model(main.get_args_parser().parse_args([*flags, "--pretext", "region_prior"]))
    assert not any("builds the pretext" in line for line in lines)


# ---- a backbone whose maps are the same in every step ----


def test_a_backbone_that_trains_updates_or_draws_is_not_constant() -> None:
    assert Backbone("resnet18", trainable=False).constant
    assert not Backbone("resnet18").constant
    assert not Backbone("resnet18", "live", trainable=False).constant  # updates its statistics
    dropping = Backbone("resnet18", trainable=False)
    dropping.body.layer4.add_module("drop", nn.Dropout(0.1))
    assert not dropping.constant


def test_maps_computed_ahead_serve_their_images_once() -> None:
    backbone = Backbone("resnet18", trainable=False)
    images, others = make_batch(seed=1).tensors, make_batch(seed=2).tensors
    backbone.compute_ahead(images)
    ahead = backbone._ahead[1]
    assert backbone.maps(images[:]) is ahead  # another tensor with the same memory
    assert backbone.maps(images) is not ahead
    backbone.compute_ahead(images)
    assert torch.equal(backbone.maps(others)[-1], backbone(others)[-1])
    assert backbone._ahead is None
