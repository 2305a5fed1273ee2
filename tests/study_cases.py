"""A small study: its data, the flags of its runs, and the tool called in this process; and a study that is made up."""

import json
from collections.abc import Mapping
from pathlib import Path

from PIL import Image

from tests.tiny import MODEL_FLAGS, captured_log, write_coco, write_images
from tools import transfer_study
from tools.study import presets

TINY = presets.Preset(
    title="for tests",
    model={
        **dict(zip((name[2:] for name in MODEL_FLAGS[::2]), MODEL_FLAGS[1::2], strict=True)),
        "backbone_weights": "none",
    },
    pretrain={**presets.schedule(4, 2), "lr": 1e-4, "fre_cnn": True, "backbone_norm": "frozen"},
    finetune={**presets.schedule(4, 4), "backbone_norm": "frozen"},
    pretexts=presets.pretext_flags(5, 32, 5),
    lr=1e-4,
    evaluations=2,
)


def study(command: str, *words: object) -> list[str]:
    with captured_log() as lines:
        transfer_study.main(transfer_study.parse([command, *map(str, words)]))
    return lines


def prepare_data(root: Path) -> Path:
    """20 training, 4 validation and 6 test images; copies of two of the test images are among the unlabelled ones."""
    coco = write_coco(root / "coco", train=24, val=6)
    unlabelled = write_images(root / "unlabelled", 3)
    for i in range(2):
        with Image.open(coco / "val2017" / f"{i:06d}.png") as image:
            image.resize((150, 130)).save(unlabelled / f"copy{i}.jpg", quality=70)
    words = [
        "--coco_path",
        coco,
        "--unlabelled",
        unlabelled,
        "--image_size",
        64,
        "--fractions",
        1,
        0.5,
    ]
    study("prepare", *words, "--output_dir", root / "data")
    return root / "data"


def run_words(data: Path, folder: Path, *more: object) -> list[object]:
    places = ["--data", data, "--output_dir", folder]
    return [*places, "--preset", "cpu-smoke", "--device", "cpu", "--num_workers", 0, *more]


def fake_study(
    folder: Path, aps: Mapping[tuple[str, int], float | None], codes: tuple[str, ...] = ("aaa",)
) -> Path:
    """A study of Conditional DETR on a tenth of the labels, without runs.

    aps: (row, seed) -> AP from 0 to 1, None where the run is left; AP50 is twice as high. All rows but `none` start
    from the pre-training with seed 1 + seed // 10. The codes of the runs are those given, in turn.
    """
    (folder / "recall").mkdir(parents=True)
    steps = {}
    for number, ((row, seed), ap) in enumerate(aps.items()):
        name, origin = f"finetune/{row}/{seed}", None if row == "none" else 1 + seed // 10
        facts = {"detector": "conditional_detr", "variant": row, "fraction": 0.1, "seed": seed}
        steps[name] = {"kind": "finetune", **facts, "pretrain_seed": origin}
        if ap is not None:
            (folder / name).mkdir(parents=True)
            record = {"state": "done", "seconds": 60.0, "code": codes[number % len(codes)]}
            (folder / f"{name}.json").write_text(json.dumps(record))
            lines = [
                {"epoch": i, "test_coco_eval_bbox": [x, 2 * x] + [0] * 10}
                for i, x in enumerate((ap / 2, ap))
            ]
            (folder / name / "log.txt").write_text(
                "".join(json.dumps(line) + "\n" for line in lines)
            )
    data = {part: {"images": 4, "boxes": 8} for part in ("train", "val", "test", "unlabelled")}
    start = {
        "command": "python tools/transfer_study.py run",
        "gpu": "none",
        "cores": 2,
        "jobs": 1,
        "code": "aaa",
    }
    study = {
        "settings": {"--preset": "cpu"},
        "title": "made up",
        "data": {"command": "python tools/transfer_study.py prepare", **data},
        "steps": steps,
        "starts": [start],
    }
    (folder / "study.json").write_text(json.dumps(study))
    return folder
