"""Immutable settings: from the command line, from Python, and what happens on an attempt to change them."""

import ast
import copy
import pickle
from argparse import Namespace
from pathlib import Path

import pytest

from util.errors import UserError
from util.settings import FINETUNE, PRETRAIN, Settings, flags_of, make_parser, resolve, settings

ROOT = Path(__file__).resolve().parents[3]


def test_settings_from_python_equal_those_of_the_command_line() -> None:
    words = [
        "--detector", "conditional_detr", "--num_queries", "50",
        "--no_aux_loss", "--lr_drop_epochs", "3", "4",
    ]  # fmt: skip
    parsed = resolve(make_parser(FINETUNE).parse_args(words))
    made = settings(
        detector="conditional_detr", num_queries=50, aux_loss=False, lr_drop_epochs=[3, 4]
    )
    assert made == parsed
    assert made.origins == parsed.origins


def test_the_script_follows_from_the_flags() -> None:
    assert settings(num_queries=50).script == FINETUNE
    assert settings(pretext="siamese").script == PRETRAIN
    assert settings(PRETRAIN).pretext == "random_query_patch"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"num_querys": 5}, "num_querys is no flag of .*; did you mean num_queries?"),
        ({"num_queries": 0}, "num_queries=0: must be above 0"),
        ({"num_queries": "many"}, "num_queries='many'"),
        ({"detector": "yolo"}, "choose one of detr, conditional_detr, deformable_detr"),
        ({"dilation": "yes"}, "give True or False"),
        ({"dropout": 1.0}, r"--dropout 1 must lie in \[0, 1\)"),
        ({"classification": "softmax", "num_patches": 5}, "classification is no flag of main.py"),
    ],
)
def test_invalid_values_from_python_are_rejected(flags: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        settings(**flags)


def test_settings_are_immutable() -> None:
    made = settings(num_queries=50)
    with pytest.raises(AttributeError, match="settings do not change: can't set num_queries"):
        made.num_queries = 60
    with pytest.raises(AttributeError):
        del made.num_queries
    other = made.replace(num_queries=60)
    assert (made.num_queries, other.num_queries) == (50, 60)
    assert other.was_given("num_queries")
    with pytest.raises(AttributeError, match="did you mean num_queries"):
        made.replace(num_querys=1)
    with pytest.raises(
        AttributeError, match="there is no setting num_querys; did you mean num_queries"
    ):
        made.num_querys  # noqa: B018 - reading it is the test


def test_every_value_has_an_origin() -> None:
    parsed = make_parser(PRETRAIN).parse_args(["--detector", "deformable_detr", "--seed", "7"])
    made = resolve(parsed, adopted={"seed": 3, "num_queries": 60, "nheads": 4})
    expected = {
        "seed": "given",
        "num_queries": "checkpoint",
        "nheads": "checkpoint",
        "image_size": "pretext",
        "dim_feedforward": "detector",
        "enc_layers": "default",
        "lr_backbone": "rule",
    }
    assert {name: made.origins[name] for name in expected} == expected
    assert (made.seed, made.num_queries) == (7, 60)
    assert settings(dataset_file="voc_coco", voc_path="x").origins["voc_train"] == "dataset"
    assert made.was_given("num_queries")
    assert not made.was_given("image_size")


def test_settings_can_be_pickled_and_copied() -> None:
    """Dataloader workers get them by pickle."""
    made = settings(num_queries=50, voc_train=["2007_trainval"], dataset_file="voc", voc_path="x")
    for other in (pickle.loads(pickle.dumps(made)), copy.deepcopy(made), copy.copy(made)):  # noqa: S301 - our own
        assert isinstance(other, Settings)
        assert other == made
        assert other.origins == made.origins


def test_runs_do_not_share_default_lists() -> None:
    settings().lr_backbone_names.append("changed")
    assert settings().lr_backbone_names == ["backbone"]


def test_unknown_names_of_a_namespace_are_ignored() -> None:
    made = resolve(Namespace(num_queries=30, my_own="x", lr=None))
    assert (made.num_queries, made.lr) == (30, 1e-4)
    assert "my_own" not in made


def assigned(path: Path) -> list[str]:
    """Find `settings.NAME = ...`, `args.NAME = ...`, `setattr(settings, ...)` and `vars(settings)` in a file."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store | ast.Del):
            if ast.unparse(node.value).split(".")[-1] in ("settings", "args"):
                found.append(f"{path.name}:{node.lineno} {ast.unparse(node)}")
        elif isinstance(node, ast.Call) and ast.unparse(node).startswith(
            ("setattr(settings", "vars(settings")
        ):
            found.append(f"{path.name}:{node.lineno} {ast.unparse(node)}")
    return found


def test_only_the_settings_package_assigns_settings() -> None:
    folders = [ROOT / name for name in ("util", "models", "datasets", "tools")]
    files = [*ROOT.glob("*.py"), *(path for folder in folders for path in folder.rglob("*.py"))]
    package = ROOT / "util" / "settings"
    wrong = [line for path in files if package not in path.parents for line in assigned(path)]
    assert not wrong


@pytest.mark.parametrize("script", [PRETRAIN, FINETUNE])
def test_spellings_are_unique(script: str) -> None:
    parser = make_parser(script)  # argparse rejects a spelling that two flags have
    assert parser.spellings >= {
        flag.off_switch or f"--{name}" for name, flag in flags_of(script).items()
    }


def test_lists_are_returned_as_copies() -> None:
    made = settings(lr_drop_epochs=[3, 4])
    made.lr_drop_epochs.append(5)
    made.as_dict()["lr_drop_epochs"].append(6)
    assert made.lr_drop_epochs == [3, 4]


def test_invalid_choices_from_a_mapping_are_rejected() -> None:
    with pytest.raises(UserError, match="--amp fp8 is unknown: choose one of no, bf16"):
        resolve({"amp": "fp8"})
