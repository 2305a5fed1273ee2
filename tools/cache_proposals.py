"""Build a proposal cache for a dataset on all CPU cores.

    python tools/cache_proposals.py --images data/ilsvrc/train --output_dir proposals/ilsvrc_ss128
    python main.py --pretext region_prior --imagenet_path data/ilsvrc/train --cache_path proposals/ilsvrc_ss128

It can be stopped or killed at any moment; the same command continues. Several machines can share the work in one
folder: run --shard 1/4 to --shard 4/4, then once with --merge. --check compares every image with a finished cache. See
docs/proposals.md.
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

# So that `python tools/NAME.py` works from any directory.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from datasets.images.image_folder import ImageFile, ImageFiles, ImageFolder
from datasets.images.packed_strings import PackedStrings
from datasets.proposals import build_proposals
from datasets.proposals.base import CacheableProposals
from datasets.proposals.cache import ProposalCache
from datasets.proposals.cache_builder import Plan, file_identity, make_chunk, merge
from datasets.sample import BadImageError
from util.errors import UserError
from util.files import read_lines
from util.logger import Progress, log
from util.runs.session import run_script
from util.settings import PRETRAIN, Parser, add_flags, settings, usable_cores
from util.settings.value_types import non_negative, proposal_method

METHOD_FLAGS = ("ss_resize", "ss_rank", "edge_model")
_worker_state: dict[str, Plan] = {}  # the plan, once per worker instead of with every chunk


def parse(argv: list[str]) -> Namespace:
    parser = Parser("tools/cache_proposals.py", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--images",
        required=True,
        metavar="PATH",
        help="images as for training: a folder (with subfolders), a text file with a list, or tar files",
    )
    parser.add_argument(
        "--list",
        metavar="FILE",
        help="text file with the images to use, one path per line relative to --images; a label may follow the path "
        "(default: all images)",
    )
    parser.add_argument(
        "--output_dir",
        required=True,
        type=Path,
        metavar="DIR",
        help="folder of the cache; pass it to main.py as --cache_path",
    )
    parser.add_argument(
        "--proposals",
        type=proposal_method,
        default="selective_search",
        metavar="NAME|file:PATH",
        help="proposal method, or a file of boxes to convert (default: selective_search)",
    )
    add_flags(parser, PRETRAIN, (*METHOD_FLAGS, "exif"))
    parser.add_argument(
        "--num_workers",
        type=non_negative(),
        default=usable_cores(),
        metavar="N",
        help="number of worker processes; 0 searches in the main process (default: one per CPU core)",
    )
    parser.add_argument(
        "--shard",
        type=_parse_shard,
        default=(1, 1),
        metavar="i/n",
        help="process part i of n only and don't merge, i from 1 to n (default: 1/1, everything)",
    )
    parser.add_argument(
        "--merge",
        action="store_true",
        help="merge the parts of all shards into the cache, without searching (default: off)",
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="compare size and checksum of every image with a finished cache (default: off)",
    )
    return parser.parse_args(argv)


def _parse_shard(text: str) -> tuple[int, int]:
    index, _, count = text.partition("/")
    if not (index.isdigit() and count.isdigit() and 1 <= int(index) <= int(count)):
        raise argparse.ArgumentTypeError(f"{text} is not i/n with i from 1 to n, such as 1/4")
    return int(index), int(count)


def main(args: Namespace) -> None:
    if args.check:
        check(ProposalCache(args.output_dir), args.images)
        return

    plan = build_plan(args)
    if not plan.begin():
        log.info("the proposal cache %s is already complete", plan.folder)
        return
    if not args.merge:
        search(plan, args.shard, args.num_workers)

    if args.shard == (1, 1) or args.merge:
        bar = Progress(plan.num_chunks, "merging")
        log_summary(merge(plan, bar.step))
    else:
        log.info(
            "shard %d/%d is finished: when all shards are, run the same command with --merge instead of --shard",
            *args.shard,
        )


def build_plan(args: Namespace) -> Plan:
    """Return what to build: the images in a fixed order, and the proposal method.

    Raises:
        UserError: there are no images, or the method draws random boxes, which can't be cached.
    """
    if args.list:
        names = sorted(set(_read_image_list(args.list, args.images)))
        images = ImageFiles(args.images, PackedStrings(names))
    else:
        images = ImageFolder(args.images)
        if images.shards is None:
            # A text file may list images in any order, and twice. Chunks need the same order on every machine.
            names = sorted({images.name(i) for i in range(len(images))})
            images = ImageFiles(images.base, PackedStrings(names))

    images.exif = args.exif
    flags = {name: getattr(args, name) for name in METHOD_FLAGS}
    method = build_proposals(
        settings(PRETRAIN, pretext="region_prior", proposals=args.proposals, **flags)
    )
    if not isinstance(method, CacheableProposals):
        raise UserError(
            f"--proposals {args.proposals} draws new boxes each time and can't be cached: choose another method"
        )
    return Plan(args.output_dir, images, method, args.proposals)


def _read_image_list(path: str, folder: str) -> Iterator[str]:
    """Yield the relative paths of a list. Lists of classification data have a label after each path; it is dropped."""
    try:
        lines = read_lines(path)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"--list {path} can't be read ({error}): give a text file with one path per line"
        ) from error
    names = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    if not names:
        raise UserError(f"--list {path} is empty: give one relative path per line")

    # File names may contain spaces, so the last word is a label only if the first line as a whole is no file.
    first_exists = os.path.exists(os.path.join(folder, names[0]))
    if not first_exists and len(names[0].split()) > 1:
        names = [name.rsplit(maxsplit=1)[0] for name in names]
    if not os.path.exists(os.path.join(folder, names[0])):
        raise UserError(
            f"--list {path}: its first image {names[0]} is not in {folder}: give paths relative to --images"
        )
    yield from names


def search(plan: Plan, shard: tuple[int, int], num_workers: int) -> None:
    """Search proposals for the missing chunks of a shard and log the throughput.

    Raises:
        UserError: a worker process was killed.
    """
    index, count = shard
    missing = plan.missing(shard)
    chunks = range(index - 1, plan.num_chunks, count)  # every count-th chunk: shards of equal size
    total = sum(len(plan.image_indices(chunk)) for chunk in chunks)
    done = total - sum(len(plan.image_indices(chunk)) for chunk in missing)
    if done:
        log.info("continuing: %d of %d images are already done", done, total)

    bar = Progress(total, "proposals", start=done, unit=" images")
    start, num_searched, num_unreadable = time.monotonic(), 0, 0
    for num_images, num_bad in _search_chunks(plan, missing, num_workers):
        num_searched += num_images
        num_unreadable += num_bad
        bar.step(f"{num_unreadable} unreadable" if num_unreadable else None, num_images)

    if num_searched:
        seconds = time.monotonic() - start
        num_processes = max(min(num_workers, len(missing)), 1)
        log.info(
            "%d images in %.1f s on %d processes: %.2f images/s per process",
            num_searched,
            seconds,
            num_processes,
            num_searched / seconds / num_processes,
        )


def _search_chunks(plan: Plan, chunks: list[int], num_workers: int) -> Iterator[tuple[int, int]]:
    """Yield (images, unreadable images) of each chunk, in the order in which they are finished."""
    if num_workers == 0 or not chunks:
        yield from (make_chunk(plan, chunk) for chunk in chunks)
        return

    # Fork where it exists: workers start at once and share the list of images with the main process.
    method = "fork" if "fork" in multiprocessing.get_all_start_methods() else None
    pool = ProcessPoolExecutor(
        min(num_workers, len(chunks)),
        multiprocessing.get_context(method),
        initializer=_start_worker,
        initargs=(plan, os.getpid()),
    )
    try:
        for future in as_completed([pool.submit(_make_chunk, chunk) for chunk in chunks]):
            yield future.result()
    except BrokenProcessPool as error:
        raise UserError(
            "a worker process was killed (out of memory?): finished parts are saved, run the same command again, "
            f"perhaps with --num_workers {max(num_workers // 2, 1)}"
        ) from error
    finally:
        # Without waiting: after Ctrl-C nobody wants the chunks that are being searched.
        pool.shutdown(wait=False, cancel_futures=True)


def _start_worker(plan: Plan, parent: int) -> None:
    """Set up a worker: Ctrl-C is left to the main process, and the worker exits when the main process does."""
    _worker_state["plan"] = plan
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, args=(parent,), daemon=True).start()


def _exit_with_parent(parent: int) -> None:
    # A killed parent can't tell its workers. They get another parent then, which is what shows.
    while os.getppid() == parent:
        time.sleep(0.1)
    os._exit(1)


def _make_chunk(chunk: int) -> tuple[int, int]:
    return make_chunk(_worker_state["plan"], chunk)


def log_summary(cache: ProposalCache) -> None:
    """Log size and content of a finished cache, and how many images could not be read."""
    header = cache.header
    num_bytes = sum(path.stat().st_size for path in cache.folder.iterdir())
    log.info(
        "proposal cache %s: %d images, %.1f boxes and %.0f bytes per image",
        cache.folder,
        header["images"],
        header["boxes"] / header["images"],
        num_bytes / header["images"],
    )
    if header["unreadable"]:
        name, reason = header["problems"][0]
        log.warning(
            "%d images could not be read and have no boxes; the first is %s: %s",
            header["unreadable"],
            name,
            reason,
        )


def locate_images(cache: ProposalCache, root: str) -> Callable[[int], ImageFile]:
    """Return a function from row of the cache to image file: in the folder, next to the list, or in a tar file."""
    folder = root if os.path.isdir(root) else os.path.dirname(root)
    files = ImageFiles(folder, cache.names)
    # Names of images in tar files are `FILE.tar/name`; a folder may be called *.tar too.
    if ".tar/" not in cache.names[0].lower() or os.path.exists(files.path(0)):
        return files.file

    images = ImageFolder(root)

    def file_of(row: int) -> ImageFile:
        index = images.names.find(cache.names[row])
        return files.path(row) if index is None else images.file(index)

    return file_of


def check(cache: ProposalCache, root: str) -> None:
    """Compare size and CRC-32 of every image file with those in the cache.

    Raises:
        UserError: files differ or are missing.
    """
    file_of = locate_images(cache, root)
    num_images = len(cache.names)
    bar, differing = Progress(num_images, "checking"), []
    for row in range(num_images):
        try:
            expected = (cache.file_bytes[row], cache.file_crc32[row])
            same = file_identity(file_of(row)) == expected
        except BadImageError:
            # Unreadable now; the cache has 0 bytes if it was when the cache was built.
            same = cache.file_bytes[row] == 0
        if not same:
            differing.append(cache.names[row])
        bar.step()

    if differing:
        raise UserError(
            f"{len(differing)} of {num_images} images differ from those that {cache.folder} was built from, the first "
            f"is {differing[0]}: build a new cache"
        )
    log.info("all %d images are those that %s was built from", num_images, cache.folder)


if __name__ == "__main__":
    run_script(main, parse)
