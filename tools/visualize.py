"""See what a detector is trained on, looks at and gets wrong: pictures, one kind for each sub-command.

    python tools/visualize.py attention --checkpoint CHECKPOINT --images IMAGES --output_dir pictures

docs/visualization.md shows a picture of each.
"""

import sys
from argparse import Namespace
from pathlib import Path
from types import ModuleType

# So that `python tools/NAME.py` works from any directory.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tools.figures import (
    attention,
    class_agnostic,
    errors,
    patches,
    proposals,
    samples,
    sampling,
)
from util.errors import UserError
from util.runs.session import run_script
from util.settings import Parser

NAME = "tools/visualize.py"
# A sub-command's module has a headline, `run(args)`, and `add_flags(parser)` or `make_parser(words)`.
COMMANDS: dict[str, ModuleType] = {
    "samples": samples,
    "attention": attention,
    "sampling": sampling,
    "patches": patches,
    "proposals": proposals,
    "class_agnostic": class_agnostic,
    "errors": errors,
}


def parse(argv: list[str]) -> Namespace:
    command, words = (argv[0], argv[1:]) if argv else ("--help", [])
    if command in ("-h", "--help"):
        sys.stdout.write(overview() + "\n")
        Parser(NAME).exit(0 if argv else 2)
    if command not in COMMANDS:
        raise UserError(f"{command} is no sub-command: choose one of {', '.join(COMMANDS)}")
    args = command_parser(command, words).parse_args(words)
    return Namespace(**vars(args), command=command)


def command_parser(command: str, words: list[str]) -> Parser:
    """Return the parser of a sub-command. words: its arguments, which may say whose flags it takes."""
    module = COMMANDS[command]
    title, headline = f"{NAME} {command}", headline_of(module)
    if hasattr(module, "make_parser"):
        return module.make_parser(title, headline, words)
    parser = Parser(title, description=headline)
    module.add_flags(parser)
    return parser


def headline_of(module: ModuleType) -> str:
    return (module.__doc__ or "").partition("\n")[0]


def overview() -> str:
    """Return the help: the sub-commands, and the flags of each."""
    width = max(map(len, COMMANDS)) + 2
    lines = [
        f"usage: python {NAME} COMMAND [flags]",
        "",
        "commands (`COMMAND --help` explains their flags):",
    ]
    lines += [f"  {name:<{width}}{headline_of(module)}" for name, module in COMMANDS.items()]
    lines += ["", *(command_parser(name, []).format_usage().strip() for name in COMMANDS)]
    return "\n".join(lines)


def main(args: Namespace) -> None:
    COMMANDS[args.command].run(args)


if __name__ == "__main__":
    run_script(main, parse)
