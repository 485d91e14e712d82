"""The controls that draw: what they draw depends on the run's seed and the epoch alone."""

from pathlib import Path

import pytest
import torch
from conftest import CPU, assert_same_run, signal_at

from mdistiller_ext.engine import train, train_many
from mdistiller_ext.engine.run import Run

CONTROLS = {
    "dkd_dat": ["DKD_DAT.GROUPS", "random", "DKD_DAT.RANGE", "0.5"],
    "dkd_lp": ["DKD_LP.CLASSES", "random", "DKD_LP.RATIOS", "[0.4]"],
}


@pytest.mark.parametrize("method", CONTROLS)
def test_a_control_is_one_run_alone_beside_others_and_resumed(digits_cfg, trained, method):
    options = [*CONTROLS[method], "SOLVER.EPOCHS", "2"]
    cfg = digits_cfg(method, *options)
    alone = trained(method, *options)
    beside = digits_cfg(method, *options, "SOLVER.SEED", "1")
    train_many([(beside, "other"), (cfg, "beside")], CPU)
    with signal_at(2, 4):
        train(cfg, "resumed", CPU)
    torch.rand(7)
    train(cfg, "resumed", CPU, resume=True)
    for name in ("beside", "resumed"):
        # beside another run, the global generators are not this run's
        assert_same_run(Path("output/digits", name), alone)


@pytest.mark.parametrize("method", CONTROLS)
def test_an_epoch_draws_anew_and_another_seed_otherwise(digits_cfg, method, monkeypatch):
    seen, drawn = [], Run._uniforms
    monkeypatch.setattr(Run, "_uniforms", lambda run, n: seen.append(drawn(run, n)) or seen[-1])
    for seed in ("0", "1"):
        options = ["SOLVER.EPOCHS", "2", "SOLVER.SEED", seed]
        train(digits_cfg(method, *CONTROLS[method], *options), seed, CPU)
    assert {len(numbers) for numbers in seen} == {539}
    assert all(numbers.min() >= 0 and numbers.max() < 1 for numbers in seen)
    for i, numbers in enumerate(seen):
        assert not any(torch.equal(numbers, other) for other in seen[:i])
