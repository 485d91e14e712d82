"""Where teachers' weights are looked for, and which files are refused."""

import sys
import tarfile
from pathlib import Path

import pytest
import torch

from mdistiller_ext import cifar_model_dict
from mdistiller_ext.errors import ConfigError, RunError
from mdistiller_ext.teacher import fetch_weights, find_weights, load_into, load_weights, weights

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
        "python tools/train.py --cfg configs/cifar100/teacher_resnet110.yaml",
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


def test_weights_of_another_network_are_named_on_both_sides(workdir):
    torch.save({"model": cifar_model_dict["resnet20"][0](num_classes=10).state_dict()}, "w.pth")
    found = load_weights(Path("w.pth"))
    with pytest.raises(
        RunError, match=r"layer1\.1\.conv1\.weight has shape \(16, 16, 3, 3\) in the file"
    ):
        load_into(cifar_model_dict["resnet8"][0](num_classes=10), found, "resnet8")
    with pytest.raises(
        RunError, match=r"fc\.weight has shape \(10, 64\) in the file .*\(100, 64\)"
    ):
        load_into(cifar_model_dict["resnet20"][0](num_classes=100), found, "resnet20")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"no checkpoint at all", "not a readable checkpoint"),
        (b"", "not a readable checkpoint"),
        ([1], "expected {.model.: state_dict}"),
        ({"model": {"fc": 1}}, "expected {.model.: state_dict}"),
    ],
)
def test_files_that_are_refused(workdir, content, message):
    file = Path("w.pth")
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        torch.save(content, file)
    with pytest.raises(RunError, match=f"w.pth: .*{message}"):
        load_weights(file)
