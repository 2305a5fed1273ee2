"""tools/visualize_pretext.py, and the evaluation of pre-trained models by main.py."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

import main as pretrain_main
import visualization
from predictor import Predictor
from tests.published_files import published_files
from tests.tiny import (
    FROZEN,
    PRETEXT_FLAGS,
    RUN_FLAGS,
    captured_log,
    pre_train,
    read_log,
    write_coco,
    write_images,
    write_voc,
)
from tools import evaluate_proposals, visualize_pretext
from util.errors import UserError
from util.runs.session import start_session
from util.settings import FINETUNE, PRETRAIN
from util.settings import settings as make_settings

REGION = (
    "--pretext",
    "region_prior",
    "--proposals",
    "random",
    "--num_patches",
    "10",
    "--max_prop",
    "6",
)
BATCH = "2"


def draw(*flags: object) -> list[str]:
    with captured_log() as lines:
        visualize_pretext.main(
            visualize_pretext.parse([*RUN_FLAGS, *PRETEXT_FLAGS, *map(str, flags)])
        )
    return lines


def visualize(*flags: object) -> None:
    visualize_pretext.main(visualize_pretext.parse([str(flag) for flag in flags]))


def size(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        return image.size


@pytest.fixture(scope="module")
def region_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images, a COCO dataset, and a run of region prior on the images. Tests copy the run before they write to it."""
    root = tmp_path_factory.mktemp("region")
    images = write_images(root / "images")
    write_coco(root / "coco")
    flags = (*REGION, *FROZEN, "--imagenet_path", images, "--epochs", "1")
    pre_train(*flags, "--output_dir", root / "run")
    return root


def test_samples_need_no_checkpoint(tmp_path: Path) -> None:
    images = write_images(tmp_path / "images")
    draw(*REGION, "--imagenet_path", images, "--output_dir", tmp_path / "a", "--count", "2")
    draw(*REGION, "--imagenet_path", images, "--output_dir", tmp_path / "b", "--count", "4")
    assert size(tmp_path / "b" / "samples.png")[1] > size(tmp_path / "a" / "samples.png")[1]
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["samples.png"]


def test_replaces_its_own_pictures_only(tmp_path: Path) -> None:
    images, folder = write_images(tmp_path / "images"), tmp_path / "a"
    words = (*REGION, "--imagenet_path", images, "--output_dir", folder, "--count")
    draw(*words, "1")
    (folder / "samples.png").rename(
        folder / "patches.png"
    )  # of an earlier run with another pretext
    draw(*words, "2")
    assert [path.name for path in folder.iterdir()] == ["samples.png"]

    own = Image.new("RGB", (4, 4))
    own.save(folder / "samples.png")
    before = (folder / "samples.png").read_bytes()
    with pytest.raises(UserError, match="already has samples.png, which this tool did not draw"):
        draw(*words, "2")
    assert (folder / "samples.png").read_bytes() == before
    draw(*words, "2", "--overwrite")
    assert size(folder / "samples.png") != (4, 4)


def test_failure_leaves_nothing_behind(tmp_path: Path) -> None:
    images, folder = write_images(tmp_path / "images"), tmp_path / "out"
    words = ("--imagenet_path", images, "--output_dir", folder)
    with pytest.raises(UserError, match="no such file"):
        draw("--checkpoint", tmp_path / "none.pth", *words)
    state = published_files()["siamese detr"]
    state["state_dict"].pop("patch2query.bias")
    torch.save(state, tmp_path / "damaged.pth")
    with pytest.raises(UserError, match="lacks patch2query.bias"):
        visualize("--checkpoint", tmp_path / "damaged.pth", *words)
    (images / "bad.png").write_bytes(b"no image")
    with pytest.raises(UserError, match="nothing could be drawn"):
        draw(*REGION, "--imagenet_path", images / "bad.png", "--output_dir", folder)
    assert not folder.exists()


@pytest.mark.parametrize(
    ("kind", "picture"),
    [
        ("detreg", "objects.png"),
        ("detreg detr", "objects.png"),
        ("updetr", "patches.png"),
        ("siamese conditional", "patches.png"),
    ],
)
def test_draws_published_files_without_flags(kind: str, picture: str, tmp_path: Path) -> None:
    torch.save(published_files()[kind], tmp_path / "published.pth")
    write_images(tmp_path / "images")
    visualize(
        *("--checkpoint", tmp_path / "published.pth"),
        *("--imagenet_path", tmp_path / "images" / "000.png", "--output_dir", tmp_path / "out"),
        "--device", "cpu", "--image_size", "64",  # nothing that the file says
    )  # fmt: skip
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [picture, "samples.png"]


def test_draws_patches_of_pretext_and_of_given_boxes(tmp_path: Path) -> None:
    images = write_images(tmp_path / "images")
    pre_train("--imagenet_path", images, "--epochs", "1", "--output_dir", tmp_path / "run", *FROZEN)
    model = ("--checkpoint", tmp_path / "run" / "checkpoint.pth")
    draw(*model, "--output_dir", tmp_path / "a", "--count", "2")  # the images are those of the run
    assert (tmp_path / "a" / "patches.png").exists()
    draw(
        *model,
        "--imagenet_path",
        images / "000.png",
        "--boxes",
        5,
        5,
        40,
        40,
        20,
        10,
        70,
        60,
        "--output_dir",
        tmp_path / "b",
    )
    assert (tmp_path / "b" / "patches.png").exists()
    for boxes, said in (
        ((5, 5, 400, 40), "80"),
        ((5, 5, 40), "3 numbers"),
        ((9, 9, 9, 9), "x0 < x1"),
    ):
        with pytest.raises(UserError, match=said):
            draw(
                *model,
                "--imagenet_path",
                images / "000.png",
                "--boxes",
                *boxes,
                "--output_dir",
                tmp_path / "c",
            )


@pytest.mark.parametrize("flags", [(), ("--feature_loss_coef", "0")], ids=["with crops", "without"])
def test_draws_regions_of_both_siamese_views(flags: tuple, tmp_path: Path) -> None:
    """Both views of each image are drawn, each with the regions of the other."""
    images = write_images(tmp_path / "images")
    pre_train(
        "--pretext",
        "siamese",
        "--proposals",
        "random",
        *flags,
        "--imagenet_path",
        images,
        "--epochs",
        "1",
        "--batch_size",
        "2",
        "--output_dir",
        tmp_path / "run",
        *FROZEN,
    )
    draw(
        "--checkpoint",
        tmp_path / "run" / "checkpoint.pth",
        "--output_dir",
        tmp_path / "a",
        "--count",
        "2",
    )
    draw(
        "--checkpoint",
        tmp_path / "run" / "checkpoint.pth",
        "--output_dir",
        tmp_path / "b",
        "--count",
        "4",
    )
    assert size(tmp_path / "b" / "patches.png")[1] > size(tmp_path / "a" / "patches.png")[1]


def test_draws_objects_with_proposals_and_ground_truth(region_run: Path, tmp_path: Path) -> None:
    coco = region_run / "coco"
    shutil.copytree(region_run / "run", tmp_path / "run")
    model = ("--checkpoint", tmp_path / "run" / "checkpoint.pth", "--num_patches", "10")
    draw(*model, "--output_dir", tmp_path / "a", "--count", "2")
    draw(*model, "--output_dir", tmp_path / "b", "--count", "2", "--truth_path", coco)
    two, three = (size(tmp_path / name / "objects.png") for name in "ab")
    assert three[0] > two[0], "the ground truth is a third panel"


def test_main_eval_is_class_agnostic(region_run: Path, tmp_path: Path) -> None:
    """`./configs/DETReg_top30_in.sh --resume exps/DETReg_top30_in/checkpoint.pth --eval`, as published."""
    images, coco = region_run / "images", region_run / "coco"
    shutil.copytree(region_run / "run", tmp_path / "run")
    words = [
        *RUN_FLAGS,
        *REGION,
        "--imagenet_path",
        images,
        "--coco_path",
        coco,
        "--output_dir",
        tmp_path / "run",
        "--eval",
    ]
    resumed = [*map(str, words), "--resume", str(tmp_path / "run" / "checkpoint.pth")]
    pretrain_main.main(pretrain_main.parse(resumed))
    metrics = tmp_path / "run" / "proposal_metrics.json"
    recall = json.loads(metrics.read_text())["AR100"]
    assert recall >= 0
    page = (tmp_path / "run" / "result.html").read_text()
    assert "Pre-training (region_prior)" in page, "the page is still that of the run"
    assert ">Class-agnostic precision and recall</h2>" in page
    assert f"<td>{recall:.3f}</td>" in page
    assert ">Training images</h2>" in page
    metrics.write_text("{}")
    with pytest.raises(
        UserError,
        match="already has proposal_metrics.json: choose another folder, or add --overwrite",
    ):
        pretrain_main.main(pretrain_main.parse(resumed))
    assert metrics.read_text() == "{}"
    pretrain_main.main(pretrain_main.parse([*resumed, "--overwrite"]))
    assert json.loads(metrics.read_text())["AR100"] >= 0
    assert not (tmp_path / "run" / "objects.png").exists(), "pictures are for --viz"
    with pytest.raises(UserError, match="--eval needs the model"):
        pretrain_main.main(pretrain_main.parse([*map(str, words)]))
    with pytest.raises(
        UserError, match=r"finetune_main.py trains and evaluates .* add --resume PATH"
    ):
        pretrain_main.parse(["--eval", "--coco_path", str(coco)])


def test_main_viz_draws_predicted_boxes(region_run: Path, tmp_path: Path) -> None:
    """Draws DETReg's three panels for each validation image and changes no other file of the run."""
    images, coco = region_run / "images", region_run / "coco"
    shutil.copytree(region_run / "run", tmp_path / "run")
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    words = [
        *RUN_FLAGS,
        *REGION,
        "--imagenet_path",
        images,
        "--data_root",
        tmp_path,
        "--output_dir",
        tmp_path / "run",
        "--viz",
    ]
    (tmp_path / "MSCoco").symlink_to(coco)
    pretrain_main.main(
        pretrain_main.parse(
            [*map(str, words), "--resume", str(tmp_path / "run" / "checkpoint.pth")]
        )
    )
    assert size(tmp_path / "run" / "objects.png")[0] > 3 * 64
    assert before == {name: (tmp_path / "run" / name).read_bytes() for name in before}
    with pytest.raises(UserError, match="--viz needs the model"):
        pretrain_main.main(pretrain_main.parse([*map(str, words)]))


def test_boxes_of_a_file_are_not_drawn_on_labelled_images(
    region_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They belong to the unlabelled images, and images of both may have the same names."""
    flags = {"resume": str(region_run / "run" / "checkpoint.pth"), "eval": True, "device": "cpu"}
    session = start_session(flags, PRETRAIN)
    predictor = Predictor.from_checkpoint(session.checkpoint, device="cpu", class_agnostic=True)
    settings = session.settings.replace(proposals="file:boxes.json")
    labelled = make_settings(FINETUNE, coco_path=str(region_run / "coco"), image_size=64)
    rows: list = []
    monkeypatch.setattr(visualization, "panel_page", lambda page, path: rows.extend(page) or path)
    visualization.draw_objects(predictor, settings, tmp_path / "a.png", labelled=labelled)
    assert [title for title, *_ in rows[0]] == ["predicted", "ground truth"]


def test_class_agnostic_evaluation_during_training(tmp_path: Path) -> None:
    """After every second epoch and the last. The last metrics equal those of --eval; training losses are unchanged."""
    images, coco = write_images(tmp_path / "images"), write_coco(tmp_path / "coco")
    flags = [*REGION, "--imagenet_path", images, "--epochs", "3", "--batch_size", BATCH, *FROZEN]
    pre_train(*flags, "--output_dir", tmp_path / "plain")
    (tmp_path / "MSCoco").symlink_to(coco)
    pre_train(
        *flags, "--output_dir", tmp_path / "run", "--data_root", tmp_path, "--eval_every", "2"
    )
    log = read_log(tmp_path / "run")
    assert ["test_object_AR100" in record for record in log] == [False, True, True]
    assert [r["train_loss"] for r in log] == [r["train_loss"] for r in read_log(tmp_path / "plain")]
    checkpoint = tmp_path / "run" / "checkpoint.pth"
    numbers = evaluate_proposals.main(
        evaluate_proposals.parse(
            [
                "--checkpoint",
                str(checkpoint),
                "--coco_path",
                str(coco),
                "--image_size",
                "64",
                "--num_workers",
                "0",
                "--device",
                "cpu",
                "--batch_size",
                BATCH,
            ]
        )
    )
    assert {f"test_object_{name}": value for name, value in numbers.items()} == {
        name: value for name, value in log[-1].items() if name.startswith("test_")
    }
    with pytest.raises(UserError, match="nowhere"):
        pre_train(
            *flags,
            "--output_dir",
            tmp_path / "b",
            "--data_root",
            tmp_path / "nowhere",
            "--eval_every",
            "2",
        )


def test_class_agnostic_evaluation_uses_data_of_pre_training(tmp_path: Path) -> None:
    """Here VOC's test images, in training and with --eval."""
    data = [
        "--dataset_file",
        "voc",
        "--voc_path",
        write_voc(tmp_path / "VOCdevkit"),
        "--voc_val",
        "2007_test",
    ]
    run, folder = tmp_path / "run", tmp_path / "eval"
    with captured_log() as lines:
        pre_train(
            *REGION,
            *data,
            "--epochs",
            "1",
            "--batch_size",
            BATCH,
            *FROZEN,
            "--output_dir",
            run,
            "--eval_every",
            "1",
        )
        words = [
            "--pretext",
            "region_prior",
            *data,
            "--resume",
            run / "checkpoint.pth",
            "--eval",
            "--output_dir",
            folder,
            "--image_size",
            "64",
            "--num_workers",
            "0",
            "--device",
            "cpu",
            "--batch_size",
            BATCH,
        ]
        pretrain_main.main(pretrain_main.parse([*map(str, words)]))
    numbers, (record,) = json.loads((folder / "proposal_metrics.json").read_text()), read_log(run)
    assert record["test_object_AR100"] == numbers["AR100"]
    assert sum("VOCdevkit (2007_test): 3 images" in line for line in lines) == 2, (
        "in training and by --eval"
    )
