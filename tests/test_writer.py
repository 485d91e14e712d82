"""What is written beside the training: in order, as it was, and never lost without a word."""

from concurrent.futures import wait
from threading import Event, Thread

import pytest
import torch
from conftest import CPU, assert_same_run, signal_at

from mdistiller_ext.engine import run, train
from mdistiller_ext.engine.loop import Meter
from mdistiller_ext.engine.record import read_record
from mdistiller_ext.engine.writer import Writer, snapshot
from mdistiller_ext.errors import RunError
from mdistiller_ext.files import load

HANGS = 60  # seconds


def test_one_piece_of_work_after_the_other():
    writer, go_on, done = Writer(), Event(), []
    writer.start(lambda: done.append(go_on.wait(HANGS)))
    writer.check()
    assert done == []
    Thread(target=go_on.set).start()
    writer.start(lambda: done.append("second"))
    assert done[0] is True
    writer.wait()
    assert done == [True, "second"]


def test_what_goes_wrong_is_raised_once():
    writer = Writer()
    writer.start(lambda: 1 / 0)
    wait([writer.work])
    with pytest.raises(ZeroDivisionError):
        writer.check()
    writer.check()
    writer.start(lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        writer.start(lambda: None)
    writer.wait()


def test_a_snapshot_does_not_change():
    live = {"a": torch.zeros(2), "b": [torch.zeros((), requires_grad=True), 3]}
    copy = snapshot(live)
    live["a"] += 1
    assert copy == {"a": copy["a"], "b": [torch.zeros(()), 3]}
    assert torch.equal(copy["a"], torch.zeros(2)) and not copy["b"][0].requires_grad


@pytest.fixture
def slow(monkeypatch):
    """The first state is written when the run is in the third step of its second epoch."""
    there, save_state, count = Event(), run.save_state, Meter.count

    def counted(self, images):
        count(self, images)
        if (self.epoch, self.step) >= (2, 3):
            there.set()

    def saved(state, folder):
        assert there.wait(HANGS)
        save_state(state, folder)

    monkeypatch.setattr(Meter, "count", counted)
    monkeypatch.setattr(run, "save_state", saved)


def test_an_epoch_is_written_as_it_was_while_the_next_one_trains(digits_cfg, slow, monkeypatch):
    cfg = digits_cfg("dkd_dat", "LOG.SAVE_CHECKPOINT_FREQ", "1")
    kept, save = [], run.Run._save

    def saved(self):
        kept.append({k: v.clone() for k, v in self.student.state_dict().items()})
        save(self)

    monkeypatch.setattr(run.Run, "_save", saved)
    _, folder = train(cfg, "r", CPU)
    states = [load(folder / f"student_{epoch}")["model"] for epoch in (1, 2, 3)]
    for state, weights in zip(states, kept, strict=True):
        assert all(torch.equal(state[key], value) for key, value in weights.items())
    before = load(folder / "latest.previous")["model"]
    assert all(torch.equal(before[f"student.{k}"], v) for k, v in kept[1].items())


def test_a_run_that_stops_meanwhile_keeps_both(digits_cfg, slow):
    cfg = digits_cfg("dkd_dat")
    _, whole = train(cfg, "whole", CPU)
    with signal_at(2, 3):
        train(cfg, "parts", CPU)
    parts = whole.parent / "parts"
    states = [load(parts / name) for name in ("latest.previous", "latest")]
    assert [(state["epoch"], len(state["meter"].get("sizes", []))) for state in states] == [
        (1, 0),
        (1, 3),
    ]
    train(cfg, "parts", CPU, resume=True)
    assert_same_run(whole, parts)


def test_a_disk_that_fails_meanwhile_ends_the_run_in_its_next_step(digits_cfg, monkeypatch):
    """What was trained since then is no epoch of the record."""
    save_state, build, count, runs, steps = run.save_state, run.Run.__init__, Meter.count, [], []

    def full(state, folder):
        if state["epoch"] == 2:
            raise RunError("no space left")
        save_state(state, folder)

    def built(self, *args):
        runs.append(self)
        build(self, *args)

    def counted(self, images):
        count(self, images)
        steps.append((self.epoch, self.step))
        if self.epoch == 3:
            wait([runs[0].writer.work], HANGS)

    for where, name, value in (
        (run, "save_state", full),
        (run.Run, "__init__", built),
        (Meter, "count", counted),
    ):
        monkeypatch.setattr(where, name, value)
    with pytest.raises(RunError, match=r"no space left; \S+ keeps the state after epoch 1$"):
        train(digits_cfg(), "r", CPU)
    assert steps[-1] == (3, 1)
    record = read_record(runs[0].folder / "record.json")
    assert record["status"] == "failed" and len(record["epochs"]) == 1
