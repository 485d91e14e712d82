"""Where teachers' weights are looked for, and which files are refused."""

import hashlib
import json
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
        ({"epoch": 3, "nets": {}}, "expected a state dict, or .* found a dict of 'epoch', 'nets'"),
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


def named(name, seed=0):
    """A network of ten classes, and its state dict."""
    torch.manual_seed(seed)
    network = cifar_model_dict[name][0](num_classes=10)
    return network, network.state_dict()


def under(prefix, state):
    return {prefix + key: value for key, value in state.items()}


def loaded(name="resnet8", file="w.pth"):
    """What a network of this name has after the file is loaded."""
    network, _ = named(name, 9)
    load_into(network, load_weights(Path(file)), name)
    return network.state_dict()


def same(one, other):
    return one.keys() == other.keys() and all(map(torch.equal, one.values(), other.values()))


PREFIXES = ["", "module.", "_orig_mod.", "model.", "module._orig_mod.", "_orig_mod.module."]
PREFIXES += ["student.", "module.student._orig_mod.", "model.model.module."]


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("entry", ["", "model", "state_dict", "model_state_dict", "net", "ema"])
def test_a_state_dict_is_found_however_it_was_saved(workdir, capsys, prefix, entry):
    """The prefix that was taken off is said; an old file has no `num_batches_tracked`."""
    _, state = named("resnet8")
    old = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
    for content in (state, old):
        content = under(prefix, content)
        torch.save({entry: content, "epoch": 3} if entry else content, "w.pth")
        assert same(loaded(), state)
        said = f"w.pth: takes the prefix {prefix} off its names\n" if prefix else ""
        assert capsys.readouterr().out == said


def test_a_wrapped_network_takes_bare_weights(workdir, capsys):
    _, state = named("resnet8")
    torch.save(state, "w.pth")
    wrapped = torch.nn.DataParallel(named("resnet8", 9)[0])
    load_into(wrapped, load_weights(Path("w.pth")), "it")
    assert same(wrapped.module.state_dict(), state)
    assert capsys.readouterr().out == "w.pth: puts the prefix module. before its names\n"


def test_raw_and_averaged_weights_are_told_apart(workdir, capsys):
    (_, raw), (_, ema) = named("resnet8"), named("resnet8", 1)
    averaged = {"n_averaged": torch.tensor(3), **under("module.", ema)}
    torch.save({"model": raw, "model_ema": averaged}, "w.pth")
    assert same(loaded(), raw)
    said = 'w.pth: takes the entry "model", not "model_ema" (a file of that alone gives it)\n'
    assert capsys.readouterr().out == said
    torch.save(averaged, "w.pth")
    assert same(loaded(), ema)


def test_the_students_part_of_a_run_is_taken_where_it_is_meant(workdir, capsys):
    (_, small), (_, large) = named("resnet8"), named("resnet14")
    parts = under("module.student.", small) | under("module.teacher.", large)
    torch.save({"model": parts, "optimizer": {"lr": 0.1}}, "w.pth")
    assert same(loaded(), small)
    left = "w.pth: takes the prefix module.student. off its names; leaves module.teacher.*\n"
    assert capsys.readouterr().out == left
    message = r"as module.student.\*, beside module.teacher.\*\) and .*; the file holds a resnet8"
    with pytest.raises(RunError, match=message):
        loaded("resnet20")
    torch.save(under("student.", small) | under("teacher.", small), "w.pth")
    message = r"w.pth: holds several networks that fit resnet8: student.\* and teacher.\*"
    with pytest.raises(RunError, match=message) as error:
        loaded()
    assert "\n" not in str(error.value)


def test_a_file_that_is_swapped_meanwhile_is_read_once(workdir, monkeypatch):
    file, live = Path("w.pth"), Path.read_bytes
    torch.save({"w": torch.ones(1)}, file)
    content = file.read_bytes()

    def swapped(self):
        found = live(self)
        torch.save({"w": torch.zeros(1)}, self)
        return found

    monkeypatch.setattr(Path, "read_bytes", swapped)
    found = load_weights(file)
    assert found.state["w"] == 1 and found.sha256 == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize("key", ["best_acc", "accuracy"])
def test_a_teacher_below_what_its_file_claims_is_said(digits_cfg, tool, capfd, key):
    """A claim in percent, as a share, and one that holds."""
    cfg = digits_cfg("kd", "SOLVER.EPOCHS", "1", "DISTILLER.TEACHER", "resnet8")
    file = cfg.DISTILLER.TEACHER_CKPT
    _, state = named("resnet8")
    words = ["-m", "resnet8", "-c", file, "-d", "digits"]
    for claim, expected in ((99.5, "99.50 %"), (torch.tensor(0.995), "99.50 %"), (0.01, "")):
        torch.save({"model": state, key: claim}, file)
        status, output, _ = tool("eval", *words)
        found = [line for line in output.splitlines() if line.startswith("warning: resnet8 has")]
        assert status == 0 and bool(found) == bool(expected)
        assert not found or f" % top-1 here, {key} says {expected}: " in found[0]
    torch.save({"model": state, key: 99.5}, file)
    record, _ = train(cfg, "r", CPU)
    top1 = record["teacher"]["test_top1"]
    said = f"warning: the teacher resnet8 has {top1:.2f} % top-1 here, {key} says 99.50 %: "
    assert said in capfd.readouterr().out


def test_a_teacher_is_measured_against_its_record(digits_cfg, tool):
    """As trained; and with weights that are not the record's."""
    record, folder = train(digits_cfg("vanilla", "SOLVER.EPOCHS", "2"), "r", CPU)
    words = ["-m", "resnet8", "-d", "digits", "-c"]
    for file in ("student_last", "student_best"):
        assert "warning: resnet8" not in tool("eval", *words, str(folder / file))[1]
    torch.save({"model": named("resnet8", 5)[1]}, folder / "student_last")
    top1 = record["last_epoch_top1"]
    expected = f"{folder}/record.json, of the test set says {top1:.2f} %"
    assert expected in tool("eval", *words, str(folder / "student_last"))[1]
    assert expected in tool("eval", *words, str(folder / "student_last"), "--json")[2]


def test_a_file_of_safetensors_is_read_as_any_other(workdir, capsys, monkeypatch):
    safetensors = pytest.importorskip("safetensors.torch")
    _, state = named("resnet8")
    safetensors.save_file(under("module.", state), "w.safetensors")
    assert same(loaded(file="w.safetensors"), state)
    said = "w.safetensors: takes the prefix module. off its names\n"
    assert capsys.readouterr().out == said
    record = {"last_epoch_top1": 61.0, "data": {"evaluated_on": "the test set"}}
    record |= {"best_epoch_top1_selected_on_test": 62.0}
    Path("record.json").write_text(json.dumps(record))
    for name, top1 in (("last", 61.0), ("best", 62.0)):
        Path("w.safetensors").rename(f"student_{name}.safetensors")
        assert load_weights(Path(f"student_{name}.safetensors")).claim[0] == top1
        Path(f"student_{name}.safetensors").rename("w.safetensors")
    content = Path("w.safetensors").read_bytes()
    for damaged in (b"", b"hello", content[:-1], content[:100], b"\xff" * 8 + content[8:]):
        Path("w.safetensors").write_bytes(damaged)
        with pytest.raises(RunError, match=r"w\.safetensors: not a readable checkpoint: ") as error:
            load_weights(Path("w.safetensors"))
        assert "\n" not in str(error.value)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(
        ConfigError, match=r"w\.safetensors: .*: pip install 'mdistiller-ext\[export"
    ):
        load_weights(Path("w.safetensors"))
