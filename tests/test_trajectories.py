"""Loss curves of short runs, stored in `tests/golden/trajectories.json`: a change that hurts learning changes them.

Every pretext, and fine-tuning of every detector, trains for 12 steps on synthetic images, with the loop, data
pipeline, optimizer and schedule of a real run. Everything is in float64, so that differences between machines and
versions of PyTorch stay small. A change that alters the curves on purpose explains why and rewrites the file:

    python tests/test_trajectories.py --write
"""

import json
import shlex
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # as a script

import engine  # noqa: E402
import trainer  # noqa: E402
from datasets import build_dataset, build_loader, transfer  # noqa: E402
from models import build_model  # noqa: E402
from tests.tiny import tiny_args, write_coco, write_images  # noqa: E402
from tests.two_processes import in_float64  # noqa: E402
from util.runs.session import seed_everything  # noqa: E402
from util.settings import FINETUNE, PRETRAIN  # noqa: E402

FILE = ROOT / "tests" / "golden" / "trajectories.json"
STEPS = 12
FLAGS = shlex.split(
    "--epochs 6 --lr_drop 4 --batch_size 4 --lr 1e-3 --weight_decay 2 --dropout 0 "
    "--num_workers 0 --backbone_norm live"
)
CASES = {
    "random_query_patch": (PRETRAIN, ("--detector", "detr", "--feature_recon", "--fre_cnn")),
    "region_prior": (
        PRETRAIN,
        shlex.split(
            "--detector deformable_detr --with_box_refine --proposals random "
            "--num_patches 10 --max_prop 6 --object_embedding_loss --lr_backbone 0"
        ),
    ),
    # On this detector and with a low learning rate: between similar queries, rounding decides the matching.
    "siamese": (
        PRETRAIN,
        shlex.split(
            "--detector detr --proposals random --lr_backbone 0 --global_loss_coef 1 --lr 3e-4"
        ),
    ),
    "detr": (FINETUNE, ("--pre_norm", "--lr_backbone", "1e-4")),
    "conditional_detr": (FINETUNE, ("--lr_backbone", "0")),
    "deformable_detr": (FINETUNE, ("--with_box_refine", "--lr_backbone", "1e-4")),
}


def run_case(name: str, folder: Path) -> dict:
    """Train a case.

    Returns {"losses": {name: values per step}, "moved": {part of the model: L2 distance of its weights}}.
    """
    script, flags = CASES[name]
    if script == FINETUNE:
        data = ("--detector", name, "--coco_path", str(write_coco(folder / name, train=8, val=1)))
    else:
        data = ("--pretext", name, "--imagenet_path", str(write_images(folder / name, count=8)))
    args = tiny_args(script, *FLAGS, *data, *flags)
    seed_everything(args.seed)
    loader = build_loader(build_dataset("train", args), args, train=True)
    model, criterion, _ = build_model(args)
    model, criterion = model.double(), criterion.double()
    start = {key: p.detach().clone() for key, p in model.named_parameters()}
    normalization = {"mean": [0.5] * 3, "std": [0.25] * 3}
    run = trainer.build_run(
        args,
        model,
        criterion,
        loader,
        torch.device("cpu"),
        folder=None,
        normalization=normalization,
    )
    steps = record(run)
    moved: dict[str, float] = {}
    for key, p in model.named_parameters():
        part = ".".join(key.removeprefix("detector.").split(".")[:2])
        moved[part] = moved.get(part, 0.0) + float((p.detach() - start[key]).square().sum())
    names = [
        key
        for key in steps[0]
        if "loss" in key and not key.endswith(("_unscaled", "_enc")) and not key[-1].isdigit()
    ]
    return {
        "losses": {key: [values[key] for values in steps] for key in names},
        "moved": {key: x**0.5 for key, x in moved.items() if x},
    }


def record(run: trainer.Run) -> list[dict[str, float]]:
    """Train to the end and return the logged values of each step."""
    steps, train_step, to_device = [], engine.train_step, transfer.to_device

    def recorded(*args, **kwargs) -> tuple:
        values, asked = train_step(*args, **kwargs)
        steps.append(values)
        return values, asked

    engine.train_step, transfer.to_device = recorded, in_float64(to_device)
    try:
        trainer.fit(run)
    finally:
        engine.train_step, transfer.to_device = train_step, to_device
    return steps


def tolerances() -> np.ndarray:
    """Return the relative tolerance of each step: an initial difference grows."""
    return np.geomspace(3e-4, 1e-2, STEPS)


@pytest.mark.skipif(
    not torch.backends.cpu.get_cpu_capability().startswith("AVX"),
    reason="image resizing rounds differently on this CPU",
)
@pytest.mark.parametrize("name", CASES)
def test_losses_equal_stored_curves(name: str, tmp_path: Path) -> None:
    expected, ours = json.loads(FILE.read_text())[name], run_case(name, tmp_path)
    assert set(ours["losses"]) == set(expected["losses"])
    for key, curve in ours["losses"].items():
        difference = np.abs(np.array(curve) - expected["losses"][key]) / np.maximum(
            np.abs(expected["losses"][key]), 1e-2
        )
        step = int((difference / tolerances()).argmax())
        assert (difference <= tolerances()).all(), (
            f"{key} of step {step} is {curve[step]:.6f}, was {expected['losses'][key][step]:.6f}; if "
            "intended, see the head of this file"
        )
    assert ours["moved"] == pytest.approx(expected["moved"], rel=1e-2)


@pytest.mark.parametrize("name", CASES)
def test_stored_losses_fall(name: str) -> None:
    """The stored curves show learning."""
    losses = json.loads(FILE.read_text())[name]["losses"]["loss"]
    assert len(losses) == STEPS
    assert np.mean(losses[-4:]) < 0.96 * np.mean(losses[:2])


def write() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        results = {name: run_case(name, Path(folder)) for name in CASES}
    rounded = json.loads(json.dumps(results), parse_float=lambda text: float(f"{float(text):.7g}"))
    FILE.write_text(json.dumps(rounded, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit("python tests/test_trajectories.py --write replaces the stored loss curves")
    write()
