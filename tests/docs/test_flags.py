"""docs/flags.md: the tables of defaults and choices match the parsers."""

import re

import pytest

from tests.documents import ROOT
from util.settings import FINETUNE, PRETRAIN, settings
from util.settings.table import flags_of

PAGE = (ROOT / "docs" / "flags.md").read_text()


def table(heading: str) -> list[list[str]]:
    """Return the cells of the table below a heading, its head first."""
    section = PAGE.split(f"## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    del lines[1]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]


@pytest.mark.parametrize(
    ("heading", "script", "chosen_by"),
    [
        ("Defaults by detector", FINETUNE, "detector"),
        ("Defaults by pretext", PRETRAIN, "pretext"),
    ],
)
def test_defaults_are_those_of_the_settings(heading: str, script: str, chosen_by: str) -> None:
    head, *rows = table(heading)
    assert len(rows) >= 8
    for column, name in enumerate(head[1:], start=1):
        resolved = settings(script, **{chosen_by: name.strip("`")})
        for row in rows:
            value = getattr(resolved, row[0].strip("`-"))
            assert row[column] == value or float(row[column]) == value, (name, row[0])


def test_choices_are_those_of_the_parser() -> None:
    """Those without a registry; tests/docs/test_documents.py compares the others."""
    flags = flags_of(FINETUNE)
    compared = []
    for cells in table("Choices")[1:]:
        flag = flags.get(cells[0].strip("`-"))
        if flag is not None and flag.choices:
            assert set(re.findall(r"`([^`]+)`", cells[1])) == set(flag.choices), cells[0]
            compared.append(cells[0])
    assert len(compared) >= 4
