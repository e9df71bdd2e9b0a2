"""The selected convolution: selection, masks, exact zeros, precision, gradients."""

import pytest
import torch
from torch import nn

from afdslib import afs
from afdslib.afs.layer import select


def layer(c_in=3, c=8, dtype=torch.float32, seed=0) -> afs.AFSConvBN:
    torch.manual_seed(seed)
    made = afs.AFSConvBN(nn.Conv2d(c_in, c, 3, padding=1, bias=False), nn.BatchNorm2d(c, affine=False)).to(dtype)
    nn.init.normal_(made.predictor.weight)
    nn.init.uniform_(made.predictor.bias, 0.2, 1)
    nn.init.normal_(made.beta)
    return made.eval()


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


def test_output_is_the_formula():
    afs_layer = layer(dtype=torch.float64)
    afs_layer.density = 0.5
    afs_layer.m[2], afs_layer.s[5], afs_layer.gamma[5] = 0, 0, 0.3
    x = torch.randn(4, 3, 6, 6, dtype=torch.float64)
    h = torch.relu(x.mean((2, 3)) @ afs_layer.predictor.weight.T + afs_layer.predictor.bias)
    pi = reference_selection(h, afs_layer.m, afs_layer.s, 4)
    eta = afs_layer.s * pi + (1 - afs_layer.s) * afs_layer.gamma
    active = afs_layer.m * ((1 - afs_layer.s) + afs_layer.s * (pi > 0))
    y = afs_layer.norm(afs_layer.conv(x))
    expected = active[..., None, None] * (eta[..., None, None] * y + afs_layer.beta[:, None, None])
    assert torch.allclose(afs_layer(x), expected, atol=1e-12)
    gates = afs_layer.gates(x)
    assert torch.allclose(gates.pi, pi) and torch.allclose(gates.eta, eta) and torch.equal(gates.active, active)


def test_an_inactive_channel_is_exactly_zero_and_an_active_one_is_not():
    afs_layer = layer()
    afs_layer.density = 0.5
    x = torch.randn(4, 3, 6, 6)
    out, active = afs_layer(x), afs_layer.gates(x).active.bool()
    assert (active.sum(1) == 4).all()
    assert (out[~active] == 0).all() and (out[active].abs().amax((1, 2)) > 0).all()


def test_selected_channel_with_zero_importance_is_not_computed():
    afs_layer = layer()
    with torch.no_grad():
        afs_layer.predictor.weight.zero_()
        afs_layer.predictor.bias.copy_(torch.tensor([1, -1, 1, -1, 1, -1, 1, -1.0]))
    x = torch.randn(2, 3, 6, 6)
    assert afs_layer.k == 8
    assert torch.equal(afs_layer.gates(x).active, torch.tensor([1, 0, 1, 0, 1, 0, 1, 0.0]).expand(2, -1))
    assert (afs_layer(x)[:, 1::2] == 0).all()


def test_k_counts_places_of_the_original_width():
    afs_layer = layer(c=10)
    for density, k in ((1.0, 10), (0.5, 5), (0.3, 3), (0.31, 4), (0.01, 1), (0.1 + 0.2, 3)):
        afs_layer.density = density
        assert afs_layer.k == k


def test_static_channels_take_places_first():
    afs_layer = layer()
    afs_layer.density = 0.5  # 4 places
    afs_layer.s[:3] = 0
    assert (afs_layer.gates(torch.randn(5, 3, 6, 6)).active.sum(1) == 4).all()
    afs_layer.s[:6] = 0  # more static channels than places: all of them, and no dynamic one
    assert (afs_layer.gates(torch.randn(5, 3, 6, 6)).active.sum(1) == 6).all()


def test_gradient_reaches_only_selected_entries_and_their_predictors():
    afs_layer = layer()
    afs_layer.density = 0.25
    x = torch.randn(1, 3, 6, 6)
    afs_layer(x).square().sum().backward()
    active = afs_layer.gates(x).active[0].bool()
    assert (afs_layer.predictor.bias.grad[active] != 0).all()
    assert (afs_layer.predictor.bias.grad[~active] == 0).all()
    assert (afs_layer.beta.grad[~active] == 0).all()


def test_memory_format_does_not_change_the_gates():
    afs_layer = layer(c_in=16, c=32, dtype=torch.float64)
    afs_layer.density = 0.5
    x = torch.randn(4, 16, 8, 8, dtype=torch.float64)
    a, b = afs_layer.gates(x), afs_layer.gates(x.to(memory_format=torch.channels_last))
    assert torch.equal(a.active, b.active)
    assert torch.allclose(afs_layer(x), afs_layer(x.to(memory_format=torch.channels_last)), atol=1e-12)


def test_gates_stay_float32_under_bf16_autocast():
    afs_layer = layer()
    afs_layer.density = 0.5
    x = torch.randn(4, 3, 6, 6).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        gates, out = afs_layer.gates(x), afs_layer(x)
    assert gates.eta.dtype == gates.pi.dtype == torch.float32
    assert out.dtype == torch.bfloat16
    reference = afs_layer.gates(x.float())
    assert torch.equal(gates.active, reference.active) and torch.allclose(gates.eta, reference.eta)
    assert (out[~gates.active.bool()] == 0).all()


def test_masks_and_density_are_in_the_state_dict():
    afs_layer = layer()
    afs_layer.m[1], afs_layer.s[2], afs_layer.gamma[2], afs_layer.density = 0, 0, 0.5, 0.5
    other = layer(seed=1)
    other.load_state_dict(afs_layer.state_dict())
    x = torch.randn(2, 3, 6, 6)
    assert torch.equal(other(x), afs_layer(x)) and other.k == 4
