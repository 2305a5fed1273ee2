"""Every case of a folder of golden files against values of the published implementations."""

from pathlib import Path

import pytest

from tests import golden_data, golden_models, golden_parts, golden_siamese

# Slow in float64. Every case runs in float32; in float64 detr_r50, cond_r50, detr_r50_masks, updetr_r50,
# detreg_deform_refine, detreg_deform (with its optimizer steps), siamese_conditional and siamese_deform_ms stay.
SLOW_IN_FLOAT64 = (
    *("deform_r50_ms", "deform_r50_ss", "deform_r50_refine", "deform_r50_twostage"),
    *("detr_r50_panoptic", "detr_r50_dc5", "detr_r50_prenorm", "detr_r50_learned", "cond_r50_dc5"),
    *("detreg_detr", "updetr_r50_norecon_postnorm", "siamese_vanilla", "siamese_deform_ss"),
)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    folder = Path(metafunc.config.getoption("--golden-dir"))
    names = sorted(path.stem for path in folder.glob("*.npz"))
    data = [name for name in names if name.startswith("data_")]
    siamese = [name for name in names if name.startswith("siamese_")]
    chosen = {
        "model_case": [name for name in names if name not in data + siamese],
        "siamese_case": siamese,
        "data_case": data,
    }
    for fixture, cases in chosen.items():
        if fixture in metafunc.fixturenames:
            is_slow = metafunc.function in (test_float64_and_steps, test_siamese_float64)
            metafunc.parametrize(
                fixture,
                [
                    pytest.param(case, marks=pytest.mark.slow)
                    if is_slow and case in SLOW_IN_FLOAT64
                    else case
                    for case in cases
                ],
            )


@pytest.fixture
def golden_dir(request: pytest.FixtureRequest) -> Path:
    return Path(request.config.getoption("--golden-dir"))


def _skip_unsupported(name: str, folder: Path) -> None:
    reason = golden_models.unsupported(golden_models.load(name, folder)[0])
    if reason:
        pytest.skip(f"{name}: {reason}")


def test_outputs_losses_gradients(model_case: str, golden_dir: Path) -> None:
    _skip_unsupported(model_case, golden_dir)
    golden_models.check_float32(golden_models.build(model_case, golden_dir))


def test_float64_and_steps(model_case: str, golden_dir: Path) -> None:
    _skip_unsupported(model_case, golden_dir)
    case = golden_models.build(model_case, golden_dir)
    if "float64" not in case.meta:
        pytest.skip(f"{model_case}: this case has no float64 run")
    golden_models.check_float64(case, num_steps=3)


@pytest.mark.slow  # the test above has the first three
def test_all_optimizer_steps(model_case: str, golden_dir: Path) -> None:
    _skip_unsupported(model_case, golden_dir)
    case = golden_models.build(model_case, golden_dir)
    if "step_losses" not in case.meta.get("float64", {}):
        pytest.skip(f"{model_case}: this case has no optimizer steps")
    golden_models.check_float64(case)


def test_patch_queries(model_case: str, golden_dir: Path) -> None:
    _skip_unsupported(model_case, golden_dir)
    if "patches0_q32" not in golden_models.load(model_case, golden_dir)[1]:
        pytest.skip(f"{model_case}: no query patches in this case")
    golden_models.check_patch_queries(golden_models.build(model_case, golden_dir))


def test_siamese_outputs_losses_gradients(siamese_case: str, golden_dir: Path) -> None:
    golden_siamese.check_float32(golden_siamese.build(siamese_case, golden_dir))


def test_siamese_float64(siamese_case: str, golden_dir: Path) -> None:
    golden_siamese.check_float64(golden_siamese.build(siamese_case, golden_dir))


def test_siamese_steps(siamese_case: str, golden_dir: Path) -> None:
    if "adamw" not in golden_models.load(siamese_case, golden_dir)[0]:
        pytest.skip(f"{siamese_case}: this case has no optimizer steps")
    golden_siamese.check_steps(golden_siamese.build(siamese_case, golden_dir))


def test_data(data_case: str, golden_dir: Path) -> None:
    checks = [
        checks[data_case]
        for checks in (golden_data.CHECKS, golden_parts.CHECKS, golden_siamese.CHECKS)
        if data_case in checks
    ]
    if not checks:
        pytest.skip(f"{data_case}: its data is not part of this version")
    meta, arrays = golden_models.load(data_case, golden_dir)
    for check in checks:
        check(data_case, meta, arrays, golden_dir)
