"""docs/published_commands.md: both columns of every row mean the same flags, but for the differences that the row
names.
"""

import re
import shlex

import pytest

import finetune_main
from tests.documents import ROOT, TOOLS, check_command, config_words, parse, without_launcher

PATH_FLAGS = {"coco_path", "imagenet_path", "output_dir", "resume", "pretrain"}
CODE_BASES = {"UP-DETR", "DETR", "Conditional DETR", "Deformable DETR", "DETReg", "Siamese DETR"}


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
# Those that train, evaluate or convert; tests/test_hub.py checks those of torch.hub, tests/tools/test_setup_env.py the
# set-up.
POSSIBLE = [
    row
    for row in ROWS
    if row[0] in CODE_BASES and row[2].startswith("`") and not row[2].startswith("`torch.hub")
]


def code(cell: str) -> list[str]:
    """The first text in backticks of a cell, as words."""
    return shlex.split(re.match(r"`([^`]+)`", cell)[1])


def test_all_code_bases_are_listed() -> None:
    assert {row[0] for row in ROWS} == CODE_BASES | {"Installing and preparing data"}
    assert {row[0] for row in POSSIBLE} == CODE_BASES
    assert all(len(row) == (4 if row[0] in CODE_BASES else 3) for row in ROWS)


def test_what_is_not_here_is_said() -> None:
    """A cell has a command or says in words why not, or by which other tool."""
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
    """What is written behind a config, or behind a script of another name; names of the reader's files count as
    none.
    """
    start = next(
        i
        for i, word in enumerate(words)
        if re.search(r"\.(sh|py)[>\]]?$|^file>", word) and "run_dist" not in word
    )
    return [word for word in words[start + 1 :] if re.match(r"--|[\d.]+$", word)]


@pytest.mark.parametrize("row", POSSIBLE, ids=lambda row: f"{row[0]}: {row[1][-30:]}")
def test_command_here_means_the_published_one(row: tuple[str, str, str, str]) -> None:
    """Only the script's name changes, and the detector is said."""
    section, published, here, _ = row
    ours = code(here)
    check_command(ours)
    theirs = code(published)
    if any("configs/" in word for word in ours) or theirs[1] in TOOLS or "submitit" in published:
        ignored = {"--timeout", "3000", "[--deform]"}
        assert [word for word in flags_behind(theirs) if word not in ignored] == flags_behind(ours)
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


def test_impossible_commands_are_refused_by_the_parser(capsys: pytest.CaptureFixture) -> None:
    """What the table calls not in this version is not half accepted."""
    for flags in (["--dataset_file", "coco_panoptic"], ["--masks"], ["--frozen_weights", "x"]):
        with pytest.raises(SystemExit):
            finetune_main.parse(flags)
        assert capsys.readouterr().err.startswith("error: ")
