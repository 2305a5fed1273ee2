"""Training steps, epochs, evaluation, and the files that a run writes."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import engine
import finetune_main
import trainer
from datasets.collate import normalize_images, to_device
from engine import results_to_host
from models import build_model
from tests.tiny import (
    FROZEN,
    RUN_FLAGS,
    assert_same,
    captured_log,
    fine_tune,
    make_batch,
    make_targets,
    pre_train,
    read_checkpoint,
    read_log,
    tiny_args,
    write_coco,
    write_images,
)
from tools import replay
from util.bf16 import AMP_DTYPES
from util.distributed import get_world_size
from util.errors import NonFinite, NonFiniteLoss, UserError
from util.nested_tensor import NestedTensor
from util.packed_targets import PackedTargets
from util.runs.background import copy_to_host
from util.runs.meters import (
    Averages,
    LossReader,
    to_host,
    weight_class_error,
)
from util.runs.nonfinite import Batch, NonFiniteGuard
from util.runs.optimizer import build_optimizer, parameter_groups
from util.runs.session import run_script
from util.settings import FINETUNE, PRETRAIN, make_parser
from util.settings.registry import DETECTORS


@pytest.fixture(scope="module")
def fine_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fine-tuning run of three epochs with two decoder layers, and its data."""
    root = tmp_path_factory.mktemp("fine")
    fine_tune(
        "--coco_path",
        write_coco(root / "coco", empty=(1,)),
        "--output_dir",
        root / "run",
        "--epochs",
        3,
        "--lr_drop",
        2,
        "--save_every",
        3,
        "--eval_every",
        2,
    )
    return root


@pytest.fixture(scope="module")
def pretext_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pretext")
    pre_train(
        "--imagenet_path",
        write_images(root / "unlabelled"),
        "--output_dir",
        root / "run",
        "--epochs",
        1,
        "--feature_recon",
        "--dec_layers",
        "1",
    )
    return root


def build_run(
    *flags: str, script: str = FINETUNE
) -> tuple[trainer.Run, NestedTensor, list[dict[str, Tensor]]]:
    """Return a run without a loader, a batch and its targets."""
    torch.manual_seed(0)
    args = tiny_args(script, "--backbone_norm", "frozen", "--dropout", "0", *flags)
    model, criterion, _ = build_model(args)
    normalization = {"mean": [0.5] * 3, "std": [0.5] * 3}
    run = trainer.build_run(
        args,
        model.train(),
        criterion.train(),
        None,
        torch.device("cpu"),
        folder=None,
        normalization=normalization,
    )
    return run, make_batch(), make_targets([2, 1])


# ---------------------------------------------------------------------------------------------------- one step


@pytest.mark.parametrize("detector", DETECTORS)
@pytest.mark.parametrize("where", ["matched image", "image without objects"])
def test_non_finite_loss_never_reaches_the_optimizer(detector: str, where: str) -> None:
    run, samples, targets = build_run("--detector", detector)
    engine.train_step(run, samples, targets, stop=False)  # so that the optimizer has moments
    weights = {name: value.clone() for name, value in run.model.state_dict().items()}
    moments = {
        name: value.clone()
        for state in run.optimizer.state.values()
        for name, value in state.items()
    }
    if where == "image without objects":
        targets = make_targets([2, 0])
    bad = NestedTensor(samples.tensors.clone(), samples.mask, samples.padded)
    bad.tensors[1, 0, 5, 5] = math.nan
    run.guard.add(Batch(bad, PackedTargets.pack(targets)), is_first=True)
    with captured_log() as lines:
        values, _ = engine.train_step(run, bad, targets, stop=False)
    assert not math.isfinite(values["loss"])
    assert any("step skipped" in line and "[100, 101]" in line for line in lines)
    run.guard.limit = 1
    with pytest.raises(NonFiniteLoss, match=r"--max_nonfinite.*lower --lr"):
        run.guard.check_limit()
    for name, value in run.model.state_dict().items():
        assert torch.equal(value, weights[name]), name
    after = {name: value for state in run.optimizer.state.values() for name, value in state.items()}
    assert_same(after, moments)
    # Training can continue.
    values, _ = engine.train_step(run, samples, make_targets([2, 1]), stop=False)
    assert math.isfinite(values["loss"])


def test_step_lowers_the_loss_and_clips_gradients() -> None:
    run, samples, targets = build_run("--lr", "1e-3", "--clip_max_norm", "0.1")
    history = [engine.train_step(run, samples, targets, stop=False)[0]["loss"] for _ in range(10)]
    assert history[-1] < history[0]
    norm = torch.stack([p.grad.norm() for p in run.model.parameters() if p.grad is not None]).norm()
    assert float(norm) == pytest.approx(0.1, rel=1e-3)
    free, samples, targets = build_run("--clip_max_norm", "0")
    engine.train_step(free, samples, targets, stop=False)
    assert (
        torch.stack([p.grad.norm() for p in free.model.parameters() if p.grad is not None]).norm()
        > 0.2
    )


@pytest.mark.parametrize("counts", [[3, 1], [0, 4]])
def test_accumulated_step_equals_a_larger_batch(counts: list[int]) -> None:
    """Exactly so for focal classification: every loss is a sum over the number of targets of all batches."""
    flags = ("--detector", "conditional_detr", "--sgd", "--lr", "1")
    whole, samples, targets = build_run(*flags)
    targets = make_targets(counts)
    packed = PackedTargets.pack(targets)
    engine.train_step(whole, samples, packed, stop=False)

    run, _, _ = build_run(*flags)
    loader = [
        (
            NestedTensor(samples.tensors[[i]], samples.mask[[i]], False),
            PackedTargets.pack([targets[i]]),
        )
        for i in range(2)
    ]
    norms = []
    for place, images, own in engine.accumulate(loader, 2):
        before = [parameter.clone() for parameter in run.model.parameters()]
        engine.train_step(run, images, own, False, place)
        same = all(map(torch.equal, before, run.model.parameters()))
        assert same is not place.is_last
        norms.append(run.unread_norm)
    assert norms[0] is None
    assert float(norms[1]) == pytest.approx(float(whole.unread_norm), rel=1e-4)
    for ours, expected in zip(run.model.parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-6)


def test_last_accumulated_step_of_an_epoch_may_be_smaller() -> None:
    loader = [(i, PackedTargets({}, {"labels": [i, 1]})) for i in range(5)]
    places = [
        (place.index, place.size, place.mean_targets)
        for place, _, _ in engine.accumulate(loader, 2)
    ]
    assert places == [(0, 2, 1.5), (1, 2, 1.5), (0, 2, 3.5), (1, 2, 3.5), (0, 1, 5.0)]
    assert [place.mean_targets for place, _, _ in engine.accumulate(loader, 1)] == [None] * 5


@pytest.mark.parametrize("clip_max_norm", ["0.1", "0"])
def test_gradient_norm_is_read_one_step_later(clip_max_norm: str) -> None:
    run, samples, targets = build_run("--clip_max_norm", clip_max_norm)
    norms, logged = [], []
    for _ in range(3):
        values, _ = engine.train_step(run, samples, targets, stop=False)
        norms.append(float(run.unread_norm))
        logged.append(values.get("grad_norm"))
    assert logged == [None, *norms[:2]]
    assert len(set(norms)) == 3


def test_progress_line_shows_the_losses_of_every_pretext() -> None:
    """Every loss that a pretext or detector weighs has its place in the line, auxiliary ones aside."""
    weighed = set()
    for script, flags in (
        (PRETRAIN, ("--pretext", "random_query_patch", "--feature_recon")),
        (PRETRAIN, ("--pretext", "region_prior", "--object_embedding_loss")),
        (PRETRAIN, ("--pretext", "siamese")),
        (FINETUNE, ("--masks",)),
    ):
        args = make_parser(script).parse_args([*RUN_FLAGS, *flags])
        with torch.device("meta"):
            weighed |= set(build_model(args)[1].weight_dict)
    names = {re.sub(r"_(\d+|enc)$", "", name) for name in weighed}
    assert names == set(engine.PROGRESS_LOSSES) - {"loss"}


def test_step_does_not_read_image_ids_from_device() -> None:
    """Each read would make the host wait for the backward pass; ids are only needed for error messages."""
    counts = []
    for batch in (2, 4):
        run, _, _ = build_run("--sgd")  # AdamW counts its steps on the host
        calls = []

        class Count(TorchDispatchMode):
            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                calls.append(str(function))  # noqa: B023
                return function(*args, **(kwargs or {}))

        with Count():
            engine.train_step(run, make_batch(batch), make_targets([1] * batch), stop=False)
        counts.append(sum("_local_scalar_dense" in call for call in calls))
    assert counts[0] == counts[1]


@pytest.mark.parametrize("optimizer", [(), ("--sgd",)])
def test_non_finite_gradient_never_reaches_the_optimizer(optimizer: tuple) -> None:
    """The optimizer skips it on the device; the host reads the gradient norm in the next step, and counts it."""
    run, samples, targets = build_run(*optimizer)
    engine.train_step(run, samples, targets, stop=False)
    spoil = run.model.class_embed.bias.register_hook(lambda gradient: gradient * math.inf)
    before = copy_to_host([run.model.state_dict(), run.optimizer.state_dict()])
    engine.train_step(run, samples, targets, stop=False)
    assert_same([run.model.state_dict(), run.optimizer.state_dict()], before)
    assert run.guard.in_a_row == 0  # not known yet
    engine.train_step(run, samples, targets, stop=False)
    assert run.guard.in_a_row == 1
    spoil.remove()
    values, _ = engine.train_step(run, samples, targets, stop=False)
    assert run.guard.in_a_row == 2
    assert "grad_norm" not in values
    engine.train_step(run, samples, targets, stop=False)
    assert run.guard.in_a_row == 0
    assert not torch.equal(before[0]["class_embed.bias"], run.model.class_embed.bias)


def test_float16_gradient_that_is_never_finite_ends_the_run() -> None:
    """Once the scale is below 1, it is no overflow that a lower one would end."""
    run, samples, targets = build_run("--amp", "fp16", "--max_nonfinite", "2")
    run.scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    run.model.class_embed.bias.register_hook(lambda gradient: gradient * math.inf)
    counts = []
    for _ in range(4):
        engine.train_step(run, samples, targets, stop=False)
        counts.append((run.scaler.get_scale(), run.guard.in_a_row))
    assert counts == [(1.0, 0), (0.5, 0), (0.25, 1), (0.125, 2)]
    with pytest.raises(NonFiniteLoss):
        run.guard.check_limit()


def test_step_returns_stop_flag() -> None:
    run, samples, targets = build_run()
    assert engine.train_step(run, samples, targets, stop=True)[1] is True
    assert engine.train_step(run, samples, targets, stop=False)[1] is False


@pytest.mark.parametrize(
    ("script", "amp"), [(FINETUNE, "bf16"), (PRETRAIN, "bf16"), (PRETRAIN, "fp16")]
)
def test_half_precision_step(script: str, amp: str) -> None:
    run, samples, targets = build_run("--amp", amp, script=script)
    assert run.amp is AMP_DTYPES[amp]
    if script == PRETRAIN:
        targets = make_targets([5, 5], patches=5)
    values, _ = engine.train_step(run, samples, targets, stop=False)
    assert all(math.isfinite(value) for value in values.values())
    assert {p.dtype for p in run.model.parameters()} == {torch.float32}


def test_float16_skips_a_step_that_overflows() -> None:
    run, samples, targets = build_run("--amp", "fp16")
    assert run.scaler is not None
    run.scaler = torch.amp.GradScaler("cpu", init_scale=16.0)  # the default overflows by itself
    spoil = run.model.class_embed.bias.register_hook(lambda gradient: gradient * math.inf)
    steps = []
    for step in range(3):
        before = [parameter.clone() for parameter in run.model.parameters()]
        values, _ = engine.train_step(run, samples, targets, stop=False)
        unchanged = all(map(torch.equal, before, run.model.parameters()))
        steps.append((unchanged, run.scaler.get_scale(), "grad_norm" in values))
        if step == 0:
            spoil.remove()
    scale = 8.0  # half of the first one
    assert steps == [(True, scale, False), (False, scale, False), (False, scale, True)]
    assert run.guard.in_a_row == 0  # an overflow of float16 is no error


@pytest.mark.parametrize("norm", [(), ("--pre_norm",)])
def test_encoder_residual_stream_is_float32_under_autocast(norm: tuple) -> None:
    """In pre-norm layers the residual stream keeps the dtype of the input: nothing casts it on the way."""
    run, samples, _ = build_run(*norm)
    given = []
    run.model.transformer.encoder.register_forward_pre_hook(
        lambda module, inputs: given.append(inputs[0].dtype)
    )
    with engine.autocast(torch.device("cpu"), torch.bfloat16):
        run.model(samples)
    assert given == [torch.float32]


def test_optimizer_has_published_parameter_groups() -> None:
    run, _, _ = build_run("--lr", "2e-4", "--lr_backbone", "3e-5", "--weight_decay", "0.01")
    groups = run.optimizer.param_groups
    assert [(group["lr"], group["weight_decay"]) for group in groups] == [
        (2e-4, 0.01),
        (3e-5, 0.01),
    ]
    backbone = {
        id(p) for name, p in run.model.named_parameters() if "backbone" in name and p.requires_grad
    }
    assert {id(p) for p in groups[1]["params"]} == backbone
    assert sum(len(group["params"]) for group in groups) == sum(
        p.requires_grad for p in run.model.parameters()
    )
    frozen, _, _ = build_run("--lr_backbone", "0")
    assert [len(group["params"]) for group in frozen.optimizer.param_groups][1] == 0
    assert build_optimizer(run.model, 1e-4, 1e-5, 0.0).__class__ is torch.optim.AdamW
    assert len(parameter_groups(run.model, 1.0, 1.0)) == 2


def test_images_and_patches_are_normalized_on_device() -> None:
    images = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    patches = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
    target = {
        "labels": torch.ones(2, dtype=torch.int64),
        "boxes": torch.rand(2, 4),
        "patches": patches,
    }
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
    packed = PackedTargets.pack([target, target])
    mask = torch.zeros(2, 8, 8, dtype=torch.bool)
    samples, targets = to_device(
        NestedTensor(images, mask, False), packed, torch.device("cpu"), mean, std
    )
    torch.testing.assert_close(samples.tensors, normalize_images(images, mean, std))
    expected = (patches / 255 - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[
        :, None, None
    ]
    torch.testing.assert_close(targets[1]["patches"], expected)
    assert targets[0]["labels"].dtype == torch.int64


# ---------------------------------------------------------------------------------------------------- epoch averages


def test_averages() -> None:
    averages = Averages()
    averages.add({"a": 1.0, "b": 4.0})
    averages.add({"a": 3.0}, weight=3)
    assert averages.means() == {"a": 2.5, "b": 4.0}
    again = Averages(averages.state())
    again.add({"b": 0.0})
    assert again.means() == {"a": 2.5, "b": 2.0}
    assert averages.means()["b"] == 4.0  # the copy is a copy
    assert averages.merged().means() == averages.means()
    assert Averages().means() == {}


def test_loss_reader_reads_all_losses_at_once() -> None:
    losses = {
        "b": torch.tensor(2.0, requires_grad=True),
        "a": torch.tensor(1.0, dtype=torch.float64),
    }
    assert LossReader(losses).read() == to_host(losses) == {"a": 1.0, "b": 2.0}
    reader = LossReader(losses, (1.0, 0.0))
    reader.read()
    assert reader.flags == [1.0, 0.0]
    assert get_world_size() == 1


def test_logged_values_have_published_names() -> None:
    losses = {"loss_ce": 2.0, "loss_ce_0": 3.0, "class_error": 50.0, "cardinality_error": 4.0}
    assert engine.logged_values(losses, {"loss_ce": 2.0, "loss_ce_0": 1.0}) == {
        "loss_ce_unscaled": 2.0,
        "loss_ce_0_unscaled": 3.0,
        "class_error_unscaled": 50.0,
        "cardinality_error_unscaled": 4.0,
        "loss_ce": 4.0,
        "loss_ce_0": 3.0,
        "loss": 7.0,
        "class_error": 50.0,
    }


def test_class_error_is_averaged_over_matched_pairs() -> None:
    """Batches of four wrong matches, one right match and none: 80 %. Published: the mean over batches, where a batch
    without matches counts as 100 %.
    """
    averages = Averages()
    for error, pairs in ((100.0, 4), (0.0, 1), (100.0, 0)):
        losses = to_host(
            weight_class_error(
                {"loss_ce": torch.tensor(2.0), "class_error": torch.tensor(error)}, pairs
            )
        )
        averages.add(engine.logged_values(losses, {"loss_ce": 1.0}), weight=3)
    expected = {
        "loss_ce_unscaled": 2,
        "loss_ce": 2,
        "loss": 2,
        "class_error": 80,
        "class_error_unscaled": 80,
    }
    assert averages.means() == pytest.approx(expected)
    assert Averages(averages.state()).means() == averages.means()
    published = Averages()
    for error in (100.0, 0.0, 100.0):
        published.add(
            engine.logged_values({"loss_ce": 2.0, "class_error": error}, {"loss_ce": 1.0})
        )
    assert published.means()["class_error"] == pytest.approx(200 / 3)


def test_reproduce_published_averages_class_error_over_batches(tmp_path: Path) -> None:
    """Three of four batches have no objects; as published, each counts as 100 %."""
    coco = write_coco(tmp_path / "coco", train=4, val=1, empty=(0, 1, 2))
    flags = ("--coco_path", coco, "--epochs", 1, "--batch_size", 1, "--lr", 1e-9, *FROZEN)
    for name, extra in (("ours", ()), ("published", ("--reproduce_published",))):
        fine_tune(*flags, *extra, "--output_dir", tmp_path / name)
    ours, published = (
        read_log(tmp_path / name)[0]["train_class_error"] for name in ("ours", "published")
    )
    assert published == pytest.approx((300 + ours) / 4)


# ---------------------------------------------------------------------------------------------------- a whole run


def published_names(prefix: str, losses: tuple[str, ...], suffixes: tuple[str, ...]) -> set[str]:
    names = {f"{name}{suffix}" for name in losses for suffix in suffixes}
    raw = {f"{name}_unscaled" for name in names} | {
        f"cardinality_error{suffix}_unscaled" for suffix in suffixes
    }
    return {
        f"{prefix}_{name}" for name in names | raw | {"loss", "class_error", "class_error_unscaled"}
    }


# Of every epoch in `log.txt`, besides the losses.
RUN_KEYS = {
    "epoch",
    "n_parameters",
    "train_lr",
    "train_grad_norm",
    "train_padding",
    "train_seconds",
}


def test_log_has_published_keys(fine_run: Path) -> None:
    lines = read_log(fine_run / "run")
    losses, suffixes = ("loss_ce", "loss_bbox", "loss_giou"), ("", "_0")
    evaluated = published_names("test", losses, suffixes) | {"test_coco_eval_bbox"}
    assert [line["epoch"] for line in lines] == [0, 1, 2]
    for line in lines:
        expected = (
            published_names("train", losses, suffixes)
            | RUN_KEYS
            | (evaluated if line["epoch"] in (1, 2) else set())
        )
        assert set(line) == expected
    assert [line["train_lr"] for line in lines] == pytest.approx([1e-4, 1e-4, 1e-5])
    assert len(lines[-1]["test_coco_eval_bbox"]) == 12
    model = read_checkpoint(fine_run / "run" / "checkpoint.pth")["model"]
    statistics = sum(value.numel() for key, value in model.items() if "running_" in key)
    assert lines[0]["n_parameters"] == sum(value.numel() for value in model.values()) - statistics
    for line in lines:
        assert line["train_loss"] == pytest.approx(
            sum(line[f"train_{name}{suffix}"] for name in losses for suffix in suffixes)
        )
        assert line["train_loss_bbox"] == pytest.approx(5 * line["train_loss_bbox_unscaled"])


def test_pretext_log_has_published_keys(pretext_run: Path) -> None:
    line = read_log(pretext_run / "run")[0]
    names = published_names("train", ("loss_ce", "loss_bbox", "loss_giou", "loss_feature"), ("",))
    assert set(line) == names | RUN_KEYS
    assert 1 < line["train_loss_feature"] < 3


def test_output_files_of_fine_tuning(fine_run: Path) -> None:
    """`checkpoint0001.pth` is from before the learning rate drop after 2 epochs, `checkpoint0002.pth` from --save_every
    3. No temporary files are left.
    """
    files = {path.name for path in (fine_run / "run").iterdir()}
    assert files - {"best_images.png"} == {  # an untrained model may find nothing
        "analysis.json",
        "args.json",
        "checkpoint.pth",
        "checkpoint0001.pth",
        "checkpoint0002.pth",
        "checkpoint_best.pth",
        "curves.png",
        "log.txt",
        "metrics.json",
        "per_class.json",
        "precision_recall.png",
        "predictions.png",
        "result.html",
        "results.json",
        "samples.png",
        "worst_images.png",
    }
    for name in ("precision_recall.png", "worst_images.png", "predictions.png", "samples.png"):
        with Image.open(fine_run / "run" / name) as image:
            image.load()
            assert min(image.size) > 100
    results = json.loads((fine_run / "run" / "results.json").read_text())
    assert {row["image_id"] for row in results} == {501, 502, 503}
    assert len(results) == 3 * 20
    assert all(set(row) == {"image_id", "category_id", "bbox", "score"} for row in results)
    settings = json.loads((fine_run / "run" / "args.json").read_text())
    assert settings["settings"]["lr_drop"] == 2
    assert settings["images"] == [4, 3]
    assert "torch" in json.dumps(settings["environment"])


def test_output_files_of_pre_training(pretext_run: Path) -> None:
    assert {path.name for path in (pretext_run / "run").iterdir()} == {
        "args.json",
        "checkpoint.pth",
        "curves.png",
        "log.txt",
        "patches.png",
        "result.html",
        "samples.png",
    }


def test_checkpoints_are_complete_and_load_with_weights_only(
    fine_run: Path, pretext_run: Path
) -> None:
    for root in (fine_run, pretext_run):
        checkpoint = read_checkpoint(root / "run" / "checkpoint.pth")  # weights_only=True
        published = {"model", "optimizer", "lr_scheduler", "epoch", "args"}
        assert published | {
            "random_states",
            "class_names",
            "normalization",
            "version",
            "best",
            "batch",
            "averages",
        } <= set(checkpoint)
        assert type(checkpoint["args"]) is dict
        assert checkpoint["batch"] == 0
        assert checkpoint["world_size"] == len(checkpoint["random_states"]) == 1
    fine = read_checkpoint(fine_run / "run" / "checkpoint.pth")
    assert fine["epoch"] == 2
    assert fine["class_names"] == {1: "red", 2: "green", 3: "blue"}
    assert fine["normalization"]["mean"] == pytest.approx([0.485, 0.456, 0.406])
    assert read_checkpoint(fine_run / "run" / "checkpoint0001.pth")["epoch"] == 1
    assert not any(
        "detector." in key
        for key in read_checkpoint(pretext_run / "run" / "checkpoint.pth")["model"]
    )


def test_best_checkpoint_has_best_ap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = iter([0.2, 0.5, 0.3])
    monkeypatch.setattr(
        finetune_main.Evaluation,
        "__call__",
        lambda self, model, epoch: {"test_coco_eval_bbox": [next(scores)] * 12},
    )
    fine_tune(
        "--coco_path",
        write_coco(tmp_path / "coco", train=2),
        "--output_dir",
        tmp_path / "run",
        "--epochs",
        3,
        *FROZEN,
    )
    best, last = (
        read_checkpoint(tmp_path / "run" / name)
        for name in ("checkpoint_best.pth", "checkpoint.pth")
    )
    assert (best["epoch"], best["best"]) == (1, 0.5)
    assert (last["epoch"], last["best"]) == (2, 0.5)


def test_eval_of_checkpoint_matches_training_log(
    fine_run: Path, tmp_path: Path, monkeypatch
) -> None:
    values = {}
    evaluate = engine.evaluate

    def kept(*args, **kwargs):
        result = evaluate(*args, **kwargs)
        values.update(result[0])
        return result

    monkeypatch.setattr(engine, "evaluate", kept)
    before = {path.name: path.read_bytes() for path in (fine_run / "run").iterdir()}
    finetune_main.main(
        finetune_main.parse(
            [
                "--coco_path",
                str(fine_run / "coco"),
                "--resume",
                str(fine_run / "run" / "checkpoint.pth"),
                "--eval",
                "--output_dir",
                str(tmp_path / "eval"),
                "--device",
                "cpu",
                "--num_workers",
                "0",
                "--image_size",
                "64",
            ]
        )
    )
    last = read_log(fine_run / "run")[-1]
    assert values["coco_eval_bbox"] == last["test_coco_eval_bbox"]
    for name, value in values.items():
        if name not in ("coco_eval_bbox", "per_class"):
            assert value == pytest.approx(last[f"test_{name}"], rel=1e-6), name
    for name in ("metrics.json", "per_class.json", "results.json", "analysis.json"):
        assert (tmp_path / "eval" / name).read_bytes() == before[name]
    assert {path.name for path in (tmp_path / "eval").iterdir()} - {"best_images.png"} == {
        "analysis.json",
        "eval_args.json",
        "metrics.json",
        "per_class.json",
        "precision_recall.png",
        "results.json",
        "predictions.png",
        "result.html",
        "worst_images.png",
    }
    assert {path.name: path.read_bytes() for path in (fine_run / "run").iterdir()} == before


def test_eval_without_auxiliary_losses(fine_run: Path) -> None:
    with captured_log() as lines:
        finetune_main.main(
            finetune_main.parse(
                [
                    "--coco_path",
                    str(fine_run / "coco"),
                    "--resume",
                    str(fine_run / "run" / "checkpoint.pth"),
                    "--eval",
                    "--no_aux_loss",
                    "--device",
                    "cpu",
                    "--num_workers",
                    "0",
                    "--image_size",
                    "64",
                ]
            )
        )
    assert any(line.startswith("AP ") for line in lines)


def test_dry_run_saves_nothing(fine_run: Path, pretext_run: Path, tmp_path: Path) -> None:
    unlabelled = pretext_run / "unlabelled"
    for start, flag, data, counted in (
        (fine_tune, "--coco_path", fine_run / "coco", "4 training"),
        (pre_train, "--imagenet_path", unlabelled, "4 images"),
    ):
        with captured_log() as lines:
            start(
                flag,
                data,
                "--output_dir",
                tmp_path / "run",
                "--dry_run",
                "--epochs",
                7,
                "--batch_size",
                2,
            )
        text = "\n".join(lines)
        assert "epochs=7" in text  # resolved settings
        assert counted in text  # the data
        assert "loss" in next(line for line in lines if "on a batch of [2, 3, " in line)
        estimate = next(line for line in lines if line.startswith("dry run: 2 steps per epoch"))
        assert "for 7 epochs" in estimate
        assert "peak memory" in text
        assert not (tmp_path / "run").exists()


def test_bad_images_are_logged_once_with_path(tmp_path: Path) -> None:
    images = write_images(tmp_path / "unlabelled", count=5)
    (images / "bad.png").write_bytes(b"no image at all")
    Image.new("RGB", (12, 60)).save(images / "001_tiny.png")
    with captured_log() as lines:
        pre_train("--imagenet_path", images, "--epochs", 3, "--batch_size", 7, *FROZEN)
    for name, reason in (("bad.png", "can't be decoded"), ("001_tiny.png", "12 x 60")):
        # The check at the start names one bad image of those that it tries; training reports each.
        reports = [line for line in lines if name in line and "that were tried" not in line]
        assert len(reports) == 1, reports
        assert reason in reports[0]
    counts = [line for line in lines if "2 unreadable or tiny images" in line]
    assert len(counts) == 3


def test_training_on_images_without_objects(fine_run: Path, tmp_path: Path) -> None:
    with captured_log() as lines:
        fine_tune(
            "--coco_path",
            write_coco(tmp_path / "coco", train=4, empty=(0, 1)),
            "--epochs",
            1,
            "--output_dir",
            tmp_path / "run",
            "--batch_size",
            1,
            *FROZEN,
        )
    assert any("2 without objects" in line for line in lines)
    line = read_log(tmp_path / "run")[0]
    assert line["train_loss_bbox"] > 0
    assert line["train_loss_ce"] > 0


def test_run_that_diverges_is_saved_with_the_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A ground-truth box is NaN in step 2 of the second epoch. The file of that step gives its losses again."""
    add, steps = NonFiniteGuard.add, []

    def spoil(guard: NonFiniteGuard, batch: Batch, is_first: bool) -> None:
        steps.append(1)
        if len(steps) == 4:
            batch.targets.tensors["boxes"][0, 2] = math.nan
        add(guard, batch, is_first)

    monkeypatch.setattr(NonFiniteGuard, "add", spoil)
    words = ["--coco_path", write_coco(tmp_path / "coco"), "--output_dir", tmp_path / "run"]
    words += ["--epochs", 3, "--eval_every", 9, "--batch_size", 2, *FROZEN, "--max_nonfinite", 1]
    argv = [*RUN_FLAGS, *map(str, words)]
    with captured_log() as lines, pytest.raises(SystemExit) as stop:
        run_script(finetune_main.main, finetune_main.parse, argv)
    assert stop.value.code == 1
    error = next(line for line in lines if line.startswith("error: "))
    assert re.search(r"on images \[\d, \d\] in 1 steps in a row .*--lr.*saved in .*--resume", error)
    saved = read_checkpoint(tmp_path / "run" / "checkpoint.pth")
    assert (saved["epoch"], saved["batch"], saved["step"]) == (0, 2, 4)
    assert {int(state["step"]) for state in saved["optimizer"]["state"].values()} == {3}

    path = tmp_path / "run" / "nonfinite" / "step_000003_rank_0.pth"
    assert any(f"python tools/replay.py {path}" in line for line in lines)
    dumped = read_checkpoint(path)
    assert_same(dumped["model"], saved["model"])
    (batch,) = dumped["nonfinite"]["batches"]
    assert len(batch["image_ids"]) == 2
    assert batch["boxes"][0]["objects"] >= 1
    with captured_log() as lines:
        replay.main(replay.parse([str(path), "--device", "cpu"]))
    text = "\n".join(lines)
    bad = {name for name, value in batch["losses"].items() if not math.isfinite(value)}
    assert {"loss_bbox", "loss_giou"} <= bad
    for name, value in batch["losses"].items():
        assert f"  {name:32} {value:14.7g} {value:14.7g}" in text
    assert "gradient norm now: nan" in text


def test_statistics_of_batch_norm_survive_a_step_that_is_not_finite() -> None:
    norm = torch.nn.BatchNorm1d(2)
    guard = NonFiniteGuard([norm])
    guard.before_forward(is_first=True)
    norm(torch.randn(4, 2))
    before = copy_to_host(norm.state_dict())
    guard.before_forward(is_first=True)
    norm(torch.full((4, 2), math.nan))
    reader = LossReader({"loss": torch.tensor(math.nan)})
    guard.check_losses(reader.read(), reader)
    assert_same(norm.state_dict(), before)
    assert not guard.step_is_finite


@pytest.mark.parametrize("key", ["scores", "boxes"])
def test_predictions_that_are_not_finite_are_an_error(key: str) -> None:
    """They would be written to results.json as NaN, and no threshold would find such an object."""
    result = {"scores": torch.ones(3), "labels": torch.ones(3).long(), "boxes": torch.ones(3, 4)}
    assert len(results_to_host([result, result])) == 2
    broken = {**result, key: torch.full_like(result[key], float("nan"))}
    with pytest.raises(NonFinite, match=f"NaN or infinite {key}.*earlier checkpoint"):
        results_to_host([result, broken])


def test_batch_norm_on_a_single_value_is_reported_in_one_line() -> None:
    """UP-DETR's patches in a batch of one, for example: a single 1 x 1 feature map per channel."""

    class SingleValue(torch.nn.Module):
        needs_targets = False

        def __init__(self) -> None:
            super().__init__()
            self.norm = torch.nn.BatchNorm2d(3)

        def forward(self, samples: NestedTensor) -> dict:
            return {"out": self.norm(samples.tensors[:, :, :1, :1])}

    batch, model = make_batch(1), SingleValue()
    with pytest.raises(UserError, match=r"^--batch_size 1: batch norm .*; use a larger --batch"):
        engine.forward(model, batch, [], amp=None)
    assert engine.forward(model, make_batch(2), [], amp=None)["out"].shape == (2, 3, 1, 1)
    assert engine.forward(model.eval(), batch, [], amp=None)["out"].shape == (1, 3, 1, 1)
