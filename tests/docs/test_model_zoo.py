"""docs/model_zoo.md: the command of each row runs on a file of its kind, and the number of tensors is right."""

import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

import finetune_main
from tests.documents import ROOT, check_command, shown_commands
from tests.published_files import (
    SMALL,
    detreg,
    filled,
    masks,
    shapes,
    siamese,
    siamese_file,
    updetr,
)
from tests.tiny import write_coco, write_panoptic
from util.checkpoints.architecture import infer_architecture
from util.checkpoints.checkpoint import parse_checkpoint, save_checkpoint
from util.checkpoints.weight_files import cached_path
from util.runs.model_summary import PUBLISHED

PAGE = ROOT / "docs" / "model_zoo.md"
R101 = ("--backbone", "resnet101")
REFINE = "--with_box_refine"
TINY = ("--device", "cpu", "--num_workers", "0", "--image_size", "64")


def of_siamese(detector: str, channels: int, *flags: str) -> Callable[..., dict]:
    """Build a checkpoint of Siamese DETR. A small one has ResNet-18, with a fourth of the `channels`."""
    return lambda *size: siamese(
        detector, *flags, *size, channels=channels // 4 if size else channels
    )


# File of a row -> function that returns its parameter names and shapes; flags make it smaller.
FILES: dict[str, Callable[..., dict]] = {
    "detr-r50-e632da11.pth": lambda *size: shapes("detr", *size, outputs=92),
    "detr-r50-dc5-f0fb7ef5.pth": lambda *size: shapes("detr", "--dilation", *size, outputs=92),
    "detr-r101-2c7b67e5.pth": lambda *size: shapes("detr", *R101, *size, outputs=92),
    "detr-r101-dc5-a2e86def.pth": lambda *size: shapes(
        "detr", *R101, "--dilation", *size, outputs=92
    ),
    "DETR-R50, 50 epochs": lambda *size: shapes("detr", *size, outputs=92),
    "DETR-R101, 50 epochs": lambda *size: shapes("detr", *R101, *size, outputs=92),
    "detr-r50-panoptic-00ce5173.pth": lambda *size: masks("--backbone", "resnet50", *size),
    "detr-r50-dc5-panoptic-da08f1b1.pth": lambda *size: masks(
        "--backbone", "resnet50", "--dilation", *size
    ),
    "detr-r101-panoptic-40021d53.pth": lambda *size: masks(*R101, *size),
    "ConditionalDETR_r50_epoch50.pth": lambda *size: shapes("conditional_detr", *size),
    "ConditionalDETR_r50dc5_epoch50.pth": lambda *size: shapes(
        "conditional_detr", "--dilation", *size
    ),
    "ConditionalDETR_r101_epoch50.pth": lambda *size: shapes("conditional_detr", *R101, *size),
    "ConditionalDETR_r101dc5_epoch50.pth": lambda *size: shapes(
        "conditional_detr", *R101, "--dilation", *size
    ),
    "four levels": lambda *size: shapes("deformable_detr", *size),
    "single scale": lambda *size: shapes("deformable_detr", "--num_feature_levels", "1", *size),
    "single scale, DC5": lambda *size: shapes(
        "deformable_detr", "--num_feature_levels", "1", "--dilation", *size
    ),
    "box refinement": lambda *size: shapes("deformable_detr", REFINE, *size),
    "box refinement and two-stage": lambda *size: shapes(
        "deformable_detr", REFINE, "--two_stage", *size
    ),
    "up-detr-pre-training-60ep-imagenet.pth": lambda *size: updetr(
        "--pre_norm", *size, backbone="resnet18" if size else "resnet50"
    ),
    "up-detr-coco-fine-tuned-300ep.pth": lambda *size: shapes(
        "detr", "--pre_norm", *size, outputs=92
    ),
    "checkpoint_imagenet.pth": lambda *size: detreg("deformable_detr", *size),
    "checkpoint_imagenet_detr.pth": lambda *size: detreg("detr", "--pre_norm", *size),
    "checkpoint_coco.pth": lambda *size: detreg("deformable_detr", *size),
    "full_coco_finetune.pth": lambda *size: shapes("deformable_detr", *size),
    "Conditional DETR, 100 queries, ImageNet": of_siamese(
        "conditional_detr", 2048, "--num_queries", "100"
    ),
    "Conditional DETR, 100 queries, COCO": of_siamese(
        "conditional_detr", 2048, "--num_queries", "100"
    ),
    "DETR (post-norm), 100 queries, ImageNet": of_siamese("detr", 2048),
    "Deformable DETR, four levels, 300 queries, ImageNet": of_siamese("deformable_detr", 3584),
    "Deformable DETR, single scale, 300 queries, ImageNet": of_siamese(
        "deformable_detr", 2048, "--num_feature_levels", "1"
    ),
}


def rows() -> list[list[str]]:
    """Return the cells of each row with a command: file, download, size, tensors, published AP, command."""
    lines = [
        line
        for line in PAGE.read_text().splitlines()
        if line.startswith("| ") and "`python finetune_main.py" in line
    ]
    return [
        [cell.strip() for cell in line.split(" | ")]
        for line in (line.strip("| ") for line in lines)
    ]


def row_command(row: list[str]) -> str:
    return re.search(r"`(python [^`]+)`", row[-1])[1]


@pytest.mark.parametrize("row", rows(), ids=lambda row: row[0].strip("`"))
def test_row_runs(row: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command evaluates, or starts to train, a small detector from a file of the row's kind and name."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.chdir(tmp_path)
    write_panoptic(write_coco(tmp_path / "data" / "MSCoco", train=3, val=2))
    words = shlex.split(row_command(row))[2:]
    args = finetune_main.parse(words)
    backbone = ("--backbone", "resnet50") if "dc5" in row[0].lower() else ()
    state = FILES[row[0].strip("`")](*SMALL, *backbone)
    source = args.resume or args.pretrain
    place = cached_path(source) if source.startswith("https://") else Path(source)
    save_checkpoint(siamese_file(state) if "iter_" in source else {"model": filled(state)}, place)
    finetune_main.main(
        finetune_main.parse(
            [*words, *TINY, *(() if args.eval else ("--dry_run", "--batch_size", "2"))]
        )
    )


def test_every_published_checkpoint_has_a_row() -> None:
    assert [row[0].strip("`") for row in rows()] == list(FILES)
    assert all(len(row) == 6 for row in rows())


@pytest.mark.parametrize("row", rows(), ids=lambda row: row[0].strip("`"))
def test_row_matches_its_file(row: list[str]) -> None:
    """The command parses unchanged, and its flags agree with what such a file says about itself."""
    name, download, _, tensors, _, here = row
    state = FILES[name.strip("`")]()
    assert int(tensors) == len(state)
    assert "http" in download or download == "see above"
    args = check_command(shlex.split(row_command(row)))
    assert bool(args.eval) is bool(args.resume) is not bool(args.pretrain)
    checkpoint = parse_checkpoint({"model": state}, args.resume or args.pretrain)
    certain, likely = infer_architecture(checkpoint)
    assert args.dilation is ("dc5" in name.lower() and "--dilation" in here)
    assert likely.get("dilation", False) or args.dilation or "dc5" not in name.lower()
    assert args.dataset_file == ("coco_panoptic" if "panoptic" in name else "coco")
    if args.eval:
        assert certain["num_queries"] if not certain.get("two_stage") else True
        assert args.batch_size == (1 if "dc5" in name.lower() and "single scale" not in name else 2)


def test_page_shows_how_to_convert() -> None:
    shown = shown_commands(PAGE)
    assert {word for command in shown for word in command.split() if word.startswith("tools/")} == {
        "tools/convert_checkpoint.py",
        "tools/convert_to_detr.py",
    }
    for to in ("predetr", "detr", "updetr", "detreg", "siamese"):
        assert any(f"--to {to} " in command for command in shown)


def test_published_figures_agree_with_those_that_a_run_logs() -> None:
    """Parameters and FLOPs of the table are `PUBLISHED`, to which a run's own are compared."""
    found = set()
    for line in PAGE.read_text().splitlines():
        row = re.match(r"\| (Conditional )?DETR-(DC5-)?R(50|101) \| \d+ \| (\d+) \| (\d+) \|", line)
        if row:
            detector = "conditional_detr" if row[1] else "detr"
            key = (detector, f"resnet{row[3]}", bool(row[2]), 1)
            assert PUBLISHED[key] == (int(row[4]), int(row[5])), line
            found.add(key)
    assert found == {key for key in PUBLISHED if key[0] != "deformable_detr"}


def test_evaluation_needs_no_flags_of_the_architecture() -> None:
    """As docs/evaluation.md says: `--dilation` where nothing tells, and the dataset of panoptic models."""
    flags = {
        flag
        for command in re.findall(r"`(python finetune_main.py [^`]+)`", PAGE.read_text())
        if "--eval" in command
        for flag in re.findall(r"--\w+", command)
    }
    usual = {"--coco_path", "--eval", "--batch_size", "--resume"}
    assert flags - usual == {"--dilation", "--dataset_file"}
