"""Makes a store of proposals for a data set, on all cores; see docs/proposals.md.

    python tools/cache_proposals.py --images data/ilsvrc/train --output_dir proposals/ilsvrc_ss128
    python main.py --pretext region_prior --imagenet_path data/ilsvrc/train --cache_path proposals/ilsvrc_ss128

It may be stopped or killed at any moment: the same command goes on. Several machines share the work in one folder by
--shard 1/4 to 4/4; when all are done, --merge makes the store. --check compares every image with a finished store.
"""

import argparse
import multiprocessing
import os
import signal
import sys
import threading
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

sys.path.insert(
    0, str(Path(__file__).resolve().parent.parent)
)  # `python tools/NAME.py` works from any directory
from datasets.images.image_folder import ImageFile, ImageFiles, ImageFolder
from datasets.images.packed_strings import PackedStrings
from datasets.proposals import build_proposals
from datasets.proposals.base import CacheableProposals
from datasets.proposals.cache import ProposalCache
from datasets.proposals.cache_builder import Plan, file_identity, make_chunk, merge
from datasets.sample import BadImageError
from util.errors import UserError
from util.logger import Progress, log
from util.runs.session import run_script
from util.settings import PRETRAIN, Parser, add_flags, settings, usable_cores
from util.settings.value_types import non_negative, proposal_method

METHOD_FLAGS = ("ss_resize", "edge_model")
_worker_state: dict[str, Plan] = {}


def parse(argv: list[str]) -> Namespace:
    parser = Parser("tools/cache_proposals.py", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--images",
        required=True,
        metavar="DIR",
        help="as for training: any folder tree, a list of files, or tar files",
    )
    parser.add_argument(
        "--list",
        metavar="FILE",
        help="only these images of the folder: one relative path a line (a label may follow)",
    )
    parser.add_argument(
        "--output_dir",
        required=True,
        type=Path,
        metavar="DIR",
        help="the store; later --cache_path",
    )
    parser.add_argument(
        "--proposals",
        type=proposal_method,
        default="selective_search",
        metavar="NAME|file:PATH",
        help="method, or boxes to convert (selective_search)",
    )
    add_flags(parser, PRETRAIN, METHOD_FLAGS)
    parser.add_argument(
        "--num_workers",
        type=non_negative(),
        default=usable_cores(),
        help="processes (all cores; 0: this one alone)",
    )
    parser.add_argument(
        "--shard",
        type=_parse_shard,
        default=(1, 1),
        metavar="i/n",
        help="only part i of n, without merging",
    )
    parser.add_argument(
        "--merge", action="store_true", help="make the store out of all parts, without searching"
    )
    parser.add_argument(
        "--check", action="store_true", help="compare every image's content with the finished store"
    )
    return parser.parse_args(argv)


def _parse_shard(text: str) -> tuple[int, int]:
    part, _, of = text.partition("/")
    if not (part.isdigit() and of.isdigit() and 1 <= int(part) <= int(of)):
        raise argparse.ArgumentTypeError(f"{text} is not i/n with i from 1 to n")
    return int(part), int(of)


def main(args: Namespace) -> None:
    if args.check:
        check(ProposalCache(args.output_dir), args.images)
        return
    plan = build_plan(args)
    if not plan.begin():
        log.info("%s is finished", plan.folder)
        return
    if not args.merge:
        search(plan, args.shard, args.num_workers)
    if args.shard == (1, 1) or args.merge:
        bar = Progress(plan.num_chunks, "merging")
        log_summary(merge(plan, bar.step))
    else:
        log.info(
            "shard %d/%d is done: run the others, and then the same command with --merge in place of --shard",
            *args.shard,
        )


def build_plan(args: Namespace) -> Plan:
    """
    Raises:
        UserError: no images; a method that can't be stored.
    """
    if args.list:
        images = ImageFiles(
            args.images, PackedStrings(sorted(set(_read_image_list(args.list, args.images))))
        )
    else:
        images = ImageFolder(args.images)
        if images.shards is None:  # a list may be in any order
            images = ImageFiles(
                images.base, PackedStrings(sorted({images.name(i) for i in range(len(images))}))
            )
    flags = {name: getattr(args, name) for name in METHOD_FLAGS}
    method = build_proposals(
        settings(PRETRAIN, pretext="region_prior", proposals=args.proposals, **flags)
    )
    if not isinstance(method, CacheableProposals):
        raise UserError(
            f"--proposals {args.proposals} draws new boxes each time: there is nothing to store"
        )
    return Plan(args.output_dir, images, method, args.proposals)


def _read_image_list(path: str, folder: str) -> Iterator[str]:
    """Relative paths of a list; the word behind a path, as in lists of classification data, is no part of it."""
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"--list {path} can't be read ({error}): give a text file with one path a line"
        ) from error
    names = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    if not names:
        raise UserError(f"--list {path} is empty: give one relative path a line")
    with_labels = not os.path.exists(os.path.join(folder, names[0])) and len(names[0].split()) > 1
    names = [name.rsplit(maxsplit=1)[0] if with_labels else name for name in names]
    if not os.path.exists(os.path.join(folder, names[0])):
        raise UserError(
            f"--list {path}: its first image {names[0]} is not in {folder}: paths count from --images"
        )
    yield from names


def search(plan: Plan, shard: tuple[int, int], num_workers: int) -> None:
    """Makes the missing chunks of a shard.

    Raises:
        UserError: a process was ended from outside.
    """
    todo, mine = plan.missing(shard), range(shard[0] - 1, plan.num_chunks, shard[1])
    total = sum(len(plan.image_indices(k)) for k in mine)
    done = total - sum(len(plan.image_indices(k)) for k in todo)
    if done:
        log.info("%d of %d images are done already", done, total)
    bar = Progress(total, "proposals", start=done, unit=" images")
    began, searched, unreadable = time.monotonic(), 0, 0
    for images, bad in _chunks(plan, todo, num_workers):
        searched, unreadable = searched + images, unreadable + bad
        bar.step(f"{unreadable} unreadable" if unreadable else None, images)
    if searched:
        seconds = time.monotonic() - began
        processes = max(min(num_workers, len(todo)), 1)
        log.info(
            "%d images in %.1f s on %d processes: %.2f images/s a process",
            searched,
            seconds,
            processes,
            searched / seconds / processes,
        )


def _chunks(plan: Plan, todo: list[int], num_workers: int) -> Iterator[tuple[int, int]]:
    if num_workers == 0 or not todo:
        yield from (make_chunk(plan, chunk) for chunk in todo)
        return
    method = "fork" if "fork" in multiprocessing.get_all_start_methods() else None
    context = multiprocessing.get_context(method)
    pool = ProcessPoolExecutor(
        min(num_workers, len(todo)), context, _start_worker, (plan, os.getpid())
    )
    try:
        for future in as_completed([pool.submit(_make_chunk, chunk) for chunk in todo]):
            yield future.result()
    except BrokenProcessPool as error:
        raise UserError(
            "a process was ended from outside (is the memory full?): finished parts are kept, run the same command "
            f"again, perhaps with --num_workers {max(num_workers // 2, 1)}"
        ) from error
    finally:
        pool.shutdown(
            wait=False, cancel_futures=True
        )  # after Ctrl-C nobody waits for what is being searched


def _start_worker(plan: Plan, parent: int) -> None:
    """Ctrl-C is for the main process, and a worker must not outlive it, however it ends."""
    _worker_state["plan"] = plan
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, args=(parent,), daemon=True).start()


def _exit_with_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.1)
    os._exit(1)


def _make_chunk(chunk: int) -> tuple[int, int]:
    return make_chunk(_worker_state["plan"], chunk)


def log_summary(store: ProposalCache) -> None:
    header = store.header
    size = sum(path.stat().st_size for path in store.folder.iterdir())
    log.info(
        "%s: %d images, %.1f boxes and %.0f bytes an image",
        store.folder,
        header["images"],
        header["boxes"] / header["images"],
        size / header["images"],
    )
    if header["unreadable"]:
        name, reason = header["problems"][0]
        log.warning(
            "%d images could not be read and have no boxes, the first is %s: %s",
            header["unreadable"],
            name,
            reason,
        )


def locate_images(store: ProposalCache, root: str) -> Callable[[int], ImageFile]:
    """Says where an image of the store is: below the folder, beside the list, or in a tar file."""
    beside = ImageFiles(root if os.path.isdir(root) else os.path.dirname(root), store.names)
    if ".tar/" not in store.names[0].lower() or os.path.exists(beside.path(0)):
        return beside.file
    images = ImageFolder(root)

    def file_of(row: int) -> ImageFile:
        index = images.names.find(store.names[row])
        return beside.path(row) if index is None else images.file(index)

    return file_of


def check(store: ProposalCache, root: str) -> None:
    """Compares size and CRC-32 of every file with those of the store.

    Raises:
        UserError: files differ or are missing.
    """
    file_of = locate_images(store, root)
    bar, wrong = Progress(len(store.names), "checking"), []
    for row in range(len(store.names)):
        try:
            same = file_identity(file_of(row)) == (store.file_bytes[row], store.file_crc32[row])
        except BadImageError:
            same = store.file_bytes[row] == 0
        if not same:
            wrong.append(store.names[row])
        bar.step()
    if wrong:
        raise UserError(
            f"{len(wrong)} of {len(store.names)} images differ from those that {store.folder} was made of, the first "
            f"is {wrong[0]}: make another store"
        )
    log.info("all %d images are those that %s was made of", len(store.names), store.folder)


if __name__ == "__main__":
    run_script(main, parse)
