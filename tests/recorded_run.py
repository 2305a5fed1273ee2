"""Run finetune_main.py and record the images of each training step.

    python tests/recorded_run.py FOLDER STOP_AFTER FLAGS...

Each rank appends a line per batch to FOLDER/rank_R.txt: the epoch, the image ids, and a hash of what the model sees.
STOP_AFTER is the number of batches of this start after which the last rank asks to stop; 0: never.
"""

import hashlib
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import engine
import finetune_main
from util.distributed import get_rank, get_world_size
from util.runs.session import run_script


def record(folder: Path, stop_after: int) -> None:
    """Make `engine.train_step` write the images, and stop in time."""
    train_step, batches = engine.train_step, []

    def recorded(state, samples, targets, stop, *place):
        seen = hashlib.sha256(samples.tensors.contiguous().numpy())
        for name in ("boxes", "labels", "image_id"):
            seen.update(targets.tensors[name].contiguous().numpy())
        line = {
            "epoch": state.epoch,
            "images": targets.tensors["image_id"].tolist(),
            "hash": seen.hexdigest(),
        }
        with (folder / f"rank_{get_rank()}.txt").open("a") as file:
            file.write(json.dumps(line) + "\n")
        batches.append(line)
        is_last_rank = get_rank() == get_world_size() - 1
        stop = stop or (is_last_rank and len(batches) == stop_after)
        return train_step(state, samples, targets, stop, *place)

    engine.train_step = recorded


if __name__ == "__main__":
    record(Path(sys.argv[1]), int(sys.argv[2]))
    run_script(finetune_main.main, finetune_main.parse, sys.argv[3:])
