"""`--teacher_momentum`: the teacher's weights, its targets, and a run that stops and resumes.

test_distributed.py compares two ranks with one.
"""

import shlex
from pathlib import Path

import pytest
import torch

from models import build_model
from models.pretext.momentum_teacher import MomentumTeacher
from tests.models.pretext.test_siamese import FLAGS, build, view_targets
from tests.tiny import (
    FROZEN,
    assert_same,
    fine_tune,
    make_batch,
    pre_train,
    read_checkpoint,
    stop_after,
    tiny_args,
    write_coco,
    write_images,
)
from util.errors import StopRequested, UserError
from util.settings import PRETRAIN
from util.settings.registry import DETECTORS

TRAINED = (
    "--lr_backbone",
    "1e-5",
)  # the backbone trains, except its frozen norms, stem and first stage


def perturb_parameters(model: torch.nn.Module) -> None:
    """Change the trained parameters, as an optimizer step does."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)


def own_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Copy the student's tensors that the teacher has too."""
    return {name: model.state_dict()[name].clone() for name in model.teacher.network.state_dict()}


@pytest.mark.parametrize("detector", DETECTORS)
@pytest.mark.parametrize(
    "backbone",
    [(), TRAINED, ("--backbone_norm", "live", *TRAINED)],
    ids=["frozen", "trained", "live"],
)
def test_initial_teacher_gives_the_targets_of_the_student(detector: str, backbone: tuple) -> None:
    """With equal weights, batch statistics and no dropout nothing differs. No gradient reaches the teacher."""
    batch, targets = make_batch([(64, 64), (64, 96)] * 2), view_targets(4)
    results = []
    for teacher in ((), ("--teacher_momentum", "0.9")):
        model, criterion = build(
            "--detector", detector, "--box_disturbance", "0", *backbone, *teacher
        )
        outputs = model.train()(batch, targets)
        losses = criterion.train()(outputs, targets)
        criterion.total_loss(losses).backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        names = ("projections", "predictions", "target_features")
        results.append(({name: outputs[name].detach() for name in names}, losses, gradients))
    without, with_teacher = results
    assert_same(without, with_teacher)
    assert not outputs["projections"].requires_grad
    assert not outputs["target_features"].requires_grad
    assert not any(
        p.requires_grad or p.grad is not None for p in model.teacher.network.parameters()
    )
    assert not any(
        "teacher" in name for name, _ in [*model.named_parameters(), *model.named_buffers()]
    )


def test_update_follows_equation_1() -> None:
    model, _ = build("--teacher_momentum", "0.8", *TRAINED)
    start = own_weights(model)
    before = {name: p.clone() for name, p in model.teacher.network.named_parameters()}
    perturb_parameters(model)
    for progress, momentum in ((0.0, 0.8), (0.5, 0.9), (1.0, 1.0)):
        model.teacher.network.load_state_dict(start)
        model.after_step(progress)
        teacher = dict(model.teacher.network.named_parameters())
        expected = {
            name: momentum * before[name] + (1 - momentum) * model.get_parameter(name).detach()
            for name in teacher
        }
        torch.testing.assert_close(teacher, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("progress", [0.0, 0.3, 0.9])
def test_momentum_of_0_and_1(progress: float) -> None:
    latest, _ = build("--teacher_momentum", "0")
    constant, _ = build("--teacher_momentum", "1")
    start = own_weights(constant)
    for model in (latest, constant):
        perturb_parameters(model)
        model.after_step(progress)
    assert_same(dict(constant.teacher.network.state_dict()), start)
    if progress == 0:
        assert_same(dict(latest.teacher.network.state_dict()), own_weights(latest))


def test_running_statistics_are_copied_from_the_student() -> None:
    model, _ = build("--teacher_momentum", "0.9", "--backbone_norm", "live", *TRAINED)
    model.train()(make_batch(4), view_targets(4))
    model.after_step(0.0)
    student, teacher = model.state_dict(), model.teacher.network.state_dict()
    statistics = [name for name in teacher if "running" in name or "num_batches" in name]
    assert {name.split(".")[0] for name in statistics} == {"backbone", "enc_head"}
    assert_same(
        {name: teacher[name] for name in statistics}, {name: student[name] for name in statistics}
    )
    assert int(student["enc_head.0.projector.mlp.1.num_batches_tracked"]) == 2, (
        "one pass per view: the teacher's own passes do not count"
    )


def test_targets_come_from_the_teacher() -> None:
    """A changed teacher changes the projections and, if it has a backbone, the crop features; nothing else."""
    batch, targets = make_batch(4), view_targets(4)
    for backbone, others in (((), {"projections"}), (TRAINED, {"projections", "target_features"})):
        model, _ = build("--teacher_momentum", "0.9", "--box_disturbance", "0", *backbone)
        has_backbone = any(
            name.startswith("backbone") for name in model.teacher.network.state_dict()
        )
        assert has_backbone == bool(backbone), "a backbone that does not train is not copied"
        outputs = model.train()(batch, targets)
        for parameter in model.teacher.network.parameters():
            parameter.mul_(1.3)
        changed = model(batch, targets)
        tensors = {name for name, value in outputs.items() if isinstance(value, torch.Tensor)}
        assert {name for name in tensors if not torch.equal(outputs[name], changed[name])} == others
        assert model.teacher.maps is None or model.teacher.maps.tensors == []


def test_teacher_has_no_dropout() -> None:
    model, _ = build("--teacher_momentum", "0.9", "--dropout", "0.5", "--box_disturbance", "0")
    first, second = (model.train()(make_batch(4), view_targets(4)) for _ in range(2))
    assert torch.equal(first["projections"], second["projections"])
    assert not torch.equal(first["predictions"], second["predictions"])


def test_teacher_follows_the_model_to_its_dtype() -> None:
    model, _ = build("--teacher_momentum", "0.9")
    model.double()
    assert {p.dtype for p in model.teacher.network.parameters()} == {torch.float64}
    assert build()[0].frozen_parts() == {}


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (
            ("--pretext", "random_query_patch", "--proposals", "random"),
            "--teacher_momentum has no effect with --pretext random_query_patch",
        ),
        (
            ("--pretext", "region_prior", "--num_patches", "10"),
            "--teacher_momentum has no effect with --pretext region_prior",
        ),
        (("--teacher_momentum", "1.5"), r"--teacher_momentum 1.5 must lie in \[0, 1\]"),
        (("--global_loss_coef", "0"), "--teacher_momentum 0.9 has no target to give"),
    ],
)
def test_conflicting_flags(flags: tuple, said: str) -> None:
    with pytest.raises(UserError, match=said) as error:
        build_model(
            tiny_args(
                PRETRAIN, *FLAGS, "--backbone_norm", "frozen", "--teacher_momentum", "0.9", *flags
            )
        )
    assert "\n" not in str(error.value)


@pytest.mark.slow  # tests/test_resume.py resumes in mid-epoch, tests/test_distributed.py trains a teacher
def test_run_stops_in_mid_epoch_resumes_and_is_fine_tuned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three steps per epoch, two epochs, stopped after the fourth step."""
    images = write_images(tmp_path / "images", count=6)
    flags = [
        *FLAGS,
        *FROZEN,
        "--imagenet_path",
        images,
        *shlex.split("--epochs 2 --lr_drop 1 --lr 1e-2 --teacher_momentum 0.5"),
    ]
    progress_values, update = [], MomentumTeacher.update
    monkeypatch.setattr(
        MomentumTeacher,
        "update",
        lambda self, student, progress: (
            progress_values.append(progress),
            update(self, student, progress),
        ),
    )
    pre_train(*flags, "--output_dir", tmp_path / "whole")
    assert progress_values == pytest.approx([i / 6 for i in range(6)])
    stop_after(monkeypatch, 4)
    with pytest.raises(StopRequested, match="epoch 2, after batch 1 of 3"):
        pre_train(*flags, "--output_dir", tmp_path / "stopped")
    pre_train(*flags, "--output_dir", tmp_path / "stopped", "--resume", "auto")
    whole, resumed = (
        read_checkpoint(tmp_path / name / "checkpoint.pth") for name in ("whole", "stopped")
    )
    for name in ("model", "optimizer", "frozen", "random_states"):
        assert_same(resumed[name], whole[name], name)
    teacher = whole["frozen"]["momentum_teacher"]
    distance = (teacher["query_embed.weight"] - whole["model"]["query_embed.weight"]).abs().max()
    assert 1e-4 < distance < 0.1, "it lags behind"

    fine_tune(
        "--coco_path",
        write_coco(tmp_path / "coco"),
        "--pretrain",
        tmp_path / "whole" / "checkpoint.pth",
        "--dry_run",
    )
    del whole["frozen"]
    torch.save(whole, tmp_path / "without.pth")
    with pytest.raises(UserError, match="lacks the frozen network momentum_teacher"):
        pre_train(*flags, "--resume", tmp_path / "without.pth")
