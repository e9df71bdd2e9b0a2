"""The selected convolution: selection, masks, exact zeros, precision, gradients."""

import pytest
import torch
from checks import layer
from tiny import maps

from afdslib.afs.layer import select


def reference_selection(h, m, s, k):
    """The definition, sample by sample, with Python's stable sort."""
    pi = torch.zeros_like(h)
    static = int(((m == 1) & (s == 0)).sum())
    dynamic = [c for c in range(h.shape[1]) if m[c] and s[c]]
    for row in range(h.shape[0]):
        places = max(0, min(k - static, len(dynamic)))
        for c in sorted(dynamic, key=lambda c: -float(h[row, c]))[:places]:
            pi[row, c] = h[row, c]
    return pi


@pytest.mark.parametrize("k", [1, 3, 5, 8])
def test_selection_is_the_stable_sort_of_the_definition_even_under_ties(k):
    generator = torch.Generator().manual_seed(k)
    h = torch.randint(0, 3, (64, 8), generator=generator).float()  # many ties, many zeros
    for m, s in (
        (torch.ones(8), torch.ones(8)),
        (torch.tensor([1, 0, 1, 1, 0, 1, 1, 1.0]), torch.ones(8)),
        (torch.tensor([1, 0, 1, 1, 0, 1, 1, 1.0]), torch.tensor([1, 1, 0, 1, 0, 1, 0, 1.0])),
        (torch.ones(8), torch.zeros(8)),
    ):
        assert torch.equal(select(h, m, s, k), reference_selection(h, m, s, k))


def test_selected_channel_with_zero_importance_is_not_computed():
    one, x = layer(), maps(2, 3, 6, 6)
    with torch.no_grad():
        one.predictor.weight.zero_()
        one.predictor.bias.copy_(torch.tensor([1, -1, 1, -1, 1, -1, 1, -1.0]))
    assert one.k == 8 and (one(x)[:, 1::2] == 0).all()
    assert torch.equal(one.gates(x).active, torch.tensor([1.0, 0] * 4).double().expand(2, -1))


def test_k_counts_places_of_the_original_width_and_static_channels_take_them_first():
    one = layer(c=10)
    for density, k in ((1.0, 10), (0.5, 5), (0.3, 3), (0.31, 4), (0.01, 1), (0.1 + 0.2, 3)):
        one.density = density
        assert one.k == k
    one, x = layer(), maps(5, 3, 6, 6)
    one.density = 0.5  # 4 places
    for static, active in ((3, 4), (6, 6)):  # more static channels than places: all of them, and no dynamic one
        one.s[:static] = 0
        assert (one.gates(x).active.sum(1) == active).all()


def test_gradient_reaches_only_selected_entries_and_their_predictors():
    one, x = layer(), maps(1, 3, 6, 6)
    one.density = 0.25
    one(x).square().sum().backward()
    active = one.gates(x).active[0].bool()
    assert (one.predictor.bias.grad[active] != 0).all() and (one.predictor.bias.grad[~active] == 0).all()
    assert (one.beta.grad[~active] == 0).all()


def test_memory_format_does_not_change_the_gates():
    one, x = layer(16, 32), maps(4, 16, 8, 8)
    one.density = 0.5
    other = x.to(memory_format=torch.channels_last)
    assert torch.equal(one.gates(x).active, one.gates(other).active)
    assert torch.allclose(one(x), one(other), atol=1e-12)


def test_gates_stay_float32_under_bf16_autocast():
    one, x = layer().float(), maps(4, 3, 6, 6).bfloat16()
    one.density = 0.5
    with torch.autocast("cpu", torch.bfloat16):
        gates, out = one.gates(x), one(x)
    assert gates.eta.dtype == gates.pi.dtype == torch.float32 and out.dtype == torch.bfloat16
    reference = one.gates(x.float())
    assert torch.equal(gates.active, reference.active) and torch.allclose(gates.eta, reference.eta)
    assert (out[~gates.active.bool()] == 0).all()
