"""What a run changes in the whole process, restored at its end: a run may be part of a user's program."""

import contextlib
from collections.abc import Iterator

import torch

from util.random_state import get_rng_states, set_rng_states


@contextlib.contextmanager
def restored_process_state() -> Iterator[None]:
    """Give a run PyTorch's usual state, and restore the program's own at the end, also after an error.

    Restored are the random states, the default dtype and device, gradient mode, TF32 and the current GPU. Notebooks
    often switch gradients off for all that follows, as those of DETR do.
    """
    dtype, device = torch.get_default_dtype(), torch.get_default_device()
    random_states = get_rng_states()
    tf32 = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    gpu = torch.cuda.current_device() if torch.cuda.is_available() else None
    try:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        torch.set_default_dtype(dtype)
        torch.set_default_device(None if device.type == "cpu" else device)
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = tf32
        if gpu is not None:
            torch.cuda.set_device(gpu)
        set_rng_states(random_states)
