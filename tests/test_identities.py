"""What must be equal for reasons of mathematics, whatever the logits; in float64."""

import math

import pytest
import torch
import torch.nn.functional as F
from composed import apply, composed, logits

from mdistiller_ext.losses import LOSSES, Pair, dkd_loss, kd_loss, kl_divergence
from mdistiller_ext.losses.abkd import ABKD
from mdistiller_ext.losses.dist import correlation
from mdistiller_ext.losses.divergence import binary_kl
from mdistiller_ext.losses.dkd import dkd
from mdistiller_ext.policies.dat import sample_temperature

BATCHES = [1, 7, 64]
STATISTICS = ["LS", "NORM"]
# Losses with their settings that take policies of samples and classes, and those that take a
# statistic; NKD's first term has none.
APART = {"DIST": {"DIST": {"GAMMA": 0.0}}, "LDRLD": {"LDRLD": {"ALPHA": 0.0, "TOP": 2}}}
PRUNABLE = [loss for loss in LOSSES if loss != "MLKD"]
STANDARDISED = [loss for loss in PRUNABLE if loss not in ("TTM", "WTTM", "DTKD", "NKD")]
LP = {"RATIOS": [0.4]}
close = torch.testing.assert_close


def equal(found, expected):
    close(found.detach(), expected.detach(), rtol=1e-10, atol=1e-12)


def compared(batch, tau):
    """What the losses are given."""
    return Pair(*batch, tau_s=tau, tau_t=tau, tau=tau)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("epoch", [1, 11, 80])
def test_no_policy_and_neutral_ones_are_the_loss_itself(batch, epoch):
    student, teacher, target = logits(batch)
    neutral = {"EAT": {"RANGE": 0.0}, "DAT": {"RANGE": 0.0}, "LP": {"RATIOS": [0.0]}}
    for policies, settings in (([], {}), (["EAT", "DAT", "LP"], neutral)):
        kd = apply(composed("KD", policies, **settings), (student, teacher, target), epoch)
        assert torch.equal(kd.value, kd_loss(student, teacher, 4.0).detach())
        found = apply(composed("DKD", policies, **settings), (student, teacher, target), epoch)
        assert torch.equal(found.value, dkd_loss(student, teacher, target, 1, 8, 4.0).detach())


@pytest.mark.parametrize("tau", [0.5, 4.0])
def test_kd_is_dkd_with_a_beta_for_each_sample(tau):
    student, teacher, target = logits()
    beta = 1 - (teacher / tau).softmax(dim=1).gather(1, target[:, None])[:, 0]
    found = dkd(student, teacher, target, 1.0, beta, tau)
    equal(found, kl_divergence(student, teacher, tau))


@pytest.mark.parametrize("loss", STANDARDISED)
@pytest.mark.parametrize("policies", [[], ["LP"]])
def test_ls_is_norm_up_to_the_factor(loss, policies):
    batch, settings = logits(), {**APART.get(loss, {}), **({"LP": LP} if policies else {})}
    ls, norm = (apply(composed(loss, [s, *policies], **settings), batch) for s in STATISTICS)
    teacher = batch[1]
    if policies:
        teacher = teacher.masked_fill(norm.pair.pruned, torch.nan)
    share = torch.stack([row[~row.isnan()].var() for row in teacher])
    near = {"rtol": 1e-5, "atol": 1e-5}  # LS adds 1e-7 to the deviation
    close(norm.value, share * ls.value, **near)
    close(norm.gradient, share[:, None] * ls.gradient, **near)


@pytest.mark.parametrize("loss", STANDARDISED)
@pytest.mark.parametrize("statistic", STATISTICS)
@pytest.mark.parametrize("mode", [None, "prune", "lump"])
def test_under_a_statistic_the_gradient_changes_neither_mean_nor_scale(loss, statistic, mode):
    batch, policies = logits(), [statistic] + (["LP"] if mode else [])
    settings = {**APART.get(loss, {}), **({"LP": {**LP, "MODE": mode}} if mode else {})}
    gradient = apply(composed(loss, policies, **settings), batch).gradient
    assert gradient.abs().amax(dim=1).min() > 1e-3
    assert gradient.sum(dim=1).abs().max() < 1e-10
    exact = 1e-10 if statistic == "NORM" else 1e-5
    assert (gradient * batch[0]).sum(dim=1).abs().max() < exact


@pytest.mark.parametrize("statistic", [[], ["LS"], ["NORM"]])
def test_the_chain_rule_of_lump_and_prune(statistic):
    """KL = KL of the two masses + m KL of the kept + (1 - m) KL of the pruned."""
    batch = logits(classes=20)
    student, teacher, _ = batch
    lump, prune = (
        apply(composed("KD", ["LP", *statistic], LP={**LP, "MODE": mode}), batch)
        for mode in ("lump", "prune")
    )
    pair, factor = prune.pair, prune.pair.tau**2
    assert (pair.pruned.sum(dim=1) == 8).all()
    taus = [torch.as_tensor(t, dtype=student.dtype).expand(16) for t in (pair.tau_s, pair.tau_t)]
    scaled = [z / t[:, None] for z, t in zip((student, teacher), taus, strict=True)]
    shares = [z.softmax(dim=1).masked_fill(pair.pruned, 0).sum(dim=1) for z in scaled]
    masses, m, kept = binary_kl(*(share.logit() for share in shares)), shares[1], prune.value
    whole, pruned = (
        factor * kl_divergence(student, teacher, taus[0], out, taus[1])
        for out in (None, ~pair.pruned)
    )
    equal(lump.value, factor * masses + m * kept)
    equal(whole, factor * masses + m * kept + (1 - m) * pruned)
    assert (lump.value <= whole).all()  # as of any processing of data


@pytest.mark.parametrize(
    ("loss", "statistic"),
    [
        *((loss, []) for loss in PRUNABLE),
        *((loss, [statistic]) for loss in (*STANDARDISED, "NKD") for statistic in STATISTICS),
    ],
)
def test_a_pruned_class_gets_exactly_no_gradient(loss, statistic):
    policies = ["LP", "DAT", "EAKD", *statistic]
    found = apply(composed(loss, policies, LP=LP, **APART.get(loss, {})), logits())
    pruned = found.pair.pruned
    assert (pruned.sum(dim=1) == 4).all()
    assert (found.gradient[pruned] == 0).all()
    assert (found.gradient != 0).any(dim=1).all()


@pytest.mark.parametrize("loss", ["KD", "DKD", "TTM", "WTTM", "ABKD"])
def test_a_lumped_class_gets_its_share_of_the_one_that_it_is_in(loss):
    """Whose gradient is divided as the student's probabilities are."""
    batch = logits()
    found = apply(composed(loss, ["LP"], LP={**LP, "MODE": "lump"}), batch)
    alone = ~found.pair.pruned[:, :10]
    shares = (batch[0].detach() / found.pair.tau_s).masked_fill(alone, -torch.inf).softmax(dim=1)
    lumped = found.gradient.masked_fill(alone, 0)
    assert lumped.sum(dim=1).abs().min() > 0
    close(lumped, shares * lumped.sum(dim=1, keepdim=True), rtol=1e-8, atol=1e-12)


def test_ttm_is_kl_with_the_students_own_probabilities():
    student, teacher, target = logits()
    found = apply(composed("TTM", T=5.0), (student, teacher, target))
    assert torch.equal(found.value, kl_divergence(student, teacher, 1.0, None, 5.0).detach())
    at_one = apply(composed("TTM", T=1.0), (student, teacher, target))
    equal(at_one.value, kd_loss(student, teacher, 1.0))


def test_ttm_is_kd_and_an_entropy_of_renyi():
    """KL(p ‖ q) = T KL(p ‖ q_T) + (T - 1) (H(p) - Rényi's entropy of q, of order 1 / T)."""
    student, teacher, target = logits()
    tau = 5.0
    q, p = student.softmax(dim=1), (teacher / tau).softmax(dim=1)
    renyi = tau / (tau - 1) * q.pow(1 / tau).sum(dim=1).log()
    entropy = -(p * p.log()).sum(dim=1)
    expected = tau * kl_divergence(student, teacher, tau) + (tau - 1) * (entropy - renyi)
    equal(apply(composed("TTM", T=tau), (student, teacher, target)).value, expected)


def test_wttm_is_ttm_with_a_weight():
    batch = logits()
    ttm, wttm = (apply(composed(loss, T=5.0), batch) for loss in ("TTM", "WTTM"))
    power = batch[1].softmax(dim=1).pow(1 / 5).sum(dim=1)
    equal(wttm.value, power * ttm.value)
    equal(wttm.gradient, power[:, None] * ttm.gradient)
    # The weight is 1 at T 1, and where the teacher is certain.
    certain = batch[0], 1e4 * F.one_hot(batch[2], 10).double(), batch[2]
    for data, tau in ((batch, 1.0), (certain, 5.0)):
        ttm, wttm = (apply(composed(loss, T=tau), data) for loss in ("TTM", "WTTM"))
        equal(wttm.value, ttm.value)


@pytest.mark.parametrize(("scale", "shift"), [(3.0, 0.0), (0.2, 0.5), (1.0, -2.0)])
def test_dist_compares_what_neither_scale_nor_shift_changes(scale, shift):
    student, teacher = (z.softmax(dim=1) for z in logits()[:2])
    near = {"rtol": 0, "atol": 1e-6}  # for the 1e-8 in its denominator
    for a, b in ((student, teacher), (student.T, teacher.T)):
        close(correlation(scale * a + shift, b), correlation(a, b), **near)
    close(correlation(scale * teacher + shift, teacher), torch.ones(16).double(), **near)


@pytest.mark.parametrize("loss", [loss for loss in LOSSES if loss not in ("TTM", "WTTM", "NKD")])
def test_equal_logits_are_no_loss(loss):
    """But for TTM, whose student has another temperature, and NKD, which is a cross-entropy."""
    _, teacher, target = logits()
    target = teacher.argmax(dim=1) if loss == "RLD" else target
    found = apply(composed(loss), (teacher.clone().requires_grad_(), teacher, target))
    # DIST: the 1e-8 in its denominator stands beside squares of softened probabilities.
    assert found.value.abs().max() < (1e-3 if loss == "DIST" else 1e-12)


@pytest.mark.parametrize("loss", ["KD", "DKD", "DIST", "TTM", "ABKD", "DTKD", "RLD"])
@pytest.mark.parametrize("batch", [10, 64])
def test_dat_as_a_weight_has_the_bases_temperatures_and_dats_factor(loss, batch):
    settings, data, dat = APART.get(loss, {}), logits(batch), {"RANGE": 0.5}
    base = apply(composed(loss, **settings), data)
    full, control = (
        apply(composed(loss, ["DAT"], DAT={**dat, "MODE": mode}, **settings), data)
        for mode in ("temperature", "weight")
    )
    for tau in ("tau_s", "tau_t"):
        close(getattr(control.pair, tau), getattr(base.pair, tau), rtol=0, atol=0)
    assert torch.equal(control.pair.tau, full.pair.tau)
    share, few = control.pair.tau / 4, batch // 10
    assert [(share == s).sum() for s in (0.5, 1.0, 1.5)] == [few, batch - 2 * few, few]
    factor = share if loss == "TTM" else share**2
    equal(control.value, factor * base.value)
    equal(control.gradient, factor[:, None] * base.gradient)
    # The same samples as DAT's own ranking takes.
    kl = kl_divergence(*data[:2], base.pair.tau_s, None, base.pair.tau_t)
    assert torch.equal(control.pair.tau, sample_temperature(kl, 4.0, 0.5, 0.1))


@pytest.mark.parametrize(
    ("loss", "others"),
    [
        ("KD", []),
        ("DKD", ["LP"]),
        ("KD", ["LS"]),
        ("KD", ["NORM", "LP"]),
        ("KD", ["EAKD"]),
        ("DIST", []),
        ("TTM", []),
        ("WTTM", []),
        ("DTKD", []),
        ("ABKD", ["NORM"]),
        ("MLKD", []),
    ],
)
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("epoch", [1, 80])
def test_eat_as_a_gradient_has_eats_length_and_the_bases_direction(loss, others, batch, epoch):
    data, settings = logits(batch), {"LP": LP} if "LP" in others else {}
    base = apply(composed(loss, others, **settings), data, epoch)
    full, control = (
        apply(composed(loss, ["EAT", *others], EAT={"MODE": mode}, **settings), data, epoch)
        for mode in ("temperature", "gradient")
    )
    equal(control.gradient.norm(), full.gradient.norm())
    equal(control.gradient / control.gradient.norm(), base.gradient / base.gradient.norm())
    assert not math.isclose(control.gradient.norm(), base.gradient.norm(), rel_tol=1e-5)


@pytest.mark.parametrize("tau", [1.0, 4.0])
def test_rld_is_dkd_where_the_teacher_is_right(tau):
    batch = logits()
    right = batch[1].argmax(dim=1) == batch[2]
    assert 0 < right.sum() < 16
    rld = apply(composed("RLD", T=tau, RLD={"ALPHA": 0.7, "BETA": 2.0}), batch)
    dkd = apply(composed("DKD", T=tau, DKD={"ALPHA": 0.7, "BETA": 2.0}), batch)
    for found, expected in ((rld.value, dkd.value), (rld.gradient, dkd.gradient)):
        equal(found[right], expected[right])
        assert not torch.isclose(found[~right], expected[~right]).any()


def test_rld_teaches_nothing_below_a_label_that_the_teacher_ranks_last():
    student, teacher, _ = logits()
    target = teacher.argmin(dim=1)
    last = composed("RLD", RLD={"ALPHA": 0.0})
    found = apply(last, (student, teacher, target))
    assert not found.value.any() and not found.gradient.any()
    assert last.loss.seen(found.pair) == {"rld_empty": 16}
    # Classes that tie with the label are not below it.
    tied = apply(last, (student, torch.zeros_like(teacher), target))
    assert not tied.value.any()


def test_gdkds_parts_are_kd():
    """Also by LP's name: what is not in the top as one class is KD with it lumped."""
    batch = logits(classes=20)
    student, teacher, _ = batch
    parts = [
        apply(composed("GDKD", GDKD=dict(zip(("W0", "W1", "W2"), weights, strict=True))), batch)
        for weights in torch.eye(3).tolist()
    ]
    binary, top, rest = (part.value for part in parts)
    p = (teacher / 4).softmax(dim=1)
    mass = p.topk(5, dim=1).values.sum(dim=1)
    equal(binary + mass * top + (1 - mass) * rest, kd_loss(student, teacher, 4.0))
    lumped = batch[0], batch[1], teacher.argmax(dim=1)  # so that the label is in the top
    kd = apply(composed("KD", ["LP"], LP={"RATIOS": [0.75], "MODE": "lump"}), lumped)
    equal(binary + mass * top, kd.value)
    equal(parts[0].gradient + mass[:, None] * parts[1].gradient, kd.gradient)


@pytest.mark.parametrize("top", [10, 30])
def test_where_all_are_the_top_there_is_no_rest(top):
    batch = logits()
    kd = apply(composed("KD"), batch)
    gdkd = apply(composed("GDKD", GDKD={"TOP": top, "W1": 1.0}), batch)
    equal(gdkd.value, kd.value)
    ldrld = apply(composed("LDRLD", LDRLD={"TOP": top, "ALPHA": 0.0}), batch)
    assert not ldrld.value.any() and not ldrld.gradient.any()


def test_ldrld_of_a_pair_is_the_kl_of_two():
    student, teacher, target = logits()
    settings = {"TOP": 2, "ALPHA": 1.0, "BETA": 0.0}
    found = apply(composed("LDRLD", LDRLD=settings), (student, teacher, target))
    two = student.topk(2, dim=1).indices
    kl = kd_loss(student.gather(1, two), teacher.gather(1, two), 4.0)
    weight = 2 * math.exp(-0.05 * 3) / 2.5
    equal(found.value, (weight * kl + kl) / 2)


def test_ldrld_of_the_rest_is_kl_without_the_top():
    student, teacher, target = logits()
    found = apply(composed("LDRLD", LDRLD={"ALPHA": 0.0, "BETA": 1.0}), (student, teacher, target))
    rest = student.topk(3, dim=1, largest=False).indices
    equal(found.value, kd_loss(student.gather(1, rest), teacher.gather(1, rest), 4.0))


def test_abkd_is_forward_and_reverse_kl_and_hellingers():
    batch = logits()
    student, teacher, _ = batch
    q, p = ((z / 4).softmax(dim=1) for z in (student, teacher))
    for (a, b), expected in {
        (1.0, 0.0): kl_divergence(student, teacher, 4.0),
        (0.0, 1.0): kl_divergence(teacher, student, 4.0),
        (0.5, 0.5): 2 * (p.sqrt() - q.sqrt()).square().sum(dim=1),
        (1.0, 1.0): (p - q).square().sum(dim=1) / 2,
        (0.0, 0.0): (p.log() - q.log()).square().sum(dim=1) / 2,
    }.items():
        equal(apply(composed("ABKD", ABKD={"ALPHA": a, "BETA": b}), batch).value, expected)


@pytest.mark.parametrize("limit", [(0.6, 0.0), (0.0, 0.6), (0.0, 0.0)])
def test_abkd_is_continuous_where_a_power_is_0(limit):
    pair = compared(logits(), 4.0)
    near = [max(power, 1e-5) for power in limit]
    close(ABKD(*near)(pair), ABKD(*limit)(pair), rtol=1e-4, atol=1e-5)


def test_nkd_is_dkds_second_part_and_a_softened_label():
    batch = logits()
    student, teacher, target = batch
    nkd = apply(composed("NKD", NKD={"GAMMA": 1.5}), batch)
    rest = apply(composed("DKD", DKD={"ALPHA": 0.0, "BETA": 1.5}), batch)
    hit = teacher.softmax(dim=1).gather(1, target[:, None])[:, 0]
    soft = hit * F.cross_entropy(student, target, reduction="none")
    (of_label,) = torch.autograd.grad(soft.sum(), student)
    equal(nkd.gradient, rest.gradient + of_label)
    others = teacher.scatter(1, target[:, None], -torch.inf)
    q = (others / 4).softmax(dim=1)
    equal(nkd.value, rest.value + soft + 1.5 * 16 * torch.special.entr(q).sum(dim=1))


def test_dtkd_of_equal_maxima_is_kd():
    student, teacher, target = logits()
    largest = student.detach().amax(dim=1, keepdim=True)
    teacher = teacher - teacher.amax(dim=1, keepdim=True) + largest
    assert (largest > 0).all()
    found = apply(composed("DTKD", DTKD={"ALPHA": 3.0, "BETA": 0.5}), (student, teacher, target))
    equal(found.value, 3.5 * kd_loss(student, teacher, 4.0))
    # The two temperatures share 2 T; where both maxima are negative each is T.
    twice = apply(composed("DTKD"), (student, 2 * teacher, target)).pair
    equal(twice.tau_t / twice.tau_s, torch.full((16,), 2.0).double())
    equal(twice.tau_t + twice.tau_s, torch.full((16,), 8.0).double())
    below = apply(composed("DTKD"), (student, teacher - 100, target)).pair
    assert below.seen == {"dtkd_clamped": 16}
    equal(below.tau_t, torch.full((16,), 0.08, dtype=torch.float64))
    negative = ((student - 100).detach().requires_grad_(), teacher - 100, target)
    equal(apply(composed("DTKD"), negative).pair.tau_s, torch.full((16,), 4.0).double())


def test_mlkd_is_kd_at_five_temperatures_and_what_samples_and_classes_share():
    student, teacher, target = logits()
    found = apply(composed("MLKD"), (student, teacher, target)).value
    taus = (2.0, 3.0, 4.0, 5.0, 6.0)
    kd = sum(kd_loss(student, teacher, tau) for tau in taus)
    rest = found - kd
    equal(rest, rest[0].expand(16))
    expected = 0.0
    for tau in taus:
        s, t = ((z.detach() / tau).softmax(dim=1).numpy() for z in (student, teacher))
        expected += ((t.T @ t - s.T @ s) ** 2).sum() / 10 + ((t @ t.T - s @ s.T) ** 2).sum() / 16
    equal(rest[0], torch.tensor(expected))


@pytest.mark.parametrize("normalise", [False, True])
def test_eakd_weighs_by_entropies(normalise):
    student, teacher, target = logits()
    teacher = teacher.clone()
    teacher[0], teacher[1] = 1e5 * F.one_hot(target[0], 10), 0.0
    student = student.detach().clone()
    student[1] = 7.0
    batch = student.requires_grad_(), teacher, target
    kd, found = (
        apply(composed("KD", policies, EAKD={"NORMALISE": normalise}), batch)
        for policies in ([], ["EAKD"])
    )
    s, t = (torch.special.entr((z / 3).softmax(dim=1)).sum(dim=1) for z in (student, teacher))
    weight = (t / 2 * (1 + s / math.log(10))).detach()
    assert weight[0] < 1e-12 and weight[1] == pytest.approx(math.log(10))
    if normalise:
        weight = weight / weight.mean()
    equal(found.value, weight * kd.value)
    equal(found.gradient, weight[:, None] * kd.gradient)


def test_ctkd_climbs_where_the_student_falls():
    """Its gradient is the loss's, turned round, times a strength that comes to 1."""
    batch = logits()
    distiller = composed("KD", ["CTKD"]).double()
    (theta,) = distiller.learned.parameters()
    assert [distiller.schedule(e)["ctkd_strength"] for e in (5, 10, 80)] == pytest.approx(
        [0.5, 1, 1]
    )
    assert distiller.schedule(1)["ctkd_strength"] == pytest.approx(0.0245, abs=1e-4)
    for epoch in (1, 5, 10):
        found = apply(distiller, batch, epoch)
        share = (0.25 + 5 * theta.sigmoid()) * torch.ones(16).double()
        equal(found.pair.tau, 4 * share)
        equal(found.value, kd_loss(*batch[:2], 4 * share))
        equal(found.pair.seen["mean_temperature"], (4 * share).sum())
        slope, expected = (
            torch.autograd.grad(value.sum(), theta)[0]
            for value in (
                distiller.value(found.pair),
                kd_loss(*batch[:2], 4 * share),
            )
        )
        equal(slope, -distiller.schedule(epoch)["ctkd_strength"] * expected)
    assert found.pair.tau[0].item() == pytest.approx(15.62, abs=0.01)


def test_ctkd_without_strength_moves_by_weight_decay_alone():
    distiller = composed("KD", ["CTKD"]).double()
    (theta,) = distiller.learned.parameters()
    now = {**distiller.schedule(1), "ctkd_strength": 0.0}
    distiller.schedule = lambda epoch: now
    pair = apply(distiller, logits()).pair
    (slope,) = torch.autograd.grad(distiller.value(pair).sum(), theta)
    assert slope == 0
