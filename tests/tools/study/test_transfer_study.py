"""A transfer study: its data are disjoint, its plan fair, its numbers those of the definitions. Its runs:
tests/tools/study/test_transfer_runs.py.
"""

import json
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.documents import config_words, parse, tool
from tests.study_cases import prepare_data, run_words, study
from tests.tiny import ROOT, write_coco, write_voc
from tools import transfer_study
from tools.study import plan, presets
from tools.study.pictures import common_epochs
from tools.study.plan import flags_of, make_plan, options_of
from tools.study.prepare import draw_unlabelled, read_manifest, repeated, shrink
from tools.study.runner import launched
from tools.study.statistics import in_words, paired_difference, summarize
from util.errors import UserError


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_data(tmp_path_factory.mktemp("study"))


# ---------------------------------------------------------------------------------------------------------------- data


def names(data: Path, part: str) -> set[str]:
    return {image["file_name"] for image in json.loads((data / "annotations" / f"{part}.json").read_text())["images"]}


def test_parts_are_disjoint_and_nothing_held_out_is_pre_trained_on(data: Path) -> None:
    train, val, test = (names(data, part) for part in ("train", "val", "test"))
    assert [len(part) for part in (train, val, test)] == [20, 4, 6]
    assert not train & val
    assert not (train | val) & test
    listed = set((data / "unlabelled.txt").read_text().split())
    assert {f"labelled/{name}" for name in train} <= listed
    assert not {f"labelled/{name}" for name in val | test} & listed
    assert sorted(Path(name).name for name in listed if name.startswith("unlabelled")) == [
        "000.png.jpg",
        "001.png.jpg",
        "002.png.jpg",
    ]
    manifest = read_manifest(data)
    assert manifest["unlabelled"]["left_out_as_held_out"] == 2
    assert manifest["unlabelled"]["images"] == len(listed) == 23
    assert str(data.parent) not in json.dumps(manifest), "no place of one's own disk"


def test_copies_of_validation_images_are_left_out_too(data: Path, tmp_path: Path) -> None:
    """All training images again, as unlabelled ones: those of val are not for pre-training."""
    coco = data.parent / "coco"
    study(
        "prepare",
        "--coco_path",
        coco,
        "--unlabelled",
        coco / "train2017",
        "--no_labelled_images",
        "--image_size",
        64,
        "--fractions",
        1,
        "--output_dir",
        tmp_path / "data",
    )
    listed = {Path(name).name for name in (tmp_path / "data" / "unlabelled.txt").read_text().split()}
    assert listed == {Path(name).name for name in names(tmp_path / "data", "train")}
    assert read_manifest(tmp_path / "data")["unlabelled"]["left_out_as_held_out"] == 4


def test_no_val_and_a_limit_of_unlabelled_images(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    words = [
        "--coco_path",
        data.parent / "coco",
        "--unlabelled",
        data.parent / "unlabelled",
        "--fractions",
        1,
        "--image_size",
        64,
    ]
    study("prepare", *words, "--val_share", 0, "--max_unlabelled", 3, "--output_dir", tmp_path / "data")
    manifest = read_manifest(tmp_path / "data")
    assert [manifest[part]["images"] for part in ("train", "val", "test")] == [24, 0, 6]
    assert manifest["unlabelled"]["sources"][0]["images"] == 3
    with pytest.raises(UserError, match="prepared with --val_share 0, and there is nothing to choose on"):
        study("run", *run_words(tmp_path / "data", tmp_path / "out", "--fractions", 1, "--choose", "lr", "--list"))
    for flag, value in (("--fractions", -1), ("--val_share", -1), ("--val_share", 1)):
        with pytest.raises(SystemExit):
            study("prepare", *words, flag, value, "--output_dir", tmp_path / "other")
        assert f"error: argument {flag}: " in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_unlabelled_images_are_drawn_from_all_folders() -> None:
    assert draw_unlabelled([2, 0, 3], None, 1) == draw_unlabelled([2, 0, 3], 9, 1) == [[0, 1], [], [0, 1, 2]]
    drawn = draw_unlabelled([500, 500], 100, 1)
    assert drawn == draw_unlabelled([500, 500], 100, 1) != draw_unlabelled([500, 500], 100, 2)
    assert sum(map(len, drawn)) == len({(i, j) for i, part in enumerate(drawn) for j in part}) == 100
    assert 30 < len(drawn[0]) < 70


def test_small_jpegs_are_copied_and_all_else_becomes_one(tmp_path: Path) -> None:
    args, image = Namespace(image_size=64, quality=82), Image.new("RGB", (40, 50), (200, 30, 30))
    for name in ("a.jpg", "a.png"):
        image.save(tmp_path / name)
        assert shrink(str(tmp_path / name), tmp_path / "out" / f"{name}.jpg", args) == ((40, 50), (40, 50))
    assert (tmp_path / "out" / "a.jpg.jpg").read_bytes() == (tmp_path / "a.jpg").read_bytes()
    with Image.open(tmp_path / "out" / "a.png.jpg") as copy:
        assert copy.format == "JPEG"
    image.resize((80, 100)).save(tmp_path / "b.jpg")
    assert shrink(str(tmp_path / "b.jpg"), tmp_path / "out" / "b.jpg", args) == ((80, 100), (64, 80))


@pytest.mark.parametrize("custom", [False, True])
def test_crowds_stay_crowds(custom: bool, tmp_path: Path) -> None:
    """They are in the test's annotations, scaled and with the class of their label, and are no objects."""
    coco = write_coco(tmp_path / "coco", train=24, val=6)
    file = coco / "annotations" / "instances_val2017.json"
    content = json.loads(file.read_text())
    crowd = content["annotations"][0]
    crowd["iscrowd"] = 1
    file.write_text(json.dumps(content))
    words = ["--coco_path", coco]
    if custom:
        words = [
            "--dataset_file",
            "custom",
            "--train_images",
            coco / "train2017",
            "--val_images",
            coco / "val2017",
            "--val_annotations",
            file,
            "--train_annotations",
            coco / "annotations" / "instances_train2017.json",
        ]
    study("prepare", *words, "--image_size", 32, "--fractions", 1, "--output_dir", tmp_path / "data")
    test = json.loads((tmp_path / "data" / "annotations" / "test.json").read_text())
    assert len(test["annotations"]) == len(content["annotations"])
    (found,) = [box for box in test["annotations"] if box["iscrowd"]]
    classes = [{category["id"]: category["name"] for category in part["categories"]} for part in (test, content)]
    assert classes[0][found["category_id"]] == classes[1][crowd["category_id"]]
    small, large = (
        next(image for image in part["images"] if image["id"] == crowd["image_id"]) for part in (test, content)
    )
    assert found["bbox"][2] == pytest.approx(crowd["bbox"][2] * small["width"] / large["width"], abs=0.01)
    assert read_manifest(tmp_path / "data")["test"]["boxes"] == len(content["annotations"]) - 1


def test_a_fraction_is_as_long_as_the_whole(data: Path) -> None:
    split = json.loads((data / "splits" / "0.5.json").read_text())
    whole, part = (json.loads((data / "annotations" / f"{name}.json").read_text()) for name in ("train", "train_0.5"))
    chosen = {image["file_name"] for image in whole["images"] if image["id"] in split["ids"]}
    assert len(chosen) == 10
    assert len(part["images"]) == len(whole["images"]) == 20
    listed = [image["file_name"] for image in part["images"]]
    assert {name: listed.count(name) for name in chosen} == dict.fromkeys(chosen, 2)


def test_repeated_images_keep_their_boxes() -> None:
    content = {
        "images": [{"id": 7, "file_name": "a"}, {"id": 9, "file_name": "b"}],
        "categories": [],
        "annotations": [{"id": 1, "image_id": 9, "bbox": [1, 2, 3, 4]}],
    }
    again = repeated(content, 5)
    assert [image["file_name"] for image in again["images"]] == ["a", "b", "a", "b", "a"]
    assert [image["id"] for image in again["images"]] == [1, 2, 3, 4, 5]
    assert [(box["id"], box["image_id"]) for box in again["annotations"]] == [(1, 2), (2, 4)]


def test_boxes_are_in_the_pixels_of_the_small_images(tmp_path: Path) -> None:
    voc = write_voc(tmp_path / "VOCdevkit", {"2007_trainval": 8, "2007_test": 3})
    study(
        "prepare",
        "--dataset_file",
        "voc",
        "--voc_path",
        voc,
        "--voc_train",
        "2007_trainval",
        "--image_size",
        32,
        "--fractions",
        1,
        "--output_dir",
        tmp_path / "data",
    )
    content = json.loads((tmp_path / "data" / "annotations" / "test.json").read_text())
    assert content["annotations"]
    sizes = {image["id"]: image for image in content["images"]}
    for image in content["images"]:
        with Image.open(tmp_path / "data" / "labelled" / image["file_name"]) as small:
            assert small.size == (image["width"], image["height"])
            assert min(small.size) == 32
    for box in content["annotations"]:
        image, (x, y, width, height) = sizes[box["image_id"]], box["bbox"]
        assert x + width <= image["width"] + 1
        assert y + height <= image["height"] + 1
        with Image.open(tmp_path / "data" / "labelled" / image["file_name"]) as small:
            inner = np.asarray(small)[round(y + height / 2), round(x + width / 2)].astype(int)
        assert np.ptp(inner) > 80, "a plain rectangle of one colour lies on grey"


def test_prepare_goes_on_and_refuses_other_settings(data: Path, tmp_path: Path) -> None:
    words = [
        "--coco_path",
        data.parent / "coco",
        "--unlabelled",
        data.parent / "unlabelled",
        "--image_size",
        64,
        "--fractions",
        1,
        0.5,
    ]
    assert study("prepare", *words, "--output_dir", data)[-1] == f"{data} is finished"
    with pytest.raises(UserError, match="prepared with val_share 0.15, now it is 0.3"):
        study("prepare", *words, "--val_share", 0.3, "--output_dir", data)
    folder = tmp_path / "again"
    study("prepare", *words, "--output_dir", folder)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.jpg")}
    missing = next(iter(sorted(before)))
    missing.unlink()
    (folder / "manifest.json").unlink()
    study("prepare", *words, "--output_dir", folder)
    assert {path for path, written in before.items() if path.stat().st_mtime_ns != written} == {missing}
    assert read_manifest(folder)["sha256"] == read_manifest(data)["sha256"]
    (folder / "annotations" / "test.json").write_text("{}")
    with pytest.raises(UserError, match=r"annotations/test\.json is not what was prepared"):
        read_manifest(folder)


def test_rare_classes_are_left_out(data: Path, tmp_path: Path) -> None:
    counts = [read_manifest(data)[part]["boxes_by_class"] for part in ("train", "test")]
    least = min(counts[1].values()) + 1
    study(
        "prepare",
        "--coco_path",
        data.parent / "coco",
        "--image_size",
        64,
        "--min_objects",
        least,
        "--output_dir",
        tmp_path / "data",
    )
    kept = {name for name in counts[0] if all(count[name] >= least for count in counts)}
    assert set(read_manifest(tmp_path / "data")["test"]["boxes_by_class"]) == kept != set(counts[0])


# ---------------------------------------------------------------------------------------------------------------- plan


def plan_of(data: Path, *words: object) -> list[plan.Step]:
    args = transfer_study.parse(["run", *map(str, run_words(data, Path("out"), *words))])
    return make_plan(options_of(args, read_manifest(data), {}), read_manifest(data))


@pytest.mark.parametrize("preset", presets.PRESETS)
@pytest.mark.parametrize("detector", presets.DETECTOR_FLAGS)
def test_fine_tunings_differ_in_where_they_start_alone(data: Path, preset: str, detector: str) -> None:
    steps = plan_of(
        data, "--preset", preset, "--detectors", detector, "--ablations", "region_prior-random", "--fractions", 1
    )
    tuned = [
        flags_of(step.words) for step in steps if step.kind == "finetune" and step.fraction == 1 and step.seed == 2
    ]
    assert len(tuned) == 5
    assert "--pretrain" not in tuned[0]
    assert len({flags.pop("--pretrain", "") for flags in tuned}) == 5
    assert len({flags.pop("--output_dir") for flags in tuned}) == 5
    assert all(flags == tuned[0] for flags in tuned)


@pytest.mark.parametrize("preset", presets.PRESETS)
def test_commands_are_commands_of_the_scripts(data: Path, preset: str) -> None:
    """Every row of every preset; configs are run by bash, and their names exist."""
    of_configs = {pretext for _, pretext in presets.PRESETS[preset].configs}
    ablations = [
        name
        for name, row in presets.ABLATIONS.items()
        if row.pretext not in of_configs or row.times == 1 and None not in row.changes.values()
    ]
    words = ["--preset", preset, "--detectors", *presets.DETECTOR_FLAGS, "--seeds", 1, "--fractions", 1, "--ablations"]
    steps = plan_of(data, *words, *ablations)
    for step in steps:
        words = [word.replace("{data}", str(data)).replace("{study}", "out") for word in step.words]
        if words[0].endswith(".sh"):
            words = config_words(ROOT / words[0], *words[1:])
        if words[0].startswith("tools/"):
            tool(words[0]).parse(words[1:])
        else:
            settings = parse(words)
            published = 800 if words[0] == "finetune_main.py" else 480
            assert settings.image_size == (published if preset == "paper" else 64)
            assert settings.seed == 1


def test_the_edge_model_goes_to_all_who_search_with_it(data: Path, tmp_path: Path) -> None:
    """A store knows its model, and pre-training on it has to name the same."""
    steps = plan_of(
        data,
        "--pretexts",
        "none",
        "--ablations",
        "region_prior-edge_boxes",
        "region_prior-random",
        "--seeds",
        1,
        "--fractions",
        1,
        "--edge_model",
        tmp_path / "model.yml.gz",
    )
    named = {step.name for step in steps if f"--edge_model {tmp_path / 'model.yml.gz'}" in " ".join(step.words)}
    assert named == {
        "proposals/edge_boxes",
        "pretrain/conditional_detr/region_prior-edge_boxes_seed1",
        "recall/proposals/edge_boxes",
    }


def test_commands_for_several_gpus() -> None:
    """A config starts its script with $LAUNCH; tools are one process."""
    start = ["python", "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "8"]
    many, alone = (lambda words, count=count: launched(words, count, "python", Path()) for count in (8, 1))
    assert many(["finetune_main.py", "--x"]) == ([*start, "finetune_main.py", "--x"], {})
    assert many(["configs/a.sh", "--x"]) == (["bash", "configs/a.sh", "--x"], {"LAUNCH": " ".join(start)})
    assert many(["tools/a.py"]) == alone(["tools/a.py"]) == (["python", "tools/a.py"], {})
    assert alone(["configs/a.sh"]) == (["bash", "configs/a.sh"], {"LAUNCH": "python"})


def test_seeds_come_whole(data: Path) -> None:
    """Order of the plan: a stopped study is balanced; one pre-training serves all fine-tunings."""
    fractions = "--fractions", 1, 0.5
    steps = plan_of(data, "--seeds", 5, 6, "--pretrain_seeds", 1, *fractions)
    tuned = [step for step in steps if step.kind == "finetune"]
    assert [step.seed for step in tuned] == [5] * 8 + [6] * 8
    assert [step.fraction for step in tuned[:8]] == [1.0] * 4 + [0.5] * 4
    assert sum(step.kind == "pretrain" for step in steps) == 4, "three pretexts and the untrained model"
    varied = plan_of(data, "--seeds", 5, 6, "--pretrain_seeds", 1, 2, *fractions)
    starts = {step.seed: step.needs for step in varied if step.kind == "finetune" and step.variant == "siamese"}
    assert starts == {seed: (f"pretrain/conditional_detr/siamese_seed{seed - 4}",) for seed in (5, 6)}


def test_a_file_can_be_a_row(data: Path, tmp_path: Path) -> None:
    """It is fine-tuned as all others are; nothing is pre-trained for it."""
    file = tmp_path / "mine.pth"
    file.touch()
    steps = plan_of(data, "--pretexts", "none", "--seeds", 1, "--fractions", 1, "--pretrained", f"mine={file}")
    assert [step.name for step in steps] == [f"finetune/conditional_detr/{row}/1_seed1" for row in ("none", "mine")]
    none, mine = (flags_of(step.words) for step in steps)
    assert mine == {**none, "--pretrain": str(file), "--output_dir": "{study}/finetune/conditional_detr/mine/1_seed1"}
    for words, what in (
        ("mine", "give NAME=FILE"),
        (f"a/b={file}", "give NAME=FILE"),
        (f"siamese={file}", "is another row's name"),
        (f"mine={file}x", "there is no file"),
    ):
        with pytest.raises(UserError, match=what):
            plan_of(data, "--fractions", 1, "--pretrained", words)


@pytest.mark.parametrize("change", ["no_reconstruction", "longer"])
def test_a_config_can_not_be_cut(data: Path, change: str) -> None:
    with pytest.raises(
        UserError, match=rf"{change} changes or leaves out what configs/UPDETR_conditional_pretrain_in\.sh sets"
    ):
        plan_of(data, "--preset", "paper", "--fractions", 1, "--ablations", f"random_query_patch-{change}")


def test_a_longer_row_has_more_steps_of_pre_training_and_nothing_else(data: Path) -> None:
    """The rate drops at the same share of them; fine-tuning is the same."""
    rows = "region_prior", "region_prior-longer"
    steps = plan_of(
        data, "--preset", "cpu", "--pretexts", rows[0], "--ablations", rows[1], "--seeds", 1, "--fractions", 1
    )
    pretrained, tuned = (
        [flags_of(step.words) for step in steps if step.kind == kind and step.variant in rows]
        for kind in ("pretrain", "finetune")
    )
    lengths = [(int(flags.pop("--max_iters")), int(flags.pop("--lr_drop_iters"))) for flags in pretrained]
    assert lengths[1] == tuple(4 * steps for steps in lengths[0])
    for pair in (pretrained, tuned):
        places = [flags.pop("--output_dir") for flags in pair], [flags.pop("--pretrain", "") for flags in pair]
        assert pair[0] == pair[1], places


def test_fractions_have_to_be_prepared(data: Path) -> None:
    with pytest.raises(UserError, match=r"--fractions 0\.25: .* has 0\.5 1"):
        plan_of(data, "--fractions", 0.25)


# -----------------------------------------------------------------------------------------------------------------
# statistics


def test_mean_and_deviation_by_hand() -> None:
    found = summarize([1.0, 2.0, 6.0])
    assert (found.mean, found.count) == (3.0, 3)
    assert found.deviation == pytest.approx(7**0.5)  # (4 + 1 + 9) / 2
    assert summarize([4.0]).deviation is None
    assert summarize([]) is None


def test_paired_difference_by_hand() -> None:
    """Differences 1, 2, 3: deviation 1, t of two degrees of freedom 4.302653; seed 9 has no partner."""
    found = paired_difference({1: 11.0, 2: 22.0, 3: 33.0, 9: 0.0}, {1: 10.0, 2: 20.0, 3: 30.0, 8: 5.0})
    assert (found.mean, found.count) == (2.0, 3)
    assert found.half_width == pytest.approx(4.302653 / 3**0.5, rel=1e-6)
    assert not found.shown
    assert in_words(found) == "+2.0 ± 2.5 AP: no difference that 3 seeds can show"
    assert (
        in_words(paired_difference({1: 5.0, 2: 6.1}, {1: 1.0, 2: 2.0}), "AP50")
        == "+4.0 ± 0.6 AP50: higher over 2 seeds"
    )
    assert in_words(paired_difference({1: 1.0, 2: 2.0}, {1: 5.0, 2: 6.1})) == "-4.0 ± 0.6 AP: lower over 2 seeds"
    assert in_words(paired_difference({1: 1.0}, {1: 1.04})) == "+0.0 AP with one seed: nothing can be said"
    assert in_words(paired_difference({1: 1.0}, {2: 1.0})) == "not measured yet"


def test_runs_of_one_pre_training_count_once() -> None:
    """Differences 1, 3 of one pre-training and 5, 7 of another: means 2 and 6, deviation 8 ** 0.5, t of one degree of
    freedom 12.7062.
    """
    values, baseline = {1: 1.0, 2: 5.0, 3: 3.0, 4: 7.0}, dict.fromkeys(range(1, 5), 0.0)
    found = paired_difference(values, baseline, {1: 1, 2: 2, 3: 1, 4: 2})
    assert (found.mean, found.count, found.what) == (4.0, 2, "pre-trainings")
    assert found.half_width == pytest.approx(12.7062047 * 2, rel=1e-6)
    assert in_words(found).endswith("no difference that 2 pre-trainings can show")
    for origins in ({}, dict.fromkeys(values, 1), {seed: seed for seed in values}):
        assert paired_difference(values, baseline, origins) == paired_difference(values, baseline)


def test_curves_show_epochs_that_all_seeds_have() -> None:
    epochs, values = common_epochs([[(1, 0.5), (2, 1.0), (4, 3.0)], [(2, 2.0), (4, 5.0)]])
    assert epochs == [2, 4]
    assert values.tolist() == [[1.0, 3.0], [2.0, 5.0]]
