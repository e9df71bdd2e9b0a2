import pytest
import torch
from torch import nn

from afdslib import backbones
from afdslib.base.errors import AFDSError
from afdslib.losses.l2sp import L2SP


def _model():
    torch.manual_seed(0)
    return backbones.build("resnet14", 3, stem="cifar", width=1 / 32)


def _move(model):
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())), alpha=0.1)


def test_l2sp_is_the_formula_and_pulls_to_the_start_and_the_classifier_to_zero():
    model = _model()
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    penalty = L2SP(model, alpha=0.3, beta=0.05)
    assert penalty()["l2sp"].item() == 0
    # The start is in the checkpoint, and the model is not.
    assert all(name.startswith("start") for name in penalty.state_dict()) and not list(penalty.parameters())
    _move(model)
    away = sum(((p - start[n]) ** 2).sum().item() for n, p in model.named_parameters() if not n.startswith("fc."))
    terms = penalty()
    assert terms["l2sp"].item() == pytest.approx(0.3 / 2 * away, rel=1e-5)
    assert terms["l2"].item() == pytest.approx(0.05 * _decay(model), rel=1e-5)
    sum(terms.values()).backward()
    for name, p in model.named_parameters():
        wanted = 0.05 * p if name.startswith("fc.") else 0.3 * (p - start[name])
        torch.testing.assert_close(p.grad, wanted.detach())


def _decay(model):
    return sum(p.square().sum().item() for p in model.fc.parameters()) / 2


def test_the_start_can_be_a_source_network_that_lacks_the_classifier_and_other_parameters():
    source, model = _model(), _model()
    _move(model)
    backbones.reset_classifier(model, 7)
    model.layer1[0].extra = nn.Parameter(torch.full((4,), 2.0))
    terms = L2SP(model, alpha=1.0, beta=1.0, reference=dict(source.named_parameters()))()
    own = dict(model.named_parameters())
    wanted = sum(((own[n] - p) ** 2).sum().item() for n, p in source.named_parameters() if not n.startswith("fc."))
    assert terms["l2sp"].item() == pytest.approx(wanted / 2, rel=1e-5)
    assert terms["l2"].item() == pytest.approx(8.0 + _decay(model), rel=1e-6)
    penalty = L2SP(model, alpha=1.0, beta=1.0)
    model.conv1 = nn.Conv2d(3, 1, 3)
    with pytest.raises(AFDSError, match="conv1.weight of shape"):
        penalty()
