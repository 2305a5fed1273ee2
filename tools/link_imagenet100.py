"""Makes ImageNet-100 out of ImageNet: a folder of links to the 100 classes that DETReg's tables use.

    python tools/link_imagenet100.py --imagenet data/ilsvrc --output_dir data/ilsvrc100

The links are train/CLASS and val/CLASS; nothing is copied. The classes are those of datasets/imagenet100.txt. The same
command adds what was missing before; what is there already is never changed.
"""

import argparse
import os
import sys
from argparse import Namespace
from pathlib import Path

sys.path.insert(
    0, str(Path(__file__).resolve().parent.parent)
)  # `python tools/NAME.py` works from any directory

from util.errors import UserError
from util.logger import log
from util.runs.session import run_script

PARTS = ("train", "val")
CLASSES = Path(__file__).resolve().parent.parent / "datasets" / "imagenet100.txt"


def parse(argv: list[str]) -> Namespace:
    parser = argparse.ArgumentParser(
        "tools.link_imagenet100", description=__doc__.splitlines()[0], allow_abbrev=False
    )
    parser.add_argument(
        "--imagenet",
        required=True,
        type=Path,
        metavar="DIR",
        help="a folder for each class in train/, perhaps in val/",
    )
    parser.add_argument(
        "--output_dir",
        required=True,
        type=Path,
        metavar="DIR",
        help="where train/ and val/ with the links go",
    )
    return parser.parse_args(argv)


def main(args: Namespace) -> None:
    """
    Raises:
        UserError: no ImageNet there; something else lies where a link belongs; classes are missing (the others are
            linked).
    """
    classes = CLASSES.read_text(encoding="utf-8").split()
    if not (args.imagenet / "train").is_dir():
        raise UserError(
            f"--imagenet {args.imagenet} has no folder train: give the one that holds train/n01440764 and so on"
        )
    parts = [part for part in PARTS if (args.imagenet / part).is_dir()]
    wanted = [
        (args.imagenet / part / name, args.output_dir / part / name)
        for part in parts
        for name in classes
    ]
    present = [(source, link) for source, link in wanted if source.is_dir()]
    for source, link in present:
        _check_free(source, link)
    made = sum(_link(source, link) for source, link in present)
    log.info(
        "%s: %d links made, %d were there, for %s",
        args.output_dir,
        made,
        len(present) - made,
        " and ".join(parts),
    )
    if len(parts) < len(PARTS):
        log.info("%s has no val; pre-training needs train alone", args.imagenet)
    missing = [
        str(source.relative_to(args.imagenet)) for source, _ in wanted if not source.is_dir()
    ]
    if missing:
        raise UserError(
            f"{args.imagenet} lacks {len(missing)} of the {len(wanted)} class folders, the first is {missing[0]}; the "
            "others are linked: add it (in val too each class has a folder) and run the same command again"
        )


def _check_free(source: Path, link: Path) -> None:
    """Before anything is made: either nothing is there, or the same link."""
    if os.path.lexists(link) and not _is_same(source, link):
        raise UserError(
            f"{link} exists and is no link to {source}: choose another --output_dir, or remove it"
        )


def _is_same(source: Path, link: Path) -> bool:
    return link.is_symlink() and link.resolve() == source.resolve()


def _link(source: Path, link: Path) -> bool:
    """Whether it had to be made."""
    if link.is_symlink():
        return False
    try:
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(source.resolve(), target_is_directory=True)
    except OSError as error:
        raise UserError(
            f"{link} can't be made ({error.strerror}): check --output_dir {link.parent.parent}"
        ) from error
    return True


if __name__ == "__main__":
    run_script(main, parse)
