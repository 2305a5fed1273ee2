"""Run every command of docs/custom_dataset.md, in order, on synthetic scenes with category ids of a user."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch

import finetune_main
import main as pretrain_main
from models import build_model
from tests.documents import shown_commands
from tests.tiny import (
    MODEL_FLAGS,
    PRETEXT_FLAGS,
    ROOT,
    captured_log,
    read_checkpoint,
    renumber,
    tiny_args,
)
from tools import check_dataset, convert_dataset, predict
from tools.demo.scenes import class_names, write_coco
from util.checkpoints.checkpoint import save_checkpoint
from util.checkpoints.weight_files import cached_path
from util.settings import FINETUNE

pytest.importorskip("skimage")
PAGE = (ROOT / "docs" / "custom_dataset.md").read_text()
SCRIPTS = {
    "main.py": pretrain_main,
    "finetune_main.py": finetune_main,
    "tools/predict.py": predict,
    "tools/check_dataset.py": check_dataset,
    "tools/convert_dataset.py": convert_dataset,
}
SMALL = ["--device", "cpu", "--num_workers", "0", "--image_size", "64"]
TRAINING = ["--epochs", "1", "--batch_size", "2", "--lr_backbone", "0", "--backbone_norm", "frozen"]
IDS = {1: 7, 2: 3, 3: 1000, 4: 12}
PUBLISHED = re.findall(r"--pretrain (https://\S+)", PAGE)


def commands() -> list[list[str]]:
    return [shlex.split(command) for command in shown_commands(ROOT / "docs" / "custom_dataset.md")]


def write_dataset(folder: Path) -> None:
    """Write the page's folders with a few scenes, and the category ids of IDS."""
    write_coco(folder, num_train=4, num_val=2, num_unlabelled=4, size=64)
    for split in ("train", "val"):
        (folder / f"{split}2017").rename(folder / split)
        content = json.loads((folder / "annotations" / f"instances_{split}2017.json").read_text())
        (folder / f"{split}.json").write_text(json.dumps(renumber(content, IDS)))
    shutil.copytree(folder / "unlabelled", folder / "new")


def write_export(folder: Path, export: Path) -> None:
    """Write the dataset of `write_dataset` as a labelling tool exports it: YOLO with a data.yaml."""
    names = class_names(len(IDS))
    for split in ("train", "val"):
        content = json.loads((folder / f"{split}.json").read_text())
        shutil.copytree(folder / split, export / split / "images")
        (export / split / "labels").mkdir()
        files = {row["id"]: row for row in content["images"]}
        for row in content["annotations"]:
            image = files[row["image_id"]]
            x, y, width, height = row["bbox"]
            numbers = [(x + width / 2) / image["width"], (y + height / 2) / image["height"]]
            numbers += [width / image["width"], height / image["height"]]
            path = (export / split / "labels" / image["file_name"]).with_suffix(".txt")
            with path.open("a") as file:
                file.write(" ".join(map(str, [row["category_id"], *numbers])) + "\n")
    lines = "".join(f"  {IDS[label]}: {name}\n" for label, name in names.items())
    (export / "data.yaml").write_text(f"train: train/images\nval: val/images\nnames:\n{lines}")


def convert(words: list[str], folder: Path) -> None:
    """Run the page's conversion, and check that it makes the page's folders from an export of the same data."""
    pytest.importorskip("supervision")
    original = folder.with_name("original")
    folder.rename(original)
    write_export(original, folder.with_name("export"))
    convert_dataset.main(convert_dataset.parse([*words, "--num_workers", "0"]))
    for split in ("train", "val"):
        files = [json.loads((root / f"{split}.json").read_text()) for root in (folder, original)]
        sizes = [
            sorted(round(row["bbox"][2]) for row in content["annotations"]) for content in files
        ]
        assert sizes[0] == sizes[1]
        assert len(list((folder / split).iterdir())) == len(files[1]["images"])
    for name in ("new", "unlabelled"):
        (original / name).rename(folder / name)


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the page's data, and a small checkpoint under the URL of the published detector."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.chdir(tmp_path)
    write_dataset(tmp_path / "my_data")
    torch.manual_seed(0)
    model = build_model(tiny_args(FINETUNE, "--backbone_norm", "frozen", "--nheads", "8"))[0]
    for address in set(PUBLISHED):
        save_checkpoint({"model": model.state_dict()}, cached_path(address))
    return tmp_path


def small(command: list[str]) -> list[str]:
    """Return the arguments of a command, followed by flags that make it small."""
    script, words = command[1], command[2:]
    extra = {
        "main.py": [
            *MODEL_FLAGS,
            *PRETEXT_FLAGS,
            "--backbone_weights",
            "none",
            "--epochs",
            "1",
            "--batch_size",
            "2",
        ],
        "finetune_main.py": TRAINING[2:] if "--eval" in words else TRAINING,
        "tools/predict.py": ["--threshold", "0"],
    }
    return (
        [*words, "--num_workers", "0"]
        if script == "tools/check_dataset.py"
        else [*words, *SMALL, *extra[script]]
    )


def test_every_command_of_the_page_runs(workplace: Path) -> None:
    names = class_names(len(IDS))
    for command in commands():
        assert command[0] == "python"
        if command[1] == "tools/convert_dataset.py":
            convert(command[2:], workplace / "my_data")
            continue
        module = SCRIPTS[command[1]]
        with captured_log() as lines:
            module.main(module.parse(small(command)))
        if command[1] == "finetune_main.py" and not {"--eval", "--dry_run"} & set(command):
            assert any("class_embed: 0 of 4 class rows kept by name" in line for line in lines), (
                "shapes are not COCO's"
            )
            assert (
                f"--checkpoint {command[command.index('--output_dir') + 1]}/checkpoint_best.pth"
                in lines[-1]
            )
    assert [command[1] for command in commands()][:5] == [
        "tools/convert_dataset.py",
        "tools/check_dataset.py",
        "main.py",
        "finetune_main.py",
        "tools/predict.py",
    ]
    assert json.loads((workplace / "check" / "check.json").read_text())["val"]["readable"] == 2
    checkpoint = read_checkpoint(workplace / "outputs" / "custom" / "checkpoint_best.pth")
    assert {
        checkpoint["category_ids"][row]: name for row, name in checkpoint["class_names"].items()
    } == {IDS[label]: name for label, name in names.items()}
    found = json.loads((workplace / "predictions" / "predictions.json").read_text())
    assert found
    assert {(row["category_id"], row["category_name"]) for row in found} <= {
        (IDS[label], name) for label, name in names.items()
    }
    example = json.loads(re.findall(r"```json\n(\[.*?)```", PAGE, re.DOTALL)[0])
    assert set(found[0]) == set(example[0])
    metrics = json.loads((workplace / "outputs" / "custom_eval" / "metrics.json").read_text())
    assert len(metrics["coco_eval_bbox"]) == 12


def test_fine_tuning_starts_from_the_pre_training(workplace: Path) -> None:
    """`--pretrain outputs/custom_pretrain/checkpoint.pth`, as the page says."""
    _, _, first, second, *_ = commands()
    pretrain_main.main(pretrain_main.parse(small(first)))
    second[second.index("--pretrain") + 1] = "outputs/custom_pretrain/checkpoint.pth"
    assert "outputs/custom_pretrain/checkpoint.pth" in PAGE
    finetune_main.main(finetune_main.parse(small([*second, "--dry_run"])))


def test_example_annotations_of_the_page_are_valid(tmp_path: Path) -> None:
    from datasets.labelled.coco_parser import read_coco

    path = tmp_path / "train.json"
    path.write_text(re.findall(r"```json\n(\{.*?)```", PAGE, re.DOTALL)[0])
    annotations = read_coco(str(path))
    assert annotations.class_names == {7: "helmet", 1000: "vest"}
    assert annotations.boxes_xyxy_abs.tolist() == [[610, 220, 700, 360]]
