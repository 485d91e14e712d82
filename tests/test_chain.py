"""Chains of teacher assistants: links are runs that chains share, and that go on when stopped."""

import json
from pathlib import Path

import pytest
import torch
from conftest import CPU, ROOT, signal_at, weights

from mdistiller_ext.config import load_cfg
from mdistiller_ext.engine import chain, train
from mdistiller_ext.errors import ConfigError

SHORT = ["SOLVER.EPOCHS", "1"]


def folders():
    return sorted(f.name for f in Path("output/digits").iterdir())


def test_a_chain_is_the_same_as_its_links_by_hand(digits_cfg):
    teachers = ["DISTILLER.ASSISTANTS", "['resnet14', 'resnet8']"]
    cfg = digits_cfg("kd", *teachers, *SHORT)
    record, folder = train(cfg, "chain", CPU)
    assert [one["student"] for one in record["chain"]] == ["resnet14", "resnet8"]
    assert [one["epochs"] for one in record["chain"]] == [1, 1]
    assert len(folders()) == 3 and record["teacher"]["name"] == "resnet8"
    teacher = cfg.DISTILLER.TEACHER_CKPT
    for number, (network, student) in enumerate(
        [("resnet20", "resnet14"), ("resnet14", "resnet8"), ("resnet8", "resnet8")]
    ):
        words = ["DISTILLER.TEACHER", network, "DISTILLER.STUDENT", student]
        words += ["DISTILLER.TEACHER_CKPT", str(teacher)]
        by_hand = load_cfg(ROOT / "configs/digits/kd.yaml", [*SHORT, *words])
        _, last = train(by_hand, f"hand{number}", CPU)
        teacher = last / "student_last"
    one, other = weights(folder), weights(last)
    assert all(torch.equal(value, other[key]) for key, value in one.items())


@pytest.mark.slow
def test_chains_share_what_they_begin_with(digits_cfg, capsys):
    first = digits_cfg("kd", "DISTILLER.ASSISTANTS", "['resnet14']", *SHORT)
    train(first, "one", CPU)
    before = folders()
    longer = digits_cfg("kd", "DISTILLER.ASSISTANTS", "['resnet14', 'resnet8']", *SHORT)
    train(longer, "two", CPU)
    assert len(folders()) == len(before) + 2
    assert f"{chain.name(chain.link(first))}: finished already" in capsys.readouterr().out
    seeded = digits_cfg("kd", "DISTILLER.ASSISTANTS", "['resnet14']", "SOLVER.SEED", "1", *SHORT)
    assert chain.name(chain.link(seeded)) not in folders()


def test_a_link_with_settings_of_its_own(digits_cfg, workdir):
    own = "DISTILLER: {TYPE: KD, TEACHER: resnet20, STUDENT: resnet14}\nKD: {TEMPERATURE: 2}\n"
    own += "SOLVER: {EPOCHS: 2, LR_DECAY_STAGES: []}\n"
    (workdir / "link.yaml").write_text(own)
    options = ["DISTILLER.ASSISTANTS", "['link.yaml']", *SHORT]
    text = (ROOT / "configs/digits/dkd.yaml").read_text()
    (workdir / "c.yaml").write_text(text)
    teacher = digits_cfg("dkd").DISTILLER.TEACHER_CKPT
    cfg = load_cfg(workdir / "c.yaml", [*options, "DISTILLER.TEACHER_CKPT", teacher])
    assert cfg.DISTILLER.ASSISTANTS == ["link.yaml"]  # of an option, in the working folder
    record, _ = train(cfg, "chain", CPU)
    (link,) = record["chain"]
    assert (link["method"], link["epochs"]) == ("KD", 2)
    assert link["config"]["KD"]["TEMPERATURE"] == 2
    assert link["config"]["LOG"] == record["config"]["LOG"]


def test_a_chain_that_is_stopped_goes_on_in_the_link_it_was_in(digits_cfg):
    cfg = digits_cfg("kd", "DISTILLER.ASSISTANTS", "['resnet14']", "SOLVER.EPOCHS", "2")
    _, whole = train(
        digits_cfg(
            "kd",
            "DISTILLER.ASSISTANTS",
            "['resnet14']",
            "SOLVER.EPOCHS",
            "2",
            "LOG.PREFIX",
            "other",
        ),
        "chain",
        CPU,
    )
    with signal_at(1, 4):
        train(cfg, "chain", CPU)
    name = chain.name(chain.link(cfg))
    record = json.loads((Path("output/digits") / name / "record.json").read_text())
    assert record["status"] == "interrupted"
    _, folder = train(cfg, "chain", CPU, resume=True)
    one, other = weights(folder), weights(whole)
    assert all(torch.equal(value, other[key]) for key, value in one.items())


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("['no_such_net']", "DISTILLER.ASSISTANTS: .* a list of networks, or of YAML files"),
        ("[3]", "DISTILLER.ASSISTANTS"),
        ("'resnet14'", "DISTILLER.ASSISTANTS: .* is of the wrong type, expected list"),
    ],
)
def test_what_is_no_chain_is_refused(digits_cfg, monkeypatch, value, message):
    monkeypatch.delenv("MDISTILLER_ROOT", raising=False)
    with pytest.raises(ConfigError, match=message):
        digits_cfg("kd", "DISTILLER.ASSISTANTS", value)
