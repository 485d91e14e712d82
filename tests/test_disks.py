"""Disks that are full, read-only, refused or gone, and files that rot: nothing good is lost."""

import operator
import os
import random
import resource
import shlex
import shutil
import subprocess
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import test_data
import test_table
import torch
from conftest import CPU, ROOT
from test_run import assert_same_run

from mdistiller_ext import files
from mdistiller_ext.config import get_cfg, load_cfg
from mdistiller_ext.data import cifar100
from mdistiller_ext.engine import run, train
from mdistiller_ext.engine.folder import earlier_state, save_state
from mdistiller_ext.engine.record import read_record, summary, write_record
from mdistiller_ext.errors import RunError
from mdistiller_ext.files import download, download_folder, entries, load, save
from mdistiller_ext.teacher import TeacherTable, load_weights

small, network, data = test_data.small, test_table.network, test_table.data
NOBODY = 65534
FAULTS = {
    "full": "No space left on device; make room there",
    "limited": "File too large",
    "read-only": "Read-only file system; make its folder writable, or name another",
    "refused": "Permission denied; make its folder writable, or name another",
    "vanished": "No such file or directory; its folder is gone",
}


def mount(*words: object) -> None:
    result = subprocess.run(["mount", *map(str, words)], capture_output=True, text=True)
    if result.returncode:
        pytest.skip(f"file systems cannot be mounted here: {result.stderr.strip()}")


@pytest.fixture
def tmpfs(workdir):
    """Mounts a small disk; of these all are gone after the test."""
    mounted = []

    def tmpfs(folder: Path, size: str) -> Path:
        folder.mkdir(parents=True)
        mount("-t", "tmpfs", "-o", f"size={size}", "none", folder)
        mounted.append(folder)
        return folder

    yield tmpfs
    for folder in mounted:
        subprocess.run(["umount", "-l", folder], check=True)


def fill(folder: Path, left: int = 0) -> None:
    """Leave that many bytes on the disk of a folder."""
    stat = os.statvfs(folder)
    (folder / "filler").write_bytes(b"x" * (stat.f_bavail * stat.f_bsize - left))


@contextmanager
def limited(size: int):
    """No file grows beyond `size` bytes. This needs no rights."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextmanager
def read_only(folder: Path):
    mount("--bind", folder, folder)
    try:
        mount("-o", "remount,bind,ro", folder)
        yield
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


@contextmanager
def refused(folder: Path):
    """A folder that may not be written; root may everything, so it steps down. Needs no rights."""
    for parent in folder.parents:  # up to the working folder, for paths are relative to it
        parent.chmod(0o755)
    folder.chmod(0o555)
    root = os.geteuid() == 0
    if root:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)
        folder.chmod(0o755)


@pytest.fixture(params=FAULTS)
def faulty(request, workdir, tmpfs):
    """A folder, how it is broken for a while, and how that is said."""
    folder = Path("disk")
    if request.param == "full":
        tmpfs(folder, "1m")
    else:
        folder.mkdir()

    @contextmanager
    def broken():
        if request.param == "full":
            fill(folder)
            yield
            (folder / "filler").unlink()
        elif request.param == "limited":
            with limited(4096):
                yield
        elif request.param == "read-only":
            with read_only(folder):
                yield
        elif request.param == "refused":
            with refused(folder):
                yield
        else:
            moved = folder.with_name("moved")
            folder.rename(moved)
            yield
            assert not folder.exists()
            moved.rename(folder)

    return folder, broken, FAULTS[request.param]


def contents(folder: Path) -> dict[str, bytes]:
    files = (file for file in folder.rglob("*") if file.is_file() and file.name != "lock")
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def state(epoch: int) -> dict:
    """What `latest` holds, of a run that never was."""
    history = [{"epoch": n, "test_top1": 50.0} for n in range(1, epoch + 1)]
    return {
        "epoch": epoch,
        "model": {"weight": torch.full((3000,), float(epoch))},
        "optimizer": {"state": {}},
        "random": {},
        "environments": [],
        "history": history,
        "meter": {},
        "spent": 0.0,
        "config": {"SOLVER": {"EPOCHS": 3}},
        "teacher_sha256": None,
    }


def record(epochs: int = 3) -> dict:
    history = [{"epoch": n, "test_top1": 10.0 * n, "loss": 1 / 3} for n in range(1, epochs + 1)]
    place = {"first_epoch": 1, "torch": "2", "device_name": "stub", "mdistiller_ext": "0"}
    content = {"name": "r", "status": "finished", "environments": [place], "teacher": None}
    return content | {"config": {}, "wall_seconds": 1.0, "epochs": history, **summary(history)}


WRITERS = {
    "latest": lambda folder, n: save_state(state(n), folder),
    "student_last": lambda folder, n: save({"model": {"w": torch.full((3000,), n)}}, folder / "s"),
    "record": lambda folder, n: write_record(folder / "record.json", record(200 + n)),
    "download": lambda folder, n: download(Path(f"served{n}").absolute().as_uri(), folder / "file"),
}


# A download makes its folder anew; below, it vanishes later.
BROKEN = [pair for pair in product(FAULTS, WRITERS) if pair != ("vanished", "download")]


@pytest.mark.parametrize(("faulty", "kind"), BROKEN, indirect=["faulty"])
def test_what_cannot_be_written_is_one_line_and_leaves_the_good_files(faulty, kind):
    folder, broken, message = faulty
    for number in (1, 2, 3):
        Path(f"served{number}").write_bytes(bytes([number]) * 100_000)
    for number in (1, 2):
        WRITERS[kind](folder, number)
    before = contents(folder)
    with broken(), pytest.raises(RunError) as error:
        WRITERS[kind](folder, 3)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert str(folder) in str(error.value)
    assert contents(folder) == before
    WRITERS[kind](folder, 3)
    assert contents(folder) != before


def test_a_folder_that_vanishes_during_a_download(workdir, monkeypatch):
    def received(url, name):
        yield b"1"
        shutil.rmtree("into")
        yield b"2"

    monkeypatch.setattr(files, "_received", received)
    with pytest.raises(RunError, match=f"^into/file: cannot be written: {FAULTS['vanished']}$"):
        download("http://nowhere", Path("into/file"))
    assert list(workdir.iterdir()) == []


@pytest.mark.parametrize("faulty", [name for name in FAULTS if name != "vanished"], indirect=True)
def test_a_download_that_cannot_be_unpacked_leaves_nothing(faulty):
    folder, broken, _ = faulty
    Path("source").mkdir()
    Path("source/large").write_bytes(os.urandom(30_000))
    subprocess.run(["tar", "czf", "a.tar.gz", "source"], check=True)
    with broken(), pytest.raises(RunError, match=r"^[^\n]*disk[^\n]*$"):
        download_folder(Path("a.tar.gz").absolute().as_uri(), "source", folder)
    assert contents(folder) == {}
    download_folder(Path("a.tar.gz").absolute().as_uri(), "source", folder)
    assert list(contents(folder)) == ["source/large"]


def test_a_table_answers_from_a_broken_disk(faulty, network, data, capsys):
    """On a full tmpfs, a look at what was never written would end this process."""
    folder, broken, _ = faulty
    index, view = test_table.everything(data)
    whole = TeacherTable(Path("elsewhere"), network, data).logits(index, view)
    opened = TeacherTable(folder / "tables", network, data)
    opened.logits(index[:50], view[:50])
    with broken():
        assert torch.equal(opened.logits(index, view), whole)
    said = capsys.readouterr().out
    assert said.count("cannot be written: ") == said.count("; new entries are not kept") == 1
    assert "damaged" not in said
    again = TeacherTable(folder / "tables", network, data)
    assert again.filled >= 50 and torch.equal(again.logits(index, view), whole)
    assert again.damaged == 0


def test_a_table_on_a_disk_with_room_for_its_description_alone(tmpfs, network, data):
    """The same where its files have pages that nobody has written at all."""
    fill(tmpfs(Path("disk"), "1m"), left=8192)
    data = replace(data, padded=data.padded.repeat(9, 1, 1, 1), targets=data.targets.repeat(9))
    keys = test_table.everything(data)
    opened = TeacherTable(Path("disk"), network, data)
    assert torch.equal(opened.logits(*keys), TeacherTable(Path("."), network, data).logits(*keys))
    assert opened.problem.startswith("cannot be written: No space left")


@pytest.mark.parametrize("faulty", ["read-only", "refused"], indirect=True)
def test_a_read_only_table_is_read(faulty, network, data):
    folder, broken, _ = faulty
    index, view = test_table.everything(data)
    opened = TeacherTable(folder / "tables", network, data)
    whole = opened.logits(index[:50], view[:50])
    with broken():
        opened = TeacherTable(folder / "tables", network, data)
        assert torch.equal(opened.logits(index, view)[:50], whole)
    assert (opened.hits, opened.filled) == (50, 50)
    assert opened.problem in ("the folder is read-only", "cannot be written: Permission denied")


@pytest.mark.parametrize("faulty", ["full", "read-only", "refused"], indirect=True)
def test_a_table_that_cannot_be_made_is_one_line(faulty, network, data):
    folder, broken, message = faulty
    with broken(), pytest.raises(RunError) as error:
        TeacherTable(folder / "tables", network, data)
    assert message.split(";")[0] in str(error.value) and "\n" not in str(error.value)
    assert not list(folder.rglob("*.part"))
    TeacherTable(folder / "tables", network, data).fill()


DIGITS = ["train", "--cfg", str(ROOT / "configs" / "digits" / "vanilla.yaml"), "--device", "cpu"]
OPTIONS = ["SOLVER.EPOCHS", "3", "EXPERIMENT.NAME", "r"]
DIGITS += OPTIONS
FOLDER = Path("output/digits/r")


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The folder of that run, undisturbed."""
    prefix = ["LOG.PREFIX", str(tmp_path_factory.mktemp("whole"))]
    return train(load_cfg(DIGITS[2], [*OPTIONS, *prefix]), "r", CPU)[1]


@pytest.mark.parametrize(
    ("fault", "call", "time", "file", "kept"),
    [
        ("full", "save", 2, "student_", 1),
        ("full", "save_state", 2, "latest", 1),
        ("full", "write_record", 3, "record.json", 2),
        ("read-only", "save_state", 2, "latest", 1),
        ("refused", "save_state", 2, "latest", 1),
        ("vanished", "save_state", 2, "latest", 0),
    ],
)
def test_a_run_whose_disk_fails_goes_on_when_it_is_back(
    tool, tmpfs, workdir, monkeypatch, whole, fault, call, time, file, kept
):
    """In epoch 2, at each place where something is written."""
    if fault == "full":
        tmpfs(FOLDER, "8m")
    original, calls = getattr(run, call), []
    with ExitStack() as stack:

        def failing(*args):
            calls.append(args)
            if len(calls) == time:
                if fault == "full":
                    fill(FOLDER)
                    stack.callback((FOLDER / "filler").unlink)
                elif fault == "vanished":
                    shutil.rmtree(FOLDER)
                else:
                    broken = read_only if fault == "read-only" else refused
                    stack.enter_context(broken(FOLDER))
            return original(*args)

        with monkeypatch.context() as patch:
            patch.setattr(run, call, failing)
            status, _, stderr = tool(*DIGITS)
    keeps = f"keeps the state after epoch {kept}" if kept else "keeps no state"
    (line,) = stderr.splitlines()
    assert status == 1 and f"{FOLDER / file}" in line and line.endswith(f"; {FOLDER} {keeps}")
    assert f"cannot be written: {FAULTS[fault]}" in line
    assert not list(workdir.rglob("*.part")) and (kept or not FOLDER.exists())
    assert tool(*DIGITS, "--resume")[0] == 0
    assert_same_run(whole, FOLDER)


def test_events_on_a_full_disk_are_an_error_at_once(tmpfs, workdir):
    """In a thread of its own nobody would hear of it, and the run would wait for ever."""
    events = run.Events(tmpfs(workdir / "disk", "16k") / "train.events", "r", get_cfg(), [])
    with pytest.raises(RunError, match=rf"train\.events: cannot be written: {FAULTS['full']}$"):
        for epoch in range(1, 1000):
            events.add({"epoch": epoch, "loss": 1.0})
    events.close()


def test_a_run_whose_first_state_is_too_large(tool, whole):
    """The same without any rights on the machine."""
    with limited(500_000):
        status, _, stderr = tool(*DIGITS)
    message = f"{FOLDER}/latest: cannot be written: File too large; {FOLDER} keeps no state\n"
    assert (status, stderr) == (1, f"train.py: error: {message}")
    assert not list(FOLDER.glob(".*.part"))
    assert tool(*DIGITS, "--resume")[0] == 0
    assert_same_run(whole, FOLDER)


@pytest.mark.parametrize("fault", ["read-only", "refused"])
def test_a_run_that_may_not_write_does_not_start(tool, workdir, fault):
    folder = Path("disk")
    folder.mkdir()
    with {"read-only": read_only, "refused": refused}[fault](folder):
        status, _, stderr = tool(*DIGITS, "LOG.PREFIX", "disk")
    message = f"train.py: error: disk/digits/r: cannot be written: {FAULTS[fault]}\n"
    assert (status, stderr) == (1, message) and list(folder.iterdir()) == []


@pytest.mark.parametrize("links", [True, False])
def test_at_every_moment_a_good_state_is_there(workdir, monkeypatch, links):
    """Killed before each of the steps that put a new state in place."""
    steps: list[str] = []
    originals = {name: getattr(Path, name) for name in ("unlink", "hardlink_to", "replace")}

    def step(name):
        def step(self, *args, **kwargs):
            steps.append(name)
            if len(steps) == stop:
                raise KeyboardInterrupt
            if name == "hardlink_to" and not links:
                raise OSError("no hard links here")
            return originals[name](self, *args, **kwargs)

        return step

    for name in originals:
        monkeypatch.setattr(Path, name, step(name))
    stop = 0
    save_state(state(1), workdir)
    save_state(state(2), workdir)
    held = {}
    for stop in range(1, 6):
        steps.clear()
        with suppress(KeyboardInterrupt):
            save_state(state(3), workdir)
        held[stop] = {f.name: load(f)["epoch"] for f in workdir.glob("latest*")}
        stop = 0
        save_state(state(2), workdir)
    before, after = {"latest": 2, "latest.previous": 1}, {"latest": 3, "latest.previous": 2}
    assert held[1] == before | {"latest.previous": held[1]["latest.previous"]}
    assert all(max(epochs.values()) >= 2 for epochs in held.values()) and held[5] == after


def rotten(content: bytes, count: int | None = None) -> list[bytes]:
    """Copies, each with one bit flipped: one in every byte, or so many random ones."""
    draw, size = random.Random(0), len(content)
    places = range(size) if count is None else draw.sample(range(size), count)
    return [flipped(content, 8 * place + draw.randrange(8)) for place in places]


def flipped(content: bytes, bit: int) -> bytes:
    return content[: bit // 8] + bytes([content[bit // 8] ^ 1 << bit % 8]) + content[bit // 8 + 1 :]


def outcomes(file: Path, copies: list[bytes], read) -> tuple[int, int]:
    """(found out and named, harmless) among damaged copies of a file; another outcome fails."""
    good, found, harmless = list(entries(read())), 0, 0
    for copy in copies:
        file.write_bytes(copy)
        try:
            content = list(entries(read()))
        except RunError as error:
            assert str(error).startswith(f"{file}: ") and "\n" not in str(error)
            found += 1
            continue
        assert [name for name, _ in content] == [name for name, _ in good]
        for (_, value), (_, expected) in zip(content, good, strict=True):
            assert type(value) is type(expected)
            same = torch.equal if isinstance(value, torch.Tensor) else operator.eq
            assert same(value, expected)
        harmless += 1
    return found, harmless


def test_a_flipped_bit_of_a_checkpoint_is_found_or_harmless(workdir):
    """Anywhere, and all of a tensor's entry in the archive's directory, which has no checksum.

    What is harmless is padding, and what the directory says again or PyTorch does not ask.
    """
    file = Path("student_last")
    save({"model": {"weight": torch.arange(300.0), "count": torch.tensor(7)}}, file)
    content = file.read_bytes()
    entry = content.rindex(b"archive/data/0") - 46
    copies = rotten(content, 600) + [flipped(content, 8 * entry + bit) for bit in range(8 * 46)]
    found, harmless = outcomes(file, copies, lambda: load_weights(file).state)
    assert found + harmless == len(copies) == 968 and found > 500
    # With this one PyTorch would take the values from memory that nobody has written.
    file.write_bytes(flipped(content, 8 * (entry + 38) + 4))
    with pytest.raises(RunError, match=r"student_last: .*archive/data/0 is a folder"):
        load_weights(file)


def test_a_flipped_bit_of_a_runs_state_is_found_or_harmless(workdir, whole):
    cfg = load_cfg(DIGITS[2], OPTIONS)
    shutil.copytree(whole, FOLDER)
    (FOLDER / "latest.previous").unlink()
    file = FOLDER / "latest"
    copies = rotten(file.read_bytes(), 200)
    found, _ = outcomes(file, copies, lambda: earlier_state(cfg, FOLDER, resume=True))
    assert found > 180


def test_a_flipped_bit_of_a_record_is_found(workdir):
    file = Path("record.json")
    write_record(file, record())
    copies = rotten(file.read_bytes())
    found, harmless = outcomes(file, copies, lambda: read_record(file))
    assert found + harmless == len(copies) > 500 and harmless < 5


def test_a_flipped_bit_of_the_data_is_found(small, workdir):
    for name in cifar100.BINARY:
        test_data.write(workdir / "cifar-100-binary", name, test_data.binary_file())
    file = workdir / "cifar-100-binary" / "test.bin"
    copies = rotten(file.read_bytes(), 300)
    assert outcomes(file, copies, lambda: cifar100.read_binary(file)) == (300, 0)


@pytest.mark.parametrize("name", ["rows", "keys", "table.json"])
def test_a_flipped_bit_of_a_table_is_found_and_changes_no_answer(workdir, network, data, name):
    keys = test_table.everything(data)
    opened = TeacherTable(workdir, network, data)
    whole = opened.logits(*keys)
    (file,) = opened.folder.glob(f"*{name}")
    good = file.read_bytes()
    for copy in [*rotten(good, 50), good[: len(good) // 3], b""]:
        file.write_bytes(copy)
        if name == "table.json":
            with pytest.raises(RunError, match=r"table\.json: damaged: .*remove the folder"):
                TeacherTable(workdir, network, data)
            continue
        opened = TeacherTable(workdir, network, data)
        assert torch.equal(opened.logits(*keys), whole) and opened.misses > 0
        for new in opened.folder.glob("000001-*"):
            new.unlink()


def test_what_is_cut_short_is_named(small, workdir, network, data):
    save_state(state(2), workdir)
    save({"model": {"w": torch.ones(3000)}}, workdir / "student_last")
    write_record(workdir / "record.json", record())
    test_data.write(workdir, "test.bin", test_data.binary_file())
    table = TeacherTable(workdir / "tables", network, data)
    readers = {
        workdir / "latest": load,
        workdir / "student_last": load_weights,
        workdir / "record.json": read_record,
        workdir / "test.bin": cifar100.read_binary,
        table.folder / "table.json": lambda file: TeacherTable(workdir / "tables", network, data),
    }
    for file, reader in readers.items():
        content = file.read_bytes()
        reader(file)
        for length in (0, 1, len(content) // 3, len(content) - 1):
            file.write_bytes(content[:length])
            with pytest.raises(RunError) as error:
                reader(file)
            assert str(error.value).startswith(f"{file}: ") and "\n" not in str(error.value)
        file.write_bytes(content)


@pytest.mark.parametrize("damage", ["overwritten", "cut"])
def test_of_a_damaged_state_the_one_before_is_offered(tool, whole, damage):
    """With the command that goes on from it, which is then run as it stands."""
    shutil.copytree(whole, FOLDER)
    latest = FOLDER / "latest"
    (FOLDER / "record.json").unlink()
    with latest.open("r+b") as file:
        file.seek(100_000)
        file.write(bytes(1000)) if damage == "overwritten" else file.truncate()
    assert tool(*DIGITS)[0] == 2  # still a folder that holds a run
    status, _, stderr = tool(*DIGITS, "--resume")
    fault = {"overwritten": "not match its checksum", "cut": "not a readable"}
    assert status == 1 and f"error: {latest}: " in stderr and fault[damage] in stderr
    assert "latest.previous holds the state after epoch 2: " in stderr
    command = stderr.split("after epoch 2: ")[1].removesuffix(" and --resume go on from it\n")
    assert command == f"mv {latest}.previous {latest}"
    subprocess.run(shlex.split(command), check=True)
    assert "going on after epoch 2" in tool(*DIGITS, "--resume")[1]
    assert_same_run(whole, FOLDER)


def test_where_only_the_state_before_is_left_the_run_goes_on_from_it(tool, whole):
    """Killed between two renames, on a disk without hard links."""
    shutil.copytree(whole, FOLDER)
    for name in ("latest", "record.json"):
        (FOLDER / name).unlink()
    assert tool(*DIGITS)[0] == 2  # still a folder that holds a run
    assert "going on after epoch 2" in tool(*DIGITS, "--resume")[1]
    assert_same_run(whole, FOLDER)


def test_without_a_state_before_it_the_run_starts_anew(tool, whole):
    shutil.copytree(whole, FOLDER)
    (FOLDER / "latest.previous").write_bytes(b"rotten, too")
    for name in ("latest", "record.json"):
        (FOLDER / name).unlink()
    status, _, stderr = tool(*DIGITS, "--resume")
    assert status == 1 and stderr.endswith(
        f"there is no state before it: remove {FOLDER} to start anew\n"
    )


def test_a_damaged_record_of_a_finished_run_is_written_anew(tool, whole):
    shutil.copytree(whole, FOLDER)
    file = FOLDER / "record.json"
    good = read_record(file)
    file.write_text(file.read_text().replace('"seed": 0', '"seed": 1'))
    status, _, stderr = tool(*DIGITS, "--resume")
    assert status == 1 and stderr == (
        f"train.py: error: {file}: changed after it was written (its sha256 does not match); "
        f"remove it, and --resume writes it anew\n"
    )
    file.unlink()
    assert tool(*DIGITS, "--resume")[0] == 0
    assert read_record(file)["epochs"] == good["epochs"]
