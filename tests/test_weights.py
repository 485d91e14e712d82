"""Where teachers' weights are looked for, and which files are refused."""

import sys
import tarfile
from pathlib import Path

import pytest
import torch
from conftest import CPU, ROOT

from mdistiller_ext import cifar_model_dict
from mdistiller_ext.config import load_cfg
from mdistiller_ext.engine import train
from mdistiller_ext.errors import ConfigError, RunError
from mdistiller_ext.teacher import (
    Weights,
    fetch_weights,
    find_weights,
    load_into,
    load_weights,
    weights,
)

TOOLKIT = Path("download_ckpts/cifar_teachers/resnet110_vanilla/ckpt_epoch_240.pth")


def touch(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path


def test_order_of_places(workdir, monkeypatch):
    monkeypatch.setattr(weights, "CHECKPOINTS", workdir / "project")
    package = touch(workdir / "site" / "mdistiller" / "__init__.py").parent
    monkeypatch.delitem(sys.modules, "mdistiller", raising=False)
    monkeypatch.syspath_prepend(str(package.parent))
    places = [
        Path("named.pth"),
        Path("checkpoints/cifar100/resnet110.pth"),
        workdir / "project/cifar100/resnet110.pth",
        TOOLKIT,
        workdir / "site" / TOOLKIT,
    ]
    for place in reversed(places):
        touch(place)
        found = find_weights("resnet110", "cifar100", "named.pth" if place == places[0] else "")
        assert found == place
    assert find_weights("resnet110", "digits") is None


def test_a_named_file_that_is_not_there(workdir):
    with pytest.raises(ConfigError, match=r"DISTILLER\.TEACHER_CKPT: no such file: named\.pth"):
        find_weights("resnet110", "cifar100", "named.pth")


def test_not_found_lists_the_places_and_the_command(workdir, monkeypatch):
    monkeypatch.setattr(weights, "URL", "http://127.0.0.1:9/cifar_teachers.tar")
    with pytest.raises(RunError) as error:
        fetch_weights("resnet110", "cifar100")
    for part in (
        "checkpoints/cifar100/resnet110.pth",
        str(TOOLKIT),
        "http://127.0.0.1:9/cifar_teachers.tar: download failed",
        "DISTILLER.TEACHER_CKPT",
        "train --cfg cifar100/teacher_resnet110",
    ):
        assert part in str(error.value)
    assert not list(workdir.rglob("*.tar"))


def test_download_of_the_toolkits_archive(workdir, monkeypatch):
    file = workdir / "source" / TOOLKIT.relative_to("download_ckpts")
    model = cifar_model_dict["resnet56"][0](num_classes=100)
    touch(file)
    torch.save({"model": model.state_dict(), "epoch": 240}, file)
    with tarfile.open(workdir / "t.tar", "w") as tar:
        tar.add(workdir / "source" / "cifar_teachers", "cifar_teachers")
    monkeypatch.setattr(weights, "URL", (workdir / "t.tar").as_uri())
    found = fetch_weights("resnet110", "cifar100")
    assert found == TOOLKIT == find_weights("resnet110", "cifar100")
    load_into(model, load_weights(found), "resnet56")


NETWORKS = [
    # (in the file, asked for), each with its classes; the tensor that differs first
    ("resnet20", 10, "resnet8", 10, "layer1.1.conv1.weight has shape (16, 16, 3, 3) in", "none"),
    ("resnet8", 10, "resnet20", 10, "layer1.1.conv1.weight has shape none in", "(16, 16, 3, 3)"),
    ("resnet20", 10, "resnet20", 100, "fc.weight has shape (10, 64) in", "(100, 64)"),
    ("resnet8", 100, "resnet8x4", 10, "conv1.weight has shape (16, 3, 3, 3) in", "(32, 3, 3, 3)"),
]


@pytest.mark.parametrize(("held", "classes", "asked", "wanted", "found", "expected"), NETWORKS)
def test_weights_of_another_network_are_named_on_both_sides(
    workdir, held, classes, asked, wanted, found, expected
):
    net = cifar_model_dict[held][0](num_classes=classes)
    torch.save({"model": net.state_dict()}, "w.pth")
    with pytest.raises(RunError) as error:
        load_into(
            cifar_model_dict[asked][0](num_classes=wanted), load_weights(Path("w.pth")), asked
        )
    text = str(error.value)
    assert text.startswith(f"w.pth: does not fit {asked}: {found} the file (")
    assert f" and {expected} in {asked} (" in text
    assert text.endswith(f"; the file holds a {held} for {classes} classes")


def test_weights_of_no_network_of_ours_are_called_nothing(workdir):
    state = cifar_model_dict["resnet8"][0](num_classes=10).state_dict()
    state["conv1.weight"] = torch.zeros(16, 1, 3, 3)
    weights_of_one_channel = Weights(state, Path("w.pth"), "")
    with pytest.raises(RunError, match=r"\(16, 1, 3, 3\) in the file .* \(16, 3, 3, 3\) in .*\)\Z"):
        load_into(cifar_model_dict["resnet8"][0](num_classes=10), weights_of_one_channel, "resnet8")


@pytest.mark.parametrize(("dataset", "asked"), [("cifar100", "resnet56"), ("digits", "resnet20")])
def test_a_real_teacher_where_another_is_asked(shared, workdir, dataset, asked):
    """A depth that differs, and a data set of other classes."""
    file = shared / "teachers" / "cifar100_resnet20.pth"
    options = ["DISTILLER.TEACHER", asked, "DISTILLER.TEACHER_CKPT", str(file)]
    cfg = load_cfg(ROOT / "configs" / dataset / "dkd.yaml", [*options, "DATASET.ROOT", str(shared)])
    with pytest.raises(RunError) as error:
        train(cfg, "r", CPU)
    text = str(error.value)
    assert text.startswith(f"{file}: does not fit {asked}: ")
    assert text.endswith("; the file holds a resnet20 for 100 classes")
    assert not list(workdir.rglob("record.json"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"no checkpoint at all", "not a readable checkpoint"),
        (b"", "not a readable checkpoint"),
        (b"hello", "nothing that torch.save wrote"),
        (b"PK\x03\x04", "nothing that torch.save wrote"),
        ([1], "expected a state dict, found a list"),
        ({"model": {"fc": 1}}, "expected a state dict, or .* found a dict of 'model'"),
        ({"epoch": 3, "net": {}}, "expected a state dict, or .* found a dict of 'epoch', 'net'"),
        ({"student.fc.bias": torch.ones(1)}, "the state of a run; its network is student_last"),
        (torch.nn.Linear(1, 1), "it holds a torch.nn.modules.linear.Linear, and only tensors and"),
    ],
)
def test_files_that_are_refused(workdir, content, message):
    file = Path("w.pth")
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        torch.save(content, file)
    with pytest.raises(RunError, match=f"w.pth: .*{message}") as error:
        load_weights(file)
    # No advice to run what the file holds.
    assert "weights_only" not in str(error.value) and "\x1b" not in str(error.value)


def test_a_state_dict_is_found_however_it_was_saved(workdir):
    state = cifar_model_dict["resnet8"][0](num_classes=10).state_dict()
    parallel = {f"module.{key}": value for key, value in state.items()}
    for content in (state, {"model": state}, {"state_dict": state, "epoch": 3}, parallel):
        torch.save(content, "w.pth")
        found = load_weights(Path("w.pth")).state
        assert found.keys() == state.keys()
        assert all(map(torch.equal, found.values(), state.values()))


def test_a_file_of_safetensors_is_named(workdir):
    Path("w.safetensors").write_bytes(b"\x08" + bytes(7) + b"{}      ")
    with pytest.raises(RunError, match="it is one of safetensors"):
        load_weights(Path("w.safetensors"))
