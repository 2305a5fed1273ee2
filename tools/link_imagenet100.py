"""Create ImageNet-100 as a folder of links to the 100 ImageNet classes that DETReg uses.

    python tools/link_imagenet100.py --imagenet data/ilsvrc --output_dir data/ilsvrc100

The links are train/CLASS and val/CLASS; no image is copied. datasets/imagenet100.txt lists the classes. Run the same
command again to add classes that were missing before; existing files are never changed.
"""

import argparse
import os
import sys
from argparse import Namespace
from pathlib import Path

# `python tools/NAME.py` works from any directory.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from util.errors import UserError
from util.logger import log
from util.runs.session import run_script

SPLITS = ("train", "val")
CLASSES = Path(__file__).resolve().parent.parent / "datasets" / "imagenet100.txt"


def parse(argv: list[str]) -> Namespace:
    parser = argparse.ArgumentParser(
        "tools/link_imagenet100.py", description=__doc__.splitlines()[0], allow_abbrev=False
    )
    parser.add_argument(
        "--imagenet",
        required=True,
        type=Path,
        metavar="DIR",
        help="ImageNet, with one folder per class in train/ and optionally val/",
    )
    parser.add_argument(
        "--output_dir",
        required=True,
        type=Path,
        metavar="DIR",
        help="folder for train/ and val/ with the links",
    )
    return parser.parse_args(argv)


def main(args: Namespace) -> None:
    """Create the links.

    Raises:
        UserError: ImageNet is not there, something else is in the place of a link, or classes are missing (the others
            are linked).
    """
    classes = CLASSES.read_text(encoding="utf-8").split()
    if not (args.imagenet / "train").is_dir():
        raise UserError(
            f"--imagenet {args.imagenet} has no folder train: give the one that contains train/n01440764 and so on"
        )
    splits = [split for split in SPLITS if (args.imagenet / split).is_dir()]
    wanted = [
        (args.imagenet / split / name, args.output_dir / split / name)
        for split in splits
        for name in classes
    ]
    present = [(source, link) for source, link in wanted if source.is_dir()]

    # Check all links before the first one is created, so that an error leaves nothing behind.
    for source, link in present:
        _check_free(source, link)
    created = sum(_link(source, link) for source, link in present)
    log.info(
        "%s: %d links created, %d existed, for %s",
        args.output_dir,
        created,
        len(present) - created,
        " and ".join(splits),
    )
    if len(splits) < len(SPLITS):
        log.info("%s has no val; pre-training needs only train", args.imagenet)

    missing = [
        str(source.relative_to(args.imagenet)) for source, _ in wanted if not source.is_dir()
    ]
    if missing:
        raise UserError(
            f"{args.imagenet} lacks {len(missing)} of the {len(wanted)} class folders, the first is {missing[0]}; the "
            "others are linked: add it (each class also has a folder in val) and run the same command again"
        )


def _check_free(source: Path, link: Path) -> None:
    """Raise UserError if anything but the right link exists at `link`."""
    # `lexists` is also true for a broken link.
    if os.path.lexists(link) and not _is_same(source, link):
        raise UserError(
            f"{link} exists and is not a link to {source}: choose another --output_dir, or remove it"
        )


def _is_same(source: Path, link: Path) -> bool:
    return link.is_symlink() and link.resolve() == source.resolve()


def _link(source: Path, link: Path) -> bool:
    """Create a link, if it does not exist. Return whether it was created."""
    if link.is_symlink():
        return False
    try:
        link.parent.mkdir(parents=True, exist_ok=True)
        # An absolute path: a relative one would be relative to the link, not to the current directory.
        link.symlink_to(source.resolve(), target_is_directory=True)
    except OSError as error:
        raise UserError(
            f"{link} can't be created ({error.strerror}): check --output_dir {link.parent.parent}"
        ) from error
    return True


if __name__ == "__main__":
    run_script(main, parse)
