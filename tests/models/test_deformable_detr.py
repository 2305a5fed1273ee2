"""Deformable DETR: variants, parameter names, initial values, levels, masks, proposals and training."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import models.deformable_transformer as blocks
from models import build_model
from models.criterion import SetCriterion
from models.deformable_detr import DeformableDETR
from models.detector import Queries
from tests.deform_cases import plain_from_samples
from tests.tiny import assert_same, make_batch, make_targets, tiny_args
from util.errors import UserError
from util.runs.optimizer import parameter_groups
from util.settings import FINETUNE, PRETRAIN, make_parser, resolve

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
VARIANTS = ([], ["--with_box_refine"], ["--two_stage"], ["--two_stage", "--with_box_refine"])
variants = pytest.mark.parametrize("flags", VARIANTS, ids=lambda flags: " ".join(flags) or "plain")
QUERIES = 20


def build(*flags: str, seed: int = 0) -> tuple[DeformableDETR, SetCriterion]:
    torch.manual_seed(seed)
    model, criterion, _ = build_model(tiny_args(FINETUNE, "--detector", "deformable_detr", *flags))
    return model, criterion


def at_published_size(*flags: str) -> nn.Module:
    backbone_flags = ("--backbone_weights", "none", "--backbone_norm", "frozen")
    args = make_parser(FINETUNE).parse_args(
        ["--detector", "deformable_detr", *backbone_flags, *flags]
    )
    with torch.device("meta"):
        return build_model(resolve(args))[0]


# ---- names and sizes ----


@pytest.mark.parametrize(
    ("flags", "keys", "trainable"),
    [
        ([], 561, 39_847_265),
        (["--with_box_refine"], 597, 40_627_260),
        (["--with_box_refine", "--two_stage"], 630, 40_959_129),
        (["--num_feature_levels", "1"], 549, 33_844_193),
        (["--num_feature_levels", "1", "--dilation"], 549, 33_844_193),
    ],
    ids=str,
)
def test_published_sizes(flags: list[str], keys: int, trainable: int) -> None:
    model = at_published_size(*flags)
    assert len(model.state_dict()) == keys
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == trainable


@pytest.mark.parametrize(
    ("case", "flags"),
    [
        ("ss", ["--num_feature_levels", "1"]),
        ("ms", []),
        ("refine", ["--with_box_refine"]),
        ("twostage", ["--with_box_refine", "--two_stage"]),
    ],
)
def test_names_shapes_and_order_are_the_published_ones(case: str, flags: list[str]) -> None:
    """Order matters: a published optimizer state addresses parameters by index."""
    golden = json.loads((GOLDEN / f"deform_r50_{case}.json").read_text())
    model = at_published_size(*flags, "--num_queries", str(golden["args"]["num_queries"]))
    published = [(key, entry["shape"]) for key, entry in golden["state_dict"].items()]
    assert [(key, list(value.shape)) for key, value in model.state_dict().items()] == published
    assert [name for name, p in model.named_parameters() if p.requires_grad] == golden["grad_names"]


@variants
def test_state_dict_lists_aliases_and_loads_both_ways(flags: list[str]) -> None:
    model, other = build(*flags)[0].eval(), build(*flags, seed=1)[0].eval()
    # Clones, as from a file: aliases share no storage.
    state = {key: value.clone() for key, value in model.state_dict().items()}
    refine, two_stage = "--with_box_refine" in flags, "--two_stage" in flags
    assert ("transformer.decoder.bbox_embed.0.layers.0.weight" in state) is refine
    assert ("transformer.decoder.class_embed.0.weight" in state) is two_stage
    assert ("query_embed.weight" in state) is not two_stage
    # Heads 0 and 1 belong to decoder layers, head 2 to the encoder proposals.
    assert ("class_embed.2.weight" in state) is two_stage
    with torch.no_grad():
        assert not torch.equal(model(make_batch())["pred_boxes"], other(make_batch())["pred_boxes"])
        other.load_state_dict(state, strict=True)
        assert torch.equal(model(make_batch())["pred_boxes"], other(make_batch())["pred_boxes"])
    assert (other.bbox_embed[0] is other.bbox_embed[1]) is not refine
    assert_same(dict(other.state_dict()), state)


# ---- initial values ----


def test_initial_values() -> None:
    model, _ = build("--enc_layers", "2")
    transformer = model.transformer
    first, second = transformer.encoder.layers
    for attention in (first.self_attn, transformer.decoder.layers[1].cross_attn):
        assert not attention.sampling_offsets.weight.any()
        assert not attention.attention_weights.weight.any()
        assert not attention.attention_weights.bias.any()
        assert not attention.value_proj.bias.any()
        bias = attention.sampling_offsets.bias.detach()
        offsets = bias.view(4, 4, 4, 2)  # heads, levels, points, (x, y)
        directions = torch.tensor([(1.0, 0.0), (0.0, 1.0), (-1.0, 0.0), (0.0, -1.0)])
        expected = directions[:, None, None] * torch.arange(1.0, 5)[:, None]
        torch.testing.assert_close(offsets, expected.expand(4, 4, 4, 2), rtol=0, atol=1e-6)
    assert torch.equal(first.linear1.bias, second.linear1.bias)
    assert not torch.equal(first.linear1.weight, second.linear1.weight)
    assert not transformer.reference_points.bias.any()
    assert 0.5 < float(transformer.level_embed.detach().std()) < 1.5
    assert not model.input_proj[3][0].bias.any()
    assert model.class_embed[0].bias.sigmoid().tolist() == pytest.approx([0.01] * 91)


@pytest.mark.parametrize(
    ("flags", "sizes"),
    [
        ([], [-2.0, -2.0]),
        (["--with_box_refine"], [-2.0, 0.0]),
        (["--two_stage"], [0.0, 0.0, 0.0]),
        (["--two_stage", "--with_box_refine"], [0.0, 0.0, 0.0]),
    ],
    ids=str,
)
def test_boxes_start_small_at_their_reference(flags: list[str], sizes: list[float]) -> None:
    model, _ = build(*flags)
    assert len(model.bbox_embed) == len(model.class_embed) == len(sizes)
    for head, size in zip(model.bbox_embed, sizes, strict=True):
        assert not head.layers[-1].weight.any()
        assert head.layers[-1].bias.tolist() == [0.0, 0.0, size, size]


# ---- levels ----


@pytest.mark.parametrize("levels", [1, 2, 3, 4, 5])
def test_any_number_of_levels(levels: int) -> None:
    model, criterion = build("--num_feature_levels", str(levels))
    samples, targets = make_batch([(64, 96), (128, 64)]), make_targets([2, 0])
    maps = [(16, 12), (8, 6), (4, 3), (2, 2), (1, 1)]  # strides 8, 16, 32, 64, 128
    # Up to three levels are the last maps of the backbone.
    expected = {1: maps[2:3], 2: maps[1:3]}.get(levels, maps[:levels])
    memory = model.encode(samples)
    assert memory.shapes == expected
    assert memory.tokens.shape == (2, sum(h * w for h, w in expected), 32)
    assert memory.sizes_wh.tolist() == [[w, h] for h, w in expected]
    losses = criterion(model(samples), targets)
    criterion.total_loss(losses).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
    assert all(float(p[0].weight.grad.abs().sum()) > 0 for p in model.input_proj)


def test_masks_and_valid_ratios_of_every_level() -> None:
    """The second image fills 64 of 128 rows and 128 of 192 columns."""
    model, _ = build()
    memory = model.encode(make_batch([(128, 192), (64, 128)]))
    assert memory.shapes == [(16, 24), (8, 12), (4, 6), (2, 3)]
    assert memory.valid_sizes_wh[1].tolist() == [[16, 8], [8, 4], [4, 2], [2, 1]]
    torch.testing.assert_close(
        memory.valid_ratios, torch.tensor([[[1.0, 1.0]] * 4, [[2 / 3, 0.5]] * 4])
    )
    masks = memory.padding_mask.split([h * w for h, w in memory.shapes], 1)
    for (height, width), mask in zip(memory.shapes, masks, strict=True):
        assert not mask[0].any()
        valid = ~mask[1].view(height, width)
        assert valid[: height // 2, : width * 2 // 3].all()
        assert valid.sum() == height // 2 * (width * 2 // 3)


def test_attention_does_not_read_padding() -> None:
    model, _ = build()
    model.eval()
    memory = model.encode(make_batch([(128, 192), (64, 128)]))
    attention = model.transformer.encoder.layers[0].self_attn
    references = torch.rand(2, QUERIES, 4, 2)
    query = torch.randn(2, QUERIES, 32)
    changed = memory.tokens + memory.padding_mask[..., None] * 100.0
    before = attention(query, references, memory.tokens, memory)
    after = attention(query, references, changed, memory)
    assert torch.equal(before, after)
    assert not torch.allclose(before, attention(query, references, memory.tokens + 1, memory))


@pytest.mark.parametrize("flags", [*VARIANTS, ["--num_feature_levels", "2"]], ids=str)
def test_padding_does_not_change_outputs(flags: list[str]) -> None:
    """An image has the same outputs alone and next to a larger one, with a backbone that does not read padding.

    References, valid ratios, proposals and boxes are relative to the image without its padding.
    """
    model, _ = build(*flags, "--num_queries", "8", "--hidden_dim", "64")
    model.eval()
    model.backbone[0].body = PooledBackbone(
        model.backbone[0].strides, model.backbone[0].num_channels
    )
    for module in model.modules():
        if isinstance(module, nn.GroupNorm):
            module.forward = lambda x: x
    for head in model.bbox_embed:
        nn.init.normal_(head.layers[-1].weight, std=0.3)
    small, large = make_batch(1, seed=1).tensors[0], make_batch([(128, 192)], seed=2).tensors[0]
    with torch.no_grad():
        alone, together = model([small]), model([small, large])
    for name in ("pred_logits", "pred_boxes"):
        torch.testing.assert_close(together[name][:1], alone[name], rtol=1e-4, atol=1e-5)
    assert float(alone["pred_boxes"].std()) > 0.05


class PooledBackbone(nn.Module):
    """A backbone whose cells read only their own pixels."""

    def __init__(self, strides: list[int], channels: list[int]) -> None:
        super().__init__()
        self.strides = strides
        generator = torch.Generator().manual_seed(0)
        self.weights = [torch.randn(width, 3, generator=generator) for width in channels]

    def forward(self, images: Tensor) -> list[Tensor]:
        maps = [nn.functional.avg_pool2d(images, stride) * stride for stride in self.strides]
        return [
            torch.einsum("bchw,dc->bdhw", x, weight)
            for x, weight in zip(maps, self.weights, strict=True)
        ]


# ---- decoder ----


@variants
def test_references_are_the_boxes_of_the_layer_before(flags: list[str]) -> None:
    model, _ = build(*flags, "--dec_layers", "3")
    model.eval()
    for head in model.bbox_embed:
        nn.init.normal_(head.layers[-1].weight, std=0.3)
    states = model.decode(model.encode(make_batch()))
    outputs = model.predict(states)
    if "--two_stage" in flags:
        expected = [4, 4, 4]
    elif "--with_box_refine" in flags:
        expected = [2, 4, 4]
    else:
        expected = [2, 2, 2]
    assert [x.shape[-1] for x in states.references] == expected
    boxes = [layer["pred_boxes"] for layer in (*outputs["aux_outputs"], outputs)]
    for layer, references in enumerate(states.references[1:]):
        assert not references.requires_grad or "--with_box_refine" not in flags
        if "--with_box_refine" in flags:
            torch.testing.assert_close(references, boxes[layer].detach())
        else:
            assert torch.equal(references, states.references[0])


def test_each_layer_learns_from_its_own_boxes() -> None:
    model, _ = build("--with_box_refine")
    model(make_batch())["pred_boxes"].sum().backward()
    assert not model.bbox_embed[0].layers[-1].weight.grad.any()
    assert model.bbox_embed[1].layers[-1].weight.grad.abs().sum() > 0


def test_query_groups_fold_self_attention_only() -> None:
    model, _ = build("--with_box_refine")
    model.eval()
    memory, learned = model.encode(make_batch()), model.learned_queries(2)
    groups = model.predict(model.decode(memory, learned, query_groups=4))
    for group in range(4):
        part = slice(group * 5, group * 5 + 5)
        alone = model.predict(
            model.decode(memory, Queries(learned.position[:, part], learned.content[:, part]))
        )
        torch.testing.assert_close(
            groups["pred_boxes"][:, part], alone["pred_boxes"], rtol=1e-4, atol=1e-5
        )
    assert not torch.allclose(
        groups["pred_logits"],
        model.predict(model.decode(memory, learned))["pred_logits"],
        atol=1e-4,
    )


def test_images_have_independent_queries() -> None:
    """Changing the queries of the second image leaves the first unchanged."""
    model, _ = build()
    model.eval()
    memory, learned = model.encode(make_batch()), model.learned_queries(2)
    position = learned.position.clone()
    position[1] += torch.randn(QUERIES, 32)
    plain, changed = (
        model.decode(memory, Queries(x, learned.content)) for x in (learned.position, position)
    )
    assert torch.equal(plain.layers[:, 0], changed.layers[:, 0])
    assert torch.equal(plain.references[0][0], changed.references[0][0])
    assert not torch.allclose(plain.references[0][1], changed.references[0][1], atol=1e-3)


# ---- two-stage ----


def test_two_stage_selects_the_best_proposals() -> None:
    model, _ = build("--two_stage", "--with_box_refine")
    model.eval()
    nn.init.normal_(model.class_embed[-1].weight)
    memory = model.encode(make_batch([(64, 96), (128, 128)]))
    states = model.decode(memory)
    proposals = states.encoder_proposals
    tokens = memory.tokens.shape[1]
    assert proposals["pred_logits"].shape == (2, tokens, 91)
    assert proposals["pred_boxes"].shape == (2, tokens, 4)
    best = proposals["pred_logits"][..., 0].argsort(1, descending=True)[:, :QUERIES]
    torch.testing.assert_close(
        states.references[0], proposals["pred_boxes"].gather(1, best[..., None].expand(-1, -1, 4))
    )
    assert not states.references[0].requires_grad
    assert (proposals["pred_boxes"][memory.padding_mask] == 1).all()
    valid = blocks.initial_proposals(memory)[1]
    assert (proposals["pred_boxes"][valid] < 1).all()
    assert not valid[memory.padding_mask].any()


def test_initial_proposals_double_with_each_level() -> None:
    """At initialization each cell proposes a box around its center, twice as large on each level."""
    model, _ = build("--two_stage")
    memory = model.encode(make_batch([(128, 128)]))
    boxes = model.decode(memory).encoder_proposals["pred_boxes"][0]
    counts = [h * w for h, w in memory.shapes]
    for level, ((height, width), part) in enumerate(
        zip(memory.shapes, boxes.split(counts), strict=True)
    ):
        grid = part.view(height, width, 4)
        middle = grid[height // 2, width // 2].tolist()
        expected = [
            (width // 2 + 0.5) / width,
            (height // 2 + 0.5) / height,
            0.05 * 2**level,
            0.05 * 2**level,
        ]
        assert middle == pytest.approx(expected, abs=1e-5), level


def test_small_images_have_fewer_proposals_than_queries() -> None:
    model, criterion = build("--two_stage", "--num_queries", "300")
    outputs = model(make_batch([(64, 64)] * 2))
    assert outputs["pred_boxes"].shape == (2, 64 + 16 + 4 + 1, 4)
    assert torch.isfinite(criterion.total_loss(criterion(outputs, make_targets([3, 1]))))


def test_two_stage_has_no_learned_queries() -> None:
    model, _ = build("--two_stage")
    assert model.two_stage is True
    with pytest.raises(ValueError, match="no learned queries"):
        model.learned_queries(2)
    with pytest.raises(ValueError, match="makes its own queries"):
        model.decode(model.encode(make_batch()), Queries(torch.zeros(2, 5, 32)))
    with pytest.raises(UserError, match="--two_stage.*leave it out"):
        build_model(tiny_args(PRETRAIN, "--detector", "deformable_detr", "--two_stage"))


@pytest.mark.parametrize("aux", [[], ["--no_aux_loss"]], ids=["aux", "no aux"])
def test_proposal_losses_ignore_classes(aux: list[str]) -> None:
    model, criterion = build("--two_stage", *aux)
    outputs, targets = model(make_batch()), make_targets([3, 2])
    losses = criterion(outputs, targets)
    weights = {
        name: weight for name, weight in criterion.weight_dict.items() if name.endswith("_enc")
    }
    assert weights == {"loss_ce_enc": 2.0, "loss_bbox_enc": 5.0, "loss_giou_enc": 2.0}
    assert {name for name in losses if name.endswith("_enc")} == {*weights, "cardinality_error_enc"}
    other = [{**target, "labels": target["labels"] * 0 + 7} for target in targets]
    for name in weights:
        assert torch.equal(criterion(outputs, other)[name], losses[name])
    assert not torch.equal(criterion(outputs, other)["loss_ce"], losses["loss_ce"])
    plain = {name: value for name, value in outputs.items() if name != "enc_outputs"}
    decoder = {name: value for name, value in losses.items() if not name.endswith("_enc")}
    assert_same(decoder, dict(criterion(plain, targets)))
    proposals = criterion(
        {**outputs["enc_outputs"]},
        [{**target, "labels": target["labels"] * 0} for target in targets],
    )
    for name in ("loss_ce", "loss_bbox", "loss_giou"):
        assert torch.equal(proposals[name], losses[f"{name}_enc"])
    criterion.total_loss(losses).backward()
    missing = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert missing == []


# ---- backbones and precision ----


@variants
def test_variants_train(flags: list[str]) -> None:
    model, criterion = build(*flags, "--dec_layers", "1")
    losses = criterion(model(make_batch([(64, 96), (96, 64)])), make_targets([0, 0]))
    criterion.total_loss(losses).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name


@pytest.mark.parametrize("levels", [1, 4])
def test_dilated_backbone(levels: int) -> None:
    model, _ = build("--backbone", "resnet50", "--dilation", "--num_feature_levels", str(levels))
    with torch.no_grad():
        memory = model.encode(make_batch([(64, 96)]))
    assert memory.shapes == ([(4, 6)] if levels == 1 else [(8, 12), (4, 6), (4, 6), (2, 3)])


def test_backbone_of_timm() -> None:
    pytest.importorskip("timm")
    model, criterion = build("--backbone", "timm:tf_efficientnet_lite0")
    assert [projection[0].in_channels for projection in model.input_proj] == [40, 112, 320, 320]
    assert model.encode(make_batch([(64, 96)])).shapes == [(8, 12), (4, 6), (2, 3), (1, 2)]
    criterion.total_loss(criterion(model(make_batch()), make_targets([1, 2]))).backward()
    assert all(p.grad is not None for p in model.input_proj.parameters())


@variants
def test_bfloat16(flags: list[str]) -> None:
    """The network runs in bfloat16, boxes and sampling locations in float32."""
    model, criterion = build(*flags, "--dropout", "0")
    model.eval()
    seen = []
    real = blocks.ms_deform_attn
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            blocks,
            "ms_deform_attn",
            lambda *args: seen.append((args[0].dtype, args[2].dtype)) or real(*args),
        )
        with torch.autocast("cpu", torch.bfloat16):
            states = model.decode(model.encode(make_batch()))
            outputs = model.predict(states)
    assert set(seen) == {(torch.bfloat16, torch.float32)}
    assert all(x.dtype == torch.float32 for x in states.references)
    for layer in (outputs, *outputs["aux_outputs"]):
        assert layer["pred_boxes"].dtype == layer["pred_logits"].dtype == torch.float32
    if not flags:  # other variants select or refine by what they predict
        torch.testing.assert_close(
            outputs["pred_boxes"], model(make_batch())["pred_boxes"], rtol=0, atol=0.05
        )
    criterion.total_loss(criterion(outputs, make_targets([2, 1]))).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_export_with_dynamic_batch_size() -> None:
    model = build("--no_aux_loss", "--dec_layers", "1", "--num_feature_levels", "2")[0].eval()
    model.backbone[0].body = PooledBackbone(
        model.backbone[0].strides, model.backbone[0].num_channels
    )
    exported = torch.export.export(
        model, (torch.randn(2, 3, 64, 96),), dynamic_shapes=({0: torch.export.Dim.AUTO},)
    )
    images = torch.randn(3, 3, 64, 96)
    torch.testing.assert_close(exported.module()(images)["pred_boxes"], model(images)["pred_boxes"])


def test_ms_deform_attn_flag_reaches_every_attention() -> None:
    model, _ = build("--ms_deform_attn", "pytorch", "--enc_n_points", "2", "--dec_n_points", "3")
    attentions = [
        module for module in model.modules() if isinstance(module, blocks.DeformableAttention)
    ]
    assert {module.implementation for module in attentions} == {"pytorch"}
    assert [module.num_points for module in attentions] == [2, 3, 3]


# ---- flags ----


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--detector", "detr", "--two_stage"], "--two_stage.*--detector deformable_detr"),
        (
            ["--detector", "conditional_detr", "--num_feature_levels", "4"],
            "--num_feature_levels.*deformable_detr",
        ),
        (["--detector", "deformable_detr", "--pre_norm"], "--pre_norm.*post-norm"),
        (
            ["--detector", "deformable_detr", "--with_box_refine", "--no_aux_loss"],
            "--no_aux_loss.*--with_box_refine",
        ),
        (
            ["--detector", "deformable_detr", "--ms_deform_attn", "triton"],
            "--ms_deform_attn triton",
        ),
    ],
)
def test_conflicting_flags(flags: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        build_model(tiny_args(FINETUNE, *flags))[0](make_batch())


def test_defaults_are_the_published_ones() -> None:
    args = resolve(make_parser(FINETUNE).parse_args(["--detector", "deformable_detr"]))
    expected = {
        "lr": 2e-4,
        "lr_backbone": 2e-5,
        "lr_linear_proj_mult": 0.1,
        "epochs": 50,
        "lr_drop": 40,
        "num_queries": 300,
        "dim_feedforward": 1024,
        "num_feature_levels": 4,
        "enc_n_points": 4,
        "dec_n_points": 4,
        "with_box_refine": False,
        "two_stage": False,
        "save_every": 5,
        "position_embedding": "sine_shifted",
        "classification": "focal",
        "set_cost_class": 2.0,
        "cls_loss_coef": 2.0,
        "batch_size": 2,
        "lr_backbone_names": ["backbone.0"],
        "lr_linear_proj_names": ["reference_points", "sampling_offsets"],
        "sgd": False,
        "ms_deform_attn": "auto",
        "weight_decay": 1e-4,
        "clip_max_norm": 0.1,
    }
    assert {name: getattr(args, name) for name in expected} == expected
    pretext = resolve(make_parser(PRETRAIN).parse_args(["--detector", "deformable_detr"]))
    assert (pretext.lr, pretext.lr_linear_proj_mult) == (1e-4, 1.0)
    assert (pretext.num_queries, pretext.classification) == (300, "softmax")


# ---- optimizer ----


@pytest.mark.parametrize(
    ("flags", "counts"),
    [
        ([], [230, 42, 26]),
        (["--with_box_refine"], [270, 42, 26]),
        (["--with_box_refine", "--two_stage"], [285, 42, 24]),
        (["--num_feature_levels", "1"], [218, 42, 26]),
    ],
    ids=str,
)
def test_three_parameter_groups(flags: list[str], counts: list[int]) -> None:
    model = at_published_size(*flags)
    groups = parameter_groups(
        model, 2e-4, 2e-5, ["backbone.0"], ["reference_points", "sampling_offsets"], 0.1
    )
    assert [len(group["params"]) for group in groups] == counts
    assert [group["lr"] for group in groups] == pytest.approx([2e-4, 2e-5, 2e-5])
    projections = {id(p) for p in groups[2]["params"]}
    assert all(
        ("sampling_offsets" in name or "reference_points" in name) is (id(p) in projections)
        for name, p in model.named_parameters()
    )


def test_learned_positions_follow_the_names_of_the_backbone() -> None:
    model, _ = build("--position_embedding", "learned")
    names = {id(p): name for name, p in model.named_parameters()}
    parts = [
        {names[id(p)].split(".")[1] for p in group["params"] if names[id(p)].startswith("backbone")}
        for group in parameter_groups(model, 1.0, 1.0, ["backbone.0"], ["sampling_offsets"])
    ]
    assert parts == [{"1"}, {"0"}, set()]


# ---- one kernel for softmax, locations and attention ----


def test_encoder_runs_the_fused_kernel_and_equals_the_plain_path(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With the fused kernel's formula in place of the kernel, which `tests/deform_cases.py` compares with it."""
    torch.manual_seed(0)
    model, _ = build("--dropout", "0")
    model.train()
    for module in model.modules():
        if isinstance(module, blocks.DeformableAttention):
            nn.init.normal_(module.attention_weights.weight)
            nn.init.normal_(module.sampling_offsets.weight)
    attention = model.transformer.encoder.layers[0].self_attn
    samples, calls = make_batch([(64, 96), (48, 64)]), []

    def fused(*args) -> Tensor:
        calls.append(args[-1].shape)
        return plain_from_samples(*args)

    def step() -> list[Tensor]:
        model.zero_grad()
        outputs = model(samples)
        (outputs["pred_logits"].square().mean() + outputs["pred_boxes"].sum()).backward()
        return [outputs["pred_boxes"], *(p.grad for p in model.parameters() if p.grad is not None)]

    results = [step()]
    monkeypatch.setattr(blocks, "select_implementation", lambda *_: "triton")
    monkeypatch.setattr(blocks, "ms_deform_attn_fused", fused)
    results.append(step())
    assert len(calls) == len(model.transformer.encoder.layers)
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)

    hook = attention.register_forward_hook(lambda *_: None)  # it reads the weights
    calls.clear()
    step()
    hook.remove()
    assert calls == []
