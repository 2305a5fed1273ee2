"""Multi-head attention on `scaled_dot_product_attention`: padding, query groups, and inputs that are projected
elsewhere.

Shapes: B images, Q queries, S keys, D model width, H heads.
"""

import torch
from torch import Tensor, nn
from torch.backends import cuda
from torch.nn import functional

FUSED_KERNELS = {
    "flash": cuda.can_use_flash_attention,
    "memory-efficient": cuda.can_use_efficient_attention,
    "cuDNN": cuda.can_use_cudnn_attention,
}


def fold_groups(x: Tensor, groups: int) -> Tensor:
    """[B, Q, D] -> [B * groups, Q / groups, D]: queries of one group see only each other in self-attention."""
    return x if groups == 1 else x.reshape(x.shape[0] * groups, x.shape[1] // groups, x.shape[2])


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    num_heads: int,
    padding_mask: Tensor | None = None,
    dropout: float = 0.0,
    query_groups: int = 1,
) -> Tensor:
    """Scaled dot-product attention of H heads; widths of query and key may differ from the value's.

    Args:
        query: [B, Q, K]; key: [B, S, K]; value: [B, S, D]. K and D are split over the heads, the scale is 1 / sqrt(K /
            H).
        padding_mask: bool [B, S], True on keys to ignore; None where nothing is padded (the fastest kernels need that).
        query_groups: only for self-attention: queries are cut into as many groups, each of which sees only itself. This
            equals the block mask of UP-DETR (Dai et al. 2021, section 3.2) without a mask.

    Returns:
        [B, Q, D]
    """
    batch, length = query.shape[:2]
    query, key, value = (fold_groups(x, query_groups) for x in (query, key, value))
    query, key, value = (
        x.unflatten(-1, (num_heads, -1)).transpose(1, 2) for x in (query, key, value)
    )
    mask = None if padding_mask is None else ~padding_mask[:, None, None, :]
    out = functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, dropout_p=dropout
    )
    return out.transpose(1, 2).reshape(batch, length, -1)


def usable_kernels(
    num_heads: int, head_dim: int, device: torch.device, dtype: torch.dtype
) -> str | None:
    """The fused kernels among which `scaled_dot_product_attention` chooses on a GPU, for batches without and with
    padding; None on other devices, where PyTorch doesn't tell.
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


class MultiheadAttention(nn.Module):
    """Attention with its own projections; parameter names and initial values are those of
    `torch.nn.MultiheadAttention`.
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
    ) -> Tensor:
        """query [B, Q, D], key and value [B, S, D] -> [B, Q, D]; `padding_mask` and `query_groups` as in `attend`."""
        weights, biases = self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3)
        query, key, value = (
            functional.linear(x, w, b)
            for x, w, b in zip((query, key, value), weights, biases, strict=True)
        )
        dropout = self.dropout if self.training else 0.0
        return self.out_proj(
            attend(query, key, value, self.num_heads, padding_mask, dropout, query_groups)
        )

    def kernels(self, device: torch.device, dtype: torch.dtype) -> dict[str, str]:
        """{"attention": what may run}, or nothing where that is not known; see `usable_kernels`."""
        usable = usable_kernels(self.num_heads, self.head_dim, device, dtype)
        return {} if usable is None else {"attention": usable}


class ProjectedAttention(nn.Module):
    """Attention whose query, key and value come projected already; it has only the output projection (Conditional
    DETR).
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
    ) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        return self.out_proj(
            attend(query, key, value, self.num_heads, padding_mask, dropout, query_groups)
        )
