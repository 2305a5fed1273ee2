"""Exponential moving average of a model's weights (Polyak averaging), for evaluation and later use."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


class WeightAverage:
    """average <- decay * average + (1 - decay) * weights after each optimizer step, starting from the weights.

    Statistics of batch norm are averaged, too.

    Attributes:
        state: the averages, as a state dict of the model.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model, self.average = model, get_ema_multi_avg_fn(decay)
        sources: dict[int, Tensor] = {}
        copies: dict[int, Tensor] = {}
        self.state: dict[str, Tensor] = {}
        for name, value in model.state_dict(keep_vars=True).items():
            # A tensor with several names, such as a head that decoder layers share, is averaged once.
            sources[id(value)] = value
            self.state[name] = copies.setdefault(id(value), value.detach().clone())

        moving = [key for key, value in sources.items() if _moves(value)]
        counters = [key for key, value in sources.items() if not value.is_floating_point()]
        self.averaged = [(copies[key], sources[key].detach()) for key in moving]
        self.copied = [(copies[key], sources[key].detach()) for key in counters]

    @torch.no_grad()
    def update(self) -> None:
        """Follow the weights after an optimizer step."""
        if self.averaged:
            own, current = map(list, zip(*self.averaged, strict=True))
            self.average(own, current, None)
        for own, current in self.copied:
            own.copy_(current)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Use the averages as the model's weights."""
        weights = {name: value.clone() for name, value in self.model.state_dict().items()}
        self.model.load_state_dict(self.state)
        try:
            yield
        finally:
            self.model.load_state_dict(weights)


def _moves(value: Tensor) -> bool:
    is_frozen = isinstance(value, nn.Parameter) and not value.requires_grad
    return value.is_floating_point() and not is_frozen
