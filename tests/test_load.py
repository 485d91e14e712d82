"""Many runs at once and a long one, in the short form; and that the long one sees a leak."""

import load
import pytest
import torch

from mdistiller_ext.engine.run import Run

EPOCHS = 36


@pytest.fixture(autouse=True)
def threads():
    """The runs of a crowd have one thread each."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def each_epoch(monkeypatch):
    """Has something done in every epoch of a run."""

    def each_epoch(act):
        evaluate = Run._evaluate

        def evaluated(self):
            act(len(self.history) + 1)
            return evaluate(self)

        monkeypatch.setattr(Run, "_evaluate", evaluated)

    return each_epoch


def too_much(workdir) -> set[str]:
    """What a run holds more and more of. Resident memory is for longer runs: it grows in jumps."""
    more = load.growth(load.long_run(EPOCHS, workdir)[0], EPOCHS)
    del more["resident bytes"]
    return {name for name, value in more.items() if value > load.ALLOWED[name]}


def test_runs_at_once_are_the_runs_alone(workdir, all_digits):
    assert load.crowd(4, workdir) == []


@pytest.mark.slow
def test_a_long_run_does_not_hold_more_and_more(workdir, each_epoch):
    """What comes once, as a cache, is no leak."""
    kept = []
    each_epoch(lambda n: kept.extend(torch.zeros(1000)) if n == EPOCHS // 2 else None)
    assert too_much(workdir) == set()
    assert len(kept) == 1000


@pytest.mark.slow
def test_a_leak_is_seen(workdir, each_epoch):
    kept = []
    each_epoch(lambda n: kept.extend([torch.zeros(1), [[]], [[]], bytes(4000)]))
    assert too_much(workdir) == {"tensors", "objects", "traced bytes"}
