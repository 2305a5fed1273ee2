"""Model summary: parameters and multiply-adds equal the published ones, and counting changes nothing."""

import copy

import pytest
import torch
from torch import nn

from models import build_model
from tests.tiny import RUN_FLAGS, captured_log, tiny_args
from util.errors import UserError
from util.runs.model_summary import (
    PUBLISHED,
    count_multiply_adds,
    count_parameters,
    evaluation_size,
    log_model_summary,
    published_figures,
)
from util.settings import FINETUNE, PRETRAIN, make_parser, resolve
from util.settings.registry import DETECTORS, PRETEXTS

CONDITIONAL, DEFORMABLE = ("--detector", "conditional_detr"), ("--detector", "deformable_detr")
REFINE, ONE_LEVEL = (*DEFORMABLE, "--with_box_refine"), (*DEFORMABLE, "--num_feature_levels", "1")


def published_args(*flags: str, script: str = FINETUNE):
    fixed = ["--backbone_weights", "none", "--backbone_norm", "frozen", "--device", "cpu"]
    return resolve(make_parser(script).parse_args([*fixed, *flags]))


def on_meta(args) -> nn.Module:
    """Return the model on the meta device."""
    with torch.device("meta"):
        return build_model(args)[0]


@pytest.mark.parametrize(
    ("flags", "trainable", "total"),
    [
        ((), 41_302_368, 41_524_768),
        (("--dilation",), 41_302_368, 41_524_768),
        (("--backbone", "resnet101"), 60_242_272, 60_464_672),
        (("--position_embedding", "learned"), 41_315_168, 41_537_568),
        (("--pre_norm",), 41_302_880, 41_525_280),
        (("--backbone", "resnet18"), 28_686_688, 28_843_552),
        (CONDITIONAL, 43_196_001, 43_418_401),
        ((*CONDITIONAL, "--backbone", "resnet101"), 62_135_905, 62_358_305),
        (DEFORMABLE, 39_847_265, 40_069_665),
        (REFINE, 40_627_260, 40_849_660),
        ((*REFINE, "--two_stage"), 40_959_129, 41_181_529),
        (ONE_LEVEL, 33_844_193, 34_066_593),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_number_of_parameters_equals_the_published_code(
    flags: tuple, trainable: int, total: int
) -> None:
    assert count_parameters(on_meta(published_args(*flags))) == (total, trainable)


@pytest.mark.parametrize(
    ("flags", "expected", "tolerance"),
    [
        ((), 81.2, 0.02),  # measured with the published code
        # Published figures: means over images of several shapes, hence the larger tolerance.
        (("--dilation",), 187, 0.08),
        (CONDITIONAL, 90, 0.08),
        (DEFORMABLE, 173, 0.08),
        (ONE_LEVEL, 78, 0.08),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_multiply_adds_at_800_by_1066(flags: tuple, expected: float, tolerance: float) -> None:
    detector = on_meta(published_args(*flags))
    assert count_multiply_adds(detector, 800, 1066) / 1e9 == pytest.approx(expected, rel=tolerance)


def test_multiply_adds_of_known_layers() -> None:
    class Layers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convolution, self.linear = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 5)

        def forward(self, samples) -> torch.Tensor:
            grid = torch.zeros(1, 7, 2, 2)
            x = self.convolution(samples.tensors)
            return self.linear(
                nn.functional.grid_sample(x, grid, align_corners=False).flatten(2).transpose(1, 2)
            )

    convolution, sampling, linear = 10 * 12 * 8 * 27, 5 * 8 * 14, 14 * 8 * 5
    assert count_multiply_adds(Layers(), 10, 12) == convolution + sampling + linear


@pytest.mark.parametrize("detector", DETECTORS)
def test_counting_does_not_change_the_network(detector: str) -> None:
    """Weights (tied ones too), training modes and random states stay the same."""
    torch.manual_seed(0)
    model = build_model(tiny_args(FINETUNE, "--detector", detector))[0].train()
    model.backbone.eval()
    before = copy.deepcopy(model.state_dict())
    modes = {name: part.training for name, part in model.named_modules()}
    random_state = torch.get_rng_state()
    assert count_multiply_adds(model, 64, 85) > 1e8
    assert torch.equal(torch.get_rng_state(), random_state)
    assert {name: part.training for name, part in model.named_modules()} == modes
    after = model.state_dict()
    assert list(after) == list(before)
    for name, tensor in after.items():
        assert type(tensor) is torch.Tensor, name
        assert torch.equal(tensor, before[name]), name


def test_published_figures_only_for_published_architectures() -> None:
    assert published_figures(published_args()) == (41, 86)
    assert published_figures(published_args(*CONDITIONAL, "--dilation")) == (44, 195)
    assert published_figures(published_args(*ONE_LEVEL)) == (34, 78)
    for other in (
        ("--num_queries", "50"),
        ("--enc_layers", "3"),
        ("--backbone", "resnet18"),
        ("--pre_norm",),
        ("--hidden_dim", "128"),
    ):
        assert published_figures(published_args(*other)) is None, other
    for more in ("--with_box_refine", "--two_stage"):
        assert published_figures(published_args("--detector", "deformable_detr", more)) is None
    assert {name for name, *_ in PUBLISHED} <= set(DETECTORS)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ((), (800, 1066)),
        (("--image_size", "400"), (400, 533)),
        (("--max_size", "800"), (600, 800)),
        (("--max_size", "1333"), (800, 1066)),
    ],
)
def test_evaluation_size(flags: tuple, expected: tuple) -> None:
    assert evaluation_size(published_args(*flags)) == expected


def test_log_shows_the_model_size() -> None:
    args = published_args()
    with captured_log() as lines:
        summary = log_model_summary(on_meta(args), args)
    text = "\n".join(lines)
    assert "41,524,768 parameters, 41,302,368 trainable" in text
    assert (
        "81.2 G multiply-adds for an image of 800 x 1066 (published: 41 M parameters, 86 G" in text
    )
    assert summary["parameters"] == 41_524_768
    assert summary["multiply_adds_hw"] == [800, 1066]


def test_log_shows_the_kernels() -> None:
    args = published_args(*DEFORMABLE)
    with captured_log() as lines:
        summary = log_model_summary(on_meta(args), args)
    assert summary["kernels"] == {"deformable attention": "pytorch"}
    assert any("deformable attention: pytorch" in line for line in lines)
    args = published_args(*DEFORMABLE, "--ms_deform_attn", "triton")
    with pytest.raises(UserError, match="--ms_deform_attn triton"):
        log_model_summary(on_meta(args), args)


@pytest.mark.parametrize("pretext", PRETEXTS)
def test_pretext_parameters_are_reported_separately(pretext: str) -> None:
    args = resolve(make_parser(PRETRAIN).parse_args([*RUN_FLAGS, "--pretext", pretext]))
    model = build_model(args)[0]
    with captured_log() as lines:
        summary = log_model_summary(model, args)
    assert summary["of_the_pretext"] == summary["parameters"] - count_parameters(model.detector)[0]
    assert summary["multiply_adds"] == count_multiply_adds(
        model.detector, *summary["multiply_adds_hw"]
    )
    assert any(pretext in line for line in lines)


def test_uncountable_multiply_adds_do_not_end_a_run() -> None:
    args = published_args("--position_embedding", "learned", "--dilation")
    with captured_log() as lines:
        summary = log_model_summary(on_meta(args), args)
    assert summary["multiply_adds"] is None
    assert any("not counted" in line and "50 cells" in line for line in lines)
