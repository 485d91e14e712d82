"""docs/coming_over.md: what timm and Keras compute, written out, beside what this package does."""

import re

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from torch import nn

from mdistiller_ext import distiller_dict, load_cfg

ROWS = re.findall(
    r"^\| (timm|Keras), (.*?) \| ([\d.]+) \| ([\d.]+) \| (\S+) \|$",
    (ROOT / "docs" / "coming_over.md").read_text(),
    flags=re.M,
)


class Fixed(nn.Module):
    """A network whose logits are these, whatever the image."""

    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(logits.clone())

    def forward(self, image):
        return self.logits, {}


def timm(z_s, z_t, target, t, task, distill):
    logs = [F.log_softmax(z / t, dim=-1) for z in (z_s, z_t)]
    kd = F.kl_div(*logs, reduction="batchmean", log_target=True) * t**2
    return task * F.cross_entropy(z_s, target) + distill * kd


def keras(z_s, z_t, target, t, weight, of_probabilities):
    y_t, y_s = ((z / t).softmax(1) if of_probabilities else z / t for z in (z_t, z_s))
    y_t, y_s = y_t.clip(1e-7, 1), y_s.clip(1e-7, 1)
    kd = (y_t * (y_t / y_s).log()).sum(1).mean() * (t**2 if of_probabilities else 1)
    return weight * F.cross_entropy(z_s, target) + (1 - weight) * kd


# What the rows of the document are of: the formula, its arguments, and CE_WEIGHT, KD_WEIGHT and T.
CASES = [
    (timm, (4.0, 1.0, 1.0), (1.0, 1.0, 4.0)),
    (timm, (4.0, 1.0, 0.9), (1.0, 0.9, 4.0)),
    (timm, (4.0, 0.1, 0.9), (0.1, 0.9, 4.0)),
    (timm, (4.0, 0.5, 2.0), (0.5, 2.0, 4.0)),
    (keras, (3.0, 0.5, True), (0.5, 0.5, 3.0)),
    (keras, (4.0, 0.1, True), (0.1, 0.9, 4.0)),
    (keras, (3.0, 0.5, False), (0.5, 0.5, 3.0)),
]


@pytest.mark.parametrize(("row", "case"), [*zip(ROWS, CASES, strict=True)])
def test_theirs_is_what_the_document_says_and_ours_is_equal_where_it_says_so(row, case):
    library, words, theirs, here, apart = row
    formula, arguments, (ce, kd, t) = case
    assert library.lower() == formula.__name__
    torch.manual_seed(0)
    z_s, z_t = 3 * torch.randn(64, 100), 6 * torch.randn(64, 100)
    image, target = torch.zeros(64, 3, 4, 4), torch.randint(100, (64,))
    other = z_s.clone().requires_grad_()
    expected = formula(other, z_t, target, *arguments)
    expected.backward()
    options = ["DISTILLER.TYPE", "LOGIT", "DISTILLER.TEACHER", "resnet20", "LOGIT.LOSS", "KD"]
    options += ["LOGIT.T", t, "LOGIT.CE_WEIGHT", ce, "LOGIT.KD_WEIGHT", kd]
    student = Fixed(z_s)
    method = distiller_dict["LOGIT"](student, Fixed(z_t), load_cfg(None, options))
    _, losses = method(image=image, target=target, epoch=1)
    loss = sum(term.mean() for term in losses.values())
    loss.backward()
    assert loss.item() == pytest.approx(float(here), rel=1e-5)
    assert expected.item() == pytest.approx(float(theirs), rel=1e-5)
    largest = (other.grad - student.logits.grad).abs().max() / student.logits.grad.abs().max()
    assert (
        largest < 1e-5 if float(apart) < 1e-5 else largest == pytest.approx(float(apart), rel=0.1)
    )
    assert (theirs == here) == (float(apart) < 1e-5) == ("kl_divergence" not in words)


def test_each_row_is_a_case():
    assert len(ROWS) == len(CASES)
