"""What a finished run gives: classes, student, predictions, files; the document's code."""

import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CPU, ROOT
from torch import nn

from mdistiller_ext import cifar_model_dict, distill, load_student
from mdistiller_ext.commands import export
from mdistiller_ext.data import digits
from mdistiller_ext.engine import train
from mdistiller_ext.engine.record import read_record, write_record
from mdistiller_ext.errors import ConfigError, RunError
from mdistiller_ext.models.zoo import OWN

BLOCKS = re.findall(
    r"```python\n(.*?)```", (ROOT / "docs" / "after_training.md").read_text(), flags=re.S
)
FIRST = Path("output/digits/first")


@pytest.fixture
def first(trained, workdir) -> Path:
    """A run as the document has one."""
    shutil.copytree(trained("vanilla"), FIRST)
    return FIRST


def block(word):
    """The code of the document that has this word."""
    (code,) = [code for code in BLOCKS if word in code]
    names: dict = {}
    exec(code, names)
    return names


def test_a_run_is_evaluated_by_its_folder_and_its_classes_are_those_of_its_predictions(first, tool):
    record = read_record(first / "record.json")
    status, output, _ = tool("eval", "-c", str(first), "--json", "--save", "predictions.npz")
    assert status == 0 and json.loads(output)["top1"] == record["last_epoch_top1"]
    assert json.loads(output)["model"] == "resnet8"
    saved = block("predictions.npz")["saved"]
    predicted, labels = saved["logits"].argmax(1), saved["labels"]
    expected = [[((labels == n) & (predicted == k)).sum() for k in range(10)] for n in range(10)]
    confusion = block('["confusion"]')["confusion"]
    assert (confusion == expected).all() and confusion.sum() == len(labels) == 200
    assert record["by_class"]["top1"] == pytest.approx(
        [100 * (predicted[labels == n] == n).mean() for n in range(10)]
    )
    assert record["data"]["class_names"] == saved["class_names"].tolist() == [*"0123456789"]
    best = tool("eval", "-c", str(first / "student_best"), "--json")[1]
    assert json.loads(best)["top1"] == record["best_epoch_top1_selected_on_test"]


def test_a_run_that_lacked_only_its_last_record_has_its_classes(first, digits_cfg):
    expected = read_record(first / "record.json")["by_class"]
    (first / "record.json").unlink()
    record, _ = train(digits_cfg("vanilla", "EXPERIMENT.NAME", "first"), "first", CPU, resume=True)
    assert record["status"] == "finished" and record["by_class"] == expected


def test_a_student_answers_plain_images_with_the_bits_of_the_evaluation(first, tool):
    tool("eval", "-c", str(first), "--save", "predictions.npz")
    assert block("load_student")["logits"].shape == (4, 10)
    _, test = digits.load()
    student = load_student(first)
    assert not student.training and not student.network.training and student.side == 8
    assert torch.equal(student.mean, test.mean) and torch.equal(student.std, test.std)
    side = slice(test.padding, test.padding + 8)
    with torch.no_grad():
        logits = torch.cat([student(part / 255) for part in test.padded[..., side, side].split(64)])
    assert (logits.numpy() == np.load("predictions.npz")["logits"]).all()


def test_a_network_that_was_an_object_is_refused(workdir):
    split = torch.randint(256, (32, 3, 8, 8), dtype=torch.uint8), torch.arange(32) % 4
    nets = [nn.Sequential(nn.Flatten(), nn.Linear(192, 4)) for _ in range(2)]
    options = ["SOLVER.EPOCHS", 1, "SOLVER.LR_DECAY_STAGES", []]
    _, folder = distill(*nets, split, split, options=options, device=CPU)
    with pytest.raises(ConfigError, match=r"student_last: its network was given to distill\(\)"):
        load_student(folder)


@pytest.mark.parametrize(
    ("words", "status", "part"),
    [
        (["eval"], 2, "--model: is missing, expected a network, or --ckpt with a run's folder"),
        (["eval", "-c", "."], 1, "record.json: cannot be read: No such file"),
        (["export", "-c", str(FIRST), "--format", "tf"], 2, "invalid choice: 'tf'"),
        (["eval", "-c", str(FIRST), "--save", "no/p.npz"], 2, "--save: no: No such file"),
        (
            ["eval", "-c", str(FIRST), "-d", "cifar10", "--root", "."],
            1,
            "holds no cifar-10-batches-py/",
        ),
    ],
)
def test_what_is_refused(first, tool, monkeypatch, words, status, part):
    monkeypatch.setattr("mdistiller_ext.data.cifar10.URL", "http://127.0.0.1:9/c.tar.gz")
    found, _, error = tool(*words)
    assert found == status and part in error


@pytest.mark.parametrize("kind", export.FORMATS)
def test_an_exported_file_answers_as_the_network_in_the_documents_lines(first, tool, kind):
    for library in export.FORMATS[kind].libraries:
        pytest.importorskip(library)
    status, output, error = tool("export", "-c", str(first), "--format", kind)
    assert status == 0, error
    largest = re.search(r"of 200 test images differ from the network's by at most (\S+),", output)
    assert float(largest[1]) < 1e-4 and "float32, RGB in [0, 1]" in output
    names = block(f"student_last.{kind}")
    expected = load_student(first)(torch.as_tensor(names["images"]))
    torch.testing.assert_close(torch.as_tensor(names["logits"]), expected, rtol=0, atol=1e-4)
    if kind == "onnx":
        about = names["session"].get_modelmeta().custom_metadata_map
        assert json.loads(about["class_names"]) == [*"0123456789"]
    if kind == "safetensors":
        file = first / "student_last.safetensors"
        assert torch.equal(load_student(file)(names["images"]), expected)
        before = file.read_bytes()
        status, _, error = tool("export", "-c", str(file), "--format", kind)
        assert status == 2 and "would be overwritten, expected another folder" in error
        assert file.read_bytes() == before


def test_a_library_that_is_missing_is_one_line_and_nothing_is_written(first, tool, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    status, _, error = tool("export", "-c", str(first))
    (line,) = error.splitlines()
    assert status == 2 and line.startswith("export.py: error: --format onnx: ")
    assert line.endswith(": pip install 'mdistiller-ext[export]'")
    assert not [*first.glob("student_last.*")]


def test_a_file_that_answers_otherwise_is_not_kept(first, tool, monkeypatch):
    form = export.FORMATS["pt2"]
    for changes, part in (
        ({"answer": lambda content, student, image: 1 + form.answer(content, student, image)}, ""),
        ({"write": lambda student, about: student(None)}, "resnet8 as pt2: "),
    ):
        monkeypatch.setitem(export.FORMATS, "pt2", form._replace(**changes))
        status, _, error = tool("export", "-c", str(first), "--format", "pt2")
        (line,) = error.splitlines()
        part = part or f"{first}/student_last.pt2: not written: its logits differ by up to 1.0e+00"
        assert status == 1 and line.startswith(f"export.py: error: {part}")
        assert not [*first.glob("*.pt2")]


def test_a_network_of_logits_alone_is_exported(workdir, tool):
    OWN["flat"] = lambda num_classes: nn.Sequential(nn.Flatten(), nn.Linear(192, num_classes))
    try:
        torch.save(OWN["flat"](10).state_dict(), "flat.pth")
        words = ["-m", "flat", "-c", "flat.pth", "-d", "digits", "--output", "out"]
        status, output, error = tool("export", *words, "--format", "pt2")
        assert status == 0 and output.startswith("out/flat.pt2: "), error
    finally:
        del OWN["flat"]


def test_a_record_whose_classes_are_none_is_refused(first):
    record = read_record(first / "record.json")
    rows, top1 = record["by_class"]["confusion"], record["by_class"]["top1"]
    for by_class in (
        {"top1": top1, "confusion": rows[1:]},
        {"top1": top1, "confusion": [f"1 {rows[0]}", *rows[1:]]},
        {"top1": top1, "confusion": ["-1" + rows[0][1:], *rows[1:]]},
        {"top1": top1, "confusion": ["x", *rows[1:]]},
        {"top1": [100.0] * 10, "confusion": rows},
        {"top1": top1[1:], "confusion": rows},
        {"top1": top1},
        [],
    ):
        write_record(first / "record.json", record | {"by_class": by_class})
        with pytest.raises(RunError, match=r"record.json: damaged: "):
            read_record(first / "record.json")
    short = {**record["data"], "class_names": ["0"]}
    write_record(first / "record.json", record | {"data": short})
    with pytest.raises(RunError, match="by_class is no table of its classes"):
        read_record(first / "record.json")


def test_the_names_of_a_network_are_not_needed_where_a_record_is(first):
    state = cifar_model_dict["resnet14"][0](num_classes=10).state_dict()
    torch.save({"model": state}, first / "student_last")
    with pytest.raises(RunError, match=r"does not fit resnet8: .*; the file holds a resnet14"):
        load_student(first)
