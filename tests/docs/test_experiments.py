"""docs/experiments.md: every config has one row, with the numbers of its comment and flags."""

import re
from argparse import Namespace

import pytest

from tests.documents import CONFIGS, ROOT, config_words, parse

PAGE = ROOT / "docs" / "experiments.md"
NO_NUMBER = ("-", "not published", "in the paper")
COLUMNS = 6


def rows() -> list[list[str]]:
    """Return the cells of each row that starts with a config: config, what, AP, epochs, GPUs x images, notes."""
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
    """Return GPUs x images per GPU, as "8 x 2"; "? x 2" if only the images are known, else an empty string."""
    found = re.search(r"(\d+) (?:V100|GPUs?) x (\d+) images?\b", comment)
    images_per_gpu = re.search(r"(\d+) images? per GPU\b", comment)
    if found:
        return f"{found[1]} x {found[2]}"
    return f"? x {images_per_gpu[1]}" if images_per_gpu else ""


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
def test_row_matches_its_config(row: list[str]) -> None:
    _, what, ap, epochs, gpus, notes = row
    comment, args = comment_of(name_of(row)), parse(config_words(CONFIGS[name_of(row)]))
    assert what
    numbers = published_ap(comment)
    assert re.findall(r"\d+\.\d+", ap) == numbers
    assert numbers or ap in NO_NUMBER
    assert epochs == schedule(args)
    known = hardware(comment)
    assert gpus in ((known, f"{known}, assumed") if known else ("not published", "-"))
    images = known.split(" x ")[-1]
    if images and int(images) != args.batch_size and not args.eval:
        assert f"`--batch_size {images}`" in notes, "the config has another batch size"


@pytest.mark.parametrize("page", ["README.md", "docs/published_results.md"])
def test_published_ap_of_other_pages_matches(page: str) -> None:
    """AP next to the name of a config."""
    known = {name_of(row): set(re.findall(r"\d+\.\d+", row[2])) for row in rows()}
    lines = [
        line
        for line in (ROOT / page).read_text().splitlines()
        if re.match(r"\| (none|`\w+`)[^|]* \|.*configs/", line)
    ]
    assert len(lines) > 10 or page == "README.md"
    for line in lines:
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        numbers = {number for cell in cells[2:4] for number in re.findall(r"\d+\.\d+", cell)}
        named = re.findall(r"configs/([\w.]+)\.sh", cells[-1])
        assert numbers & set().union(*(known[name] for name in named)), line
