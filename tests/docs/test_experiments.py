"""docs/experiments.md: every config in one row, with the numbers that the config's own comment and flags have."""

import re
from argparse import Namespace

import pytest

from tests.documents import CONFIGS, ROOT, config_words, parse

PAGE = ROOT / "docs" / "experiments.md"
NO_NUMBER = ("-", "not published", "in the paper")
COLUMNS = 6


def rows() -> list[list[str]]:
    """The cells of every row that begins with a config: config, what, AP, epochs, GPUs x images, notes."""
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("| [")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def name_of(row: list[str]) -> str:
    label, path = re.fullmatch(r"\[([^\]]+)\]\(\.\./configs/([^)]+)\.sh\)", row[0]).groups()
    assert label == path
    return path


def comment_of(name: str) -> str:
    lines = CONFIGS[name].read_text().splitlines()[1:]
    return " ".join(line.removeprefix("# ") for line in lines if line.startswith("#"))


def published_ap(comment: str) -> list[str]:
    return re.findall(r"\bAP (\d+\.\d+)", comment)


def hardware(comment: str) -> str:
    """ "8 x 2": GPUs and images on each, "? x 2" where the number of GPUs is not said; empty where nothing is."""
    comment = comment.replace("\n# ", " ")
    found = re.search(
        r"(\d+) (?:V100|GPUs?)(?: |, )(?:`--batch_size )?(\d+)(?:` each| images? each)", comment
    )
    alone = re.search(r"(\d+) images? a GPU\b", comment)
    return f"{found[1]} x {found[2]}" if found else f"? x {alone[1]}" if alone else ""


def schedule(args: Namespace) -> str:
    if args.eval:
        return "-"
    if args.max_iters:
        return f"{args.max_iters // 1000}k steps, drop {args.lr_drop_iters // 1000}k"
    return (
        f"{args.epochs}, drop {args.lr_drop}"
        if args.lr_drop < args.epochs
        else f"{args.epochs}, no drop"
    )


def test_every_config_has_one_row() -> None:
    assert sorted(name_of(row) for row in rows()) == sorted(CONFIGS)
    assert {len(row) for row in rows()} == {COLUMNS}


@pytest.mark.parametrize("row", rows(), ids=name_of)
def test_row_says_what_the_config_says(row: list[str]) -> None:
    _, what, ap, epochs, machines, notes = row
    comment, args = comment_of(name_of(row)), parse(config_words(CONFIGS[name_of(row)]))
    assert what
    numbers = published_ap(comment)
    assert re.findall(r"\d+\.\d+", ap) == numbers
    assert numbers or ap in NO_NUMBER
    assert epochs == schedule(args)
    known = hardware(comment)
    assert machines in ((known, f"{known}, ours") if known else ("not published", "-"))
    images = known.split(" x ")[-1]
    if images and int(images) != args.batch_size and not args.eval:
        assert f"`--batch_size {images}`" in notes, "the config alone has another batch"


def test_numbers_of_the_readme_are_those_of_the_page() -> None:
    """AP of each config that the front page names beside a number."""
    known = {name_of(row): set(re.findall(r"\d+\.\d+", row[2])) for row in rows()}
    lines = [
        line
        for line in (ROOT / "README.md").read_text().splitlines()
        if re.match(r"\| (none|`\w+`)[^|]* \|.*configs/", line)
    ]
    assert len(lines) > 10
    for line in lines:
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        numbers = {number for cell in cells[2:4] for number in re.findall(r"\d+\.\d+", cell)}
        named = re.findall(r"configs/([\w.]+)\.sh", cells[-1])
        assert numbers & set().union(*(known[name] for name in named)), line
