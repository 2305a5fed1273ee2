"""The folder of a run: settings and their origin, samples of the training data, the HTML page, and its commands."""

import json
import random
import re
import shlex
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import finetune_main
import main as pretrain_main
from datasets import build_dataset
from datasets.collate import collate
from models.pretext.random_query_patch import RandomQueryPatch
from tests.faults import states_between_operations
from tests.tiny import (
    FROZEN,
    assert_same,
    captured_log,
    fine_tune,
    pre_train,
    read_checkpoint,
    read_log,
    tiny_args,
    write_coco,
    write_images,
)
from tools import compare_runs
from util.errors import UserError
from util.plots import boxes
from util.runs import page as run_page
from util.runs.folder import (
    collect_environment,
    git_revision,
    log_settings,
    prepare_output_dir,
    read_json_object,
    save_settings,
)
from util.runs.html import slug
from util.runs.log import main_metric, write_log
from util.runs.page import commands, update_run_page, write_run_page
from util.runs.page_analysis import confusion_table
from util.runs.session import start_session
from util.settings import FINETUNE, PRETRAIN, resolve
from util.settings.frozen import GIVEN
from visualization import draw_samples, samples_to_rows

IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data and runs.

    `first`: one epoch; `second`: from the weights of `first`; `pretext`: pre-training; `evaluation`: of `first`.
    """
    root = tmp_path_factory.mktemp("runs")
    coco = write_coco(root / "coco")
    fine_tune("--coco_path", coco, "--output_dir", root / "first", "--epochs", 1, *FROZEN)
    fine_tune(
        "--coco_path", coco, "--output_dir", root / "second", "--epochs", 1,
        "--pretrain", root / "first" / "checkpoint.pth", "--lr_backbone", 0, "--lr", "3e-4",
    )  # fmt: skip
    fine_tune(
        "--resume", root / "first" / "checkpoint.pth", "--eval", "--output_dir", root / "evaluation"
    )
    pre_train(
        "--imagenet_path", write_images(root / "images"), "--output_dir", root / "pretext",
        "--epochs", 1, *FROZEN,
    )  # fmt: skip
    return root


class Reader(HTMLParser):
    """The text, titles and pictures of an HTML page. Checks that tags are closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.text, self.titles, self.pictures = [], "", [], []
        self.alternatives, self.links, self.anchors = [], [], []
        self.feed(text)
        assert self.open == ["html"] or not self.open

    def handle_starttag(self, tag: str, attrs: list) -> None:
        if tag == "img":
            self.pictures.append(dict(attrs)["src"])
            self.alternatives.append(dict(attrs)["alt"])
        elif tag not in ("meta", "br"):
            self.open.append(tag)
        if tag == "a":
            self.links.append(dict(attrs)["href"])
        self.anchors += [dict(attrs)["id"]] if "id" in dict(attrs) else []

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.open and self.open[-1] in ("h1", "h2"):
            self.titles.append(data)


def read_page(folder: Path) -> Reader:
    return Reader((folder / "result.html").read_text(encoding="utf-8"))


# --------------------------------------------------------------------------------------------------- settings, versions


def test_args_json_stores_the_origin_of_settings(runs: Path) -> None:
    first, second = (
        json.loads((runs / name / "args.json").read_text()) for name in ("first", "second")
    )
    assert {"coco_path", "output_dir", "epochs", "hidden_dim", "device"} <= set(first["given"])
    assert first["adopted"] == []
    assert {"lr", "pretrain"} <= set(second["given"])
    assert {"detector", "pre_norm", "backbone_norm"} <= set(second["adopted"])
    for record in (first, second):
        assert set(record["given"]) | set(record["adopted"]) <= set(record["settings"])
        assert not set(record["given"]) & set(record["adopted"])
        assert {"weight_decay", "seed", "amp"} <= set(record["settings"]) - {
            *record["given"],
            *record["adopted"],
        }
    assert first["model"]["parameters"] > first["model"]["trainable"] > 0


def test_device_is_a_default_unless_given(tmp_path: Path) -> None:
    for flags, given in (([], False), (["--device", "cpu"], True)):
        settings = start_session(finetune_main.parse(flags)).settings
        assert ("device" in settings.names_from(GIVEN)) is given
        assert not any(name.startswith("_") for name in settings.as_dict())


def test_log_groups_settings_by_origin(runs: Path, tmp_path: Path) -> None:
    with captured_log() as lines:
        fine_tune(
            "--coco_path", runs / "coco", "--dry_run",
            "--pretrain", runs / "first" / "checkpoint.pth", *FROZEN,
        )  # fmt: skip
    given, adopted, defaults = (
        next(line for line in lines if line.startswith(f"settings, {title}"))
        for title in ("given", "from the checkpoint", "defaults")
    )
    assert "dec_layers=2" in given
    assert "detector=detr" in adopted
    assert "weight_decay=0.0001" in defaults
    assert "dec_layers" not in defaults
    assert "lr_backbone=0.0" in given, "0 is a value"
    assert "sgd=False" in defaults, "and so is False"


def test_environment_and_revision(tmp_path: Path) -> None:
    found = collect_environment()
    assert {
        "command",
        "started",
        "code",
        "python",
        "torch",
        "torchvision",
        "numpy",
        "gpu",
        "processes",
    } <= set(found)
    assert found["torch"] == torch.__version__
    assert git_revision(tmp_path) == "unknown"
    try:
        subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    except (OSError, subprocess.CalledProcessError):
        return  # no git here
    (tmp_path / "a").write_text("a")
    identity = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    subprocess.run(["git", "-C", str(tmp_path), "add", "a"], check=True)
    subprocess.run(["git", "-C", str(tmp_path), *identity, "commit", "-qm", "a"], check=True)
    assert re.fullmatch("[0-9a-f]{40}", git_revision(tmp_path))
    (tmp_path / "a").write_text("b")
    assert re.fullmatch("[0-9a-f]{40}-dirty", git_revision(tmp_path))
    (tmp_path / "inside").mkdir()
    # A copy of the project inside another repository.
    assert git_revision(tmp_path / "inside") == "unknown"


def test_damaged_args_json_is_not_an_error(tmp_path: Path) -> None:
    for content in ("", "{", "[1]"):
        (tmp_path / "args.json").write_text(content)
        assert read_json_object(tmp_path / "args.json") == {}
    assert read_json_object(tmp_path / "none.json") == {}


# ---------------------------------------------------------------------------------------------------- samples.png


def test_samples_show_the_inputs_of_the_model(runs: Path) -> None:
    """Collation and normalization are undone exactly, padding is striped, and boxes are in pixels."""
    dataset = build_dataset("train", tiny_args(FINETUNE, "--coco_path", str(runs / "coco")))
    samples = [dataset[(3, index)] for index in range(4)]
    batch, _ = collate(samples)
    for row, (image, target) in zip(samples_to_rows(samples, **IMAGENET), samples, strict=True):
        _, height, width = image.shape
        assert row["image"].shape[:2] == batch.tensors.shape[-2:]
        assert torch.equal(torch.from_numpy(row["image"][:height, :width]).permute(2, 0, 1), image)
        padding = np.concatenate(
            [row["image"][height:].reshape(-1, 3), row["image"][:height, width:].reshape(-1, 3)]
        )
        assert {tuple(color) for color in padding.tolist()} <= {(124, 116, 104), (225, 225, 225)}
        boxes = target["boxes"] * torch.tensor([width, height, width, height])
        assert torch.allclose(row["boxes"][:, 2:] - row["boxes"][:, :2], boxes[:, 2:])
        assert torch.allclose(row["boxes"].view(-1, 2, 2).mean(1), boxes[:, :2], atol=1e-4)
        assert torch.equal(row["labels"], target["labels"])
    assert batch.padded


def test_samples_of_a_pretext_show_their_patches(runs: Path, tmp_path: Path) -> None:
    dataset = build_dataset("train", tiny_args(PRETRAIN, "--imagenet_path", str(runs / "images")))
    sample = dataset[(0, 1)]
    (row,) = samples_to_rows([sample], **IMAGENET)
    assert [
        torch.from_numpy(patch).permute(2, 0, 1).tolist() for patch in row["patches"]
    ] == sample[1]["patches"].tolist()
    draw_samples(tmp_path, dataset, 2, 0, IMAGENET, count=2)
    with Image.open(tmp_path / "samples.png") as image:
        colors = {color[:3] for _, color in image.convert("RGB").getcolors(1 << 24)}
    assert set(boxes.PALETTE[:5]) <= colors


def test_a_patch_has_the_box_of_its_most_confident_query() -> None:
    classes = torch.tensor([1.0, 0.0, -1.0])  # two classes and "no object"
    logits = torch.tensor([0.0, 3.0, 1.0, 2.0])[None, :, None] * classes  # [1, 4, 3]
    boxes = torch.arange(4.0)[None, :, None].expand(1, 4, 4)
    found, scores = RandomQueryPatch.patch_boxes({"pred_logits": logits, "pred_boxes": boxes}, 2)
    assert found[..., 0].tolist() == [[1.0, 3.0]]
    assert torch.allclose(scores, logits.softmax(-1)[:, [1, 3], 0])


def test_samples_show_class_names(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = []
    monkeypatch.setattr(
        boxes, "draw_label", lambda _draw, text, *_rest, **_options: written.append(text)
    )
    draw_samples(
        tmp_path,
        build_dataset("train", tiny_args(FINETUNE, "--coco_path", str(runs / "coco"))),
        2,
        0,
        IMAGENET,
    )
    assert written
    assert set(written) <= {"red", "green", "blue"}


def test_drawing_samples_changes_no_random_state(runs: Path, tmp_path: Path) -> None:
    dataset = build_dataset("train", tiny_args(FINETUNE, "--coco_path", str(runs / "coco")))
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    draw_samples(tmp_path, dataset, 2, 5, IMAGENET)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1].tolist(), random.getstate()) == before[1:]


def test_writing_a_folder_does_not_change_training(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither samples, nor patches, nor pages draw random numbers: with dropout, each draw would change the weights."""
    states = []
    save = pretrain_main.trainer.save
    monkeypatch.setattr(
        pretrain_main.trainer,
        "save",
        lambda run, names: (
            states.append(
                {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
            ),
            save(run, names),
        ),
    )
    for folder in ("", tmp_path / "run"):
        pre_train(
            "--imagenet_path", runs / "images", "--epochs", 2, "--output_dir", folder, *FROZEN
        )
    assert (tmp_path / "run" / "patches.png").exists()
    assert len(states) == 4
    assert_same(states[1], states[3])


def test_unreadable_samples_do_not_end_a_run(runs: Path, tmp_path: Path) -> None:
    dataset = build_dataset("train", tiny_args(FINETUNE, "--coco_path", str(runs / "coco")))
    dataset.image_folder = str(tmp_path)
    with captured_log() as lines:
        draw_samples(tmp_path, dataset, 2, 0, IMAGENET)
    assert any("no page of training samples" in line for line in lines)


# ---------------------------------------------------------------------------------------------------- result.html


def test_page_of_a_fine_tuning_run(runs: Path) -> None:
    shown = read_page(runs / "second")
    assert shown.titles[0] == "second"
    assert {
        "Average precision (AP) on the validation set",
        "Training losses",
        "Training curves",
        "Predictions on validation images",
        "Settings",
        "Training images",
        "Files in this folder",
        "Commands",
    } <= set(shown.titles)
    assert {"AP per class", "Precision and recall", "Confusions", "Worst images"} <= set(
        shown.titles
    )
    has_best = (runs / "second" / "best_images.png").exists()  # of an untrained model
    assert len(shown.pictures) == 5 + has_best
    assert all(
        source.startswith(("data:image/png;base64,", "data:image/jpeg;base64,"))
        for source in shown.pictures
    )
    assert all(shown.alternatives), "every picture has a text"
    assert set(shown.links) == {f"#{slug(title)}" for title in shown.titles[1:]}
    assert set(shown.links) <= {f"#{anchor}" for anchor in shown.anchors}
    with Image.open(runs / "second" / "curves.png") as image:
        image.load()
        assert min(image.size) > 100
    assert "Epochs finished: 1 of 1" in shown.text
    record = json.loads((runs / "second" / "analysis.json").read_text())
    assert record["worst_images"][0]["file_name"] in shown.text
    assert f"from {runs / 'first' / 'checkpoint.pth'}" in shown.text
    (entry,) = read_log(runs / "second")
    assert f"{entry['train_loss']:.3f}" in shown.text
    files = {path.name for path in (runs / "second").iterdir()} - {"result.html"}
    assert all(name in shown.text for name in files)


def test_page_of_a_pre_training_run(runs: Path) -> None:
    shown = read_page(runs / "pretext")
    assert "Average precision (AP) on the validation set" not in shown.titles
    assert {
        "Training losses",
        "Boxes predicted for query patches",
        "Training images",
    } <= set(shown.titles)
    assert "random_query_patch" in shown.text


def test_the_best_epoch_of_the_page_is_that_of_the_best_checkpoint(tmp_path: Path) -> None:
    """By PQ, else AP of masks, else AP of boxes: here the three have their best in different epochs."""
    boxes, masks, quality = [0.3, 0.2, 0.1], [0.1, 0.35, 0.2], [0.1, 0.2, 0.4]
    entries: list[dict] = [
        {"epoch": i, "test_coco_eval_bbox": [ap] * 12} for i, ap in enumerate(boxes)
    ]
    rows = []
    for key, values in ((None, boxes), ("test_coco_eval_masks", masks), ("test_PQ_all", quality)):
        for entry, value in zip(entries, values, strict=True):
            if key:
                panoptic = {"pq": value, "sq": 0.5, "rq": 0.5}
                entry[key] = panoptic if key == "test_PQ_all" else [value] * 12
        write_log(tmp_path, entries)
        write_run_page(tmp_path)
        rows.append(
            re.findall(r"best epoch \(\d\)</th><td>[\d.]+", (tmp_path / "result.html").read_text())
        )
        assert max(map(main_metric, entries)) == max(values)
    number = "best epoch ({})</th><td>{:.3f}".format
    assert rows == [
        [number(1, 0.3)],
        [number(2, 0.2), number(2, 0.35)],
        [number(3, 0.1), number(3, 0.2), number(3, 0.4)],
    ]


def test_the_page_stays_small(tmp_path: Path) -> None:
    """With pictures of noise, which no format compresses well."""
    noise = np.random.default_rng(0).integers(0, 256, (650, 900, 3), dtype=np.uint8)
    picture = Image.fromarray(noise)
    for name in ("predictions.png", "samples.png", "best_images.png", "worst_images.png",
                 "patches.png", "objects.png", "curves.png", "precision_recall.png"):  # fmt: skip
        picture.save(tmp_path / name, compress_level=0)
    path = write_run_page(tmp_path)
    assert len(read_page(tmp_path).pictures) == 8
    assert path.stat().st_size < 3_000_000


def test_confusion_table_merges_rare_classes() -> None:
    confusions = {(1, 1): 5, (1, 2): 1, (2, None): 3, (3, 1): 1, (None, 4): 2}
    names = {1: "cat", 2: "dog", 3: "cow"}
    table = confusion_table(confusions, names)
    assert table.columns == ["cat", "dog", "cow", "class 4", "missed"]
    assert [name for name, _ in table.rows] == ["cat", "dog", "cow", "class 4", "no object"]
    counts = [[cell.count for cell in cells] for _, cells in table.rows]
    assert counts == [[5, 1, 0, 0, 0], [0, 0, 0, 0, 3], [1, 0, 0, 0, 0], [0] * 5, [0, 0, 0, 2, 0]]
    assert [cell.fraction for cell in table.rows[0][1][:2]] == [5 / 6, 1 / 6]
    assert [cell.is_right for cell in table.rows[0][1]] == [True, False, False, False, False]

    table = confusion_table(confusions, names, limit=1)
    assert table.columns == ["cat", "other classes", "missed"]
    counts = [[cell.count for cell in cells] for _, cells in table.rows]
    assert counts == [[5, 1, 0], [1, 0, 3], [0, 2, 0]]


def test_page_of_an_evaluation(runs: Path) -> None:
    shown = read_page(runs / "evaluation")
    assert "Evaluation of detr" in shown.text
    assert {
        "Average precision (AP) on the validation set",
        "Predictions on validation images",
    } <= set(shown.titles)
    assert not (runs / "evaluation" / "args.json").exists()


def test_evaluation_in_the_folder_of_a_run_keeps_args_json(runs: Path) -> None:
    before = (runs / "first" / "args.json").read_bytes()
    fine_tune(
        "--resume", runs / "first" / "checkpoint.pth", "--eval", "--output_dir", runs / "first"
    )
    assert (runs / "first" / "args.json").read_bytes() == before
    shown = read_page(runs / "first")
    assert "Fine-tuning of detr" in shown.text
    assert "eval_args.json" in shown.text


def test_interrupted_run_has_a_page(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(_run) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(finetune_main.trainer, "fit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fine_tune("--coco_path", runs / "coco", "--output_dir", tmp_path, "--epochs", 3, *FROZEN)
    shown = read_page(tmp_path)
    assert "Epochs finished: 0 of 3" in shown.text
    assert shown.titles.count("Training images") == 1


def test_resumed_run_stores_its_earlier_starts(runs: Path, tmp_path: Path) -> None:
    flags = ["--output_dir", tmp_path, "--num_workers", 0]
    fine_tune("--coco_path", runs / "coco", *flags, "--epochs", 1, *FROZEN)
    first = json.loads((tmp_path / "args.json").read_text())["environment"]
    fine_tune(*flags, "--resume", "auto", "--epochs", 2)
    record = json.loads((tmp_path / "args.json").read_text())
    assert record["earlier_starts"] == [first]
    assert "coco_path" in record["adopted"]
    assert "Epochs finished: 2 of 2" in read_page(tmp_path).text


def test_resuming_with_other_data_logs_a_warning(runs: Path, tmp_path: Path) -> None:
    flags = ["--output_dir", tmp_path, *FROZEN]
    fine_tune("--coco_path", runs / "coco", *flags, "--epochs", 1)
    other = write_coco(tmp_path / "other", train=6)
    for place, expected in ((runs / "coco", False), (other, True)):
        with captured_log() as lines:
            fine_tune("--coco_path", place, *flags, "--epochs", 2, "--resume", "auto")
        assert (
            any(
                line.startswith("the training data changed since the checkpoint was saved (")
                for line in lines
            )
            is expected
        )


def test_requeued_run_without_a_checkpoint_starts_from_scratch(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The job was killed before its first checkpoint, and is requeued with the same command."""
    flags = [
        "--coco_path", runs / "coco", "--output_dir", tmp_path, "--epochs", 1, "--resume", "auto",
        *FROZEN,
    ]  # fmt: skip
    with monkeypatch.context() as patch:
        patch.setattr(finetune_main.trainer, "fit", lambda run: None)
        fine_tune(*flags)
    assert not (tmp_path / "checkpoint.pth").exists()
    fine_tune(*flags)
    for path in tmp_path.glob("*.pth"):  # the best one would do too
        path.unlink()
    with pytest.raises(UserError, match=r"already contains another run \(log.txt\)"):
        fine_tune(*flags)


def test_overwrite_removes_all_files_of_the_previous_run(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("predictions.png", "metrics.json", "curves.png", "log.txt", "args.json"):
        (tmp_path / name).write_bytes((runs / "first" / name).read_bytes())
    (tmp_path / "checkpoint0099.pth").write_bytes(b"of the previous run")
    monkeypatch.setattr(finetune_main.trainer, "fit", lambda run: None)
    fine_tune(
        "--coco_path", runs / "coco", "--output_dir", tmp_path, "--epochs", 3, "--overwrite",
        *FROZEN,
    )  # fmt: skip
    shown = read_page(tmp_path)
    assert not {
        "Average precision (AP) on the validation set",
        "Training curves",
        "Predictions on validation images",
    } & set(shown.titles)
    assert not (tmp_path / "checkpoint0099.pth").exists()


def test_overwrite_removes_nothing_if_the_new_run_fails_to_start(
    runs: Path, tmp_path: Path
) -> None:
    """Because of a wrong path, or because it starts from a checkpoint that would be removed."""
    for name in ("log.txt", "args.json", "checkpoint.pth"):
        (tmp_path / name).write_bytes((runs / "first" / name).read_bytes())
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError, match="not a folder"):
        fine_tune(
            "--coco_path", tmp_path / "typo", "--output_dir", tmp_path, "--overwrite", *FROZEN
        )
    with pytest.raises(
        UserError, match="--overwrite would remove the checkpoint that this run starts from"
    ):
        fine_tune(
            "--coco_path", runs / "coco", "--pretrain", tmp_path / "checkpoint.pth",
            "--output_dir", tmp_path, "--overwrite",
        )  # fmt: skip
    assert sorted(tmp_path.iterdir()) == before


def test_overwrite_that_is_killed_leaves_no_file_that_a_new_run_takes_for_its_own(
    tmp_path: Path,
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    for name in ("log.txt", "checkpoint.pth", "checkpoint0003.pth", "checkpoint_step_000007.pth"):
        (run / name).write_text("of the previous run")
    (run / "args.json").write_text("{}")
    settings = tiny_args(FINETUNE, "--output_dir", str(run), "--overwrite")
    states = states_between_operations(
        run, lambda: save_settings(run, settings, {}), tmp_path / "states"
    )
    assert len(states) > 5
    for folder in states.values():
        save_settings(folder, settings, {})
        assert [path.name for path in folder.iterdir()] == ["args.json"]


@pytest.mark.parametrize("name", ["TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"])
def test_a_restarted_job_does_not_overwrite_itself(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = tiny_args(FINETUNE, "--output_dir", str(tmp_path), "--overwrite")
    monkeypatch.setenv(name, "1")
    (tmp_path / "args.json").write_text("{}")
    assert prepare_output_dir(settings) == tmp_path  # killed before it saved anything
    (tmp_path / "checkpoint.pth").write_text("of this job")
    with pytest.raises(UserError, match="--overwrite would remove what this job wrote"):
        prepare_output_dir(settings)
    monkeypatch.setenv(name, "0")
    assert prepare_output_dir(settings) == tmp_path


def test_remedy_for_an_occupied_folder(runs: Path, tmp_path: Path) -> None:
    """`--resume auto` is suggested only if there is a checkpoint to resume from."""
    (tmp_path / "eval_args.json").write_text("{}")
    for more in ((), ("--resume", "auto")):
        with pytest.raises(
            UserError,
            match=r"already contains an evaluation \(eval_args.json\); --overwrite to replace it",
        ):
            fine_tune("--coco_path", runs / "coco", "--output_dir", tmp_path, *more, *FROZEN)
    with pytest.raises(
        UserError,
        match=r"already contains another run \(log.txt\); add --resume auto to continue it, --overwrite",
    ):
        fine_tune("--coco_path", runs / "coco", "--output_dir", runs / "first", *FROZEN)


def test_commands_of_the_page_can_be_parsed(runs: Path) -> None:
    for name in ("second", "pretext"):
        found = commands(runs / name, read_json_object(runs / name / "args.json"))
        listed = re.findall("<pre>(.*?)</pre>", (runs / name / "result.html").read_text())
        assert listed == [shlex.join(words) for words in found.values()]
        for launcher, script, *flags in found.values():
            assert launcher == "python"
            if script == "tools/compare_runs.py":
                assert compare_runs.parse(flags).runs[0] == runs / name
            else:
                resolve(
                    {"main.py": pretrain_main, "finetune_main.py": finetune_main}[script].parse(
                        flags
                    )
                )
    record = {"settings": {"script": FINETUNE}, "environment": {"processes": "4"}}
    resume = next(iter(commands(runs / "first", record).values()))
    assert resume[:3] == ["torchrun", "--nproc_per_node", "4"]


def test_evaluation_command_works(runs: Path, tmp_path: Path) -> None:
    """Data and architecture come from the checkpoint."""
    words = commands(runs / "second", read_json_object(runs / "second" / "args.json"))[
        "evaluate it"
    ]
    finetune_main.main(
        finetune_main.parse([*words[2:-1], str(tmp_path), "--device", "cpu", "--num_workers", "0"])
    )
    assert (tmp_path / "metrics.json").exists()


def test_missing_matplotlib_is_logged_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setattr(run_page, "_warned", set())
    (tmp_path / "log.txt").write_text('{"epoch": 0, "train_loss": 1.5}\n')
    with captured_log() as lines:
        update_run_page(tmp_path)
        update_run_page(tmp_path)
    assert sum("matplotlib" in line for line in lines) == 1
    assert "1.500" in read_page(tmp_path).text


def test_page_without_settings_and_with_html_in_values(tmp_path: Path) -> None:
    (tmp_path / "log.txt").write_text('{"train_loss": 2.0}\n')
    write_run_page(tmp_path)
    assert "The settings of this run are not in its folder" in read_page(tmp_path).text
    odd = tmp_path / "<b>"
    odd.mkdir()
    record = {
        "settings": {"detector": "<script>", "lr": "a&b"},
        "given": ["lr"],
        "environment": {"<i>": "</td>"},
    }
    (odd / "args.json").write_text(json.dumps(record))
    write_run_page(odd)
    shown = read_page(odd)
    assert shown.titles == [
        "<b>",
        "Settings",
        "Environment and data",
        "Files in this folder",
        "Commands",
    ]
    assert all(text in shown.text for text in ("<script>", "a&b", "<i>", "</td>"))
    update_run_page(None)


def test_no_page_without_output_dir(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    pre_train("--imagenet_path", runs / "images", "--epochs", 1, *FROZEN)
    assert not list(tmp_path.iterdir())


def test_checkpoints_store_plain_settings(runs: Path) -> None:
    stored = read_checkpoint(runs / "first" / "checkpoint.pth")["args"]
    assert stored["seed"] == 42
    assert not any(name.startswith("_") for name in stored)


def test_log_skips_settings_that_the_run_does_not_read() -> None:
    with captured_log() as lines:
        log_settings(tiny_args(FINETUNE))
        log_settings(tiny_args(PRETRAIN))
    finetune, pretrain = (
        {word.split("=")[0] for word in line.split()[2:]} for line in lines if "defaults" in line
    )
    assert {"eval_every", "lr_drop"} <= finetune
    assert not {"mask_ratio", "view_iou", "enc_n_points", "voc_metric", "script"} & finetune
    assert {"mask_ratio", "lr_drop", "eval_every"} <= pretrain, "0 (never) is a value"
    assert not {"view_iou", "enc_n_points"} & pretrain
