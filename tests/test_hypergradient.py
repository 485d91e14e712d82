"""A temperature that looks ahead, against steps that are taken in truth, in float64."""

import copy
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from composed import composed
from torch import nn

from mdistiller_ext.distillers.ahead import ahead
from mdistiller_ext.errors import ConfigError
from mdistiller_ext.policies import Context

close = torch.testing.assert_close
T, RATE = 4.0, 1e-3


class Small(nn.Module):
    """A network with a batch norm, in float64."""

    def __init__(self):
        super().__init__()
        layers = nn.Flatten(), nn.Linear(12, 9), nn.BatchNorm1d(9), nn.Tanh(), nn.Linear(9, 5)
        self.layers = nn.Sequential(*layers).double()

    def forward(self, image):
        return 4 * self.layers(image), {}


@pytest.fixture
def parts():
    """(student, images, teacher's logits, labels, images held out, their labels)"""
    torch.manual_seed(0)
    student = Small().train()
    image, held = torch.randn(2, 24, 3, 2, 2, dtype=torch.float64)
    teacher = 4 * torch.randn(24, 5, dtype=torch.float64)
    return student, image, teacher, teacher.argmax(dim=1), held, torch.arange(24) % 5


def gradient(student, held, target):
    loss = F.cross_entropy(student(held)[0], target)
    return torch.autograd.grad(loss, list(student.parameters()))


def test_what_is_ahead_is_the_derivative_along_the_gradient(parts):
    student, image, _, _, held, target = parts
    before = copy.deepcopy(student.state_dict())
    found = ahead(student, image, held, target)
    for key, value in student.state_dict().items():
        assert torch.equal(value, before[key])  # running statistics, too
    assert all(p.grad is None for p in student.parameters())
    logits = student(image)[0]
    any_row = torch.zeros_like(logits, requires_grad=True)  # J v is the derivative of u J v by u
    weights = list(student.parameters())
    rows = torch.autograd.grad(logits, weights, any_row, create_graph=True)
    along = zip(rows, gradient(student, held, target), strict=True)
    (expected,) = torch.autograd.grad(sum((row * v).sum() for row, v in along), any_row)
    assert (found - expected).norm() < 1e-3 * expected.norm()


def looking(parts, **settings):
    """A distiller, its act, and the pair and the context of a step."""
    student, image, teacher, label, held, target = parts
    distiller = composed("KD", ["HYPERGRADIENT"], HYPERGRADIENT=settings).double()
    distiller.student = student
    logits = student(image)[0]
    look = partial(ahead, student, image, held, target)
    return distiller, (logits, teacher, label), Context(distiller.schedule(1), ahead=look)


def estimated(distiller, batch, context):
    """What the policy estimates in the step."""
    (_, act), found = distiller.acts[0], []
    live = act.estimate
    act.estimate = lambda *given: found.append(live(*given)) or found[0]
    distiller.pair(*batch, context)
    del act.estimate
    return found[0]


def test_the_estimate_is_what_a_step_does_to_images_held_out(parts):
    """Steps of SGD at temperatures above and below; the cross-entropy after them."""
    student, image, teacher, _, held, target = parts
    found = estimated(*looking(parts, PROJECT=False))
    after = []
    for tau in (T * math.exp(d) for d in (0.05, -0.05)):
        trial = copy.deepcopy(student)
        q, p = (trial(image)[0] / tau).log_softmax(dim=1), (teacher / tau).softmax(dim=1)
        (tau**2 * (p * (p.log() - q)).sum(dim=1)).mean().backward()
        with torch.no_grad():
            for weight in trial.parameters():
                weight -= RATE * weight.grad
        after.append(F.cross_entropy(trial(held)[0], target).item())
    by_steps = -(after[0] - after[1]) / 0.1 / RATE * len(image)
    assert found.item() == pytest.approx(by_steps, rel=0.02) and abs(by_steps) > 1e-3


def test_the_projected_estimate_leaves_out_what_is_another_weight(parts):
    """By temperatures whose gradients are made as long as that at T."""
    student, image, teacher, _, held, target = parts
    logits = student(image)[0]

    def delta(tau):
        return tau * ((logits / tau).softmax(dim=1) - (teacher / tau).softmax(dim=1)).detach()

    here, near = delta(T), []
    for tau in (T * math.exp(d) for d in (-1e-4, 1e-4)):
        near.append(delta(tau) * here.norm() / delta(tau).norm())
    along = ahead(student, image, held, target)
    expected = (along * (near[1] - near[0])).sum() / 2e-4
    found, whole = (estimated(*looking(parts, PROJECT=project)).item() for project in (True, False))
    assert found == pytest.approx(expected.item(), rel=0.02)
    assert abs(found - whole) > 0.1 * abs(whole)


@pytest.mark.parametrize("project", [True, False])
def test_the_temperature_goes_along_the_mean_of_its_estimates(parts, project):
    distiller, batch, context = looking(parts, PROJECT=project, MEMORY=2, STEP=0.1)
    (_, act), mean, square, share = distiller.acts[0], 0.0, 0.0, 0.0
    for _ in range(4):
        estimate = estimated(distiller, batch, context).item()
        mean, square = (mean + estimate) / 2, (square + estimate**2) / 2
        move = 0.1 * mean / square**0.5
        share += move
        assert 0 < abs(move) <= 0.1 and act.log_share.item() == pytest.approx(share)
    kept = copy.deepcopy(act.state_dict())
    alone = context._replace(ahead=None)
    pair = distiller.pair(*batch, alone)
    assert all(torch.equal(value, kept[key]) for key, value in act.state_dict().items())
    close(pair.tau, torch.full((24,), T).double() * act.log_share.exp())
    if not project:
        assert pair.weight is None
        return
    lengths = [
        torch.autograd.grad(d.value(d.pair(*batch, alone)).sum(), batch[0], retain_graph=True)[0]
        for d in (distiller, composed("KD").double())
    ]
    close(lengths[0].norm(), lengths[1].norm())
    assert not torch.allclose(*lengths)


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ([], "DATASET.HOLDOUT: 0.0 is not allowed, expected a share above 0, as HYPERGRADIENT"),
        (["DATASET.HOLDOUT", "0.3", "SOLVER.COMPILE", "True"], "SOLVER.COMPILE: True is not all"),
    ],
)
def test_what_cannot_look_ahead_is_refused(digits_cfg, options, fault):
    with pytest.raises(ConfigError, match=f"^{fault}"):
        digits_cfg("vanilla", "DISTILLER.TYPE", "DKD_HYPERGRADIENT", *options)
