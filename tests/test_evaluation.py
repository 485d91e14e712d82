"""Metrics against plain computations, and the record's summary of them."""

import numpy as np
import pytest
import torch
from conftest import reads
from scipy.special import log_softmax, rel_entr, softmax

from mdistiller_ext.engine import fidelity, numbers, performance
from mdistiller_ext.engine.evaluation import calibration_error, confusion
from mdistiller_ext.engine.record import by_class, summary
from mdistiller_ext.errors import RunError


@pytest.fixture
def arrays():
    rng = np.random.default_rng(0)
    student, teacher = 2 * rng.standard_normal((2, 500, 10))
    return student, teacher, rng.integers(10, size=500)


def test_performance(arrays):
    logits, _, targets = arrays
    found = numbers(performance(torch.tensor(logits), torch.tensor(targets)))
    order = np.argsort(-logits, axis=1)
    assert found["top1"] == 100 * (order[:, 0] == targets).sum() / 500
    assert found["top5"] == 100 * (order[:, :5] == targets[:, None]).any(1).sum() / 500
    nll = -log_softmax(logits, axis=1)[np.arange(500), targets].mean()
    assert found["nll"] == pytest.approx(nll, rel=1e-6)
    confidence, hit = softmax(logits, axis=1).max(1), order[:, 0] == targets
    assert found["ece"] == pytest.approx(brute_force(confidence, hit), abs=1e-12)


def test_confusion_counts_labels_by_predictions(arrays):
    logits, _, targets = arrays
    expected = np.zeros((10, 10), int)
    for row, target in zip(logits, targets, strict=True):
        expected[target, row.argmax()] += 1
    found = confusion(torch.tensor(logits), torch.tensor(targets))
    assert (found.numpy() == expected).all()
    assert by_class([[3, 1], [0, 0]]) == {"top1": [75.0, None], "confusion": ["3 1", "0 0"]}


def brute_force(confidence, hit):
    """Calibration error over 15 bins, sample by sample."""
    error = 0.0
    for b in range(15):
        inside = [i for i, c in enumerate(confidence) if min(int(15 * c), 14) == b]
        if inside:
            accuracy = sum(hit[i] for i in inside) / len(inside)
            mean = sum(confidence[i] for i in inside) / len(inside)
            error += len(inside) / len(hit) * abs(accuracy - mean)
    return error


def test_calibration_error_by_hand():
    """Bins are left-closed, and certainty shares the last one."""
    confidence, hits = torch.tensor([0.5, 0.51, 0.95, 1.0]), torch.tensor([1, 0, 0, 1]) == 1
    expected = abs(1 + 0 - 0.5 - 0.51) / 4 + abs(0 + 1 - 0.95 - 1.0) / 4
    assert calibration_error(confidence, hits).item() == pytest.approx(expected, abs=1e-7)
    assert calibration_error(torch.ones(3), torch.ones(3) == 1) == 0
    assert calibration_error(torch.ones(3), torch.ones(3) == 0) == 1


@pytest.mark.parametrize("scale", [0.1, 3.0, 100.0])
def test_many_samples_in_float32(scale):
    """From hesitant to certain networks, some of whose probabilities are 1."""
    generator = torch.Generator().manual_seed(0)
    logits = scale * torch.randn(2000, 100, generator=generator)
    targets = torch.randint(100, (2000,), generator=generator)
    found = numbers(performance(logits, targets))
    assert (
        found["top1"]
        == 100
        * sum(int(row.argsort()[-1] == target) for row, target in zip(logits, targets, strict=True))
        / 2000
    )
    assert (
        found["top5"]
        == 100
        * sum(
            int(target in row.argsort()[-5:]) for row, target in zip(logits, targets, strict=True)
        )
        / 2000
    )
    p = logits.softmax(1)
    hit = (p.argmax(1) == targets).tolist()
    assert found["ece"] == pytest.approx(brute_force(p.max(1)[0].tolist(), hit), abs=1e-6)


def test_top5_of_fewer_classes():
    assert performance(torch.eye(3), torch.tensor([0, 2, 1]))["top5"] == 100


def test_fidelity(arrays):
    student, teacher, _ = arrays
    found = numbers(fidelity(torch.tensor(student), torch.tensor(teacher)))
    p, q = softmax(teacher, axis=1), softmax(student, axis=1)
    assert found["agreement"] == 100 * (p.argmax(1) == q.argmax(1)).sum() / 500
    assert found["kl"] == pytest.approx(rel_entr(p, q).sum(1).mean(), rel=1e-6)
    assert found["l2_probabilities"] == pytest.approx(np.linalg.norm(p - q, axis=1).mean())
    assert found["l2_logits"] == pytest.approx(np.linalg.norm(teacher - student, axis=1).mean())


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_logit_that_is_not_finite_is_refused(value):
    """Also one of a class that is not the label, and so costs the others nothing."""
    logits = torch.zeros(3, 4)
    logits[1, 2] = value
    with pytest.raises(RunError, match="evaluation: not finite: nll nan"):
        numbers(performance(logits, torch.tensor([0, 0, 0])))


def test_an_evaluation_is_read_at_once(arrays):
    student, teacher, targets = map(torch.tensor, arrays)
    with reads() as waited:
        measured = {**performance(student, targets), **fidelity(student, teacher)}
        assert waited == []
        numbers(measured)
    assert waited == ["tolist"]


def test_summary_names_what_is_selected_on_the_test_set():
    values = [1, 50, 50, *range(30, 40)]
    history = [{"epoch": n, "test_top1": float(v)} for n, v in enumerate(values, start=1)]
    assert summary(history) == {
        "last_epoch_top1": 39.0,
        "mean_last_10_top1": 34.5,
        "best_epoch_top1_selected_on_test": 50.0,
        "best_epoch": 2,
    }
    assert summary([]) == summary([{"epoch": 1}]) == {}
    for epoch in (1, 2, 12):  # not evaluated; 12 is one of the last ten
        del history[epoch]["test_top1"]
    assert summary(history) == {
        "last_epoch_top1": 38.0,
        "mean_last_10_top1": 34.0,
        "best_epoch_top1_selected_on_test": 38.0,
        "best_epoch": 12,
    }
