"""What is measured of teachers and students, against cases whose answer is known."""

import pytest
import torch
from conftest import ROOT, untrained_teacher
from torch import nn

from mdistiller_ext.config import load_cfg
from mdistiller_ext.distillers import METHODS
from mdistiller_ext.models import cifar_model_dict
from mdistiller_ext.study import anatomy


def logits(*shape, seed=0):
    return 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("scale", [0.01, 0.2, 1.0, 3.0])
def test_a_student_that_is_its_teacher_scaled(scale):
    teacher = logits(50, 10)
    found = anatomy.best_inverse_temperature(scale * teacher + 1, teacher)
    torch.testing.assert_close(found, torch.full_like(found, scale), rtol=1e-4, atol=0)


def test_the_best_temperature_is_where_the_derivative_is_zero():
    student, teacher = logits(50, 10).double(), logits(50, 10, seed=1).double()
    gamma = anatomy.best_inverse_temperature(student, teacher)
    inside = (gamma > 1 / 1000) & (gamma < 7.9)
    assert inside.sum() > 10
    wanted = gamma[inside].requires_grad_()
    log_p = (wanted[:, None] * teacher[inside]).log_softmax(1)
    distance = (log_p.exp() * (log_p - student[inside].log_softmax(1))).sum(1)
    (slope,) = torch.autograd.grad(distance.sum(), wanted)
    assert slope.abs().max() < 1e-4
    for factor in (0.9, 1.1):
        other = anatomy._distance(student, teacher, factor * gamma)
        best = anatomy._distance(student, teacher, gamma)
        assert (other >= best - 1e-9)[inside].all()


def test_the_groups_are_dats_and_their_difference_is_seen():
    teacher = logits(100, 10)
    student = teacher.clone()
    student[:10] = -teacher[:10] / 8  # hard
    fit = anatomy.fit(student, teacher, 4.0)
    assert fit.all.n == 100 and fit.hardest.n == fit.easiest.n == 10
    assert fit.easiest.mean == pytest.approx(0, abs=1e-6) and fit.hardest.mean > 2
    assert fit.difference.mean == pytest.approx(fit.hardest.mean - fit.easiest.mean)


def test_classes_are_ranked_by_their_mean_and_their_spread_is_over_views():
    mean = torch.linspace(-5, 5, 21).repeat(30, 1)
    noise = torch.where(mean < 0, 1.0, 0.1)  # low logits are the noisy ones
    views = mean[:, None] + noise[:, None] * torch.randn(
        30, 200, 21, generator=torch.Generator().manual_seed(0)
    )
    bins = anatomy.by_rank(views, torch.full((30,), 20))
    assert len(bins) == 10
    assert bins[0].spread.mean == pytest.approx(1.0, abs=0.1)
    assert bins[-1].spread.mean == pytest.approx(0.1, abs=0.15)
    assert bins[0].distance.mean == pytest.approx(4.5, abs=0.6)


def test_agreement_is_one_where_answers_are_the_same_and_none_where_there_is_only_noise():
    means = logits(200, 1, 50).expand(-1, 8, -1)
    target = torch.zeros(200, dtype=torch.long)
    same = anatomy.agreement(means, means[:, :3], target, 0.4)
    assert [part.mean for part in same] == pytest.approx([1, 1])
    signal = logits(200, 1, 50, seed=3).expand(-1, 8, -1) * (torch.arange(50) > 25)
    noise = 0.5 * logits(200, 8, 50, seed=4)
    low = (torch.arange(50) <= 25) * -30.0
    found = anatomy.agreement(
        signal + noise + low, (signal + low)[:, :3] + 0.5 * logits(200, 3, 50, seed=5), target, 0.4
    )
    assert abs(found.lowest.mean) < 0.05 and found.rest.mean > 0.5


def method(name, *options):
    cfg = load_cfg(
        None,
        ["DISTILLER.TYPE", name, "DISTILLER.TEACHER", "resnet8", "SOLVER.EPOCHS", 80, *options],
    )
    return METHODS[name](nn.Identity(), nn.Identity(), cfg)


def test_a_methods_gradient_beside_the_baselines():
    batch = (logits(64, 100), logits(64, 100, seed=1), torch.arange(64))
    weight = method("LOGIT", "LOGIT.KD_WEIGHT", 1.0, "LOGIT.DKD.BETA", 2.0, "LOGIT.T", 4.0)
    base = method("DKD", "DKD.BETA", 2.0, "DKD.WARMUP", 1)
    found = anatomy.gradient(weight, base, 80, iter([batch] * 2))
    assert found.length.mean == pytest.approx(1) and found.cosine.mean == pytest.approx(1)
    eat = anatomy.gradient(method("DKD_EAT"), method("DKD", "DKD.BETA", 2.0), 80, iter([batch]))
    assert eat.cosine.mean < 0.999


def test_the_command_writes_its_page(workdir, tool):
    teacher = untrained_teacher(workdir)
    torch.manual_seed(1)
    for epoch in (1, 2):
        student = cifar_model_dict["resnet8"][0](num_classes=10)
        torch.save(student.state_dict(), f"student_{epoch}")
    words = ["--cfg", str(ROOT / "configs/digits/dkd.yaml"), "--images", "70"]
    words += ["--student", "1=student_1", "--student", "2=student_2"]
    words += ["--second", f"resnet20={teacher}", "--output", "a"]
    status, stdout, _ = tool("anatomy", *words, "DISTILLER.TEACHER_CKPT", str(teacher))
    assert status == 0 and stdout.strip() == "a/anatomy.md"
    text = (workdir / "a" / "anatomy.md").read_text()
    assert "| 2 |" in text and "a view with a view of resnet20" in text and "nan" not in text
    for name in ("views", "fits", "gradients"):
        assert (workdir / "a" / f"anatomy_{name}.svg").stat().st_size > 1000
    assert tool("anatomy", "--cfg", words[1], "--student", "x")[0] == 2
