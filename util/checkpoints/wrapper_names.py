"""Names that wrappers put around a model's parameter names, and removing them.

DistributedDataParallel, DataParallel and AveragedModel store a model as `module`, Lightning modules usually as `model`,
Lightning's strategies as `_forward_module`, and torch.compile as `_orig_mod`, in the whole model or in parts of it.
"""

import re
from collections.abc import Mapping

from torch import Tensor

from util.errors import UserError
from util.logger import log

# Nested in any order, on all or some of the keys.
_OUTER = re.compile(r"^((module|model|net|network|detector|_forward_module|_orig_mod)\.)+")
_COMPILED_PART = "_orig_mod."

# Averaged weights that a Lightning module or a trainer stores next to the model.
_AVERAGED = re.compile(
    r"^(model\.|module\.)?(ema|ema_model|model_ema|averaged_model|_averaged_model)\."
)

# Entries next to the model's: a counter of AveragedModel, and the class weights of a criterion in a Lightning module.
_NO_WEIGHTS = re.compile(r"n_averaged|(.*\.)?criterion\.([\w.]*\.)?empty_weight")


def strip_wrappers(state: Mapping[str, Tensor], source: object) -> dict[str, Tensor]:
    """Return a state dict without the names of wrappers. Of a model and its average, the model is returned.

    Raises:
        UserError: two parameters would have the same name, as in a file with two models.
    """
    averaged = {key: _AVERAGED.sub("", key) for key in state if _AVERAGED.match(key)}
    plain = _strip({key: value for key, value in state.items() if key not in averaged}, source)
    average = _strip({name: state[key] for key, name in averaged.items()}, source)
    if average and not plain:
        return average
    if average and average.keys() <= plain.keys():
        log.info(
            "%s also has averaged weights (%s, ...), which are not used: to use them, save them as the only model",
            source,
            next(iter(averaged)),
        )
        return plain
    return _strip(state, source)  # such as a model that calls one of its parts so


def _strip(state: Mapping[str, Tensor], source: object) -> dict[str, Tensor]:
    plain: dict[str, Tensor] = {}
    for key, value in state.items():
        name = _OUTER.sub("", key).replace(_COMPILED_PART, "")
        if _NO_WEIGHTS.fullmatch(name):
            continue
        if name in plain:
            raise UserError(
                f"{source} has the parameter {name} twice (with and without a wrapper's prefix, as in {key}); save the "
                "state dict of one model only"
            )
        plain[name] = value
    return plain
