"""Files and servers that mean harm: nothing is run, written outside, believed, or waited for."""

import hashlib
import io
import json
import os
import pickle
import re
import shutil
import socketserver
import subprocess
import tarfile
import threading
import zipfile
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import test_study
import test_table
import torch
from conftest import CPU, ROOT

from mdistiller_ext import files
from mdistiller_ext.config import load_cfg
from mdistiller_ext.data import cifar100
from mdistiller_ext.engine import train
from mdistiller_ext.engine.folder import finished_record
from mdistiller_ext.engine.record import digest, read_record, summary, write_record
from mdistiller_ext.errors import RunError
from mdistiller_ext.files import download, extract
from mdistiller_ext.study.launch import finished, state
from mdistiller_ext.study.records import collect
from mdistiller_ext.study.report import write_report
from mdistiller_ext.teacher import TeacherTable, load_weights

network, data, study = test_table.network, test_table.data, test_study.study
PROOF = "executed"  # the file that a payload leaves where it is run
HUGE = 1 << 40


class Payload:
    """Pickled, it runs a command when it is read."""

    def __reduce__(self):
        return os.system, (f"touch {PROOF}",)


@pytest.fixture(autouse=True)
def nothing_is_executed(workdir):
    yield
    assert not (workdir / PROOF).exists()


def refused(read, file, message: str) -> None:
    """It is an error of one line that begins with the file's name."""
    with pytest.raises(RunError) as error:
        read(file)
    text = str(error.value)
    assert text.startswith(f"{file}: ") and "\n" not in text and re.search(message, text), text


def test_the_payload_is_one(workdir):
    pickle.loads(pickle.dumps(Payload()))
    assert Path(PROOF).exists()
    Path(PROOF).unlink()


# Checkpoints


def saved(content, **options) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, **options)
    return file.getvalue()


def rewritten(content: bytes, change, compression=zipfile.ZIP_STORED) -> bytes:
    """A torch.save archive whose members went through `change(name, bytes)`, their sums right."""
    result = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(result, "w") as new:
        for member in old.infolist():
            part = change(member.filename, old.read(member))
            new.writestr(member.filename, part, compress_type=compression)
    return result.getvalue()


def with_pickle(change) -> bytes:
    """A checkpoint of four numbers, its pickle changed."""
    good = saved({"model": {"w": torch.arange(4.0)}})
    content = rewritten(good, lambda name, part: change(part) if "data.pkl" in name else part)
    assert content != rewritten(good, lambda name, part: part)
    return content


FOUR = b"K\x04"  # a pickled 4
LARGE = pickle.dumps(HUGE, 2)[2:-1]
LEGACY = {"_use_new_zipfile_serialization": False}
CHECKPOINTS = {
    "a pickle": (pickle.dumps(Payload()), "not a readable checkpoint"),
    "a payload": (saved({"model": Payload()}), "not a readable checkpoint"),
    "a payload beside": (saved({"model": {}, "x": Payload()}), "not a readable checkpoint"),
    "a payload, legacy": (saved({"model": Payload()}, **LEGACY), "not a readable checkpoint"),
    "a payload for the pickle": (
        with_pickle(lambda part: pickle.dumps(Payload(), 2)),
        "not a readable checkpoint",
    ),
    "a storage of terabytes": (
        with_pickle(lambda part: part.replace(FOUR + b"tq", LARGE + b"tq")),
        "not a readable checkpoint",
    ),
    "a shape of terabytes": (
        with_pickle(lambda part: part.replace(FOUR + b"\x85", LARGE + b"\x85")),
        "not a readable checkpoint",
    ),
    "a legacy storage of terabytes": (
        saved({"w": torch.arange(4.0)}, **LEGACY).replace(FOUR, LARGE),
        "not a readable checkpoint",
    ),
    "one number for a terabyte": (
        saved({"model": {"w": torch.zeros(1).expand(HUGE)}}),
        "model.w is no tensor with a real number for each element",
    ),
    "a tensor of nothing": (
        saved({"model": {"w": torch.empty(HUGE, device="meta")}}),
        "model.w is no tensor",
    ),
    "a sparse tensor": (
        saved({"model": {"w": torch.eye(3).to_sparse()}}),
        "model.w is no tensor",
    ),
    "complex numbers": (saved({"model": {"w": torch.ones(2) * 1j}}), "model.w is no tensor"),
    "a zip bomb": (
        rewritten(
            saved({"model": {"w": torch.zeros(1 << 22)}}),
            lambda name, part: part,
            zipfile.ZIP_DEFLATED,
        ),
        r"it declares 16,\d{3},\d{3} bytes, more than it has",
    ),
    "a list in itself": (saved({"model": (own := []), "own": own.append(own)}), "expected"),
    "a name that is none": (saved({"model": {3: torch.ones(1)}}), "expected a state dict, or"),
    "NaN": (saved({"model": {"w": torch.tensor([0.0, torch.nan])}}), "w holds values that are not"),
    "infinity": (saved({"model": {"w": torch.tensor([-torch.inf])}}), "w holds values that are no"),
    "NaN, legacy": (
        saved({"model": {"w": torch.tensor(torch.nan)}}, **LEGACY),
        "w holds values that are not finite",
    ),
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_teacher_that_is_refused(workdir, name):
    content, message = CHECKPOINTS[name]
    file = Path("teacher.pth")
    file.write_bytes(content)
    refused(load_weights, file, message)


def test_a_good_file_in_the_old_format_is_read(workdir):
    Path("w.pth").write_bytes(saved({"model": {"w": torch.arange(3.0)}, "epoch": 240}, **LEGACY))
    assert load_weights(Path("w.pth")).state["w"].tolist() == [0, 1, 2]


def test_a_billion_references_to_one_list_are_read_once(workdir):
    content = {"w": torch.ones(1)}
    for _ in range(40):
        content = [content] * 10
    Path("w.pth").write_bytes(saved({"model": {"w": torch.ones(1)}, "x": content}))
    assert list(load_weights(Path("w.pth")).state) == ["w"]


@pytest.mark.parametrize(
    "read", [load_weights, read_record, cifar100.read_binary, cifar100.read_python]
)
def test_what_is_no_file_of_a_sane_size_is_not_opened(workdir, read):
    name = {cifar100.read_binary: "train.bin", cifar100.read_python: "train"}.get(read, "file")
    file = Path(name)
    with file.open("wb") as sparse:
        sparse.truncate(HUGE)
    refused(read, file, r"holds 1,099,511,627,776 bytes: 1,099.51 GB of memory, where .* are free")
    file.unlink()
    os.mkfifo(file)  # a plain open would wait for ever
    refused(read, file, "cannot be read: it is no regular file")
    file.unlink()
    file.mkdir()
    refused(read, file, "cannot be read: it is no regular file")


@pytest.fixture(scope="module")
def short_run(tmp_path_factory) -> Path:
    """The folder of a short run."""
    return train(vanilla(str(tmp_path_factory.mktemp("run"))), "r", CPU)[1]


def vanilla(prefix: str):
    options = ["SOLVER.EPOCHS", "2", "LOG.PREFIX", prefix]
    return load_cfg(ROOT / "configs" / "digits" / "vanilla.yaml", options)


def put(state, *place):
    """Replaces an entry of a nested dict."""
    *way, last, value = place
    for key in way:
        state = state[key]
    state[last] = value


MOMENTUM = "optimizer", "state", 0, "momentum_buffer"
STATES = {
    "NaN in a weight": (("model", "student.fc.bias", torch.tensor([torch.nan] * 10)), "fc.bias"),
    "infinite momentum": ((*MOMENTUM, torch.tensor([torch.inf])), "momentum_buffer holds values"),
    "NaN in its history": (("history", 0, "loss", float("nan")), "history.0.loss holds values"),
    "a payload": (("x", Payload()), "not a readable checkpoint"),
    "another entry": (("x", 1), "expected a dict of epoch, model, "),
    "text for a number": (("epoch", "2"), "epoch is a str"),
    "too many epochs": (("epoch", HUGE), "2 epochs, expected 1099511627776"),
    "no figures": (("history", 1, "loss"), "epoch 2 is a str"),
    "a list of weights": (("model", [1.0]), "model is a list"),
    "weights of another shape": (
        ("model", "student.fc.bias", torch.zeros(3)),
        r"does not fit its config: .*student\.fc\.bias",
    ),
    "no weights": (("model", {}), "does not fit its config: .*Missing key"),
    "momentum of another shape": ((*MOMENTUM, torch.zeros(3)), r"momentum_buffer has shape \(3,\)"),
    "momentum that is text": ((*MOMENTUM, "x"), "does not fit its config"),
    "no optimizer": (("optimizer", {}), "does not fit its config: 'state'"),
    "no random state": (("random", {}), "does not fit its config: 'python'"),
    "a wrong random state": (("random", "torch", torch.zeros(3)), "does not fit its config"),
    "a terabyte": (
        ("model", "student.fc.bias", torch.zeros(1).expand(HUGE)),
        "fc.bias is no tensor with a real number for each element",
    ),
}


@pytest.mark.parametrize("name", STATES)
def test_a_state_that_is_refused(workdir, short_run, name):
    place, message = STATES[name]
    folder = Path("output/digits/r")
    shutil.copytree(short_run, folder)
    (folder / "record.json").unlink()
    (folder / "latest.previous").unlink()
    state = torch.load(folder / "latest", weights_only=True)
    put(state, *place)
    torch.save(state, folder / "latest")
    before = (folder / "latest").read_bytes()
    refused(
        lambda file: train(vanilla("output"), "r", CPU, resume=True), folder / "latest", message
    )
    assert (folder / "latest").read_bytes() == before and not (folder / "record.json").exists()


def test_settings_in_a_state_are_not_believed(workdir, short_run):
    """Those of the optimizer are the config's, whatever the file says."""
    folder = Path("output/digits/r")
    shutil.copytree(short_run, folder)
    (folder / "record.json").unlink()
    (folder / "latest.previous").replace(folder / "latest")
    state = torch.load(folder / "latest", weights_only=True)
    state["optimizer"]["param_groups"][0] |= {"maximize": True, "momentum": 0.0, "nesterov": True}
    torch.save(state, folder / "latest")
    record, _ = train(vanilla("output"), "r", CPU, resume=True)
    expected = read_record(short_run / "record.json")
    assert record["epochs"][1]["loss"] == expected["epochs"][1]["loss"]


# Archives


def tar(*members: tuple[tarfile.TarInfo, bytes]) -> bytes:
    good = tarfile.TarInfo("folder/good")
    good.size = 4
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as archive:
        archive.addfile(good, io.BytesIO(b"good"))
        for info, content in members:
            archive.addfile(info)
            buffer.write(content)
    return buffer.getvalue()


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "", size: int = 0):
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, link, size
    return info, b""


OUTSIDE = "../../outside"
LINK = "neither a file nor a folder"
ARCHIVES = {
    "..": ([member("folder/../../../outside")], "outside the archive"),
    "a symbolic link": ([member("folder/link", tarfile.SYMTYPE, OUTSIDE)], LINK),
    "a file through a link": (
        [member("folder/link", tarfile.SYMTYPE, OUTSIDE), member("folder/link/file")],
        LINK,
    ),
    "an absolute link": ([member("folder/link", tarfile.SYMTYPE, "/etc/passwd")], LINK),
    "a link inside": ([member("folder/link", tarfile.SYMTYPE, "good")], LINK),
    "a hard link": ([member("folder/link", tarfile.LNKTYPE, OUTSIDE)], LINK),
    "a device": ([member("folder/null", tarfile.CHRTYPE)], LINK),
    "a pipe": ([member("folder/pipe", tarfile.FIFOTYPE)], LINK),
    "a terabyte": ([member("folder/large", size=HUGE)], "declares 1,099,511,627,776 bytes"),
    "less than nothing": ([member("folder/large", size=-(1 << 20))], "declares -1,048,576 bytes"),
    "a name of a terabyte": ([member("x", tarfile.GNUTYPE_LONGNAME, size=HUGE)], ""),
    "headers of a terabyte": ([member("x", tarfile.XHDTYPE, size=HUGE)], ""),
}


@pytest.mark.parametrize("name", ARCHIVES)
def test_an_archive_that_is_refused(workdir, name):
    members, message = ARCHIVES[name]
    into = workdir / "into"
    into.mkdir()
    file = into / "a.tar"
    file.write_bytes(tar(*members))
    refused(lambda file: extract(file, "folder", into), file, f"cannot be unpacked: .*{message}")
    assert [p.name for p in into.iterdir()] == ["a.tar"]
    assert [p.name for p in workdir.iterdir()] == ["into"]


def test_an_absolute_member_lands_inside_and_is_not_kept(workdir):
    Path("a.tar").write_bytes(tar(member(str(workdir / "outside"))))
    extract(Path("a.tar"), "folder", workdir)
    assert sorted(str(p) for p in Path().rglob("*")) == ["a.tar", "folder", "folder/good"]


def test_a_sparse_member_of_a_terabyte(workdir):
    Path("folder").mkdir()
    with Path("folder/sparse").open("wb") as file:
        file.truncate(HUGE)
    for form in ("gnu", "pax"):
        subprocess.run(["tar", "-S", f"--format={form}", "-cf", "a.tar", "folder"], check=True)
        assert Path("a.tar").stat().st_size < 100_000
        refused(
            lambda file: extract(file, "folder", Path(), files.LIMIT),
            Path("a.tar"),
            "declares 1,099,511,627,77",
        )


def test_members_that_are_too_large_together(workdir):
    Path("folder").mkdir()
    for name in "abc":
        Path("folder", name).write_bytes(bytes(400))
    subprocess.run(["tar", "czf", "a.tar.gz", "folder"], check=True)
    read = lambda file: extract(file, "folder", Path("folder"), 1000)  # noqa: E731
    refused(read, Path("a.tar.gz"), "declares 400 bytes, too many")


def test_a_file_in_the_place_of_the_folder(workdir):
    Path("folder").write_text("")
    subprocess.run(["tar", "cf", "a.tar", "folder"], check=True)
    Path("folder").unlink()
    refused(lambda f: extract(f, "folder", Path()), Path("a.tar"), "it has no folder folder")


# Servers


def answer(head: str, body: bytes = b"", endless: bool = False):
    """What a server sends, word for word; endless: the body again and again."""
    return head.replace("\n", "\r\n").encode() + b"\r\n\r\n", body, endless


ANSWERS = {
    "a terabyte": (answer(f"HTTP/1.1 200 OK\nContent-Length: {HUGE}", b"x"), "sends 1,099,511,627"),
    "without end": (
        answer("HTTP/1.1 200 OK", bytes(1 << 16), True),
        "sends [12],.* or more, expect",
    ),
    "less": (answer("HTTP/1.1 200 OK\nContent-Length: 9", b"1234"), "broke off after 4 of 9 bytes"),
    "more": (answer("HTTP/1.1 200 OK\nContent-Length: 3", b"1234"), "md5 .*, expected 81dc9bdb5"),
    "no number": (answer("HTTP/1.1 200 OK\nContent-Length: many", b"1234"), "download failed"),
    "less than nothing": (answer("HTTP/1.1 200 OK\nContent-Length: -4", b"1234"), "broke off"),
    "a local file": (answer("HTTP/1.1 302 Found\nLocation: file:///etc/passwd"), "not allowed"),
    "round and round": (answer("HTTP/1.1 302 Found\nLocation: /"), "infinite loop"),
    "no HTTP": (answer("\0\0\0 what"), "download failed"),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_a_server_that_lies(workdir, monkeypatch, name):
    (head, body, endless), message = ANSWERS[name]
    monkeypatch.setattr(files, "LIMIT", 1 << 20)

    class Handler(socketserver.StreamRequestHandler):
        def handle(self):
            while self.rfile.readline().strip():
                pass
            with suppress(OSError):
                self.wfile.write(head + body)
                while endless:
                    self.wfile.write(body)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}/"
        file = Path("file")
        file.write_text("before")
        refused(lambda url: download(url, file, hashlib.md5(b"1234").hexdigest()), url, message)
        server.shutdown()
    assert [p.name for p in workdir.iterdir()] == ["file"] and file.read_text() == "before"


# YAML


@pytest.mark.parametrize(
    "tag",
    [
        '!!python/object/apply:os.system ["touch executed"]',
        '!!python/object/new:os.system ["touch executed"]',
        "!!python/object/apply:subprocess.check_call [[touch, executed]]",
        "!!python/name:os.system",
        "!!python/module:os",
    ],
)
def test_yaml_with_python_in_it(tool, tag):
    Path("x.yaml").write_text(f"SOLVER:\n  SEED: {tag}\n")
    for words in (["train", "--cfg", "x.yaml"], ["compare", "run", "x.yaml"]):
        status, _, stderr = tool(*words)
        (line,) = stderr.splitlines()
        assert status == 2 and "x.yaml: no valid YAML: could not determine a constructor" in line


# Records and tables

RECORDS = {
    "NaN": ('"loss": 1.0', '"loss": NaN', "NaN is no finite number"),
    "infinity": ('"loss": 1.0', '"loss": -Infinity', "-Infinity is no finite number"),
    "infinity in digits": ('"loss": 1.0', '"loss": 1e999', "1e999 is no finite number"),
    "a huge number": (
        '"loss": 1.0',
        '"loss": 1' + "0" * 400,
        "100000000.* is too large",
    ),
    "text": ('"loss": 1.0', '"loss": "1.0"', "epoch 1 holds something else than numbers"),
    "truth": ('"test_top1": 50.0', '"test_top1": true', "test_top1 is a bool"),
    "a depth": ('"loss": 1.0', '"loss": ' + "[" * 100_000, "RecursionError"),
    "too good": ('"test_top1": 50.0', '"test_top1": 1e300', "test_top1 of 1e.300 %"),
    "no epochs": ('"epochs": [', '"epochs": 1000000000, "x": [', "epochs is a int"),
    "an epoch twice": ('"epoch": 2', '"epoch": 1', "epoch 2 is called 1"),
    "an epoch short of figures": (', "loss": 2.0', "", "epoch 2 has other figures than the first"),
    "an epoch without its accuracy": (
        '"test_top1": 50.0, "test_nll": 1.0, "loss": 2.0',
        '"test_nll": 1.0, "loss": 2.0',
        "test_top1 is a NoneType",
    ),
    "a last epoch that was not evaluated": (
        '"test_top1": 50.0, "test_nll": 1.0, "loss": 2.0',
        '"loss": 2.0',
        "its last epoch was not evaluated",
    ),
    "an evaluation short of figures": (
        ', "test_nll": 1.0, "loss": 2.0',
        ', "loss": 2.0',
        "epoch 2 has other figures than the first",
    ),
    "a teacher": ('"teacher": null', '"teacher": ["x"]', "teacher is a list"),
    "a teacher's file": ('"teacher": null', '"teacher": {"name": "t"}', "file is a NoneType"),
    "no device": ('"device_name": "d"', '"device_name": {}', "device_name is a dict"),
    "a better end": (
        '"last_epoch_top1": 50.0',
        '"last_epoch_top1": 99.0',
        "another last_epoch_top1",
    ),
}


@pytest.mark.parametrize("name", RECORDS)
def test_a_record_that_is_refused(workdir, name):
    """With a checksum that is right, wherever one can be computed."""
    old, new, message = RECORDS[name]
    tested = {"test_top1": 50.0, "test_nll": 1.0}
    epochs = [{"epoch": n, **tested, "loss": float(n)} for n in (1, 2)]
    place = {"first_epoch": 1, "torch": "2", "device_name": "d", "mdistiller_ext": "0"}
    content = {"name": "r", "status": "finished", "environments": [place], "teacher": None}
    content |= {"config": {}, "wall_seconds": 1.0, "epochs": epochs, **summary(epochs)}
    file = Path("record.json")
    write_record(file, content)
    assert read_record(file) == content
    text = json.dumps(content)
    changed = text.replace(old, new, 1)
    assert changed != text
    with suppress(ValueError, RecursionError):
        changed = changed.replace(content["sha256"], digest(json.loads(changed)))
    file.write_text(changed)
    refused(read_record, file, message)
    refused(lambda file: finished_record(Path()), file, f"{message}.*; remove it, and --resume")


def test_a_study_does_not_take_a_run_for_finished_whose_record_is_refused(study):
    arms = {"student alone": {"cfg": "vanilla.yaml"}, "DKD": {"cfg": "dkd.yaml"}}
    built = study(seeds=[0], arms=arms, claims={})
    test_study.stub_runs(built)
    assert all(finished(job) for job in built.jobs)
    job = built.jobs[0]
    file = job.folder / "record.json"
    for content in ("{}", '{"status": 1, "epochs": 2}', "[" * 100_000, "[1]"):
        file.write_text(content)
        assert state(job) == ("new", 0) and not finished(job)
    read = lambda file: train(job.cfg, job.name, CPU, resume=True)  # noqa: E731
    refused(read, file, "damaged: the record is a list")


def test_a_run_that_cannot_be_counted_as_numbers_is_not_recorded(workdir):
    write_record(Path("record.json"), {"loss": 1.0})
    before = Path("record.json").read_bytes()
    refused(
        lambda f: write_record(f, {"loss": float("nan")}), Path("record.json"), "cannot be writ"
    )
    assert Path("record.json").read_bytes() == before


def test_entries_of_a_table_that_are_not_finite(workdir, network, data):
    opened = TeacherTable(workdir, network, data)
    opened.log.append(np.arange(opened.rows), np.full((opened.rows, 10), np.nan, np.float32))
    with pytest.raises(RunError, match="entries are not what the teacher answers"):
        TeacherTable(workdir, network, data)


@pytest.mark.parametrize("content", ["{}", '{"shape": [1099511627776, 162, 100]}', "[" * 100_000])
def test_what_a_tables_description_declares_is_not_believed(workdir, network, data, content):
    folder = TeacherTable(workdir, network, data).folder
    (folder / "table.json").write_text(content)
    refused(lambda file: TeacherTable(workdir, network, data), folder / "table.json", "damaged")


# Reports

RUN = "console.log('RAN')"
HOSTILE = f"""<script>{RUN}</script><img src=x onerror="{RUN}">"><svg onload={RUN}>"""
HOSTILE += " [link](http://127.0.0.1/) `x` | \x1b[2J\n# heading"


def test_what_records_say_is_shown_as_text(study, workdir):
    arms = {**test_study.TREE["arms"], rf"{HOSTILE[:40]} \input{{x}} & 5 %": {"cfg": "kd.yaml"}}
    built = study(arms=arms)
    test_study.stub_runs(built, dict.fromkeys(arms, 0.0))
    place = dict.fromkeys(("torch", "device_name", "mdistiller_ext"), HOSTILE) | {"first_epoch": 1}
    for job in built.jobs:
        record = read_record(job.folder / "record.json")
        teacher = record["teacher"] and {**record["teacher"], "name": HOSTILE, "file": "/dev/zero"}
        test_study.edit(job, environments=[place], teacher=teacher)
    test_study.edit(built.jobs[0], status="failed", error=HOSTILE)
    test_study.edit(built.jobs[1], status=HOSTILE)
    test_study.edit(built.jobs[2], name=HOSTILE)
    stray = built.folder / "runs" / HOSTILE.replace("/", "").replace("\n", "")
    shutil.copytree(built.jobs[3].folder, stray)
    assert all(line.isprintable() for line in collect(built)[1])
    shown, folder = write_report(built)
    assert "no picture of the teacher: /dev/zero: cannot be read: it is" in shown
    assert all(line.isprintable() for line in shown.splitlines()) and "\n# heading" not in shown
    text = (folder / "report.md").read_text()
    assert text.count("RAN") > 10 and "\x1b" not in text and "\n# heading" not in text
    text = text.replace("![Paired differences to DKD: each seed, mean, interval.](forest.svg)", "")
    prose = "\n".join(line for line in text.splitlines() if not line.startswith("|"))
    assert not re.search(r"(?<!\\)[<\[`|]", prose)
    assert not re.search(r"(?<!\\)(?:[<`]|\]\()", text)
    assert not any(r"\input" in file.read_text() for file in folder.glob("*.tex"))
    page = (folder / "report.html").read_text()
    assert page.count("RAN") > 10 and not re.search("<(script|img src=x|svg)", page)
    assert {f.parent for f in folder.rglob("*")} == {folder}
    if not shutil.which("chromium"):
        pytest.skip("there is no Chromium")
    (folder / "unescaped.html").write_text(page + HOSTILE)
    assert "RAN" in console(folder / "unescaped.html", workdir)  # so it would be seen
    assert "CONSOLE" not in console(folder / "report.html", workdir)


def console(page: Path, workdir: Path) -> str:
    """What a page that is opened in a browser writes there."""
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    flags += ["--no-first-run", "--disable-component-update", "--disable-sync", "--disable-quic"]
    flags += ["--enable-logging=stderr", f"--user-data-dir={workdir / 'browser'}", "--dump-dom"]
    words = ["chromium", *flags, page.resolve().as_uri()]
    return subprocess.run(words, capture_output=True, text=True, timeout=120).stderr
