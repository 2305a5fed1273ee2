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

# Metrics of a Lightning module next to its model, such as `val_map.detection_scores`; some start at infinity.
_METRIC = re.compile(r"((train|val|valid|test)_\w+|\w*metrics?)\.")

# Two models of the same kind that a trainer stores side by side.
_HALF = re.compile(r"((?:module\.|model\.)*)(student|teacher)\.")


def strip_wrappers(state: Mapping[str, Tensor], source: object) -> dict[str, Tensor]:
    """Return a state dict without the names of wrappers. Of a model and its average, the model is returned.

    Raises:
        UserError: two parameters would have the same name, as in a file with two models; or it has a student and a
            teacher.
    """
    _check_halves(state, source)
    state = _drop_metrics(state, source)
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


def _check_halves(state: Mapping[str, Tensor], source: object) -> None:
    halves = {match[2]: match[0] for match in map(_HALF.match, state) if match}
    if len(halves) == 2:
        raise UserError(
            f"{source} has two models, {halves['student']}* and {halves['teacher']}*: save the state dict of one of "
            "them, with its prefix removed"
        )


def _drop_metrics(state: Mapping[str, Tensor], source: object) -> Mapping[str, Tensor]:
    """Return a Lightning module's state dict without its metrics."""
    metrics = [key for key in state if _METRIC.match(key)]
    if not metrics or not any(map(_OUTER.match, state)):
        return state
    log.info(
        "%s also has %d tensors of metrics (%s, ...), which are not used",
        source,
        len(metrics),
        metrics[0],
    )
    return {key: value for key, value in state.items() if key not in set(metrics)}


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
