"""Starting and ending an entry script: logger, processes, seeds, and errors as one line."""
import random
import sys
from argparse import Namespace
from collections.abc import Callable

import numpy as np
import torch

from util.distributed import get_rank, init_distributed, shutdown
from util.logger import UserError, log, setup_logger

STOPPED = 143  # what a shell reports of a process that SIGTERM ended


def start_session(args: Namespace) -> torch.device:
    """Joins the processes, seeds them, and returns the device. `args` need not be resolved."""
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    return init_distributed(args.device, args.dist_url or "env://")


def seed_everything(seed: int) -> None:
    """Seeds the generators of this process; processes differ by their number."""
    seed += get_rank()
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def run_script(main: Callable[[Namespace], None], parse: Callable[[list[str]], Namespace], argv: list[str] | None = None) -> None:
    """Runs an entry script; what the user can mend is one line and exit status 1, a requested stop is status 143."""
    setup_logger()
    argv = sys.argv[1:] if argv is None else argv
    status = 0
    try:
        main(parse(argv))
    except UserError as error:
        log.error("error: %s", error)
        status = 1
    except ArithmeticError as error:
        log.error("error: %s", error)
        status = 1
    except KeyboardInterrupt:
        log.error("stopped")
        status = 130
    except SystemExit as leave:
        status = leave.code
    finally:
        sys.stdout.flush()
        shutdown()
    if status:
        sys.exit(status)
