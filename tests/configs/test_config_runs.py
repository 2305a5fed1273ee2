"""Every config runs: its published model is built on the meta device, and a small one trains a few steps or is
evaluated.

Of configs that differ in numbers only, one trains.
"""

import re
from pathlib import Path

import pytest
import torch

import models
from models import build_model
from tests.documents import CONFIGS, SCRIPTS, config_words, parse
from tests.tiny import (
    captured_log,
    without_initialization,
    write_airbus,
    write_coco,
    write_few_shot_files,
    write_images,
    write_panoptic,
    write_voc,
)
from util.settings import resolve

CONDITIONAL_100 = 43_418_401 - 200 * 256
# Number of parameters of the published implementations, by the start of a config's name; the first match counts.
PARAMETERS = {
    "r50_condtr_100q_imgnet_edgebox_gpu32": 43_869_129,
    "r50_condtr_100q_imgnet_edgebox_rdiscr_gpu32": 44_461_257,
    "r50_condtr_100q_syncbn_imgnet_edgebox_gdiscr_gpu32": 44_200_137,
    "r50_condtr_100q": 44_792_265,
    "r50_condtr_300q": 44_843_465,
    "r50_vanillatr": 42_949_575,
    "r50_deformtr_ms": 42_413_769,
    "r50_deformtr_ss": 35_491_657,
    "UPDETR_pretrain_in": 42_619_079,
    "UPDETR_finetune": 41_525_280,
    "UPDETR_eval": 41_525_280,
    "DETR_r50_swav": 41_525_280,
    "UPDETR_vanilla_finetune": 41_524_768,
    "UPDETR_deformable_finetune": 40_069_665,
    "UPDETR_deformable_single_scale_finetune": 34_066_593,
    "UPDETR_conditional_300q_finetune": 43_418_401,
    "UPDETR_conditional_finetune": CONDITIONAL_100,
    "Scratch_vanilla": 41_524_768,
    "Scratch_conditional": CONDITIONAL_100,
    "Scratch_deformable": 40_069_665,
    "DeformableDETR": 40_069_665,
    "DETReg_top30_in_detr": 41_525_280 + 768 * 257,
    "DETReg_fine_tune": None,
    "DETReg_few_shot": None,
    "DETReg_vanilla_finetune": 41_524_768,
    "DETReg_conditional_finetune": CONDITIONAL_100,
    "DETReg_deformable_finetune": 40_069_665,
    "DETReg_conditional_pretrain": CONDITIONAL_100 + 768 * 257,
    "DETReg": 40_069_665 + 768 * 257,
    "DETR_r101_panoptic_boxes": 60_464_672,
    "DETR_r50_panoptic_boxes": 41_524_768,
    "DETR_r50_dc5_panoptic_boxes": 41_524_768,
    # Their detector comes from a file, whose backbone these commands need not name.
    **dict.fromkeys(("DETR_r101_panoptic", "DETR_r50_panoptic"), 42_858_425),
    **dict.fromkeys(("DETR_r50_dc5_panoptic", "DETR_r50_masks"), 42_858_425),
    "DETR_panoptic_eval": 42_858_425,
    "ConditionalDETR_r101": 62_358_305,
    "ConditionalDETR": 43_418_401,
    "DETR_r101": 60_464_672,
    "DETR": 41_524_768,
    "r50_deformable_detr_single_scale": 34_066_593,
    "r50_deformable_detr_plus_iterative_bbox_refinement_plus_plus": 41_181_529,
    "r50_deformable_detr_plus": 40_849_660,
    "r50_deformable_detr": 40_069_665,
}
SMALL = [
    "--hidden_dim",
    "32",
    "--nheads",
    "4",
    "--dim_feedforward",
    "32",
    "--enc_layers",
    "1",
    "--dec_layers",
    "2",
    "--num_queries",
    "20",
    "--device",
    "cpu",
    "--num_workers",
    "0",
    "--image_size",
    "64",
    "--max_size",
    "96",
    "--batch_size",
    "2",
]
PRETEXT_SIZES = {
    "random_query_patch": ["--num_patches", "5", "--patch_size", "32"],
    "region_prior": ["--max_prop", "5", "--patch_size", "32", "--proposals", "random"],
    "siamese": ["--num_patches", "5", "--patch_size", "32", "--proposals", "random"],
}


def small_words(words: list[str], *flags: object) -> list[str]:
    """Return a config's command for a small model; DC5 needs a backbone with bottleneck blocks."""
    detector = source_config(words) if "--frozen_weights" in words else words
    shallow = ["--backbone", "resnet50" if "--dilation" in detector else "resnet18"]
    pretext = next((name for name in PRETEXT_SIZES if name in words), "random_query_patch")
    size = [*SMALL, *PRETEXT_SIZES[pretext]] if words[0] == "main.py" else SMALL
    return [*words, *size, *shallow, *map(str, flags)]


def start(words: list[str]) -> list[str]:
    """Run a command in this process and return the lines of its log."""
    with captured_log() as lines:
        SCRIPTS[words[0]].main(SCRIPTS[words[0]].parse(words[1:]))
    return lines


def save_small(words: list[str], path: Path) -> Path:
    """Save the checkpoint that a config's small run would end with, with random weights."""
    args = resolve(
        parse(
            small_words(words, "--backbone_weights", "none", "--backbone_norm", "frozen"),
            resolved=False,
        )
    )
    num_classes = 250 if args.dataset_file == "coco_panoptic" else None
    model = build_model(args, num_classes)[0]
    stored = {**args.as_dict(), "frozen_weights": None}
    torch.save({"model": model.state_dict(), "args": stored, "epoch": 0}, path)
    return path


def source_config(words: list[str]) -> list[str]:
    """Return the config whose output a command starts from or evaluates; one of the same kind for a URL."""
    given = next(
        word
        for flag, word in zip(words, words[1:], strict=False)
        if flag in ("--pretrain", "--resume", "--frozen_weights")
    )
    if not given.startswith("https://"):
        return config_words(CONFIGS[Path(given).parent.name])
    return config_words(CONFIGS["DETR_r50_panoptic" if "panoptic" in given else "DETR_r50_coco"])


@pytest.fixture(scope="module")
def coco(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_panoptic(write_coco(tmp_path_factory.mktemp("data") / "coco", train=4, val=2))


@pytest.fixture(scope="module")
def voc(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_voc(tmp_path_factory.mktemp("data") / "VOCdevkit")


@pytest.fixture(scope="module")
def unlabelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("data") / "images")


@pytest.fixture(autouse=True)
def _no_fetching(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip the download of backbone weights; `test_configs.py` checks which ones each config uses."""
    monkeypatch.setattr(models, "load_backbone_weights", lambda body, name, source: None)


@pytest.mark.parametrize("name", CONFIGS)
def test_config_builds_the_published_model(name: str) -> None:
    args = parse(config_words(CONFIGS[name], "--device", "cpu"))
    with torch.device("meta"), without_initialization():
        model, criterion, _ = build_model(args)
    known = next((count for part, count in PARAMETERS.items() if name.startswith(part)), None)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert known in (None, count)
    assert known is not None or "pretrain" in name or "--pretrain" in config_words(CONFIGS[name])
    layers = {key.rsplit("_", 1)[-1] for key in criterion.weight_dict}
    assert ("4" in layers) == args.aux_loss


def without_numbers(name: str) -> str:
    """Return a config's command with `#` for each number, and with the command of the config that it starts from."""
    command = CONFIGS[name].read_text().split("exec ")[1].split("--output_dir")[0]
    command = re.sub(
        r"exps/([^/]+)/checkpoint.pth", lambda source: without_numbers(source[1]), command
    )
    return re.sub(r" [\d.]\S*", " #", command)


# One of each group of commands that differ in numbers only; test_configs.py checks the numbers of all.
DIFFERENT = {
    without_numbers(name): name for name in CONFIGS if not name.endswith(("_eval", "_eval_coco"))
}


@pytest.mark.parametrize("name", sorted(DIFFERENT.values()))
def test_config_runs_three_steps(
    name: str, coco: Path, voc: Path, unlabelled: Path, tmp_path: Path
) -> None:
    words = config_words(CONFIGS[name])
    values = dict(zip(words, words[1:], strict=False))  # flag -> the word behind it
    kind = values.get("--dataset")
    data = ["--coco_path", coco]
    if "--imagenet_path" in words or kind in ("imagenet", "imagenet100", "airbus_pretrain"):
        data = ["--imagenet_path", unlabelled]
    elif {"voc", "voc_coco"} & set(words):
        # Two image sets: one has too few images.
        data = ["--voc_path", voc, "--voc_train", "2007_trainval", "2012_trainval"]
    elif kind == "airbus":
        data = ["--airbus_path", write_airbus(tmp_path / "airbus", images=6)]

    if "--filter_pct" in words:
        data += ["--filter_pct", "1"]  # all: a fraction of four images is too few
    if "--few_shot" in words and "voc" not in words:
        data += ["--novel_classes", "red"]
    if "--few_shot_file" in words:
        data += ["--few_shot_file", write_few_shot_files(coco, tmp_path / "shots")]
    start_from = []
    if "--pretrain" in words:
        checkpoint = save_small(source_config(words), tmp_path / "pretrained.pth")
        start_from = ["--pretrain", checkpoint]
    if "--frozen_weights" in words:
        checkpoint = save_small(source_config(words), tmp_path / "boxes.pth")
        start_from = ["--frozen_weights", checkpoint]

    lines = start(
        small_words(words, *data, *start_from, "--output_dir", tmp_path / "run", "--dry_run")
    )
    assert sum(line.startswith("dry run: step ") for line in lines) == 2
    assert any("nothing was saved" in line for line in lines)
    if start_from and source_config(words)[0] == "main.py":
        assert any("patch2query" in line or "feature_embed" in line for line in lines)


@pytest.mark.parametrize(
    "name", [name for name in CONFIGS if name.endswith(("_eval", "_eval_coco"))]
)
def test_config_evaluates(name: str, coco: Path, tmp_path: Path) -> None:
    """The architecture comes from the checkpoint, without flags."""
    words = config_words(CONFIGS[name])
    checkpoint = save_small(source_config(words), tmp_path / "trained.pth")
    start(
        [
            *words,
            *SMALL[-8:],
            "--coco_path",
            str(coco),
            "--resume",
            str(checkpoint),
            "--output_dir",
            str(tmp_path / "run"),
        ]
    )
    assert (tmp_path / "run" / "metrics.json").exists()
