"""docs/model_zoo.md: every row has a command that the real parser takes, and the number of tensors that such a file has."""
import re
import shlex
from collections.abc import Callable

import pytest

from tests.published_files import detreg, masks, shapes, siamese, updetr
from tests.test_configs import ROOT, check_command, shown_commands
from util.architecture import architecture
from util.checkpoint import as_checkpoint

PAGE = ROOT / "docs" / "model_zoo.md"
R101 = ("--backbone", "resnet101")
MASK_TENSORS = len(masks()) - len(shapes("detr", "--backbone", "resnet18", "--enc_layers", "1", "--dec_layers", "2"))
REFINE = "--with_box_refine"

# what a row's file holds -> its names and shapes
FILES: dict[str, Callable[[], dict]] = {
    "detr-r50-e632da11.pth": lambda: shapes("detr", outputs=92),
    "detr-r50-dc5-f0fb7ef5.pth": lambda: shapes("detr", "--dilation", outputs=92),
    "detr-r101-2c7b67e5.pth": lambda: shapes("detr", *R101, outputs=92),
    "detr-r101-dc5-a2e86def.pth": lambda: shapes("detr", *R101, "--dilation", outputs=92),
    "DETR-R50, 50 epochs": lambda: shapes("detr", outputs=92),
    "DETR-R101, 50 epochs": lambda: shapes("detr", *R101, outputs=92),
    "detr-r50-panoptic-00ce5173.pth": lambda: shapes("detr", outputs=251),
    "detr-r50-dc5-panoptic-da08f1b1.pth": lambda: shapes("detr", "--dilation", outputs=251),
    "detr-r101-panoptic-40021d53.pth": lambda: shapes("detr", *R101, outputs=251),
    "ConditionalDETR_r50_epoch50.pth": lambda: shapes("conditional_detr"),
    "ConditionalDETR_r50dc5_epoch50.pth": lambda: shapes("conditional_detr", "--dilation"),
    "ConditionalDETR_r101_epoch50.pth": lambda: shapes("conditional_detr", *R101),
    "ConditionalDETR_r101dc5_epoch50.pth": lambda: shapes("conditional_detr", *R101, "--dilation"),
    "four levels": lambda: shapes("deformable_detr"),
    "single scale": lambda: shapes("deformable_detr", "--num_feature_levels", "1"),
    "single scale, DC5": lambda: shapes("deformable_detr", "--num_feature_levels", "1", "--dilation"),
    "box refinement": lambda: shapes("deformable_detr", REFINE),
    "box refinement and two-stage": lambda: shapes("deformable_detr", REFINE, "--two_stage"),
    "up-detr-pre-training-60ep-imagenet.pth": lambda: updetr("--pre_norm", backbone="resnet50"),
    "up-detr-coco-fine-tuned-300ep.pth": lambda: shapes("detr", "--pre_norm", outputs=92),
    "checkpoint_imagenet.pth": lambda: detreg("deformable_detr"),
    "checkpoint_imagenet_detr.pth": lambda: detreg("detr", "--pre_norm"),
    "checkpoint_coco.pth": lambda: detreg("deformable_detr"),
    "full_coco_finetune.pth": lambda: shapes("deformable_detr"),
    "Conditional DETR, 100 queries, ImageNet": lambda: siamese("conditional_detr", "--num_queries", "100", channels=2048),
    "Conditional DETR, 100 queries, COCO": lambda: siamese("conditional_detr", "--num_queries", "100", channels=2048),
    "DETR (post-norm), 100 queries, ImageNet": lambda: siamese("detr", channels=2048),
    "Deformable DETR, four levels, 300 queries, ImageNet": lambda: siamese("deformable_detr", channels=3584),
    "Deformable DETR, single scale, 300 queries, ImageNet": lambda: siamese("deformable_detr", "--num_feature_levels", "1", channels=2048),
}


def rows() -> list[list[str]]:
    """The cells of every row that has a command: file, where, size, tensors, published AP, here."""
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("| ") and "`python finetune_main.py" in line]
    return [[cell.strip() for cell in line.split(" | ")] for line in (line.strip("| ") for line in lines)]


def test_every_published_checkpoint_has_a_row() -> None:
    assert [row[0].strip("`") for row in rows()] == list(FILES)
    assert all(len(row) == 6 for row in rows())


@pytest.mark.parametrize("row", rows(), ids=lambda row: row[0].strip("`"))
def test_row_is_right(row: list[str]) -> None:
    """The command is taken as it stands, and its flags do not contradict what such a file says of itself."""
    name, where, _, tensors, _, here = row
    state = FILES[name.strip("`")]()
    with_masks = MASK_TENSORS if "panoptic" in name else 0
    assert int(tensors) == len(state) + with_masks
    assert "http" in where or where == "see above"
    args = check_command(shlex.split(re.search(r"`(python [^`]+)`", here)[1]))
    assert bool(args.eval) is bool(args.resume) is not bool(args.pretrain)
    checkpoint = as_checkpoint({"model": state}, args.resume or args.pretrain)
    certain, likely = architecture(checkpoint)
    assert args.dilation is ("dc5" in name.lower() and "--dilation" in here)
    assert likely.get("dilation", False) or args.dilation or "dc5" not in name.lower()
    assert args.num_classes == (250 if "panoptic" in name else 91)
    if args.eval:
        assert certain["num_queries"] if not certain.get("two_stage") else True
        assert args.batch_size == (1 if "dc5" in name.lower() and "single scale" not in name else 2)


def test_the_page_shows_how_to_convert() -> None:
    shown = shown_commands(PAGE)
    assert {word for command in shown for word in command.split() if word.startswith("tools/")} == {
        "tools/convert_checkpoint.py", "tools/convert_to_detr.py"}
    for to in ("predetr", "detr", "updetr", "detreg", "siamese"):
        assert any(f"--to {to} " in command for command in shown)
