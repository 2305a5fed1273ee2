"""Query and key that are one tensor are projected in one product, with the same results and gradients."""

import pytest
import torch

from models.attention import MultiheadAttention
from tests.models.test_frozen_norm import Operations


@pytest.mark.parametrize("same", [True, False])
def test_products_of_the_projections(same: bool) -> None:
    torch.manual_seed(0)
    attention = MultiheadAttention(16, 4).double()
    tokens = torch.randn(2, 5, 16, dtype=torch.float64)
    value = torch.randn(2, 5, 16, dtype=torch.float64)
    key = tokens if same else tokens.clone()
    with Operations() as operations:
        out = attention(tokens, key, value)
    assert operations.counts["addmm"] == (3 if same else 4)  # with the output projection

    plain = torch.nn.MultiheadAttention(16, 4, batch_first=True).double()
    plain.load_state_dict(attention.state_dict())
    expected = plain(tokens, tokens, value)[0]
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-12)
    out.square().sum().backward()
    expected.square().sum().backward()
    for ours, theirs in zip(attention.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-11)
