"""A run with two weights and four images, which trains in milliseconds, with everything that a run writes.

Only the training step and the evaluation are toys: loader, meters, checkpoints, logs and resuming are those of every
run.
"""

import functools
import re
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
from torch import Tensor, nn

import engine
import trainer
from datasets import build_loader
from datasets.sample import SampleDataset
from models.trainable import TrainableModel
from tests.tiny import assert_same, read_checkpoint, tiny_args
from util.checkpoints.checkpoint import load_checkpoint
from util.checkpoints.newest import resolve_resume_path
from util.files import write_text
from util.random_state import SampleRNG
from util.runs.session import seed_everything
from util.settings import FINETUNE, Settings

NORMALIZATION = {"mean": [0.5] * 3, "std": [0.25] * 3}
IMAGES = 4
TIMES = re.compile(r'"(train_seconds|images_per_second)": [\d.e+-]+')


class Dots(SampleDataset):
    """Image i is 4 x 4 pixels of value i."""

    def __len__(self) -> int:
        return IMAGES

    def path(self, index: int) -> str:
        return f"image {index}"

    def load(self, index: int, rng: SampleRNG) -> tuple[Tensor, dict]:
        size = torch.tensor([4, 4])
        boxes, labels = torch.tensor([[0.5, 0.5, 0.2, 0.2]]), torch.tensor([1])
        target = {"boxes": boxes, "labels": labels, "image_id": torch.tensor([index])}
        image = torch.full((3, 4, 4), index, dtype=torch.uint8)
        return image, {**target, "size": size, "orig_size": size}


class Toy(TrainableModel):
    normalization = NORMALIZATION

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Parameter(torch.ones(2))


class ToyCriterion(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight_dict = {"loss": 1.0}
        self.matcher = SimpleNamespace(while_waiting=None)


def _train_step(
    run: trainer.Run, samples, targets, stop: bool, place
) -> tuple[dict[str, float], bool]:
    """Move the weights by the images and by noise, as dropout does. A NaN image is the fault of the test."""
    shift = torch.rand(2) + sum(target["image_id"].item() for target in targets)
    loss = (run.model.backbone * shift).sum()
    run.optimizer.zero_grad()
    loss.backward()
    run.optimizer.step()
    return {"loss": loss.item()}, stop


def _evaluate(folder: Path):
    """Return an evaluation that writes a file. Its AP rises, falls and rises again."""

    def evaluate(model: nn.Module, epoch: int) -> dict:
        torch.rand(1)  # an evaluation may draw
        write_text(folder / "results.json", f"{model.backbone.tolist()}")
        return {"test_coco_eval_bbox": [(0.2, 0.1, 0.3, 0.4)[epoch]] * 12}

    return evaluate


@functools.cache
def _settings(*flags: str) -> Settings:
    return tiny_args(FINETUNE, *flags)


def start(folder: Path, *flags: str, resume: str = "auto") -> trainer.Run:
    """Train to the end as a new process does, by `--resume`."""
    words = ("--epochs", "3", "--lr_drop", "2", "--save_every_steps", "1", "--log_every", "1")
    settings = _settings(*words, "--batch_size", "2", "--output_dir", "FOLDER", *flags)
    path = resolve_resume_path(resume, folder)
    checkpoint = load_checkpoint(path) if path else None
    seed_everything(settings.seed)
    model = Toy()
    if checkpoint:
        model.load_state_dict(checkpoint.model)
    loader = build_loader(Dots(settings.seed), settings, train=True)
    run = trainer.build_run(
        settings, model, ToyCriterion(), loader, torch.device("cpu"), folder=folder,
        normalization=NORMALIZATION, checkpoint_extras={"args": settings.as_dict()},
    )  # fmt: skip
    run.evaluate = _evaluate(folder)
    run.on_epoch_end = lambda: write_text(folder / "result.html", f"{run.epoch} epochs")
    if checkpoint:
        trainer.resume_run(run, checkpoint)
    run.on_epoch_end()
    with mock.patch.object(engine, "train_step", _train_step):
        trainer.fit(run)
    return run


def assert_same_content(path: Path, expected: Path, where: str = "") -> None:
    """Compare a file of two runs: a checkpoint bit by bit, and text, both except for times."""
    assert_same(_content(path), _content(expected), f"{where}: {path.name}")


def _content(path: Path) -> object:
    if path.suffix != ".pth":
        return TIMES.sub("", path.read_text())
    content = read_checkpoint(path)
    del content["seconds"]
    return content
