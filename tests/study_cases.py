"""A small study: its data, the flags of its runs, and the tool called in this process."""

from pathlib import Path

from PIL import Image

from tests.tiny import MODEL_FLAGS, logged, write_coco, write_images
from tools import transfer_study
from tools.study import presets

TINY = presets.Preset(
    "for tests",
    {**dict(zip((name[2:] for name in MODEL_FLAGS[::2]), MODEL_FLAGS[1::2], strict=True)), "backbone_weights": "none"},
    (4, 4),
    (8, 16),
    {"lr": 1e-4, "fre_cnn": True, "backbone_norm": "frozen"},
    (1e-4, 2e-4),
    0.0,
    presets._pretexts(5, 32, 5),
    finetune={"conditional_detr": {"backbone_norm": "frozen"}, "detr": {"backbone_norm": "frozen"}},
    evaluations=2,
)


def study(command: str, *words: object) -> list[str]:
    with logged() as lines:
        transfer_study.main(transfer_study.parse([command, *map(str, words)]))
    return lines


def prepare_data(root: Path) -> Path:
    """20 training, 4 validation and 6 test images; copies of two of the test images are among the unlabelled ones."""
    coco = write_coco(root / "coco", train=24, val=6)
    unlabelled = write_images(root / "unlabelled", 3)
    for i in range(2):
        with Image.open(coco / "val2017" / f"{i:06d}.png") as image:
            image.resize((150, 130)).save(unlabelled / f"copy{i}.jpg", quality=70)
    words = ["--coco_path", coco, "--unlabelled", unlabelled, "--image_size", 64, "--fractions", 1, 0.5]
    study("prepare", *words, "--output_dir", root / "data")
    return root / "data"


def run_words(data: Path, folder: Path, *more: object) -> list[object]:
    return [
        "--data",
        data,
        "--output_dir",
        folder,
        "--preset",
        "cpu-smoke",
        "--device",
        "cpu",
        "--num_workers",
        0,
        *more,
    ]
