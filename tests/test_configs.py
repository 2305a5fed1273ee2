"""Configs, the launcher, and every command that the documents show: parsed by our own parsers, without training."""
import importlib
import os
import re
import shlex
import subprocess
from argparse import Namespace
from pathlib import Path

import pytest

import finetune_main
import main as pretrain_main
from datasets import sample_scenes
from util.arguments import resolve

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = {path.stem: path for path in sorted((ROOT / "configs").glob("*.sh"))}
DOCUMENTS = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])
TOOLS = {f"tools/{path.name}" for path in (ROOT / "tools").glob("*.py") if "\ndef parse(" in path.read_text()}
SCRIPTS = {"main.py": pretrain_main, "finetune_main.py": finetune_main}
PATH_FLAGS = {"coco_path", "imagenet_path", "output_dir", "resume", "pretrain"}

DETR = {
    "detector": "detr", "lr": 1e-4, "lr_backbone": 1e-5, "batch_size": 2, "num_queries": 100, "pre_norm": False, "dilation": False,
}
DETR_500 = {**DETR, "epochs": 500, "lr_drop": 400, "backbone_weights": "imagenet", "backbone": "resnet50"}
DETR_50 = {**DETR_500, "epochs": 50, "lr_drop": 40}
CONDITIONAL = {
    "detector": "conditional_detr", "epochs": 50, "lr_drop": 40, "batch_size": 2, "num_queries": 300, "backbone": "resnet50",
    "dilation": False, "lr_backbone": 1e-5, "set_cost_class": 2.0, "cls_loss_coef": 2.0, "resume": "auto",
}
UPDETR_PRETRAIN = {
    "pretext": "random_query_patch", "epochs": 60, "lr_drop": 40, "num_patches": 10, "num_queries": 100, "feature_recon": True,
    "fre_cnn": True, "lr": 1e-4, "lr_backbone": 0.0, "backbone_weights": "swav", "image_size": 480, "cls_loss_coef": 1.0,
    "set_cost_class": 1.0, "classification": "softmax", "eos_coef": 0.1, "mask_ratio": 0.1, "feature_loss_coef": 1.0,
    "position_embedding": "sine", "pre_norm": False,
}
DEFORMABLE = {
    "detector": "deformable_detr", "lr": 2e-4, "lr_backbone": 2e-5, "lr_linear_proj_mult": 0.1, "batch_size": 2, "epochs": 50,
    "lr_drop": 40, "num_queries": 300, "num_feature_levels": 4, "enc_n_points": 4, "dec_n_points": 4, "dim_feedforward": 1024,
    "dilation": False, "with_box_refine": False, "two_stage": False, "set_cost_class": 2.0, "cls_loss_coef": 2.0,
    "backbone": "resnet50", "position_embedding": "sine_shifted", "backbone_weights": "imagenet",
}
# UP-DETR's pretext on Deformable DETR, in the code base of Siamese DETR: one rate for all parameters.
UPDETR_DEFORMABLE = {
    **UPDETR_PRETRAIN, "detector": "deformable_detr", "batch_size": 8, "num_queries": 300, "num_feature_levels": 4, "dim_feedforward": 1024,
    "enc_n_points": 4, "dec_n_points": 4, "lr_linear_proj_mult": 1.0,
}
DETREG_PRETRAIN = {
    "pretext": "region_prior", "detector": "deformable_detr", "strategy": "topk", "proposals": "selective_search", "ss_resize": 128,
    "backbone_weights": "swav", "object_embedding_loss": True, "object_embedding_coef": 1.0, "obj_embedding_head": "intermediate",
    "lr_backbone": 0.0, "lr": 2e-4, "lr_drop": 40, "batch_size": 4, "num_queries": 300, "image_size": 480, "num_classes": 91,
    "classification": "focal", "cls_loss_coef": 2.0, "set_cost_class": 2.0, "position_embedding": "sine_shifted", "dim_feedforward": 1024,
    "num_feature_levels": 4, "clip_max_norm": 0.1, "weight_decay": 1e-4,
}
PUBLISHED = {
    "DETReg_top30_in": {**DETREG_PRETRAIN, "imagenet_path": "data/ilsvrc/train", "max_prop": 30, "epochs": 5},
    "DETReg_top30_in100": {**DETREG_PRETRAIN, "imagenet_path": "data/ilsvrc100/train", "max_prop": 30, "epochs": 50},
    "DETReg_top5_in100": {**DETREG_PRETRAIN, "imagenet_path": "data/ilsvrc100/train", "max_prop": 5, "epochs": 50},
    "DETReg_top30_coco": {**DETREG_PRETRAIN, "coco_path": "data/MSCoco", "max_prop": 30, "epochs": 50},
    "DETReg_top30_in_detr": {
        **DETREG_PRETRAIN, "imagenet_path": "data/ilsvrc/train", "max_prop": 30, "epochs": 60, "lr_drop": 200, "detector": "detr",
        "pre_norm": True, "num_queries": 100, "lr": 1e-4, "cls_loss_coef": 1.0, "set_cost_class": 1.0, "classification": "softmax",
        "dim_feedforward": 2048, "num_feature_levels": 1,
    },
    "DETReg_fine_tune_full_coco": {
        "coco_path": "data/MSCoco", "pretrain": "exps/DETReg_top30_in/checkpoint.pth", "batch_size": 4, "epochs": 50, "lr_drop": 40,
    },
    "UPDETR_pretrain_in": {**UPDETR_PRETRAIN, "detector": "detr", "batch_size": 32, "pre_norm": True},
    "UPDETR_finetune_coco": {
        **DETR, "epochs": 300, "lr_drop": 200, "lr_backbone": 5e-5, "pre_norm": True, "backbone_weights": "none",
    },
    "UPDETR_eval_coco": {"detector": "detr", "eval": True, "batch_size": 2, "pre_norm": True, "aux_loss": False},
    "UPDETR_conditional_pretrain_in": {**UPDETR_PRETRAIN, "detector": "conditional_detr", "batch_size": 16, "pre_norm": False},
    "UPDETR_conditional_finetune_coco": {**CONDITIONAL, "num_queries": 100, "lr_backbone": 5e-5, "resume": ""},
    "UPDETR_conditional_300q_pretrain_in": {**UPDETR_PRETRAIN, "detector": "conditional_detr", "batch_size": 16, "num_queries": 300},
    "UPDETR_conditional_300q_finetune_coco": {**CONDITIONAL, "lr_backbone": 5e-5, "resume": ""},
    "UPDETR_conditional_pretrain_coco": {
        **UPDETR_PRETRAIN, "detector": "conditional_detr", "batch_size": 4, "epochs": 65, "lr_drop": 43, "image_size": 800,
        "max_size": 1333, "coco_path": "data/MSCoco",
    },
    "UPDETR_vanilla_pretrain_in": {**UPDETR_PRETRAIN, "detector": "detr", "batch_size": 16},
    "UPDETR_vanilla_finetune_coco": {**DETR, "epochs": 150, "lr_drop": 100, "lr_backbone": 5e-5},
    "UPDETR_deformable_pretrain_in": UPDETR_DEFORMABLE,
    "UPDETR_deformable_finetune_coco": {**DEFORMABLE, "backbone_weights": "none"},
    "UPDETR_deformable_single_scale_pretrain_in": {**UPDETR_DEFORMABLE, "num_feature_levels": 1},
    "UPDETR_deformable_single_scale_finetune_coco": {**DEFORMABLE, "num_feature_levels": 1, "backbone_weights": "none"},
    "DETR_r50_coco": DETR_500,
    "DETR_r50_dc5_coco": {**DETR_500, "dilation": True, "batch_size": 1},
    "DETR_r101_coco": {**DETR_500, "backbone": "resnet101"},
    "DETR_r101_dc5_coco": {**DETR_500, "backbone": "resnet101", "dilation": True, "batch_size": 1},
    "DETR_r50_150epochs_coco": {**DETR_500, "epochs": 150, "lr_drop": 100},
    "DETR_r50_50epochs_coco": DETR_50,
    "DETR_r101_50epochs_coco": {**DETR_50, "backbone": "resnet101"},
    "DETR_r50_swav_coco": {
        **DETR, "epochs": 300, "lr_drop": 200, "lr_backbone": 5e-5, "pre_norm": True, "backbone": "resnet50", "backbone_weights": "swav",
    },
    "DETR_eval_coco": {"detector": "detr", "eval": True, "batch_size": 2, "aux_loss": False},
    "ConditionalDETR_r50_coco": CONDITIONAL,
    "ConditionalDETR_r50_dc5_coco": {**CONDITIONAL, "dilation": True, "batch_size": 1},
    "ConditionalDETR_r101_coco": {**CONDITIONAL, "backbone": "resnet101"},
    "ConditionalDETR_r101_dc5_coco": {**CONDITIONAL, "backbone": "resnet101", "dilation": True, "batch_size": 1},
    "ConditionalDETR_eval_coco": {"detector": "conditional_detr", "eval": True, "batch_size": 2},
    "r50_deformable_detr": DEFORMABLE,
    "r50_deformable_detr_single_scale": {**DEFORMABLE, "num_feature_levels": 1},
    "r50_deformable_detr_single_scale_dc5": {**DEFORMABLE, "num_feature_levels": 1, "dilation": True},
    "r50_deformable_detr_plus_iterative_bbox_refinement": {**DEFORMABLE, "with_box_refine": True},
    "r50_deformable_detr_plus_iterative_bbox_refinement_plus_plus_two_stage": {**DEFORMABLE, "with_box_refine": True, "two_stage": True},
    "r50_deformable_detr_eval": {"detector": "deformable_detr", "eval": True, "batch_size": 2},
}


def config_words(config: Path, *extra: str, cwd: Path = ROOT) -> list[str]:
    """What a config would run: the script and its flags, printed by `$LAUNCH` in place of Python."""
    environment = {**os.environ, "LAUNCH": r"printf %s\n"}
    done = subprocess.run(["bash", str(config), *extra], cwd=cwd, env=environment, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def parse(words: list[str], resolved: bool = True) -> Namespace:
    """The flags of `[script, flag, ...]`. Fails for flags that the script does not take."""
    args = SCRIPTS[words[0]].parse(words[1:])
    return resolve(args) if resolved else args


# ------------------------------------------------------------------------------------------------------------- configs


def test_every_config_has_its_published_values() -> None:
    assert set(CONFIGS) == set(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_config_gives_the_published_settings(name: str) -> None:
    args = parse(config_words(CONFIGS[name]))
    settings = {flag: getattr(args, flag) for flag in PUBLISHED[name]}
    assert settings == PUBLISHED[name]
    assert args.output_dir == f"exps/{name}"


@pytest.mark.parametrize("name", CONFIGS)
def test_config_runs_from_any_directory_and_further_flags_win(name: str, tmp_path: Path) -> None:
    here, there = config_words(CONFIGS[name]), config_words(CONFIGS[name], "--seed", "7", "--output_dir", "a b", cwd=tmp_path)
    assert there == [*here, "--seed", "7", "--output_dir", "a b"]
    args = parse(there, resolved=False)
    assert (args.seed, args.output_dir) == (7, "a b")


@pytest.mark.parametrize("name", CONFIGS)
def test_config_is_a_comment_and_flags(name: str) -> None:
    """Who published it and which number or hardware, then one command."""
    lines = CONFIGS[name].read_text().splitlines()
    comment = " ".join(line for line in lines[1:] if line.startswith("#"))
    assert re.search(r"(ECCV|CVPR|ICCV|ICLR) 20\d\d", comment)
    assert "Published: " in comment
    code = [line for line in lines if not line.startswith("#")]
    assert code[:2] == ["set -euo pipefail", 'cd "$(dirname "${BASH_SOURCE[0]}")/.."']
    assert "\n".join(code[2:]).count("exec ") == 1
    assert os.access(CONFIGS[name], os.X_OK)


@pytest.mark.parametrize("name", CONFIGS)
def test_config_is_named_in_the_documents(name: str) -> None:
    assert any(f"configs/{name}.sh" in path.read_text() for path in DOCUMENTS)


# ------------------------------------------------------------------------------------------------------------ launcher


@pytest.fixture
def fake_python(tmp_path: Path) -> dict[str, str]:
    """An environment whose `python` prints its arguments, one a line."""
    script = tmp_path / "bin" / "python"
    script.parent.mkdir()
    script.write_text("#!/bin/sh\nprintf '%s\\n' \"$@\"\n")
    script.chmod(0o755)
    own = ("LAUNCH", "GPUS_PER_NODE", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT")
    kept = {name: value for name, value in os.environ.items() if name not in own}
    return {**kept, "PATH": f"{script.parent}:{os.environ['PATH']}"}


def launch(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess:
    command = ["bash", str(ROOT / "tools" / "run_dist_launch.sh"), *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def test_config_alone_runs_on_one_process(fake_python: dict[str, str]) -> None:
    done = subprocess.run(["bash", str(CONFIGS["DETR_r50_coco"])], env=fake_python, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == config_words(CONFIGS["DETR_r50_coco"])


@pytest.mark.parametrize(("processes", "settings", "expected"), [
    ("2", {}, ("1", 2, 0, "127.0.0.1", 29500)),
    ("8", {"GPUS_PER_NODE": "8"}, ("1", 8, 0, "127.0.0.1", 29500)),
    ("16", {}, ("2", 8, 0, "127.0.0.1", 29500)),
    ("16", {"GPUS_PER_NODE": "4", "NODE_RANK": "3", "MASTER_ADDR": "first", "MASTER_PORT": "1234"}, ("4", 4, 3, "first", 1234)),
])
@pytest.mark.parametrize("target", ["configs/UPDETR_pretrain_in.sh", "main.py"])
def test_launcher_starts_torchrun_with_the_command(
    fake_python: dict[str, str], target: str, processes: str, settings: dict[str, str], expected: tuple
) -> None:
    from torch.distributed.run import get_args_parser

    done = launch({**fake_python, **settings}, processes, target, "--imagenet_path", "my images")
    words = done.stdout.splitlines()
    assert words[:2] == ["-m", "torch.distributed.run"], done.stderr
    run = get_args_parser().parse_args(words[2:])
    assert (run.nnodes, int(run.nproc_per_node), run.node_rank, run.master_addr, run.master_port) == expected
    assert run.training_script == "main.py"
    assert run.training_script_args[-2:] == ["--imagenet_path", "my images"]
    assert parse(["main.py", *run.training_script_args]).imagenet_path == "my images"


@pytest.mark.parametrize(("arguments", "settings", "said"), [
    (("2",), {}, "usage"),
    (("0", "main.py"), {}, "'0'"),
    (("two", "main.py"), {}, "'two'"),
    (("2", "configs/nothing.sh"), {}, "configs/nothing.sh does not exist"),
    (("2", "README.md"), {}, "README.md"),
    (("12", "main.py"), {}, "12 processes"),
    (("8", "main.py"), {"GPUS_PER_NODE": "x"}, "GPUS_PER_NODE"),
])
def test_launcher_refuses_in_one_line(fake_python: dict[str, str], arguments: tuple, settings: dict[str, str], said: str) -> None:
    done = launch({**fake_python, **settings}, *arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert said in done.stderr
    assert done.stderr.count("\n") == 1


# ----------------------------------------------------------------------------------------------------------- documents


def without_launcher(words: list[str]) -> list[str]:
    """`torchrun ... SCRIPT FLAGS`, `python [-m torch.distributed.launch ...] SCRIPT FLAGS` -> [SCRIPT, FLAG, ...]"""
    if words[0] == "torchrun" or words[:2] == ["python", "-m"]:
        return words[next(i for i, word in enumerate(words) if word.endswith(".py")):]
    return words[1:] if words[0] == "python" else words


def check_command(words: list[str]) -> Namespace | None:
    """Fails unless the command can be run as it stands, with the data in place. Returns the settings of a training command."""
    words = words[next(i for i, word in enumerate(words) if "=" not in word):]
    first = words[0].removeprefix("./")
    if words[:3] == ["python", "-m", "datasets.sample_scenes"]:
        sample_scenes.get_args_parser().parse_args(words[3:])
        return None
    if first == "bash":
        assert words[1] in ("tools/demo.sh", "tools/test.sh")
        return None
    if words[:2] == ["source", ".venv/bin/activate"]:
        return None
    tool = [words[2].replace(".", "/") + ".py", *words[3:]] if words[:2] == ["python", "-m"] else words[1:]
    if words[0] == "python" and tool[0] in TOOLS:
        importlib.import_module(tool[0].removesuffix(".py").replace("/", ".")).parse(tool[1:])
        return None
    if first == "tools/run_dist_launch.sh":
        assert words[1].isdigit()
        words, first = words[2:], words[2].removeprefix("./")
    if first.startswith("configs/"):
        return parse(config_words(ROOT / first, *words[1:]))
    in_checkpoint = "--resume" in words and "--val_images" in words  # which kind of data it is
    return parse(without_launcher(words), resolved=not in_checkpoint)


def shown_commands(path: Path) -> list[str]:
    """The commands of a document's bash blocks, and those in backticks within its text."""
    text = path.read_text()
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", text, re.S)).replace("\\\n", " ")
    prose = re.sub(r"```.*?```|^\|.*?$", "", text, flags=re.S | re.M)
    inline = re.findall(r"`((?:python|torchrun) (?:main|finetune_main)\.py [^`]+)`", prose)
    return [line for line in [*blocks.splitlines(), *inline] if line.strip()]


@pytest.mark.parametrize(("path", "command"), [
    pytest.param(path, command, id=f"{path.stem}-{i}") for path in DOCUMENTS for i, command in enumerate(shown_commands(path))
])
def test_shown_command_is_right(path: Path, command: str) -> None:
    if "--help" not in command:
        check_command(shlex.split(command, comments=True))


def test_documents_show_commands() -> None:
    assert len(shown_commands(ROOT / "README.md")) >= 12


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_and_named_files_exist(path: Path) -> None:
    text = re.sub(r"```.*?```", "", path.read_text(), flags=re.S)
    for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
        if not link.startswith("http"):
            assert (path.parent / link).exists(), link
    for name in re.findall(r"`((?:configs|tools|tests|docs|models|datasets|util)/[\w./-]+\.\w+)`", text):
        assert "NAME" in name or (ROOT / name).exists(), name


def test_the_python_example_of_the_readme_runs() -> None:
    (code,) = (block for block in re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S) if "build_model" in block)
    small = '"none", "--backbone", "resnet18", "--enc_layers", "1", "--dec_layers", "2"]'
    code = code.replace('"none"]', small).replace("256, 320", "64, 96")
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)
    assert names["outputs"]["pred_boxes"].shape == (1, 300, 4)
    assert set(names["found"][0]) == {"scores", "labels", "boxes"}


# -------------------------------------------------------------------------------------------------- published commands


def published_rows() -> list[tuple[str, str, str, str]]:
    """(code base, published, here, config) of each row of docs/published_commands.md."""
    rows, section = [], ""
    for line in (ROOT / "docs" / "published_commands.md").read_text().splitlines():
        if line.startswith("## "):
            section = line.removeprefix("## ")
        elif line.startswith("| `"):
            cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
            rows.append((section, *cells))
    return rows


ROWS = published_rows()
# Without those of torch.hub, which tests/test_hub.py checks.
POSSIBLE = [row for row in ROWS if not row[2].startswith(("not in this version", "`torch.hub"))]


def code(cell: str) -> list[str]:
    """The first text in backticks of a cell, as words."""
    return shlex.split(re.match(r"`([^`]+)`", cell)[1])


def test_all_code_bases_are_listed() -> None:
    assert {row[0] for row in ROWS} == {"UP-DETR", "DETR", "Conditional DETR", "Deformable DETR", "DETReg", "Siamese DETR"}
    assert {row[0] for row in POSSIBLE} == {"UP-DETR", "DETR", "Conditional DETR", "Deformable DETR", "DETReg", "Siamese DETR"}
    assert all(len(row) == 4 for row in ROWS)


@pytest.mark.parametrize("row", POSSIBLE, ids=lambda row: f"{row[0]}: {row[1][-30:]}")
def test_command_here_means_the_published_one(row: tuple[str, str, str, str]) -> None:
    """Only the script's name changes, and the detector is said."""
    section, published, here, _ = row
    ours = code(here)
    check_command(ours)
    theirs = code(published)
    if any("configs/" in word for word in ours) or theirs[1] in TOOLS:
        return
    theirs = without_launcher(theirs)
    theirs[0] = "main.py" if section == "UP-DETR" and theirs[0] == "main.py" else "finetune_main.py"
    expected, actual = vars(parse(theirs, resolved=False)), vars(parse(without_launcher(ours), resolved=False))
    assert actual.pop("detector") == ("conditional_detr" if section == "Conditional DETR" else expected["detector"])
    expected.pop("detector")
    assert actual == expected


@pytest.mark.parametrize("row", POSSIBLE, ids=lambda row: f"{row[0]}: {row[1][-30:]}")
def test_config_of_a_published_command_differs_only_where_it_says_so(row: tuple[str, str, str, str]) -> None:
    config = re.match(r"`(configs/\w+\.sh)`", row[3])
    if config is None:
        return
    given, kept = check_command(code(row[2])), parse(config_words(ROOT / config[1]))
    differ = {flag for flag in vars(kept) if getattr(given, flag, None) != getattr(kept, flag)} - PATH_FLAGS - {"_filled"}
    assert differ == {flag.lstrip("-") for flag in re.findall(r"--\w+", row[3])}


def test_impossible_commands_are_refused_by_the_parser(capsys: pytest.CaptureFixture) -> None:
    """What the table calls not in this version is not half accepted."""
    refused = {
        finetune_main: (["--dataset_file", "coco_panoptic"], ["--masks"], ["--frozen_weights", "x"]),
        pretrain_main: (["--pretext", "siamese"],),
    }
    for script, commands in refused.items():
        for flags in commands:
            with pytest.raises(SystemExit):
                script.parse(flags)
            assert capsys.readouterr().err.startswith("error: ")


def test_citation_and_licence() -> None:
    yaml = pytest.importorskip("yaml")
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert [reference["year"] for reference in citation["references"]] == [2020, 2021, 2021, 2022, 2023]
    assert citation["license"] == "Apache-2.0"
    assert "END OF TERMS AND CONDITIONS" in (ROOT / "LICENSE").read_text()
