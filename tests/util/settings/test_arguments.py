"""Flags: published names and defaults, unsupported ones, and that every flag is read."""

import argparse
import ast
import itertools
import re
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import finetune_main
import main as pretrain_main
from models import build_model
from tests.tiny import captured_log
from util.errors import UserError
from util.settings import FINETUNE, PRETRAIN, given_flags, make_parser, resolve
from util.settings.registry import DATASETS, DETECTORS, PRETEXTS
from util.settings.table import FLAGS, UNSUPPORTED_FLAGS

ROOT = Path(__file__).resolve().parents[3]

# The published parsers: flag -> default. SWITCH: a flag without a value that is off.
SWITCH = "switch"
SHARED = {
    "lr": 1e-4,
    "batch_size": 2,
    "weight_decay": 1e-4,
    "clip_max_norm": 0.1,
    "backbone": "resnet50",
    "dilation": SWITCH,
    "position_embedding": "sine",
    "enc_layers": 6,
    "dec_layers": 6,
    "dim_feedforward": 2048,
    "hidden_dim": 256,
    "dropout": 0.1,
    "nheads": 8,
    "pre_norm": SWITCH,
    "no_aux_loss": SWITCH,
    "set_cost_bbox": 5.0,
    "set_cost_giou": 2.0,
    "bbox_loss_coef": 5.0,
    "giou_loss_coef": 2.0,
    "output_dir": "",
    "seed": 42,
    "resume": "",
    "start_epoch": 0,
    "dist_url": "env://",
}
LABELLED = {
    **SHARED,
    "lr_backbone": 1e-5,
    "dataset_file": "coco",
    "coco_path": None,
    "eval": SWITCH,
    "num_workers": 2,
    "masks": SWITCH,
    "mask_loss_coef": 1.0,
    "dice_loss_coef": 1.0,
}
DETR = {
    **LABELLED,
    "epochs": 300,
    "lr_drop": 200,
    "num_queries": 100,
    "set_cost_class": 1.0,
    "eos_coef": 0.1,
}
UPDETR_FINETUNE = {**DETR, "pretrain": ""}
CONDITIONAL = {
    **LABELLED,
    "frozen_weights": None,
    "epochs": 50,
    "lr_drop": 40,
    "num_queries": 300,
    "set_cost_class": 2.0,
    "cls_loss_coef": 2.0,
    "focal_alpha": 0.25,
}
UPDETR = {
    **SHARED,
    "epochs": 60,
    "lr_drop": 40,
    "num_queries": 100,
    "num_patches": 10,
    "set_cost_class": 1.0,
    "eos_coef": 0.1,
    "num_workers": 16,
    "imagenet_path": None,
    "feature_recon": SWITCH,
    "query_shuffle": SWITCH,
    "fre_cnn": SWITCH,
}
PARSERS = {
    "detr": (FINETUNE, "detr", DETR),
    "updetr_finetune": (FINETUNE, "detr", UPDETR_FINETUNE),
    "conditional": (FINETUNE, "conditional_detr", CONDITIONAL),
    "updetr": (PRETRAIN, "detr", UPDETR),
}
# Published flags that are rejected, because they have no effect there: flag -> a value.
UNSUPPORTED = {
    "remove_difficult": None,
    "world_size": "1",
}


def parse(script: str, *flags: str) -> Namespace:
    return resolve(make_parser(script).parse_args(list(flags)))


@pytest.fixture(autouse=True)
def _many_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """The default number of dataloader workers is at most the number of CPU cores."""
    monkeypatch.setattr("util.settings.resolving.usable_cores", lambda: 64)


@pytest.mark.parametrize("name", PARSERS)
def test_published_flags_have_their_defaults(name: str) -> None:
    script, detector, flags = PARSERS[name]
    args = parse(script, "--detector", detector)
    for flag, default in flags.items():
        if flag == "no_aux_loss":
            assert args.aux_loss is True
        elif default is SWITCH:
            assert not getattr(args, flag)
        else:
            assert getattr(args, flag) == default, flag
            assert type(getattr(args, flag)) is type(default), flag


@pytest.mark.parametrize("name", PARSERS)
def test_published_flags_are_accepted(name: str) -> None:
    script, detector, flags = PARSERS[name]
    words = ["--detector", detector, "--device", "cpu"]
    for flag, default in flags.items():
        words.append(f"--{flag}")
        if default is not SWITCH:
            words.append("P" if default in (None, "") else str(default))
    args = parse(script, *words)
    assert args.aux_loss is False
    switches = [flag for flag, default in flags.items() if default is SWITCH]
    assert all(getattr(args, flag) is True for flag in switches if flag != "no_aux_loss")


def test_published_defaults_without_a_published_flag() -> None:
    """DETR's weight of the class loss, UP-DETR's backbone learning rate, the epochs of numbered checkpoints."""
    assert parse(FINETUNE).cls_loss_coef == 1
    assert parse(PRETRAIN, "--lr", "3e-4").lr_backbone == 3e-4
    assert parse(PRETRAIN, "--fre_cnn").lr_backbone == 0
    assert parse(PRETRAIN).mask_ratio == 0.1
    assert [parse(PRETRAIN).save_every, parse(FINETUNE).save_every] == [20, 100]
    assert [parse(PRETRAIN).backbone_weights, parse(FINETUNE).backbone_weights] == [
        "swav",
        "imagenet",
    ]
    assert [parse(PRETRAIN).image_size, parse(FINETUNE).image_size] == [480, 800]
    assert [
        parse(FINETUNE, "--detector", d).classification for d in ("detr", "conditional_detr")
    ] == [
        "softmax",
        "focal",
    ]
    assert parse(PRETRAIN, "--detector", "conditional_detr").set_cost_class == 1


# DETReg's parser, for pre-training and fine-tuning: flag -> default. Those that depend on the detector are below.
DETREG = {
    "max_prop": 30,
    "lr_linear_proj_mult": 0.1,
    "batch_size": 4,
    "weight_decay": 1e-4,
    "clip_max_norm": 0.1,
    "sgd": SWITCH,
    "with_box_refine": SWITCH,
    "two_stage": SWITCH,
    "strategy": "topk",
    "obj_embedding_head": "intermediate",
    "backbone": "resnet50",
    "dilation": SWITCH,
    "enc_layers": 6,
    "dec_layers": 6,
    "hidden_dim": 256,
    "dropout": 0.1,
    "nheads": 8,
    "dec_n_points": 4,
    "enc_n_points": 4,
    "set_cost_bbox": 5.0,
    "set_cost_giou": 2.0,
    "object_embedding_coef": 1.0,
    "bbox_loss_coef": 5.0,
    "giou_loss_coef": 2.0,
    "focal_alpha": 0.25,
    "dataset_file": "coco",
    "data_root": "data",
    "output_dir": "",
    "cache_path": "",
    "seed": 42,
    "random_seed": SWITCH,
    "resume": "",
    "start_epoch": 0,
    "eval": SWITCH,
    "viz": SWITCH,
    "num_workers": 2,
    "object_embedding_loss": SWITCH,
    "pre_norm": SWITCH,
    "eos_coef": 0.1,
    "save_every": 5,
}
DETREG_BY_DETECTOR = {
    "deformable_detr": {
        "lr": 2e-4,
        "lr_backbone": 2e-5,
        "epochs": 50,
        "lr_drop": 40,
        "dim_feedforward": 1024,
        "num_queries": 300,
        "set_cost_class": 2.0,
        "cls_loss_coef": 2.0,
        "num_feature_levels": 4,
        "lr_backbone_names": ["backbone.0"],
        "lr_linear_proj_names": ["reference_points", "sampling_offsets"],
    },
    "detr": {
        "lr": 1e-4,
        "lr_backbone": 1e-5,
        "epochs": 300,
        "lr_drop": 200,
        "dim_feedforward": 2048,
        "num_queries": 100,
        "set_cost_class": 1.0,
        "cls_loss_coef": 1.0,
    },
}
# Flags whose default differs or depends on a rule: flag -> an accepted value.
DETREG_OTHER_DEFAULTS = {
    "eval_every": "1",
    "dataset": "imagenet",
    "load_backbone": "swav",
    "position_embedding": "sine",
    "device": "cpu",
    "lr_drop_epochs": "9",
    "no_aux_loss": None,
}
DETREG_FINETUNE_ONLY = {"filter_pct": "-1", "pretrain": "P"}
DETREG_UNSUPPORTED = {
    **UNSUPPORTED,
    "filter_num": "1",
    "reset_embedding_layer": "1",
    "position_embedding_scale": "1",
    "cache_mode": None,
}


def words_of(flag: str, value: Any) -> list[str]:
    """The words of a command line that give a flag."""
    if value is SWITCH or value is None:
        return [f"--{flag}"]
    return [f"--{flag}", *map(str, value if isinstance(value, list) else [value])]


@pytest.mark.parametrize("model", DETREG_BY_DETECTOR)
def test_detreg_flags_have_their_defaults(model: str) -> None:
    words = ["--pretext", "region_prior", "--model", model]
    flags = {**DETREG, **DETREG_BY_DETECTOR[model]}
    args = parse(PRETRAIN, *words)
    for flag, default in flags.items():
        value = getattr(args, flag)
        assert not value if default is SWITCH else value == default, flag


@pytest.mark.parametrize("model", DETREG_BY_DETECTOR)
def test_detreg_flags_are_accepted(model: str) -> None:
    words = ["--pretext", "region_prior", "--model", model]
    for flag, default in {**DETREG, **DETREG_BY_DETECTOR[model]}.items():
        if flag in ("with_box_refine", "two_stage") and model == "detr":
            continue  # of Deformable DETR
        extra = ["--resume", "P"] if flag in ("eval", "viz") else []
        args = parse(PRETRAIN, *words, *words_of(flag, default), *extra)
        assert getattr(args, flag) == (True if default is SWITCH else default), flag
    for flag, value in DETREG_OTHER_DEFAULTS.items():
        make_parser(PRETRAIN).parse_args([*words, *words_of(flag, value)])
    for flag, value in DETREG_FINETUNE_ONLY.items():
        parsed = make_parser(FINETUNE).parse_args(words_of(flag, value))
        assert str(getattr(parsed, flag)).startswith(value)


def test_other_detreg_flags_are_rejected_with_the_reason(capsys: pytest.CaptureFixture) -> None:
    for flag, value in {**DETREG_FINETUNE_ONLY, **DETREG_UNSUPPORTED}.items():
        with pytest.raises(SystemExit):
            make_parser(PRETRAIN).parse_args(words_of(flag, value))
        message = capsys.readouterr().err
        assert f"--{flag}" in message
        if flag in DETREG_FINETUNE_ONLY:
            assert "is a flag of finetune_main.py" in message
        else:
            assert UNSUPPORTED_FLAGS[f"--{flag}"][1] in message


@pytest.mark.parametrize(
    ("line", "detector"),
    [
        ("--strategy topk", "deformable_detr"),
        ("--max_prop 30", "deformable_detr"),
        ("--dataset imagenet", "deformable_detr"),
        ("--dataset coco_pretrain --eval --resume MODEL", "deformable_detr"),
        (
            "--dataset imagenet --strategy topk --load_backbone swav --max_prop 30 --object_embedding_loss "
            "--lr_backbone 0 --epochs 5",
            "deformable_detr",
        ),
        (
            "--model detr --dataset imagenet --strategy topk --load_backbone swav --max_prop 30 "
            "--object_embedding_loss --object_embedding_coef 1 --lr_backbone 0 --pre_norm --epochs 60",
            "detr",
        ),
    ],
)
def test_flags_of_detreg_mean_its_pretext(line: str, detector: str) -> None:
    """DETReg's command must not pre-train like UP-DETR. The first lines give flags with their defaults."""
    with captured_log() as lines:
        args = parse(PRETRAIN, *line.split())
    assert (args.pretext, args.detector) == ("region_prior", detector)
    (notice,) = [line for line in lines if "as in DETReg" in line]
    assert "--pretext region_prior" in notice
    assert ("--detector deformable_detr" in notice) == ("--model" not in line)
    written_out = [*line.split(), "--pretext", "region_prior", "--detector", detector]
    assert parse(PRETRAIN, *written_out).as_dict() == args.as_dict()


def test_flags_of_two_pretexts_are_rejected() -> None:
    with pytest.raises(UserError, match="--max_prop has no effect with --pretext random_query_pat"):
        parse(PRETRAIN, "--max_prop", "30", "--num_patches", "10")


@pytest.mark.parametrize("script", [PRETRAIN, FINETUNE])
@pytest.mark.parametrize(("flag", "value"), UNSUPPORTED.items())
def test_unsupported_flags_are_rejected_with_the_reason(
    script: str, flag: str, value: str | None, capsys
) -> None:
    with pytest.raises(SystemExit) as stop:
        make_parser(script).parse_args([f"--{flag}", *([value] if value else [])])
    assert stop.value.code != 0
    message = capsys.readouterr().err
    assert f"--{flag}" in message
    assert UNSUPPORTED_FLAGS[f"--{flag}"][1] in message
    assert message.count("\n") == 1


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("--lr_backbon", "--lr_backbone"),
        ("--batchsize=4", "--batch_size"),
        ("--lrdrop", "--lr_drop"),
    ],
)
@pytest.mark.parametrize("parse_script", [pretrain_main.parse, finetune_main.parse])
def test_unknown_flag_names_the_nearest(parse_script, wrong: str, right: str, capsys) -> None:
    with pytest.raises(SystemExit):
        parse_script([wrong])
    message = capsys.readouterr().err
    assert wrong in message
    assert f"did you mean {right}?" in message


def test_flags_are_never_abbreviated(capsys) -> None:
    """`--num_q` must not silently become a flag that starts like it."""
    with pytest.raises(SystemExit):
        finetune_main.parse(["--num_q", "5"])
    assert "--num_queries" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags",
    [
        ["--batch_size", "0"],
        ["--epochs", "-1"],
        ["--num_queries", "many"],
        ["--position_embedding", "v9"],
        ["--detector", "yolo"],
        ["--lr"],
        ["--amp", "fp8"],
        ["stray"],
    ],
)
def test_invalid_values_give_one_line(flags: list[str], capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        finetune_main.parse(flags)
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert message.count("\n") == 1
    assert flags[0] in message


@pytest.mark.parametrize(
    ("script", "flags", "word"),
    [
        (FINETUNE, ["--hidden_dim", "30", "--nheads", "4"], "--nheads"),
        (FINETUNE, ["--hidden_dim", "66", "--nheads", "11"], "multiple of 4"),
        (FINETUNE, ["--dropout", "1"], "--dropout"),
        (FINETUNE, ["--eval"], "--resume"),
        (FINETUNE, ["--resume", "auto"], "--output_dir"),
        (PRETRAIN, ["--num_patches", "7"], "--num_queries 100"),
        (PRETRAIN, ["--mask_ratio", "1"], "--mask_ratio"),
    ],
)
def test_contradictions_are_rejected_before_anything_starts(
    script: str, flags: list[str], word: str
) -> None:
    with pytest.raises(UserError, match=word):
        parse(script, *flags)


@pytest.mark.parametrize("detector", DETECTORS)
@pytest.mark.parametrize("script", [PRETRAIN, FINETUNE])
def test_resolve_is_idempotent(script: str, detector: str) -> None:
    args = parse(script, "--detector", detector, "--lr", "3e-4", "--load_backbone", "random")
    assert resolve(args) is args
    saved = args.as_dict()  # saved in checkpoints
    assert resolve(Namespace(**saved)).as_dict() == saved


def test_given_flags_are_those_on_the_command_line() -> None:
    args = make_parser(FINETUNE).parse_args(["--pre_norm", "--lr", "1e-4", "--no_aux_loss"])
    assert given_flags(args) == {"pre_norm": True, "lr": 1e-4, "aux_loss": False}


def test_aliases_of_backbone_weights() -> None:
    assert parse(PRETRAIN, "--load_backbone", "supervised").backbone_weights == "imagenet"
    assert parse(PRETRAIN, "--load_backbone", "").backbone_weights == "none"
    assert (
        parse(FINETUNE, "--backbone_weights", "some/file.pth").backbone_weights == "some/file.pth"
    )
    assert (
        parse(PRETRAIN, "--backbone", "resnet18").backbone_weights == "imagenet"
    )  # SwAV has only resnet50


@pytest.mark.parametrize(
    "flags", [["--resume", "P"], ["--resume", "P", "--eval"], ["--pretrain", "P"]]
)
def test_no_backbone_weights_are_loaded_with_a_checkpoint(flags: list[str]) -> None:
    assert parse(FINETUNE, *flags).backbone_weights == "none"
    assert parse(FINETUNE, *flags).backbone_norm == "frozen"


def test_random_weights_get_live_batch_norm() -> None:
    assert parse(FINETUNE, "--backbone_weights", "none").backbone_norm == "live"
    assert (
        parse(FINETUNE, "--backbone_weights", "none", "--backbone_norm", "frozen").backbone_norm
        == "frozen"
    )
    assert parse(FINETUNE).backbone_norm == "frozen"


@pytest.mark.parametrize("module", [pretrain_main, finetune_main])
def test_parser_can_be_the_parent_of_another(module) -> None:
    child = argparse.ArgumentParser("mine", parents=[module.get_args_parser()])
    child.add_argument("--more", type=int)
    args = child.parse_args(["--more", "3", "--num_queries", "20", "--hidden_dim", "64"])
    assert (args.more, args.num_queries) == (3, 20)
    assert resolve(args).script == ("main.py" if module is pretrain_main else "finetune_main.py")


@pytest.mark.parametrize("module", [pretrain_main, finetune_main])
def test_build_model_takes_unresolved_flags(module) -> None:
    flags = [
        "--backbone", "resnet18", "--backbone_weights", "none",
        "--hidden_dim", "32", "--dec_layers", "1", "--enc_layers", "1",
    ]  # fmt: skip
    args = module.get_args_parser().parse_args(flags)
    before = dict(vars(args))
    model, criterion, postprocessors = build_model(args)
    assert vars(args) == before, "the user's namespace must not change"
    assert isinstance(model, torch.nn.Module)
    assert set(criterion.weight_dict) >= {"loss_ce", "loss_bbox", "loss_giou"}
    assert set(postprocessors) == {"bbox"}
    assert model.base_detector().num_queries == 100


def test_build_model_fills_in_defaults() -> None:
    """Code that imports the project gives only what differs from the defaults."""
    model, _, _ = build_model(
        Namespace(
            backbone="resnet18", backbone_weights="none", hidden_dim=32, detector="conditional_detr"
        )
    )
    assert model.num_queries == 300


@pytest.mark.parametrize(
    ("script", "words", "needed"),
    [
        (PRETRAIN, "--pretext region_prior --object_embedding_coef 5", "--object_embedding_loss"),
        (PRETRAIN, "--pretext region_prior --obj_embedding_head head", "--object_embedding_loss"),
        (PRETRAIN, "--feature_loss_coef 5", "--feature_recon"),
        (FINETUNE, "--focal_alpha 0.5", "--classification focal"),
        (FINETUNE, "--detector conditional_detr --eos_coef 0.5", "--classification softmax"),
        (FINETUNE, "--lr_linear_proj_mult 0.5", "--lr_linear_proj_names"),
    ],
)
def test_a_flag_that_nothing_reads_is_rejected(script: str, words: str, needed: str) -> None:
    words = [
        *words.split(),
        *(("--imagenet_path", "x") if script == PRETRAIN else ("--coco_path", "x")),
    ]
    with pytest.raises(UserError, match=f"has no effect without {needed}: add that, or omit"):
        parse(script, *words)
    parse(script, *words[:-4], *words[-2:])  # without the flag


def test_the_last_flag_of_the_schedule_wins() -> None:
    given = ("--lr_drop_epochs", "30", "40"), ("--lr_drop", "10")
    args = parse(FINETUNE, *given[0], *given[1])
    assert (args.lr_drop_epochs, args.lr_drop) == (None, 10)
    assert parse(FINETUNE, *given[1], *given[0]).lr_drop_epochs == [30, 40]


def defaults_of(script: str) -> Iterator[tuple[str, Any]]:
    """Yield (flag, default) for every detector with every pretext or dataset."""
    kind, registry = ("--pretext", PRETEXTS) if script == PRETRAIN else ("--dataset_file", DATASETS)
    all_detector_flags = {flag for entry in DETECTORS.values() for flag in entry.flags}
    for name, (detector, entry) in itertools.product(registry, DETECTORS.items()):
        words = [kind, name, "--detector", detector, "--backbone_weights", "none"]
        words += ["--device", "cpu"]
        unread = all_detector_flags - set(entry.flags)
        for flag, value in parse(script, *words).as_dict().items():
            if flag not in unread and f"--{flag}" not in words:
                yield flag, value


@pytest.mark.parametrize("script", [PRETRAIN, FINETUNE])
def test_help_names_every_default(script: str) -> None:
    """Also those that a pretext, detector or dataset changes."""
    default_in_words = {
        ("lr_backbone", 1e-4): "as --lr",
        ("eval_every", 0): "never",
        ("filter_pct", -1.0): "all",
    }
    texts = {action.dest: action.help for action in make_parser(script)._actions}
    for flag, value in defaults_of(script):
        if flag not in texts or isinstance(value, bool) or not isinstance(value, int | float | str):
            continue
        numbers = {
            float(number)
            for number in re.findall(r"(?<![\w.])\d+(?:\.\d+)?(?:e-?\d+)?", texts[flag])
        }
        is_named = value in texts[flag] if isinstance(value, str) else float(value) in numbers
        if not is_named:
            assert default_in_words[flag, value] in texts[flag], f"--{flag} {value}: {texts[flag]}"


def read_names() -> set[str]:
    """Return the names that the code reads from settings, by attribute or getattr.

    `checks.py` does not count: checking a value gives it no effect.
    """
    found = set()
    for path in [
        *ROOT.glob("*.py"),
        *(
            p
            for folder in ("util", "models", "datasets", "tools")
            for p in (ROOT / folder).rglob("*.py")
        ),
    ]:
        tree = ast.parse(path.read_text())
        checks = [
            node
            for node in tree.body
            if isinstance(node, ast.FunctionDef) and path.name == "checks.py"
        ]
        checking = {id(node) for check in checks for node in ast.walk(check)}
        for node in ast.walk(tree):
            if id(node) in checking:
                continue
            if (
                isinstance(node, ast.Attribute)
                and isinstance(node.ctx, ast.Load)
                and re.search(r"args|settings|validation|draft", ast.unparse(node.value))
            ):
                found.add(node.attr)
            elif (
                isinstance(node, ast.Call)
                and ast.unparse(node.func) in ("getattr", "hasattr")
                and isinstance(node.args[1], ast.Constant)
            ):
                found.add(node.args[1].value)
            elif isinstance(node, ast.Subscript) and ast.unparse(node.value) in ("draft", "given"):
                found.add(ast.unparse(node.slice).strip("'"))
            elif isinstance(node, ast.Call) and ast.unparse(node.func) == "given.get":
                found.add(ast.unparse(node.args[0]).strip("'"))
    return found


def test_every_flag_is_read_somewhere() -> None:
    read = read_names()
    for script in (PRETRAIN, FINETUNE):
        declared = {
            action.dest
            for action in make_parser(script)._actions
            if action.default is not argparse.SUPPRESS
        }
        assert declared <= read, sorted(declared - read)


def test_registries_name_only_existing_flags() -> None:
    declared = {flag.name for flag in FLAGS}
    for entry in [*DETECTORS.values(), *PRETEXTS.values(), *DATASETS.values()]:
        assert set(entry.defaults) | set(entry.flags) <= declared, entry
