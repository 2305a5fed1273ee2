"""Small transfer studies for tests: real data with tiny models, and studies with made-up results."""

import json
from collections.abc import Mapping
from pathlib import Path

from PIL import Image

from tests.tiny import MODEL_FLAGS, captured_log, write_coco, write_images
from tools import transfer_study
from tools.study import presets
from util.settings.words import to_words

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


def argv(**flags: object) -> list[str]:
    return to_words(flags)


def study(command: str, *words: object, **flags: object) -> list[str]:
    """Run a command of the tool in this process; return the lines that it logs."""
    with captured_log() as lines:
        transfer_study.main(transfer_study.parse([command, *map(str, words), *to_words(flags)]))
    return lines


def prepare_data(root: Path) -> Path:
    """Prepare 20 training, 4 validation and 6 test images; the unlabelled ones include copies of two test images."""
    coco = write_coco(root / "coco", train=24, val=6)
    unlabelled = write_images(root / "unlabelled", 3)
    for i in range(2):
        with Image.open(coco / "val2017" / f"{i:06d}.png") as image:
            image.resize((150, 130)).save(unlabelled / f"copy{i}.jpg", quality=70)
    study(
        "prepare",
        coco_path=coco,
        unlabelled=unlabelled,
        image_size=64,
        fractions=(1, 0.5),
        output_dir=root / "data",
    )
    return root / "data"


def run_words(data: Path, folder: Path, **flags: object) -> list[str]:
    """Return the words of a `run` command on the CPU; `flags` override and extend its own."""
    own = {"preset": "cpu-smoke", "device": "cpu", "num_workers": 0}
    return argv(data=data, output_dir=folder, **{**own, **flags})


def fake_study(
    folder: Path, aps: Mapping[tuple[str, int], float | None], codes: tuple[str, ...] = ("aaa",)
) -> Path:
    """Write a study of Conditional DETR on 10 % of the labels, without running anything.

    Args:
        aps: (row, seed) -> AP from 0 to 1, None for a run that is left; AP50 is twice as high. All rows but `none`
            start from the pre-training with seed 1 + seed // 10.
        codes: versions of the code, which the runs get in turn.
    """
    (folder / "recall").mkdir(parents=True)
    steps = {}
    for number, ((row, seed), ap) in enumerate(aps.items()):
        name = f"finetune/{row}/{seed}"
        pretrain_seed = None if row == "none" else 1 + seed // 10
        facts = {"detector": "conditional_detr", "variant": row, "fraction": 0.1, "seed": seed}
        steps[name] = {"kind": "finetune", **facts, "pretrain_seed": pretrain_seed}
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
