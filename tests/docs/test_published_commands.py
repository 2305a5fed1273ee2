"""docs/published_commands.md: both columns of each row mean the same flags, except for differences that it names."""

import re
import shlex

import pytest

import detr_main
import main
from tests.documents import ROOT, TOOLS, check_command, config_words, parse, without_launcher
from util.errors import UserError
from util.settings import resolve

PATH_FLAGS = {
    "coco_path",
    "coco_panoptic_path",
    "imagenet_path",
    "output_dir",
    "resume",
    "pretrain",
    "frozen_weights",
}
CODEBASES = {"UP-DETR", "DETR", "Conditional DETR", "Deformable DETR", "DETReg", "Siamese DETR"}


def published_rows() -> list[tuple[str, str, str, str]]:
    """Return (codebase, published, here, config) of each row of docs/published_commands.md."""
    rows, section = [], ""
    for line in (ROOT / "docs" / "published_commands.md").read_text().splitlines():
        if line.startswith("## "):
            section = line.removeprefix("## ")
        elif line.startswith("| `"):
            cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
            rows.append((section, *cells))
    return rows


ROWS = published_rows()
# Rows that train, evaluate or convert. tests/test_hub.py checks torch.hub, tests/tools/test_setup_env.py the set-up.
POSSIBLE = [
    row
    for row in ROWS
    if row[0] in CODEBASES and row[2].startswith("`") and not row[2].startswith("`torch.hub")
]


def code(cell: str) -> list[str]:
    """Return the words of a cell's first code span."""
    return shlex.split(re.match(r"`([^`]+)`", cell)[1])


def test_all_codebases_are_listed() -> None:
    assert {row[0] for row in ROWS} == CODEBASES | {"Installation and data"}
    assert {row[0] for row in POSSIBLE} == CODEBASES
    assert all(len(row) == (4 if row[0] in CODEBASES else 3) for row in ROWS)


def test_every_row_has_a_command_or_says_why_not() -> None:
    words = (
        "`",
        "not in this version",
        "not needed",
        "any folder",
        "no links",
        "the same commands",
        "another tool",
    )
    assert all(row[2].startswith(words) for row in ROWS)


def flags_behind(words: list[str]) -> list[str]:
    """Return the flags and numbers after a config, or after a script of another name, without file names."""
    start = next(
        i
        for i, word in enumerate(words)
        if re.search(r"\.(sh|py)[>\]]?$|^file>", word) and "run_dist" not in word
    )
    return [word for word in words[start + 1 :] if re.match(r"--|[\d.]+$", word)]


@pytest.mark.parametrize("row", POSSIBLE, ids=lambda row: f"{row[0]}: {row[1][-30:]}")
def test_command_means_the_same_as_the_published_one(row: tuple[str, str, str, str]) -> None:
    """Only the script's name changes, and the detector is added."""
    section, published, here, _ = row
    ours = code(here)
    check_command(ours)
    theirs = code(published)
    if any("configs/" in word for word in ours) or theirs[1] in TOOLS or "submitit" in published:
        words = [word for word in flags_behind(theirs) if word != "[--deform]"]
        assert words == flags_behind(ours)
        return
    theirs = without_launcher(theirs)
    theirs[0] = "main.py" if section == "UP-DETR" and theirs[0] == "main.py" else "finetune_main.py"
    expected, actual = (
        vars(parse(theirs, resolved=False)),
        vars(parse(without_launcher(ours), resolved=False)),
    )
    assert actual.pop("detector") == (
        "conditional_detr" if section == "Conditional DETR" else expected["detector"]
    )
    expected.pop("detector")
    assert actual == expected


@pytest.mark.parametrize("row", POSSIBLE, ids=lambda row: f"{row[0]}: {row[1][-30:]}")
def test_config_of_a_published_command_differs_only_where_it_says_so(
    row: tuple[str, str, str, str],
) -> None:
    config = re.match(r"`(configs/\w+\.sh)`", row[3])
    if config is None:
        return
    given, kept = check_command(code(row[2])), parse(config_words(ROOT / config[1]))
    given, kept = given.as_dict(), kept.as_dict()
    differ = {flag for flag in kept if given[flag] != kept[flag]} - PATH_FLAGS
    assert differ == {flag.lstrip("-") for flag in re.findall(r"--\w+", row[3])}


PYTHON_SCRIPTS = {"main.py": main, "detr_main.py": detr_main}
RAW = [row for row in POSSIBLE if without_launcher(code(row[1]))[0] in PYTHON_SCRIPTS]


@pytest.mark.parametrize("row", RAW, ids=lambda row: f"{row[0]}: {row[1][-30:]}")
def test_published_line_works_or_is_answered_with_the_command(
    row: tuple[str, str, str, str],
) -> None:
    """As it stands. The command of this row is the answer, or among the answers for each detector."""
    script, *flags = without_launcher(code(row[1]))
    here = without_launcher(code(row[2]))
    try:
        args = resolve(PYTHON_SCRIPTS[script].parse(flags))
    except UserError as error:
        answers = [
            parse(shlex.split(line)[1:]).as_dict()
            for line in str(error).splitlines()
            if line.startswith("  python finetune_main.py")
        ]
        if (
            "--resume <checkpoint.pth>" in row[1]
        ):  # the file names the detector, so the answer does not
            here = [word for word in here if word not in ("--detector", "conditional_detr")]
        assert parse(here).as_dict() in answers
    else:
        assert args.as_dict() == parse(here).as_dict()


def test_published_scripts_exist() -> None:
    """tests/configs/test_published_names.py runs them; here: those that the document names."""
    text = (ROOT / "docs" / "published_commands.md").read_text()
    named = set(re.findall(r"(?:scripts|tools)/\w+\.sh|detr_main\.py|datasets/category\.txt", text))
    assert {"scripts/conddetr_r50_epoch50.sh", "tools/srun_train.sh", "detr_main.py"} <= named
    missing = {name for name in named if not (ROOT / name).is_file()}
    assert missing == {"scripts/conddetr_r50_epoch12_groupdetr11.sh"}, "is not carried"
