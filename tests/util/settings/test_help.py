"""`--help` of the entry scripts and tools: every flag has a meaning and shows its default."""

import argparse
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tools.visualize import COMMANDS, command_parser
from util.settings import FINETUNE, PRETRAIN, HelpFormatter, Parser, make_parser
from util.settings.help import format_default

ROOT = Path(__file__).resolve().parents[3]
SCRIPTS = (PRETRAIN, FINETUNE)
TOOLS = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in (ROOT / "tools").rglob("*.py")
    # Sub-commands of tools/visualize.py have their own test.
    if path.parent.name != "figures" and path.name != "visualize.py"
    if re.search(r"ArgumentParser\(|\bParser\(", path.read_text())
)
MIN_WORDS = 3  # of a meaning, without the default


class _ParserFound(Exception):
    pass


def script_parser(script: str) -> Parser:
    return Parser(script, parents=[make_parser(script)], description="A script.")


def tool_parser(name: str, monkeypatch: pytest.MonkeyPatch) -> argparse.ArgumentParser:
    """The parser of a tool, caught when it is about to parse."""
    module = importlib.import_module(name)
    if hasattr(module, "get_args_parser"):
        return module.get_args_parser()

    found = []

    def catch(self, *args, **kwargs):
        found.append(self)
        raise _ParserFound

    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", catch)
    with pytest.raises(_ParserFound):
        module.parse([])
    return found[0]


def arguments(parser: argparse.ArgumentParser) -> Iterator[tuple[argparse.Action, str]]:
    """Each argument with its help as printed, also those of subcommands; hidden ones are skipped."""
    formatter = parser._get_formatter()
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from arguments(command)
        elif action.help is not argparse.SUPPRESS:
            yield action, formatter._expand_help(action) if action.help else ""


def find_problem(action: argparse.Action, text: str) -> str | None:
    """What is wrong with the help of an argument, None if nothing."""
    meaning, _, default = text.partition("(default: ")
    if len(re.findall(r"[A-Za-z][\w'-]*", meaning)) < MIN_WORDS:
        return f"the meaning has fewer than {MIN_WORDS} words"
    shows_default = re.fullmatch(r"[^()]+\)", default.strip()) is not None
    can_be_omitted = bool(action.option_strings) and not action.required
    is_help = isinstance(action, argparse._HelpAction)
    if can_be_omitted and not is_help and not shows_default:
        return "the default is missing at the end"
    return None


def problems(parser: argparse.ArgumentParser) -> list[str]:
    found = []
    for action, text in arguments(parser):
        problem = find_problem(action, text)
        if problem:
            found.append(f"{'/'.join(action.option_strings) or action.dest}: {problem}: {text!r}")
    return found


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_has_a_meaning_and_shows_its_default(script: str) -> None:
    assert not problems(script_parser(script))


@pytest.mark.parametrize("name", TOOLS)
def test_every_argument_of_a_tool_has_a_meaning_and_shows_its_default(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not problems(tool_parser(name, monkeypatch))


@pytest.mark.parametrize("name", COMMANDS)
def test_every_flag_of_a_picture_has_a_meaning_and_shows_its_default(name: str) -> None:
    assert not problems(command_parser(name, []))


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("(6)", "fewer than 3 words"),
        ("layers (default: 6)", "fewer than 3 words"),
        ("", "fewer than 3 words"),
        ("number of encoder layers", "default is missing"),
        ("number of encoder layers (6)", "default is missing"),
        ("number of encoder layers (default: )", "default is missing"),
        ("number of encoder layers (default: 6), if any", "default is missing"),
        ("number of encoder layers (default: 6)", None),
    ],
)
def test_a_poor_help_is_found(text: str, problem: str | None) -> None:
    """The two tests above would pass for anything if this one failed."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--enc_layers", help=text)
    found = problems(parser)
    assert (problem in found[0]) if problem else not found


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_value_of_a_flag_is_named_by_its_unit(script: str) -> None:
    """`--batch_size N` rather than `--batch_size BATCH_SIZE`."""
    for action, _ in arguments(script_parser(script)):
        if action.nargs != 0:
            assert action.metavar or action.choices, action.option_strings
            assert action.metavar != action.dest.upper() or action.dest == "lr"


@pytest.mark.parametrize("columns", [80, 160])
@pytest.mark.parametrize("script", SCRIPTS)
def test_help_fits_the_terminal(script: str, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    lines = script_parser(script).format_help().splitlines()
    options = [line for line in lines if line.startswith("  --")]  # choices are never broken
    assert all(len(line) <= columns for line in lines if line not in options)
    assert lines[0] == f"usage: {script} [flags]"
    assert any(
        line.startswith("  --detector, --model {detr,conditional_detr,deformable_detr}")
        for line in lines
    )
    assert not any("--remove_difficult" in line for line in lines)  # unsupported


def test_only_the_readers_of_a_flag_are_named() -> None:
    texts = {action.dest: text for action, text in arguments(script_parser(PRETRAIN))}
    assert texts["view_iou"].startswith("siamese: ")
    assert texts["num_patches"].startswith("random_query_patch, siamese: ")
    assert texts["num_feature_levels"].endswith("(default: 4)")  # Deformable DETR's alone
    assert texts["num_queries"].startswith("number of object queries")


def test_help_of_fine_tuning_has_no_defaults_of_pretexts() -> None:
    texts = {
        script: {action.dest: text for action, text in arguments(script_parser(script))}
        for script in SCRIPTS
    }
    assert "random_query_patch, siamese: 60" in texts[PRETRAIN]["epochs"]
    assert not any("siamese" in text for text in texts[FINETUNE].values())


def test_formatter_appends_missing_defaults() -> None:
    parser = Parser("tool")
    parser.add_argument("--seed", type=int, default=42, help="random seed of the split")
    parser.add_argument("--share", default="5%", help="share of the images")
    parser.add_argument("--draw", action="store_true", help="draw the images")
    parser.add_argument("--count", help="number of images (default: all)")
    parser.add_argument("--data", required=True, help="folder of images")
    texts = {action.dest: text for action, text in arguments(parser)}
    assert texts == {
        "help": "show this help message and exit",
        "seed": "random seed of the split (default: 42)",
        "share": "share of the images (default: 5%)",
        "draw": "draw the images (default: off)",
        "count": "number of images (default: all)",
        "data": "folder of images",
    }
    assert isinstance(parser._get_formatter(), HelpFormatter)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1e-4, "1e-4"),
        (2.5e-5, "2.5e-5"),
        (0.1, "0.1"),
        (5.0, "5"),
        (0.0, "0"),
        (300, "300"),
        (True, "on"),
        (None, "not set"),
        ("", "not set"),
        ([], "none"),
        (["2007_trainval", "2012_trainval"], "2007_trainval 2012_trainval"),
        (Path("outputs"), "outputs"),
    ],
)
def test_defaults_in_words(value: object, text: str) -> None:
    assert format_default(value) == text
