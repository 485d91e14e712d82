"""What must be equal for reasons of mathematics, whatever the logits; in float64."""

import math

import pytest
import torch
import torch.nn.functional as F
from composed import apply, composed, logits

from mdistiller_ext.losses import dkd_loss, kd_loss, kl_divergence
from mdistiller_ext.losses.dist import correlation
from mdistiller_ext.losses.divergence import binary_kl
from mdistiller_ext.losses.dkd import dkd
from mdistiller_ext.policies.dat import sample_temperature

BATCHES = [1, 7, 64]
ALL_LP = {"RATIOS": [0.4]}
STATISTICS = ["LS", "NORM"]
close = torch.testing.assert_close


def equal(a, b):
    close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("epoch", [1, 11, 80])
def test_no_policy_and_neutral_ones_are_the_loss_itself(batch, epoch):
    student, teacher, target = logits(batch)
    neutral = {
        "policies": ["EAT", "DAT", "LP"],
        "EAT": {"RANGE": 0.0},
        "DAT": {"RANGE": 0.0},
        "LP": {"RATIOS": [0.0]},
    }
    for settings in ({}, neutral):
        kd = apply(composed("KD", **settings), (student, teacher, target), epoch)
        assert torch.equal(kd.value, kd_loss(student, teacher, 4.0).detach())
        found = apply(composed("DKD", **settings), (student, teacher, target), epoch)
        assert torch.equal(found.value, dkd_loss(student, teacher, target, 1, 8, 4.0).detach())


@pytest.mark.parametrize("tau", [0.5, 4.0])
def test_kd_is_dkd_with_a_beta_for_each_sample(tau):
    student, teacher, target = logits()
    beta = 1 - (teacher / tau).softmax(dim=1).gather(1, target[:, None])[:, 0]
    equal(
        dkd(student, teacher, target, 1.0, beta, tau),
        kl_divergence(student, teacher, tau),
    )


@pytest.mark.parametrize("loss", ["KD", "DKD"])
@pytest.mark.parametrize("others", [{}, {"policies": ["LP"], "LP": ALL_LP}])
def test_ls_is_norm_up_to_the_factor(loss, others):
    policies, batch = others.get("policies", []), logits()
    more = {k: v for k, v in others.items() if k != "policies"}
    ls, norm = (apply(composed(loss, [s, *policies], **more), batch) for s in STATISTICS)
    kept = (
        batch[1] if norm.pair.pruned is None else batch[1].masked_fill(norm.pair.pruned, torch.nan)
    )
    share = torch.stack([row[~row.isnan()].var() for row in kept])
    near = {"rtol": 1e-5, "atol": 1e-5}  # LS adds 1e-7 to the deviation
    close(norm.value, share * ls.value, **near)
    close(norm.gradient, share[:, None] * ls.gradient, **near)


@pytest.mark.parametrize("loss", ["KD", "DKD", "DIST"])
@pytest.mark.parametrize("statistic", STATISTICS)
@pytest.mark.parametrize("mode", [None, "prune", "lump"])
def test_under_a_statistic_the_gradient_changes_neither_mean_nor_scale(loss, statistic, mode):
    batch, policies = logits(), [statistic] + (["LP"] if mode else [])
    settings = {"LP": {**ALL_LP, "MODE": mode}} if mode else {}
    settings |= {"DIST": {"GAMMA": 0.0}} if loss == "DIST" else {}
    gradient = apply(composed(loss, policies, **settings), batch).gradient
    assert gradient.abs().amax(dim=1).min() > 1e-3
    assert gradient.sum(dim=1).abs().max() < 1e-10
    assert (gradient * batch[0]).sum(dim=1).abs().max() < 1e-5  # LS: 1e-7
    exact = 1e-10 if statistic == "NORM" else 1e-5
    assert (gradient * batch[0]).sum(dim=1).abs().max() < exact


@pytest.mark.parametrize("statistic", [[], ["LS"], ["NORM"]])
def test_the_chain_rule_of_lump_and_prune(statistic):
    """KL = KL of the two masses + m KL of the kept + (1 - m) KL of the pruned."""
    batch = logits(classes=20)
    student, teacher, _ = batch
    lump, prune = (
        apply(composed("KD", ["LP", *statistic], LP={**ALL_LP, "MODE": mode}), batch)
        for mode in ("lump", "prune")
    )
    pair = prune.pair
    assert (pair.pruned.sum(dim=1) == 8).all()
    factor = pair.tau**2
    taus = [torch.as_tensor(t, dtype=student.dtype).expand(16) for t in (pair.tau_s, pair.tau_t)]
    scaled = [z / t[:, None] for z, t in zip((student, teacher), taus, strict=True)]
    shares = [z.softmax(dim=1).masked_fill(pair.pruned, 0).sum(dim=1) for z in scaled]
    masses = binary_kl(*(m.logit() for m in shares))
    whole = kl_divergence(student, teacher, taus[0], None, taus[1])
    pruned = kl_divergence(student, teacher, taus[0], ~pair.pruned, taus[1])
    kept = prune.value / factor
    m = shares[1]
    equal(lump.value, factor * (masses + m * kept).detach())
    equal(whole, masses + m * kept + (1 - m) * pruned)
    assert (lump.value <= factor * whole).all()  # as of any processing of data


PRUNABLE = ["KD", "DKD", "DIST", "TTM", "WTTM"]


@pytest.mark.parametrize("statistic", [[], ["LS"], ["NORM"]])
@pytest.mark.parametrize("loss", PRUNABLE)
def test_a_pruned_class_gets_exactly_no_gradient(loss, statistic):
    settings = {"DIST": {"GAMMA": 0.0}} if loss == "DIST" else {}
    if statistic and loss in ("TTM", "WTTM"):
        pytest.skip("refused")
    found = apply(composed(loss, ["LP", "DAT", *statistic], LP=ALL_LP, **settings), logits())
    pruned = found.pair.pruned
    assert (pruned.sum(dim=1) == 4).all()
    assert (found.gradient[pruned] == 0).all() and (found.gradient[~pruned] != 0).all()


@pytest.mark.parametrize("loss", ["KD", "DKD", "TTM", "WTTM"])
def test_a_lumped_class_gets_its_share_of_the_one_that_it_is_in(loss):
    """Whose gradient is divided as the student's probabilities are."""
    batch = logits()
    found = apply(composed(loss, ["LP"], LP={**ALL_LP, "MODE": "lump"}), batch)
    student = batch[0].detach()
    out = ~found.pair.pruned[:, :10]  # of the classes that are compared one by one
    shares = (student / found.pair.tau_s).masked_fill(out, -torch.inf)
    lumped = found.gradient.masked_fill(out, 0)
    close(lumped, shares.softmax(dim=1) * lumped.sum(dim=1, keepdim=True), rtol=1e-8, atol=1e-12)
    assert lumped.sum(dim=1).abs().min() > 0


def test_ttm_is_kl_with_the_students_own_probabilities():
    student, teacher, target = logits()
    found = apply(composed("TTM", T=5.0), (student, teacher, target))
    assert torch.equal(found.value, kl_divergence(student, teacher, 1.0, None, 5.0).detach())
    at_one = apply(composed("TTM", T=1.0), (student, teacher, target))
    equal(at_one.value, kd_loss(student, teacher, 1.0).detach())


def test_ttm_is_kd_and_an_entropy_of_renyi():
    """KL(p^T || q^1) = T KL(p^T || q^T) - (T - 1) (H of order 1/T of q) ... up to the teacher's:
    with log q^1 = T log q^T + log of the sum of q^{1/T} to the T."""
    student, teacher, target = logits()
    tau = 5.0
    q, p = student.softmax(dim=1), (teacher / tau).softmax(dim=1)
    renyi = tau / (tau - 1) * q.pow(1 / tau).sum(dim=1).log()
    entropy = -(p * p.log()).sum(dim=1)
    kl = kl_divergence(student, teacher, tau)
    expected = tau * kl + (tau - 1) * (entropy - renyi)
    equal(apply(composed("TTM", T=tau), (student, teacher, target)).value, expected.detach())


def test_wttm_is_ttm_with_a_weight():
    batch = logits()
    ttm, wttm = (apply(composed(loss, T=5.0), batch) for loss in ("TTM", "WTTM"))
    power = batch[1].softmax(dim=1).pow(1 / 5).sum(dim=1)
    equal(wttm.value, power * ttm.value)
    equal(wttm.gradient, power[:, None] * ttm.gradient)
    z = batch[1]
    equal(wttm.pair.weight, ((z / 5).logsumexp(dim=1) - z.logsumexp(dim=1) / 5).exp())
    # The weight is 1 at T 1, and where the teacher is certain.
    certain = batch[0], 1e4 * F.one_hot(batch[2], 10).double(), batch[2]
    for data, tau in ((batch, 1.0), (certain, 5.0)):
        ttm, wttm = (apply(composed(loss, T=tau), data) for loss in ("TTM", "WTTM"))
        equal(wttm.value, ttm.value)


@pytest.mark.parametrize(("scale", "shift"), [(3.0, 0.0), (0.2, 0.5), (1.0, -2.0)])
def test_dist_compares_what_neither_scale_nor_shift_changes(scale, shift):
    student, teacher, _ = (x.softmax(dim=1) if x.dim() > 1 else x for x in logits())
    for a, b in ((student, teacher), (student.T, teacher.T)):
        close(correlation(scale * a + shift, b), correlation(a, b), rtol=0, atol=1e-6)
    close(correlation(scale * teacher + shift, teacher), torch.ones(16).double(), rtol=0, atol=1e-6)


def test_dist_of_equal_logits_is_nothing():
    _, teacher, target = logits()
    found = apply(composed("DIST"), (teacher.clone().requires_grad_(), teacher, target))
    # The 1e-8 in its denominator is beside squares of softened probabilities.
    assert (found.value > -1e-12).all() and found.value.max() < 1e-3


@pytest.mark.parametrize("loss", ["KD", "DKD", "DIST", "TTM"])
@pytest.mark.parametrize("batch", [10, 64])
def test_dat_as_a_weight_has_the_bases_temperatures_and_dats_factor(loss, batch):
    settings = {"DIST": {"GAMMA": 0.0}} if loss == "DIST" else {}
    data, dat = logits(batch), {"RANGE": 0.5}
    base = apply(composed(loss, **settings), data)
    full, control = (
        apply(composed(loss, ["DAT"], DAT={**dat, "MODE": mode}, **settings), data)
        for mode in ("temperature", "weight")
    )
    assert (control.pair.tau_s, control.pair.tau_t) == (base.pair.tau_s, base.pair.tau_t)
    assert torch.equal(control.pair.tau, full.pair.tau)
    share = control.pair.tau / 4
    assert [(share == s).sum() for s in (0.5, 1.0, 1.5)] == [
        batch // 10,
        batch - 2 * (batch // 10),
        batch // 10,
    ]
    power = 1 if loss == "TTM" else 2
    equal(control.value, share**power * base.value)
    equal(control.gradient, share[:, None] ** power * base.gradient)
    # The same samples as DAT's own ranking takes.
    kl = kl_divergence(data[0], data[1], base.pair.tau_s, None, base.pair.tau_t)
    assert torch.equal(control.pair.tau, sample_temperature(kl, 4.0, 0.5, 0.1))


@pytest.mark.parametrize(
    ("loss", "others"),
    [
        ("KD", []),
        ("DKD", []),
        ("DKD", ["LP"]),
        ("KD", ["LS"]),
        ("KD", ["NORM", "LP"]),
        ("DIST", []),
        ("TTM", []),
        ("WTTM", []),
    ],
)
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("epoch", [1, 80])
def test_eat_as_a_gradient_has_eats_length_and_the_bases_direction(loss, others, batch, epoch):
    data, settings = logits(batch), {"LP": ALL_LP} if "LP" in others else {}
    base = apply(composed(loss, others, **settings), data, epoch)
    full, control = (
        apply(composed(loss, ["EAT", *others], EAT={"MODE": mode}, **settings), data, epoch)
        for mode in ("temperature", "gradient")
    )
    equal(control.gradient.norm(), full.gradient.norm())
    equal(
        F.cosine_similarity(control.gradient.flatten(), base.gradient.flatten(), dim=0).item(), 1.0
    )
    assert not math.isclose(control.gradient.norm(), base.gradient.norm(), rel_tol=1e-5)
