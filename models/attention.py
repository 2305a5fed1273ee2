"""Multi-head attention on `scaled_dot_product_attention`, with padding masks and query groups.

Shapes: B images, Q queries, S keys, D model width, H heads, G query groups.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.backends import cuda
from torch.nn import functional

from models.precision import full_precision, without_autocast

FUSED_KERNELS = {
    "flash": cuda.can_use_flash_attention,
    "memory-efficient": cuda.can_use_efficient_attention,
    "cuDNN": cuda.can_use_cudnn_attention,
}


def fold_groups(x: Tensor, groups: int) -> Tensor:
    """Fold query groups into the batch: [B, Q, D] -> [B * G, Q / G, D].

    Groups are contiguous: query n is in group n // (Q / G). After folding, self-attention connects
    the queries of one group only.
    """
    if groups == 1:
        return x
    return x.reshape(x.shape[0] * groups, x.shape[1] // groups, x.shape[2])  # [B * G, Q / G, D]


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    num_heads: int,
    padding_mask: Tensor | None = None,
    dropout: float = 0.0,
    query_groups: int = 1,
) -> Tensor:
    """Scaled dot-product attention with H heads. Query and key may be wider than the value.

    Args:
        query: [B, Q, K].
        key: [B, S, K]. K is split over the heads, the scale is 1 / sqrt(K / H).
        value: [B, S, D]. D is split over the heads.
        padding_mask: bool [B, S], True on keys to ignore. None if no image is padded: the flash
            kernel accepts no mask.
        query_groups: self-attention only (S = Q). Split the queries into this many groups that do
            not attend to each other, as UP-DETR's attention mask does (Dai et al. 2021, section 3.2).

    Returns:
        [B, Q, D]
    """
    batch, num_queries = query.shape[:2]
    query, key, value = (fold_groups(x, query_groups) for x in (query, key, value))
    query, key, value = (
        x.unflatten(-1, (num_heads, -1)).transpose(1, 2) for x in (query, key, value)
    )  # [B * G, H, Q / G or S / G, K / H or D / H]

    # PyTorch's boolean mask is True where attention is allowed, ours where a key is padding.
    mask = None if padding_mask is None else ~padding_mask[:, None, None, :]  # [B, 1, 1, S]
    out = functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, dropout_p=dropout
    )  # [B * G, H, Q / G, D / H]
    return out.transpose(1, 2).reshape(batch, num_queries, -1)  # [B, Q, D]


def attention_weights(
    query: Tensor,
    key: Tensor,
    num_heads: int,
    padding_mask: Tensor | None = None,
    query_groups: int = 1,
) -> Tensor:
    """Return the weights of `attend` without dropout.

    Returns:
        float32 [B, H, Q, S], rows sum to 1; with query groups [B * G, H, Q / G, Q / G].
    """
    query, key = (fold_groups(x, query_groups) for x in (query, key))
    query, key = (x.unflatten(-1, (num_heads, -1)).transpose(1, 2) for x in (query, key))
    with without_autocast(query):
        query, key = full_precision(query), full_precision(key)
        logits = query @ key.transpose(-2, -1) / query.shape[-1] ** 0.5  # [B, H, Q, S]
        if padding_mask is not None:
            logits = logits.masked_fill(padding_mask[:, None, None, :], float("-inf"))
        return logits.softmax(-1)


class ObservedAttention(nn.Module):
    """Base of attention modules, whose weights can be read in two ways. Without either, none are computed.

    - `models.attention_maps.record_attention` sets `record`, which is called with the weights of each head.
    - A forward hook gets (output, weights), as of `torch.nn.MultiheadAttention`: published code reads attention maps
      as `output[1]` in a hook. Callers always get the output only.
    """

    record: Callable[[Any], None] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        out = super().__call__(*args, **kwargs)
        return out[0] if isinstance(out, tuple) else out


class _DotProductAttention(ObservedAttention):
    """Scaled dot-product attention with an output projection."""

    num_heads: int
    dropout: float
    out_proj: nn.Linear

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        padding_mask: Tensor | None,
        query_groups: int,
    ) -> Any:
        """Return the projected output [B, Q, D], or (output, weights) for a module with a forward hook."""
        dropout = self.dropout if self.training else 0.0
        out = attend(query, key, value, self.num_heads, padding_mask, dropout, query_groups)
        out = self.out_proj(out)
        if self.record is None and not self._forward_hooks:
            return out
        with torch.no_grad():
            weights = attention_weights(query, key, self.num_heads, padding_mask, query_groups)
        if self.record is not None:
            self.record(weights)
        return (out, weights.mean(1)) if self._forward_hooks else out


def usable_kernels(
    num_heads: int, head_dim: int, device: torch.device, dtype: torch.dtype
) -> str | None:
    """Describe the fused kernels that `scaled_dot_product_attention` may select on a GPU.

    Batches with and without padding are listed separately. Returns None on other devices, where
    PyTorch has no such query.
    """
    if device.type != "cuda":
        return None

    x = torch.empty(1, num_heads, 8, head_dim, device=device, dtype=dtype)
    masks = {
        "without padding": None,
        "with padding": torch.ones(1, 1, 1, 8, device=device, dtype=torch.bool),
    }
    usable = []
    for case, mask in masks.items():
        inputs = cuda.SDPAParams(x, x, x, mask, 0.0, False, False)
        names = [name for name, can_use in FUSED_KERNELS.items() if can_use(inputs)]
        usable.append(f"{' or '.join(names) or 'not fused'} {case}")
    return ", ".join(usable)


class MultiheadAttention(_DotProductAttention):
    """Attention with query, key, value and output projections.

    Parameter names and initial values are those of `torch.nn.MultiheadAttention`, so published DETR
    weights load unchanged.
    """

    def __init__(self, dim: int, num_heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.num_heads, self.dropout = num_heads, dropout
        self.head_dim = dim // num_heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * dim, dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * dim))
        self.out_proj = nn.Linear(dim, dim)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        padding_mask: Tensor | None = None,
        query_groups: int = 1,
    ) -> Any:
        """Attend from query [B, Q, D] to key and value [B, S, D]; returns [B, Q, D].

        `padding_mask` and `query_groups` as in `attend`. Pass one tensor as query and key where they are
        equal: then one product projects both.
        """
        query, key, value = self._project(query, key, value)
        return self._attend(query, key, value, padding_mask, query_groups)

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """Project query, key and value; query and key in one product where they are one tensor."""
        sizes = [2, 1] if query is key else [1, 1, 1]
        inputs = [query, value] if query is key else [query, key, value]
        dim = self.in_proj_weight.shape[1]
        weights = self.in_proj_weight.split([size * dim for size in sizes])  # query, key, value
        biases = self.in_proj_bias.split([size * dim for size in sizes])
        outputs = [
            functional.linear(x, weight, bias)
            for x, weight, bias in zip(inputs, weights, biases, strict=True)
        ]  # [B, S, 2 D] or [B, S, D] each
        return tuple(y for x in outputs for y in x.split(dim, -1))

    def kernels(self, device: torch.device, dtype: torch.dtype) -> dict[str, str]:
        """Return {"attention": usable kernels}, or {} where they are unknown."""
        usable = usable_kernels(self.num_heads, self.head_dim, device, dtype)
        return {} if usable is None else {"attention": usable}


class ProjectedAttention(_DotProductAttention):
    """Attention on query, key and value that are already projected, with an output projection only.

    Conditional DETR projects content and position separately (Meng et al. 2021, section 3.3).
    """

    def __init__(self, dim: int, num_heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.num_heads, self.dropout = num_heads, dropout
        self.out_proj = nn.Linear(dim, dim)
        nn.init.zeros_(self.out_proj.bias)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        padding_mask: Tensor | None = None,
        query_groups: int = 1,
    ) -> Any:
        """Attend from query [B, Q, K] to key [B, S, K] and value [B, S, D]; returns [B, Q, D]."""
        return self._attend(query, key, value, padding_mask, query_groups)
