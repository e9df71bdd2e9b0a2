import math

import pytest
import torch
from tiny import maps
from torch import nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from afdslib import backbones
from afdslib.base.errors import AFDSError
from afdslib.losses._maps import area_matrix
from afdslib.losses.at import ATLoss, at_loss, attention_map, gradient_at_loss, input_gradient


def _slow_attention(features, p):
    rows = []
    for sample in features:
        places = zip(*sample.flatten(1).tolist(), strict=True)
        row = [sum(abs(v) ** p for v in place) / len(place) for place in places]
        rows.append([v / math.hypot(*row) for v in row])
    return rows


@pytest.mark.parametrize("p", [0.5, 1, 2, 3, 4])
@pytest.mark.parametrize("mode", ["code", "paper"])
def test_at_loss_is_the_formula_with_different_channels(p, mode):
    student, teacher = maps(3, 2, 4, 4), maps(3, 5, 4, 4, seed=1)
    wanted = torch.tensor(_slow_attention(student, p), dtype=torch.float64)
    torch.testing.assert_close(attention_map(student, p), wanted)
    norms = list(map(math.dist, _slow_attention(student, p), _slow_attention(teacher, p)))
    wanted = sum(norms) / 3 if mode == "paper" else sum(n * n for n in norms) / (3 * 16)
    assert at_loss(student, teacher, p=p, mode=mode).item() == pytest.approx(wanted, rel=1e-12)
    student, teacher = student[:2, ..., :3].requires_grad_(), teacher[:2, ..., :3]
    assert torch.autograd.gradcheck(lambda s: at_loss(s, teacher, p=p, mode=mode), student)
    same = teacher.clone().requires_grad_()
    loss = at_loss(same, teacher, p=p, mode=mode)
    loss.backward()
    assert loss.item() == 0 and torch.equal(same.grad, torch.zeros_like(teacher))


@pytest.mark.parametrize("mode", ["code", "paper"])
@pytest.mark.parametrize("p, scale", [(2, 3.0), (2, 1e4), (1, 1e-13), (2, 1e-7), (4, 1e-3), (4, 1e-4), (3, 1e-36)])
def test_at_ignores_a_positive_rescaling_of_each_sample_of_either_network(p, scale, mode):
    student, teacher = maps(2, 3, 4, 4, dtype=torch.float32), maps(2, 3, 4, 4, seed=1, dtype=torch.float32)
    scales = torch.tensor([scale, 2 * scale])[:, None, None, None]
    wanted = at_loss(student, teacher, p=p, mode=mode).item()
    assert at_loss(student * scales, teacher, p=p, mode=mode).item() == pytest.approx(wanted, rel=1e-5)
    assert at_loss(student, teacher * scales, p=p, mode=mode).item() == pytest.approx(wanted, rel=1e-5)
    assert at_loss((student * scales).requires_grad_(), student, p=p, mode=mode).item() < 1e-6


@pytest.mark.parametrize("p", [0.5, 1, 2, 4])
@pytest.mark.parametrize("dtype, power", [(torch.float16, -17), (torch.bfloat16, -120), (torch.float64, -500)])
def test_the_faintest_maps_of_a_format_are_normalised_and_others_keep_their_bits(dtype, power, p):
    x = (maps(2, 3, 4, 4).abs() * 3).round()  # small whole numbers, which any format holds at any power of two
    faint = (x * 2.0**power).to(dtype)
    assert torch.equal(attention_map(faint, p), attention_map(x.to(dtype), p)) or p == 0.5
    torch.testing.assert_close(attention_map(faint, p), attention_map(x.to(dtype), p))
    plain = nn.functional.normalize(x.pow(p).mean(1).flatten(1), dim=1)
    assert p < 1 or torch.equal(attention_map(x, p), plain)


def test_maps_of_a_network_of_another_depth_are_paired_by_stage():
    names = {n: backbones.stages(backbones.build(n, 3, width=1 / 32)) for n in ("resnet18", "resnet34")}
    student = {n: maps(2, 3, 4, 4, seed=i) for i, n in enumerate(names["resnet18"])}
    teacher = {n: maps(2, 5, 4, 4, seed=9 + i) for i, n in enumerate(names["resnet34"])}
    loss = ATLoss(student)
    loss.set_alive({names["resnet18"][0]: torch.tensor([True, False, True])})  # the student's channels, not the other's
    wanted = sum(at_loss(a, b) for a, b in zip(student.values(), teacher.values(), strict=True))
    assert loss(student, teacher).item() == pytest.approx(wanted.item(), rel=1e-12)
    with pytest.raises(AFDSError, match="hold layer1.2, layer2.3, layer3.5 for layer1.1, .*give one map per stage"):
        loss(student, dict(list(teacher.items())[:3]))
    with pytest.raises(AFDSError, match="The student's features lack layer1.1; they hold layer1.2"):
        loss(teacher, teacher)


def test_a_map_that_is_off_has_no_gradient_and_half_precision_maps_are_squared_in_full_precision():
    student = torch.zeros(1, 2, 3, 3, requires_grad=True)
    for p in (0.5, 1, 2):
        at_loss(student, torch.rand(1, 2, 3, 3), p=p).backward()
    assert torch.equal(student.grad, torch.zeros_like(student))
    student, teacher = maps(1, 4, 3, 3) * 1000, maps(1, 4, 3, 3, seed=1)  # squares overflow float16
    assert at_loss(student.half(), teacher.half()).item() == pytest.approx(at_loss(student, teacher).item(), rel=2e-2)


def test_another_map_size_is_averaged_by_area_and_said():
    student, teacher = maps(2, 3, 8, 6), maps(2, 5, 4, 3, seed=1)
    pooled = nn.functional.avg_pool2d(student.square().mean(1, keepdim=True), 2).sqrt()
    with pytest.warns(UserWarning, match="8x6 map and the teacher's 4x3 are compared at 4x3"):
        loss = at_loss(student, teacher)
    assert loss.item() == pytest.approx(at_loss(pooled, teacher).item(), rel=1e-12)
    matrix = area_matrix(3, 2, torch.zeros((), dtype=torch.float64))
    torch.testing.assert_close(matrix, torch.tensor([[2, 1, 0], [0, 1, 2]], dtype=torch.float64) / 3)
    with pytest.warns(UserWarning):
        teacher = maps(1, 2, 3, 4, seed=1)
        assert torch.autograd.gradcheck(lambda s: at_loss(s, teacher), maps(1, 2, 5, 5).requires_grad_())


@pytest.mark.filterwarnings("ignore:.*area averaging")
def test_the_resize_is_the_same_in_every_run():
    """Bit-equal gradients on the device at hand, by products alone: torch names pooling and interpolation as operations
    without a deterministic gradient on a GPU."""
    place = "cuda" if torch.cuda.is_available() else "cpu"
    student, teacher = (maps(4, 3, size, size, seed=size, dtype=torch.float32).to(place) for size in (9, 7))
    gradients = []
    for _ in range(2):
        leaf = student.clone().requires_grad_()
        loss = at_loss(leaf, teacher)
        loss.backward()
        gradients.append(leaf.grad)
    assert torch.equal(*gradients) and float(gradients[0].abs().sum()) > 0
    nodes, seen = [loss.grad_fn], set()
    while nodes:
        node = nodes.pop()
        seen.add(node.name())
        nodes += [after for after, _ in node.next_functions if after is not None]
    assert any("Bmm" in name or "Mm" in name for name in seen)
    assert not [name for name in seen if "Pool" in name or "Upsample" in name or "Interpol" in name]


def test_gradient_at_is_the_formula_and_takes_a_teachers_gradient_without_a_graph():
    student, teacher = maps(3, 3, 4, 4), maps(3, 3, 4, 4, seed=1)
    wanted = sum(math.sqrt(float(((s - t) ** 2).sum())) for s, t in zip(student, teacher, strict=True)) / 3
    assert gradient_at_loss(student, teacher).item() == pytest.approx(wanted, rel=1e-12)
    assert torch.autograd.gradcheck(lambda s: gradient_at_loss(s, teacher), student.requires_grad_())
    assert gradient_at_loss(teacher.clone(), teacher).item() == 0
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    images, target = maps(2, 3, 2, 2, dtype=torch.float32).requires_grad_(), torch.tensor([0, 1])
    graph, plain = (input_gradient(model(images), target, images, create_graph=kept) for kept in (True, False))
    with pytest.raises(AFDSError, match="create_graph=False"):
        gradient_at_loss(plain, graph)
    assert gradient_at_loss(graph, plain).item() == gradient_at_loss(graph, graph.detach()).item() == 0


def test_input_gradient_is_per_sample_in_eval_mode():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(36, 2)).eval()
    images, target = maps(4, 3, 5, 5, dtype=torch.float32).requires_grad_(), torch.tensor([0, 1, 1, 0])
    together = input_gradient(model(images), target, images, create_graph=False)
    for i in range(4):
        one = images[i : i + 1].detach().requires_grad_()
        alone = input_gradient(model(one), target[i : i + 1], one, create_graph=False)
        torch.testing.assert_close(together[i : i + 1], alone)


@pytest.mark.parametrize("training", [False, True])
def test_gradient_at_differentiates_a_residual_network_twice(training):
    torch.manual_seed(0)
    model = backbones.build("resnet14", 3, stem="cifar", width=1 / 32).double().train(training)
    for module in list(model.modules()):
        if hasattr(module, "relu"):  # the input gradient jumps at a ReLU's kink, where no difference quotient holds
            module.relu = nn.Softplus(beta=5)
        if isinstance(module, nn.BatchNorm2d):  # statistics that matter, momentum 0 so that calls do not move them
            module.momentum = 0.0
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    images, target, teacher = maps(4, 3, 8, 8), torch.tensor([0, 1, 2, 1]), maps(4, 3, 8, 8, seed=1)

    def loss():
        x = images.clone().requires_grad_()
        return gradient_at_loss(input_gradient(model(x), target, x), teacher)

    parameters = [p for p in model.parameters() if p is not model.fc.bias]
    loss().backward()
    start, gradient = (parameters_to_vector(x).detach().clone() for x in (parameters, [p.grad for p in parameters]))
    direction = maps(len(start), seed=3)
    analytic, values = float(gradient @ direction), []
    for sign in (1, -1):
        vector_to_parameters(start + sign * 1e-7 * direction, parameters)
        values.append(loss().item())
    assert abs(analytic) > 1e-4
    assert analytic == pytest.approx((values[0] - values[1]) / 2e-7, rel=1e-5)
