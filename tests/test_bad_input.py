"""Bad input to the entry scripts: a one-line error before the model is built, or a warning if training continues."""

import contextlib
import errno
import json
import os
import pickle
import re
import resource
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import finetune_main
import main as pretrain_main
from datasets.images.image_folder import open_image
from datasets.sample import BadImageError
from models import build_model
from tests.tiny import (
    FROZEN,
    PRETEXT_FLAGS,
    RUN_FLAGS,
    captured_log,
    pre_train,
    read_log,
    tiny_args,
    write_coco,
    write_images,
)
from util.checkpoints.checkpoint import save_checkpoint
from util.logger import log
from util.runs.session import run_script
from util.settings import FINETUNE, PRETRAIN

SCRIPTS = {PRETRAIN: pretrain_main, FINETUNE: finetune_main}
TRAIN, VAL = "train2017", "val2017"


class Started(Exception):
    """Raised instead of building the model: the input was accepted."""


class RunsCode:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def write_changed_coco(
    root: Path, name: str, change: Callable[[dict], object], split: str = TRAIN
) -> None:
    """Write a copy of the dataset `coco` with a changed annotation file. Its images are links.

    change: changes the content in place, or returns other content as text or as a list.
    """
    folder = root / name
    shutil.copytree(root / "coco" / "annotations", folder / "annotations")
    for images in (TRAIN, VAL):
        (folder / images).symlink_to(root / "coco" / images)
    file = folder / "annotations" / f"instances_{split}.json"
    content = json.loads(file.read_text())
    other = change(content)
    if isinstance(other, str):
        file.write_text(other)
    elif isinstance(other, list):
        file.write_text(json.dumps(other))
    else:
        file.write_text(json.dumps(content))


def change_first_annotation(**changes: object) -> Callable[[dict], None]:
    return lambda content: content["annotations"][0].update(changes)


ANNOTATIONS = {
    "half": lambda content: json.dumps(content)[:700],
    "nothing": lambda content: "",
    "list": lambda content: [1],
    "no_categories": lambda content: content.pop("categories") and None,
    "no_images": lambda content: content.update(images=[], annotations=[]),
    "no_boxes": lambda content: content.update(annotations=[]),
    "same_ids": lambda content: content["images"].append(content["images"][0]),
    "same_file": lambda content: content["images"].append({**content["images"][0], "id": 99}),
    "many": lambda content: content["annotations"].extend(
        {**content["annotations"][0], "id": 100 + i} for i in range(30)
    ),
    "absent": lambda content: content["images"][1].update(file_name="gone.png"),
    "all_absent": lambda content: (
        [image.update(file_name="gone.png") for image in content["images"]] and None
    ),
    "other_size": lambda content: content["images"][0].update(height=33),
    "other_names": lambda content: content["categories"][0].update(name="violet"),
    "id_120": change_first_annotation(category_id=120),
    "id_minus": change_first_annotation(category_id=-1),
    "id_text": change_first_annotation(category_id="1"),
    "box_nan": change_first_annotation(bbox=[1, 1, float("nan"), 4]),
    "box_zero": change_first_annotation(bbox=[1, 1, 0, 4]),
    "box_negative": change_first_annotation(bbox=[9, 9, -3, 4]),
    "box_outside": change_first_annotation(bbox=[500, 5, 3, 4]),
    "box_partly": change_first_annotation(bbox=[60, 5, 300, 4]),
    "box_null": change_first_annotation(bbox=None),
    "box_three": change_first_annotation(bbox=[1, 2, 3]),
    "unlisted_image": change_first_annotation(image_id=12345),
    "unlisted": change_first_annotation(category_id=50),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with valid data (`coco`, `photos`), and each kind of bad data under its name."""
    root = tmp_path_factory.mktemp("bad")
    write_coco(root / "coco")
    write_images(root / "photos")
    for name, change in ANNOTATIONS.items():
        write_changed_coco(root, name, change)
    for name in ("half", "no_boxes", "absent", "other_names"):
        write_changed_coco(root, f"{name}_val", ANNOTATIONS[name], VAL)
    (root / "empty").mkdir()
    make_bad_images(root)
    make_bad_files(root)
    make_checkpoints(root)
    return root


def make_bad_images(root: Path) -> None:
    for name in ("text", "notes", "tiny", "strips"):
        (root / name).mkdir()
    (root / "notes" / "read.me").write_text("no image")
    for i in range(4):
        (root / "text" / f"{i}.jpg").write_text("not an image")
        Image.new("RGB", (9, 9)).save(root / "tiny" / f"{i}.png")
        Image.new("RGB", (4000, 18)).save(root / "strips" / f"{i}.png")
    shutil.copytree(root / "photos", root / "some_bad")
    (root / "links").mkdir()
    (root / "links" / "lost.png").symlink_to(root / "gone" / "lost.png")
    for name in ("000.png", "001.png"):
        (root / "links" / name).symlink_to(root / "photos" / name)
    whole = (root / "some_bad" / "000.png").read_bytes()
    (root / "some_bad" / "000.png").write_bytes(whole[: len(whole) // 2])
    (root / "some_bad" / "001.png").write_bytes(b"")
    for split in (TRAIN, VAL):
        folder = root / f"bad_{split}"
        shutil.copytree(root / "coco", folder)
        for file in (folder / split).iterdir():
            file.write_text("not an image")
    folder = root / "shared"
    shutil.copytree(root / "coco", folder)
    shutil.rmtree(folder / VAL)
    shutil.copytree(folder / TRAIN, folder / VAL)
    shutil.copy(
        folder / "annotations" / f"instances_{TRAIN}.json",
        folder / "annotations" / f"instances_{VAL}.json",
    )


def make_bad_files(root: Path) -> None:
    (root / "file").write_text("mine")
    (root / "taken").mkdir()
    (root / "taken" / "results.json").write_text("mine")
    (root / "list.txt").write_text("photos/000.png\nphotos/gone.png\nphotos/001.png\n")
    (root / "lost.txt").write_text("gone.png\n")
    (root / "no_val").mkdir()
    (root / "no_val" / TRAIN).symlink_to(root / "coco" / TRAIN)
    (root / "no_val" / "annotations").symlink_to(root / "coco" / "annotations")


def make_checkpoints(root: Path) -> None:
    for name, script, flags in (
        ("detr", FINETUNE, ()),
        ("conditional", FINETUNE, ("--detector", "conditional_detr")),
        ("pretext", PRETRAIN, ()),
    ):
        args = tiny_args(script, "--backbone_norm", "frozen", *flags)
        stored = {"nheads": 4, "pretext": args.pretext, "script": script}
        save_checkpoint(
            {"model": build_model(args)[0].state_dict(), "args": stored}, root / f"{name}.pth"
        )
    whole = (root / "detr.pth").read_bytes()
    (root / "cut.pth").write_bytes(whole[: len(whole) // 2])
    (root / "text.pth").write_text("<html>not here</html>\n")
    (root / "zero.pth").write_bytes(b"")
    (root / "code.pkl").write_bytes(pickle.dumps({"model": RunsCode(root / "it_ran")}))
    torch.save({"model": RunsCode(root / "it_ran")}, root / "code.pth")
    torch.save([1, 2], root / "list.pth")
    torch.save({"model": {"conv1.weight": torch.zeros(3)}}, root / "backbone.pth")


@pytest.fixture(autouse=True)
def _restore_logger():
    """`run_script` sends the log to standard output; other tests read it through the parent logger."""
    handlers, propagate = list(log.handlers), log.propagate
    yield
    log.handlers[:], log.propagate = handlers, propagate


def call(
    script: str, words: list, monkeypatch: pytest.MonkeyPatch | None = None
) -> tuple[int | str, list[str]]:
    """Run an entry script in this process and return (exit status or "started", log lines).

    With `monkeypatch`, the script stops before it builds the model.
    """
    module = SCRIPTS[script]
    if monkeypatch is not None:

        def start(*_: object) -> None:
            raise Started

        monkeypatch.setattr(module, "build_model", start)
    flags = [*RUN_FLAGS, "--epochs", "1", "--data_root", "/nowhere"]
    if script == PRETRAIN:
        flags += PRETEXT_FLAGS
    with captured_log() as lines:
        try:
            run_script(module.main, module.parse, [*flags, *map(str, words)])
        except SystemExit as error:
            return error.code, lines
        except Started:
            return "started", lines
    return 0, lines


def modification_times(root: Path) -> dict[str, int]:
    return {str(path): path.lstat().st_mtime_ns for path in root.rglob("*") if not path.is_dir()}


# -------------------------------------------------------------------------------------------------------------- errors

F, P = FINETUNE, PRETRAIN
REFUSED = [
    # name, script, flags, pattern of the error, exit status
    (
        "missing folder",
        F,
        "--coco_path {root}/none",
        "{root}/none is not a folder: --coco_path takes",
        1,
    ),
    (
        "missing folder",
        P,
        "--imagenet_path {root}/none",
        "{root}/none does not exist; give a folder of images",
        1,
    ),
    (
        "empty folder",
        F,
        "--coco_path {root}/empty",
        "{root}/empty has neither train2017 nor images/train2017: put .* custom",
        1,
    ),
    (
        "empty folder",
        P,
        "--imagenet_path {root}/empty",
        "{root}/empty contains no image .*; give a folder",
        1,
    ),
    ("no images", F, "--coco_path {root}/notes", "{root}/notes has neither", 1),
    (
        "no images",
        P,
        "--imagenet_path {root}/notes",
        "{root}/notes contains no image \\(1 other files\\); give",
        1,
    ),
    (
        "no validation images",
        F,
        "--coco_path {root}/no_val",
        "{root}/no_val has neither val2017 nor images/val2017",
        1,
    ),
    (
        "a folder of images",
        F,
        "--coco_path {root}/coco/train2017",
        "coco/train2017 has neither train2017 .* --dataset_file custom",
        1,
    ),
    (
        "an annotation file",
        F,
        "--coco_path {root}/list/annotations/instances_val2017.json",
        "is not a folder: .* --dataset_file custom",
        1,
    ),
    (
        "an annotation file",
        P,
        "--imagenet_path {root}/list/annotations/instances_val2017.json",
        "its first entry .{{,90}}\\.\\.\\. does not exist; a list has one path per line",
        1,
    ),
    (
        "a list of missing images",
        P,
        "--imagenet_path {root}/lost.txt",
        "lost.txt: its first entry gone.png does not exist",
        1,
    ),
    (
        "only text files named .jpg",
        P,
        "--imagenet_path {root}/text",
        "none of 4 .*/text/0.jpg: can't be decoded .*; check the image folder",
        1,
    ),
    (
        "only text files named .png",
        F,
        "--coco_path {root}/bad_train2017",
        "none of 4 .*/train2017/000000.png: can't be decoded",
        1,
    ),
    (
        "only text files in validation",
        F,
        "--coco_path {root}/bad_val2017",
        "none of 3 .*/val2017/000000.png: can't be decoded",
        1,
    ),
    (
        "tiny images",
        P,
        "--imagenet_path {root}/tiny",
        "none of 4 .*/tiny/0.png: 9 x 9 pixels; both sides must exceed 16",
        1,
    ),
    (
        "a truncated file",
        F,
        "--coco_path {root}/half",
        "half/.*_train2017.json is not valid JSON \\(.*\\): is the download complete",
        1,
    ),
    (
        "a truncated file",
        F,
        "--coco_path {root}/half_val",
        "half_val/.*_val2017.json is not valid JSON",
        1,
    ),
    ("an empty file", F, "--coco_path {root}/nothing", "nothing/.*.json is not valid JSON", 1),
    (
        "a list",
        F,
        "--coco_path {root}/list",
        "list/.*.json has no list 'images': a COCO detection file has",
        1,
    ),
    (
        "no categories",
        F,
        "--coco_path {root}/no_categories",
        "has no list 'categories': a COCO detection file has",
        1,
    ),
    (
        "no images listed",
        F,
        "--coco_path {root}/no_images",
        "no_images/.*.json lists no images: give",
        1,
    ),
    (
        "no boxes",
        F,
        "--coco_path {root}/no_boxes",
        "no_boxes/.*.json has no box that can be trained on: .* main.py",
        1,
    ),
    (
        "a duplicate image id",
        F,
        "--coco_path {root}/same_ids",
        "two images have the same id 1: ids must be unique",
        1,
    ),
    (
        "a large category id",
        F,
        "--coco_path {root}/id_120",
        "has category id 120, but --num_classes is 91: .* --num_classes 121",
        1,
    ),
    (
        "too few classes",
        F,
        "--coco_path {root}/coco --num_classes 2",
        "has category id 3, but --num_classes is 2: .* --num_classes 4",
        1,
    ),
    (
        "a negative category id",
        F,
        "--coco_path {root}/id_minus",
        "category_id of .* is -1: it must be at least 0",
        1,
    ),
    (
        "a string as an id",
        F,
        "--coco_path {root}/id_text",
        "category_id of .* is '1': it must be an integer",
        1,
    ),
    (
        "no bbox",
        F,
        "--coco_path {root}/box_null",
        "annotation 1 of image 1 has bbox None: it must be",
        1,
    ),
    (
        "a short bbox",
        F,
        "--coco_path {root}/box_three",
        "annotation 1 of image 1 has bbox \\[1, 2, 3\\]: it must be",
        1,
    ),
    (
        "all images missing",
        F,
        "--coco_path {root}/all_absent",
        "4 of 4 images of .* are not in .*: gone.png \\(image 1\\): add",
        1,
    ),
    (
        "a missing validation image",
        F,
        "--coco_path {root}/absent_val",
        "1 of 3 images of .*: gone.png \\(image 502\\): add the files",
        1,
    ),
    (
        "a large batch",
        F,
        "--coco_path {root}/coco --batch_size 64",
        "4 training images are fewer than .* --batch_size 4 or less",
        1,
    ),
    (
        "a large batch",
        P,
        "--imagenet_path {root}/photos --batch_size 64",
        "4 training images are fewer .* --batch_size 4 or less",
        1,
    ),
    # flags
    (
        "patches",
        P,
        "--imagenet_path {root}/photos --num_patches 3",
        "--num_patches 3 does not divide --num_queries 20.*: use --num_patches 2,",
        1,
    ),
    ("unknown", F, "--coco_pth x", "unknown argument --coco_pth; did you mean --coco_path", 2),
    (
        "unknown",
        P,
        "--imagnet_path x",
        "unknown argument --imagnet_path; did you mean --imagenet_path",
        2,
    ),
    (
        "of the other script",
        P,
        "--pretrain x",
        "--pretrain is a flag of finetune_main.py, not of main.py",
        2,
    ),
    ("of the other script", F, "--num_patches 3", "--num_patches is a flag of main.py", 2),
    ("no value", F, "--coco_path", "argument --coco_path: expected one argument", 2),
    ("a wrong choice", F, "--detector dert", "--detector.*: invalid choice: 'dert' .*'detr'", 2),
    ("size 0", F, "--image_size 0", "--image_size: must be above 0, got 0", 2),
    (
        "size 1",
        P,
        "--imagenet_path {root}/photos --image_size 1",
        "--image_size 1: .* use 32 or more",
        1,
    ),
    ("weight 0", F, "--eos_coef 0", "--eos_coef: must be above 0, got 0", 2),
    ("learning rate inf", F, "--lr inf", "--lr: must be above 0, got inf", 2),
    ("clip nan", F, "--clip_max_norm nan", "--clip_max_norm: must be a finite number, got nan", 2),
    (
        "fraction above 1",
        F,
        "--coco_path {root}/coco --detector conditional_detr --focal_alpha 7",
        "--focal_alpha 7 is a fraction",
        1,
    ),
    (
        "a huge seed",
        P,
        f"--imagenet_path x --seed {10**30}",
        f"--seed {10**30} has more than 63 bits: choose",
        1,
    ),
    (
        "no such device",
        F,
        "--device mps",
        "--device: mps is not supported: use cuda, cuda:N or cpu",
        2,
    ),
    (
        "contradiction",
        P,
        "--imagenet_path x --coco_path y",
        "--imagenet_path and --coco_path both name the unlabelled images",
        1,
    ),
    (
        "contradiction",
        P,
        "--imagenet_path x --fre_cnn --lr_backbone 1e-4",
        "--fre_cnn freezes the backbone and --lr_backbone 0.0001",
        1,
    ),
    (
        "contradiction",
        F,
        "--coco_path x --resume auto --overwrite --output_dir y",
        "--overwrite replaces the run that --resume",
        1,
    ),
    (
        "contradiction",
        F,
        "--coco_path x --start_epoch 5",
        "--start_epoch 5 leaves nothing to train of --epochs 1",
        1,
    ),
    (
        "contradiction",
        F,
        "--coco_path x --dataset_file custom",
        "--coco_path x is not for --dataset_file custom: give --train_images",
        1,
    ),
    (
        "incomplete",
        F,
        "--coco_path x --eval",
        "--eval needs the detector to evaluate: add --resume PATH",
        1,
    ),
    (
        "incomplete",
        F,
        "--coco_path x --resume auto",
        "--resume auto looks for checkpoint.pth in --output_dir: add --output_dir",
        1,
    ),
    ("incomplete", P, "", "no unlabelled images: give --imagenet_path DIR", 1),
    ("incomplete", F, "--dataset_file custom", "--dataset_file custom needs --train_images", 1),
    (
        "no such images",
        F,
        "--dataset_file custom --train_images {root}/none --train_annotations {root}/coco/annotations",
        "--train_images {root}/none is not a folder: give the one",
        1,
    ),
    # output folders
    (
        "a file",
        F,
        "--coco_path {root}/coco --output_dir {root}/file",
        "--output_dir {root}/file is not writable: .*; choose another",
        1,
    ),
    (
        "below a file",
        P,
        "--imagenet_path {root}/photos --output_dir {root}/file/out",
        "file/out is not writable: .*; choose",
        1,
    ),
    (
        "the images' folder",
        P,
        "--imagenet_path {root}/photos --output_dir {root}/photos",
        "--output_dir {root}/photos is inside the image folder .*: choose another folder",
        1,
    ),
    (
        "below the images",
        P,
        "--imagenet_path {root}/photos --output_dir {root}/photos/out",
        "out is inside the image folder",
        1,
    ),
    (
        "next to a file of this name",
        F,
        "--coco_path {root}/coco --output_dir {root}/taken",
        "--output_dir {root}/taken already contains another run \\(results.json\\); .*--overwrite to replace it, "
        "or choose another",
        1,
    ),
    (
        "next to a file of this name",
        F,
        "--coco_path {root}/coco --eval --resume {root}/detr.pth --output_dir {root}/taken",
        "--output_dir {root}/taken already contains other files \\(results.json\\); --overwrite to replace it, "
        "or choose another",
        1,
    ),
    (
        "resumed into another run",
        F,
        "--coco_path {root}/coco --resume {root}/detr.pth --output_dir {root}/taken",
        "--output_dir {root}/taken already contains another run",
        1,
    ),
    # checkpoints
    (
        "another detector",
        F,
        "--detector detr --pretrain {root}/conditional.pth",
        "--detector detr contradicts {root}/conditional.pth, .* conditional_detr; omit",
        1,
    ),
    (
        "other sizes",
        F,
        "--resume {root}/detr.pth --hidden_dim 64",
        "--hidden_dim 64 contradicts {root}/detr.pth, .* 32; omit",
        1,
    ),
    (
        "of pre-training",
        F,
        "--resume {root}/pretext.pth --eval",
        "pretext.pth is from pre-training .*--pretrain",
        1,
    ),
    (
        "of fine-tuning",
        P,
        "--imagenet_path x --resume {root}/detr.pth",
        "detr.pth contains a detector without a pretext",
        1,
    ),
]
CHECKPOINTS = [
    ("cut.pth", "an incomplete checkpoint .*download or save it again"),
    ("text.pth", "it is a text file .*; download the file itself"),
    ("zero.pth", "is empty; download or save it again"),
    ("gone.pth", "no such file; check the path"),
    ("code.pkl", "may run code, so it is not loaded; save only its tensors"),
    (
        "code.pth",
        "contains the Python object .*, which may run code, so it is not loaded; save only its tensors",
    ),
    ("list.pth", "contains a list, not a checkpoint .*; choose another file"),
    ("backbone.pth", "contains a backbone, but no detector; pass it as --backbone_weights"),
    ("empty", "is a folder, not a checkpoint; give the file in it"),
    ("photos/000.png", "it is not a torch.save file, .*; choose another file"),
]
for file, text in CHECKPOINTS:
    REFUSED += [
        (file, F, f"--pretrain {{root}}/{file}", f"{{root}}/{file}.* {text}", 1),
        (file, F, f"--eval --resume {{root}}/{file}", f"{{root}}/{file}.* {text}", 1),
        (file, P, f"--imagenet_path x --resume {{root}}/{file}", f"{{root}}/{file}.* {text}", 1),
    ]


@pytest.mark.parametrize(
    ("name", "script", "words", "pattern", "status"),
    REFUSED,
    ids=[f"{row[0]}-{row[1]}-{row[2]}" for row in REFUSED],
)
def test_bad_input_raises_a_one_line_error(
    name: str,
    script: str,
    words: str,
    pattern: str,
    status: int,
    root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture,
) -> None:
    monkeypatch.chdir(tmp_path)
    before = modification_times(root)
    words = words.format(root=root).split()
    if "--output_dir" not in words and words[-2:] != ["--resume", "auto"]:
        words = ["--output_dir", tmp_path / "out", *words]
    actual_status, lines = call(script, words, monkeypatch)
    captured = capfd.readouterr()
    assert actual_status == status
    if status == 2:  # the parser writes to standard error
        error = captured.err.removesuffix("\n")
    else:
        assert captured.err == ""
        (error,) = [line for line in lines if line.startswith("error: ")]
        assert error == lines[-1]
    assert error.startswith("error: ")
    assert "\n" not in error
    assert "Traceback" not in captured.out + captured.err
    pattern = pattern.replace("{root}", re.escape(str(root)))
    pattern = pattern.replace("{{", "{").replace("}}", "}")
    assert re.search(pattern, error), error
    assert modification_times(root) == before
    assert modification_times(tmp_path) == {}


def test_code_in_a_checkpoint_does_not_run(root: Path) -> None:
    """Unpickling these files, as above, would create `it_ran`."""
    for file in ("code.pkl", "code.pth"):
        status, _ = call(
            FINETUNE, ["--coco_path", root / "coco", "--backbone_weights", root / file]
        )
        assert status == 1
    assert not (root / "it_ran").exists()
    pickle.loads((root / "code.pkl").read_bytes())  # noqa: S301 - shows that the file does run code
    assert (root / "it_ran").exists()
    (root / "it_ran").unlink()


# ------------------------------------------------------------------------------------------------------------ warnings

WARNED = [
    # name, script, flags, pattern of the warning
    (
        "no boxes in validation",
        F,
        "--coco_path {root}/no_boxes_val",
        "no_boxes_val/.*.json has no box: AP will be -1",
    ),
    (
        "a missing image",
        F,
        "--coco_path {root}/absent",
        "1 of 4 images of .* are not in .*: gone.png \\(image 2\\): they are skipped",
    ),
    (
        "two images with one file",
        F,
        "--coco_path {root}/same_file",
        "file name twice: 1 .* keep one entry\\), the first: .*000000.png",
    ),
    (
        "another size",
        F,
        "--coco_path {root}/other_size",
        "1 of 4 .* can't be used, .*000000.png: 72 x 60 pixels, but image 1 is 72 x 33",
    ),
    (
        "many objects",
        F,
        "--coco_path {root}/many",
        "more objects than queries: 1 .* larger --num_queries .* image 1, 3\\d objects, --num_queries 20",
    ),
    (
        "shared images",
        F,
        "--coco_path {root}/shared",
        "shared image: 4 .* remove it from one\\), the first: .*shared/val2017/000000.png, image 1, same as "
        ".*train2017/000000.png, image 1",
    ),
    (
        "other class names",
        F,
        "--coco_path {root}/other_names_val",
        "classes differ: .* same list of categories.* class 1 is 'red' in .* and 'violet' here",
    ),
    (
        "an unlisted category",
        F,
        "--coco_path {root}/unlisted",
        "category ids \\[50\\] are used but not listed",
    ),
    (
        "an unlisted image",
        F,
        "--coco_path {root}/unlisted_image",
        "1 annotation of images that the file does not list is skipped, the first is annotation 1 of image 12345",
    ),
    (
        "NaN",
        F,
        "--coco_path {root}/box_nan",
        "1 annotation with a box that is not finite is skipped, .* annotation 1 of image 1",
    ),
    (
        "width 0",
        F,
        "--coco_path {root}/box_zero",
        "1 annotation with a box without area, .* annotation 1 of image 1",
    ),
    (
        "width -3",
        F,
        "--coco_path {root}/box_negative",
        "1 annotation with a box without area, .* annotation 1 of image 1",
    ),
    (
        "outside",
        F,
        "--coco_path {root}/box_outside",
        "1 annotation with a box .* outside its image, .* annotation 1 of image 1",
    ),
    (
        "partly outside",
        F,
        "--coco_path {root}/box_partly",
        "box partly outside: 1 \\(clipped .* annotation 1",
    ),
    (
        "some bad images",
        P,
        "--imagenet_path {root}/some_bad",
        "2 of 4 .* can't be used, the first is .*000.png: can't be decoded",
    ),
    (
        "a broken link",
        P,
        "--imagenet_path {root}/links",
        "1 of 3 .* can't be used, the first is .*lost.png: no such file",
    ),
    (
        "a missing image in a list",
        P,
        "--imagenet_path {root}/list.txt",
        "1 of 3 .* can't be used, the first is .*gone.png: no such file",
    ),
]


@pytest.mark.parametrize(
    ("name", "script", "words", "pattern"), WARNED, ids=[row[0] for row in WARNED]
)
def test_bad_input_logs_a_warning_before_training(
    name: str, script: str, words: str, pattern: str, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    status, lines = call(script, words.format(root=root).split(), monkeypatch)
    assert status == "started"
    (line,) = [line for line in lines if re.search(pattern, line)]
    assert "\n" not in line
    summaries = [line for line in lines if line.startswith("data check: ")]
    assert "warning(s); python tools/check_dataset.py" in summaries[-1]


def test_valid_data_give_no_warning(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The images of both splits have the same names, but are different."""
    for script, words in (
        (FINETUNE, ["--coco_path", root / "coco"]),
        (PRETRAIN, ["--imagenet_path", root / "photos"]),
    ):
        status, lines = call(script, words, monkeypatch)
        assert status == "started"
        assert lines[-1] == "data check: no warnings"


def test_extreme_aspect_ratios_are_resized(root: Path) -> None:
    """4000 x 18 pixels would become less than one pixel high at this size."""
    status, _ = call(PRETRAIN, ["--imagenet_path", root / "strips", "--dry_run"])
    assert status == 0


def test_image_modes_and_undecodable_images(root: Path, tmp_path: Path) -> None:
    gray = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16))
    for name, mode in (
        ("gray.png", "L"),
        ("cmyk.jpg", "CMYK"),
        ("palette.png", "P"),
        ("ünï — 图.png", "RGBA"),
        ("bits.png", "1"),
    ):
        gray.convert("RGB").convert(mode).save(tmp_path / name)
    for path in tmp_path.iterdir():
        assert open_image(str(path)).mode == "RGB"
    for name, reason in (
        ("some_bad/000.png", "truncated"),
        ("some_bad/001.png", "an empty file"),
        ("text/0.jpg", "unknown image format"),
    ):
        with pytest.raises(BadImageError, match=rf"can't be decoded \(.*{reason}"):
            open_image(str(root / name))


# --------------------------------------------------------------------------------------------------- devices and disks


def test_missing_devices(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for script, data in (
        (FINETUNE, ["--coco_path", root / "coco"]),
        (PRETRAIN, ["--imagenet_path", root / "photos"]),
    ):
        status, lines = call(script, [*data, "--device", "cuda"], monkeypatch)
        assert status == 1
        assert re.search(
            "error: --device cuda: no CUDA GPU is visible to PyTorch .*; use --device cpu",
            lines[-1],
        )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    status, lines = call(
        FINETUNE, ["--coco_path", root / "coco", "--device", "cuda:7"], monkeypatch
    )
    assert status == 1
    assert (
        "error: --device cuda:7: there are 2 GPUs, counted from cuda:0; use one of them"
        in lines[-1]
    )


@pytest.mark.parametrize(
    ("errno_", "remedy"),
    [
        (errno.EACCES, "; choose"),
        (errno.EROFS, "; choose"),
        (errno.ENOSPC, "; free some space or choose"),
    ],
)
def test_output_folder_without_write_access(
    errno_: int, remedy: str, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, content: bytes) -> None:
        path.touch()  # on a full disk an empty file can be created
        raise OSError(errno_, os.strerror(errno_))

    monkeypatch.setattr(Path, "write_bytes", refuse)
    status, lines = call(
        FINETUNE, ["--coco_path", root / "coco", "--output_dir", tmp_path], monkeypatch
    )
    assert status == 1
    assert lines[-1].startswith(
        f"error: --output_dir {tmp_path} is not writable: {os.strerror(errno_)}{remedy}"
    )
    assert list(tmp_path.iterdir()) == []


def test_disk_without_space_for_a_checkpoint(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(2**40, 2**40 - 2**20, 2**20))
    for script, data in (
        (FINETUNE, ["--coco_path", root / "coco"]),
        (PRETRAIN, ["--imagenet_path", root / "photos"]),
    ):
        status, lines = call(script, [*data, "--output_dir", tmp_path])
        assert status == 1
        assert re.search(
            r"error: --output_dir .*: a checkpoint needs 1\d\d MiB, the disk has 1 MiB left; free some space",
            lines[-1],
        )
    assert list(tmp_path.iterdir()) == []


@contextlib.contextmanager
def limited_file_size(size: int):
    """Make the kernel refuse to write more than `size` bytes into a file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_disk_that_fills_up_during_training(root: Path, tmp_path: Path) -> None:
    words = ["--imagenet_path", root / "photos", "--output_dir", tmp_path, *FROZEN]
    pre_train(*words, "--epochs", 1)
    before = (tmp_path / "checkpoint.pth").read_bytes()
    with limited_file_size(2**20):
        status, lines = call(PRETRAIN, [*words, "--epochs", 2, "--resume", "auto"])
    assert status == 1
    (error,) = [line for line in lines if line.startswith("error: ")]
    assert re.search(
        r"cannot write .*checkpoint.pth: disk full \(.*\); the previous file is kept; free some space or choose",
        error,
    )
    assert (tmp_path / "checkpoint.pth").read_bytes() == before
    pre_train(*words, "--epochs", 2, "--resume", "auto")
    assert [line["epoch"] for line in read_log(tmp_path)] == [0, 1]
