"""docs/migration.md: every row works as it says. The examples of docs/python_api.md that train are run, too."""

import argparse
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

import finetune_main
import models
import predetr.runs
from models import build_model
from tests.documents import python_examples
from tests.tiny import (
    ROOT,
    RUN_FLAGS,
    make_batch,
    make_targets,
    write_coco,
)
from util.plots.curves import smooth

SAME = "the same"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def rows() -> list[tuple[str, str]]:
    """Return (published, here) of each row; `here` is code or SAME."""
    text = (ROOT / "docs" / "migration.md").read_text()
    lines = re.findall(r"^\| `(.+?)`[^|`]*\| (?:`(.+)`|(the same)) \|$", text, re.M)
    return [(published, here or same) for published, here, same in lines]


ROWS = rows()


@pytest.fixture(scope="module")
def detector() -> dict[str, Any]:
    """What the rows call `args`, `model`, `outputs`, ..."""
    args = finetune_main.parse([*RUN_FLAGS, "--coco_path", "coco"])
    model, criterion, postprocessors = build_model(args)
    samples = make_batch()
    outputs, targets = model(samples), make_targets([2, 1])
    return {
        "args": args,
        "model": model,
        "checkpoint": {"model": model.state_dict()},
        "criterion": criterion,
        "postprocessors": postprocessors,
        "outputs": outputs,
        "targets": targets,
        "results": postprocessors["bbox"](outputs, torch.tensor([[64, 64]] * 2)),
        "loss_dict": criterion(outputs, targets),
        "weight_dict": criterion.weight_dict,
        "samples": samples,
        "images": [torch.rand(3, 60, 64), torch.rand(3, 64, 50)],
        "tensors": samples.tensors,
        "mask": samples.mask,
    }


@pytest.fixture
def names(detector: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr(models, "load_backbone_weights", lambda *args: None)  # no download
    monkeypatch.chdir(tmp_path)
    write_coco(tmp_path / "coco")
    entry = {"epoch": 0, "train_class_error": 50.0, "test_coco_eval_bbox": [0.25, 0.5]}
    (tmp_path / "log.txt").write_text(json.dumps(entry) + "\n")
    masks = torch.zeros(1, 20, 30, dtype=torch.bool)
    masks[0, 5:9, 10:15] = True
    import datasets.transforms
    from util.random_state import SampleRNG

    target = {"boxes": torch.tensor([[10.0, 10, 30, 40]]), "labels": torch.tensor([1])}
    return {
        **detector,
        "torch": torch,
        "argparse": argparse,
        "get_args_parser": finetune_main.get_args_parser,
        "T": datasets.transforms,
        "SampleRNG": SampleRNG,
        "transforms": datasets.transforms.detection_transforms("val", 64),
        "image": Image.new("RGB", (60, 50), (255, 0, 0)),
        "pixels": torch.zeros(3, 8, 8, dtype=torch.uint8),
        "target": target,
        "sizes": torch.tensor([[64, 64]] * 2),
        "masks": masks,
        "mean": MEAN,
        "std": STD,
        "folder": tmp_path,
    }


def run(code: str, names: dict[str, Any]) -> None:
    code = code.replace('hub.load("."', f"hub.load({str(ROOT)!r}")
    with torch.device("meta" if "hub.load" in code else "cpu"):
        exec(compile(code, "row", "exec"), names)


@pytest.mark.parametrize(("published", "here"), ROWS, ids=[row[0][:60] for row in ROWS])
def test_row(published: str, here: str, names: dict[str, Any]) -> None:
    run(published if here == SAME else here, names)


def test_the_table_is_read_completely() -> None:
    text = (ROOT / "docs" / "migration.md").read_text()
    assert len(ROWS) == len(re.findall(r"^\| `", text, re.M)) > 50


MOVED = [
    published
    for published, here in ROWS
    if here != SAME and re.match(r"(from|import) (?!main |detr_main |engine |datasets import)", published)
]  # fmt: skip


@pytest.mark.parametrize("published", MOVED)
def test_a_moved_import_names_the_new_place(published: str, names: dict[str, Any]) -> None:
    """The line that it ends with names a module that exists."""
    with pytest.raises(ImportError, match=": now ") as error:
        run(published, names)
    place = re.findall(r"now (?:in )?([\w.]+)", str(error.value))[0]
    place = place.removesuffix(".")
    module = place.rpartition(".")[0] if not (ROOT / place.replace(".", "/")).exists() else place
    if place != "result.html":
        __import__(module if module.split(".")[0] != "torch" else "torch")
        assert not module.startswith(("models", "util", "datasets")) or any(
            (ROOT / f"{name.replace('.', '/')}{end}").exists()
            for name in (place, module)
            for end in (".py", "/__init__.py")
        )


def test_rows_give_the_published_values(names: dict[str, Any]) -> None:
    """Of the rows that replace a function by another one."""

    def of(word: str) -> str:
        return next(here for published, here in ROWS if word in published)

    run(of("masks_to_boxes"), names)
    assert names["boxes"].tolist() == [[10, 5, 14, 8]], "DETR's: the last pixel, not one more"
    run(of("nested_tensor_from_tensor_list"), names)
    assert names["samples"].tensors.shape == (2, 3, 64, 64)
    assert names["samples"].mask.sum() == 4 * 64 + 64 * 14
    run(of("criterion.matcher"), names)
    assert [len(queries) for queries, _ in names["indices"]] == [2, 1]
    names["pixels"] = torch.full((3, 8, 8), 255, dtype=torch.uint8)
    run(of("image = T.Normalize"), names)
    torch.testing.assert_close(
        names["image"][0, 0, 0].item(), (1 - MEAN[0]) / STD[0], rtol=1e-5, atol=0
    )
    run(of("plot_logs"), names)
    assert Path("curves.png").read_bytes().startswith(b"\x89PNG")


def test_smoothing_is_that_of_pandas() -> None:
    values = [3.0, 1.0, 4.0, 1.0, 5.0]
    assert smooth(values, 0) == values
    # pandas.Series(values).ewm(com=2).mean()
    expected = [3.0, 1.8, 2.8421052631578947, 2.0769230769230766, 3.1990521327014214]
    assert smooth(values, 2) == pytest.approx(expected, rel=1e-12)
    pandas = pytest.importorskip("pandas", reason="pandas is an extra")
    assert smooth(values, 1.5) == pytest.approx(pandas.Series(values).ewm(com=1.5).mean().tolist())


def test_examples_of_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With small models. `call` replaces the run itself, which tests/predetr/test_runs.py has."""
    started = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(predetr.runs, "run_in_program", lambda main, args: started.append(args))
    finished = SimpleNamespace(names=["cat"])
    monkeypatch.setattr(
        predetr.runs.FinishedRun, "predictor", lambda self: lambda image, threshold: finished
    )
    monkeypatch.setattr(predetr.runs.FinishedRun, "checkpoint", Path("checkpoint.pth"))
    for code in python_examples("import finetune, pretrain"):
        exec(compile(code, "example", "exec"), {})
    assert [args.script for args in started] == ["main.py", "finetune_main.py"]
    assert started[0].detector == "conditional_detr"
    assert (started[1].pretrain, started[1].coco_path) == ("checkpoint.pth", "data/MSCoco")
