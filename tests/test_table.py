"""The teacher table: its entries are the teacher's answers, whatever happens to its files."""

import copy
import multiprocessing
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import CPU, batches, networks
from torch import nn

from mdistiller_ext import cifar_model_dict, distiller_dict, get_cfg
from mdistiller_ext.data import ImageSet, cifar100
from mdistiller_ext.distillers import Distiller
from mdistiller_ext.engine import train
from mdistiller_ext.errors import ConfigError, RunError
from mdistiller_ext.policies import Context
from mdistiller_ext.study import launch
from mdistiller_ext.teacher import TabledTeacher, TeacherTable, features_taken, log, table

VIEWS = 18


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (20, 3, 8, 8), generator=generator, dtype=torch.uint8)
    return ImageSet.build(pixels, torch.arange(20) % 10, (0.5,) * 3, (0.25,) * 3, 1, flips=True)


@pytest.fixture
def network():
    torch.manual_seed(0)
    net = cifar_model_dict["resnet8"][0](num_classes=10)
    net.train()(torch.randn(64, 3, 8, 8))  # so that its batch norms hold something to fold
    return net.eval()


def everything(data):
    index = torch.arange(len(data)).repeat_interleave(VIEWS)
    return index, torch.arange(VIEWS).repeat(len(data))


def open_table(tmp_path, network, data, dtype="float32"):
    return TeacherTable(tmp_path, network, data, dtype)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float16", 2e-3)])
def test_every_entry_is_the_networks_answer(tmp_path, network, data, dtype, tolerance):
    keys = everything(data)
    with torch.no_grad():
        expected = torch.cat([network(b.image)[0] for b in data.batches(*keys, 100)])
    opened = open_table(tmp_path, network, data, dtype)
    first, again = opened.logits(*keys), opened.logits(*keys)
    assert (opened.misses, opened.hits) == (len(first), len(first))
    torch.testing.assert_close(first, expected, rtol=0, atol=tolerance * expected.abs().max())
    assert first.dtype == torch.float32 and torch.equal(first, again)


@pytest.mark.parametrize("held", [False, True])
def test_an_entry_has_the_same_bits_whoever_computes_it(tmp_path, network, data, held):
    index, view = everything(data)
    whole = open_table(tmp_path / "a", network, data).logits(index, view)
    order = torch.randperm(len(index))
    opened = open_table(tmp_path / "b", network, data)
    if held:
        opened.hold()
    parts = torch.cat([opened.logits(index[p], view[p]) for p in order.split(7)])
    assert torch.equal(parts, whole[order])
    other = open_table(tmp_path / "b", network, data)
    if held:
        other.hold()
    assert torch.equal(other.logits(index, view), whole) and other.misses == 0


def test_filling_goes_on_where_it_stopped(tmp_path, network, data):
    def stop(count):
        if opened.misses >= 10 * VIEWS:
            raise KeyboardInterrupt

    opened = open_table(tmp_path, network, data)
    with pytest.raises(KeyboardInterrupt):
        opened.fill(stop, images=5)
    opened = open_table(tmp_path, network, data)
    ready = []
    opened.fill(ready.append, images=5)
    assert 0 < opened.misses < opened.rows == opened.filled == sum(ready) == 20 * VIEWS
    assert opened.hits + opened.misses == opened.rows


def test_networks_data_and_types_have_their_own(tmp_path, network, data):
    folders = {open_table(tmp_path, network, data).folder}
    folders.add(open_table(tmp_path, network, data).folder)
    assert len(folders) == 1
    folders.add(open_table(tmp_path, network, data, "float16").folder)
    with torch.no_grad():
        network.fc.bias[3] += 1
    folders.add(open_table(tmp_path, network, data).folder)
    data.padded[7, 1, 4, 4] += 1
    folders.add(open_table(tmp_path, network, data).folder)
    assert len(folders) == 4


def segment(opened, kind):
    """The file of the rows or keys that a table's only writer has left."""
    (file,) = opened.folder.glob(f"*.{kind}")
    return file


@pytest.mark.parametrize("bit", [0, 13, 31])
def test_a_flipped_bit_is_computed_again(tmp_path, network, data, bit):
    keys = everything(data)
    opened = open_table(tmp_path, network, data)
    before = opened.logits(*keys)
    content = np.memmap(segment(opened, "rows"), np.uint32, "r+").reshape(-1, 10)
    content[33, 4] ^= np.uint32(1 << bit)
    content.flush()
    assert torch.equal(opened.logits(*keys), before)
    assert opened.damaged == 1 and opened.misses == opened.rows + 1
    again = open_table(tmp_path, network, data)
    assert torch.equal(again.logits(*keys), before) and again.misses == again.damaged == 0


@pytest.mark.parametrize("held", [False, True])
def test_what_is_damaged_or_gone_is_computed_again(tmp_path, network, data, held):
    """A row in another's place, a torn one, keys that name no place; then the files themselves."""
    keys = everything(data)
    opened = open_table(tmp_path, network, data)
    before = opened.logits(*keys)
    rows = np.memmap(segment(opened, "rows"), np.float32, "r+").reshape(opened.rows, -1)
    places = np.memmap(segment(opened, "keys"), log.KEY, "r+")
    rows[5], rows[9, 5:] = rows[6], rows[10, 5:]
    places["position"][[20, 21]] = -1, opened.rows

    def missing():
        other = open_table(tmp_path, network, data)
        if held:
            other.hold()
        assert torch.equal(other.logits(*keys), before)
        other.flush()
        return other.misses

    assert missing() == 4
    assert missing() == 0
    for file in opened.folder.glob("*.rows"):
        file.unlink()
    assert missing() == opened.rows
    assert missing() == 0


def test_what_another_has_computed_meanwhile_is_read(tmp_path, network, data):
    keys = everything(data)
    one, other = (open_table(tmp_path, network, data) for _ in range(2))
    before = one.logits(*keys)
    assert torch.equal(other.logits(*keys), before) and other.misses == 0


@pytest.mark.parametrize("columns", [1, 100])
def test_checksums_are_those_of_the_device(columns):
    rows, position = np.random.default_rng(0).normal(size=(50, columns)), np.arange(50) * 10**8
    for dtype in (np.float32, np.float16):
        kept = rows.astype(dtype)
        there = log.checksum(torch.from_numpy(kept), torch.from_numpy(position))
        assert np.array_equal(log.checksum(kept, position), there.numpy())


def test_the_next_epoch_is_computed_between_the_steps_of_this_one(tmp_path, network, data):
    index, view = everything(data)
    whole = open_table(tmp_path / "a", network, data).logits(index, view)
    opened = open_table(tmp_path / "b", network, data)
    opened.hold()
    opened.logits(index[:100], view[:100])
    assert opened.prefetch(index[50:250], view[50:250]) == 150
    assert opened.prefetch(index[200:], view[200:]) == len(index) - 250
    opened.work()
    assert opened.filled == 100 + opened.chunk
    assert torch.equal(opened.logits(index, view), whole)
    assert opened.misses == opened.filled == opened.rows
    opened.flush()
    again = open_table(tmp_path / "b", network, data)
    assert torch.equal(again.logits(index, view), whole) and again.misses == 0


def test_entries_that_the_teacher_would_not_answer_are_refused(tmp_path, network, data):
    opened = open_table(tmp_path, network, data)
    places = np.arange(opened.rows)
    opened.log.append(
        places, np.random.default_rng(0).normal(size=(opened.rows, 10)).astype(np.float32)
    )
    with pytest.raises(RunError, match=r"entries are not what the teacher answers .* remove the"):
        open_table(tmp_path, network, data)


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path, network, data):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"Not a directory; name another .*TEACHER_TABLE_ROOT"):
        open_table(tmp_path / "file", network, data)


def large():
    """A network, and images enough to be filled in by several."""
    torch.manual_seed(0)
    network = cifar_model_dict["resnet8"][0](num_classes=10)
    pixels = torch.randint(256, (400, 3, 8, 8), dtype=torch.uint8)
    data = ImageSet.build(pixels, torch.arange(400) % 10, (0.5,) * 3, (0.25,) * 3, 1, flips=True)
    return network, data


def fill(folder, ready):
    """A process that fills the table when the others are ready to."""
    torch.set_num_threads(1)
    network, data = large()
    ready.wait()
    table = TeacherTable(folder, network, data)
    table.fill(images=20)
    assert table.filled == table.rows


def test_processes_fill_one_table_together(tmp_path):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(launch.PRELOADED)  # the server is one for all tests
    ready = context.Barrier(3)
    processes = [context.Process(target=fill, args=(tmp_path, ready)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 3
    (folder,) = tmp_path.iterdir()
    kinds = Counter(file.suffix or file.name for file in folder.iterdir())
    assert kinds == {".rows": 3, ".keys": 3, "lock": 1, ".json": 1}
    again = TeacherTable(tmp_path, *large())
    again.logits(*everything(again.data))
    assert (again.filled, again.misses, again.damaged) == (again.rows, 0, 0)


class Features(Distiller):
    TYPE = "FEATURES"

    def __init__(self, student, teacher, cfg):
        super().__init__(student, teacher)
        self.seen = []

    def forward_train(self, *, image, target, **kwargs):
        logits, features = self.student(image)
        _, wanted = self.teacher(image)
        self.seen.append(set(wanted))
        return logits, {"loss": (features["pooled_feat"] - wanted["pooled_feat"]).pow(2).mean()}


class OtherView(Distiller):
    TYPE = "OTHER_VIEW"

    def forward_train(self, *, image, target, **kwargs):
        logits, answers = self.student(image)[0], self.teacher(image.flip(3))[0]
        return logits, {"loss": (logits - answers).pow(2).mean()}


def test_the_teacher_answers_from_the_table_for_the_batch_of_the_moment_only(network, data):
    parts = list(data.plain(10))
    with torch.no_grad():
        live = [network(b.image) for b in parts]
    keys = list(network.state_dict())
    tabled = TabledTeacher(network)
    answers = [torch.full((10, 10), float(n)) for n in range(2)]
    for number, (batch, rows) in enumerate(zip(parts, answers, strict=True)):
        with tabled.answering(batch.image, rows):
            logits, features = network(batch.image)
            assert torch.equal(logits, rows) and tabled.live_calls == 2 * number
            assert torch.equal(network(batch.image.clone())[0], live[number][0])
            assert torch.equal(features["pooled_feat"], live[number][1]["pooled_feat"])
            assert set(features) == set(live[number][1]) and tabled.live_calls == 2 * number + 2
    assert torch.equal(network(parts[1].image)[0], live[1][0])
    assert list(network.state_dict()) == keys


def test_an_answer_is_forgotten_where_a_step_fails(network, data):
    image = data.batch(*torch.zeros(2, 4, dtype=torch.int64)).image
    tabled = TabledTeacher(network)
    with pytest.raises(RuntimeError, match="a step"), tabled.answering(image, torch.ones(4, 10)):
        raise RuntimeError("a step")
    assert not torch.equal(network(image)[0], torch.ones(4, 10)) and tabled.live_calls == 1


def test_what_a_method_takes_from_its_teacher_is_found_out(network, data):
    few = data.batch(torch.arange(4), torch.zeros(4, dtype=torch.int64))
    for name in ("KD", "DKD", "DKD_EAT_DAT_LP"):
        distiller = distiller_dict[name](cifar_model_dict["resnet8"][0](), network, get_cfg())
        before = {key: value.clone() for key, value in distiller.state_dict().items()}
        random = torch.get_rng_state()
        assert features_taken(distiller, few) == set()
        assert all(torch.equal(v, before[k]) for k, v in distiller.state_dict().items())
        assert torch.equal(torch.get_rng_state(), random)
    student = cifar_model_dict["resnet8"][0]()
    assert features_taken(Features(student, network, None), few) == {"teacher", "student"}
    assert features_taken(OtherView(student, network), few) == {"teacher"}


def test_a_method_with_features_trains_with_the_live_teacher(digits_cfg, monkeypatch):
    monkeypatch.setitem(distiller_dict, "KD", Features)
    record, _ = train(digits_cfg("kd", "SOLVER.EPOCHS", "1"), "auto", CPU)
    assert record["status"] == "finished" and record["teacher_table"] is None
    cfg = digits_cfg("kd", "SOLVER.EPOCHS", "1", "DISTILLER.TEACHER_TABLE", "on")
    with pytest.raises(ConfigError, match=r"TEACHER_TABLE: on, but KD takes the teacher's feat"):
        train(cfg, "on", CPU)


@pytest.mark.parametrize("method", ["kd", "dkd_eat_dat_lp"])
def test_a_run_with_the_table_is_the_run_without(digits_cfg, workdir, monkeypatch, method):
    """To rounding: after one epoch; later, rounding grows as in any two runs."""
    monkeypatch.setenv("MDISTILLER_EXT_CACHE", str(workdir / "cache"))
    records = {}
    for name, options in {
        "off": ["DISTILLER.TEACHER_TABLE", "off"],
        "cold": [],
        "warm": [],
        "half": ["DISTILLER.TEACHER_TABLE_DTYPE", "float16"],
    }.items():
        cfg = digits_cfg(method, "SOLVER.EPOCHS", "1", "SOLVER.SEED", "7", *options)
        records[name], _ = train(cfg, name, CPU)
    losses = {name: record["epochs"][0]["loss"] for name, record in records.items()}
    assert losses["cold"] == losses["warm"] == pytest.approx(losses["off"], rel=1e-5)
    assert losses["half"] == pytest.approx(losses["off"], rel=1e-2)
    assert losses["half"] != losses["cold"]
    hits = [records[name]["epochs"][0]["teacher_table_hits"] for name in ("cold", "warm")]
    assert hits[0] < 100 == hits[1]
    assert records["warm"]["teacher_table"]["misses"] == 0
    assert (workdir / "cache" / records["warm"]["teacher_table"]["fingerprint"]).is_dir()


def test_losses_on_real_images_are_those_of_the_live_teacher(shared, tmp_path):
    """float32: relative 1e-6; float16: 2e-4."""
    train_set, _ = cifar100.load(shared)
    student, teacher = networks(shared)
    parts = batches(shared, 2)
    answers = {}
    for dtype in ("float32", "float16"):
        opened = TeacherTable(tmp_path, teacher, train_set, dtype)
        answers[dtype] = [opened.logits(b.index, b.view) for b in parts]
    for method in ("KD", "DKD", "DKD_EAT", "DKD_DAT", "DKD_LP"):
        pair = copy.deepcopy((student, teacher))
        distiller = distiller_dict[method](*pair, get_cfg()).train()
        live = [distiller(image=b.image, target=b.target, epoch=41)[1]["loss_kd"] for b in parts]
        for dtype, tolerance in (("float32", 1e-6), ("float16", 2e-4)):
            for batch, rows, expected in zip(parts, answers[dtype], live, strict=True):
                context = Context(distiller.schedule(41), rows)
                _, losses = distiller(image=batch.image, target=batch.target, context=context)
                torch.testing.assert_close(losses["loss_kd"], expected, rtol=tolerance, atol=0)


def test_folding_leaves_the_network_alone():
    torch.manual_seed(0)
    network = cifar_model_dict["resnet20"][0]()
    network.train()(torch.randn(32, 3, 32, 32))
    before = {key: value.clone() for key, value in network.state_dict().items()}
    folded = table.folded(network)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    image = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        for own, other in zip(
            network.eval()(image)[1]["feats"], folded(image)[1]["feats"], strict=True
        ):
            torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-4)
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())


def test_where_no_table_can_be_auto_goes_on_without(digits_cfg, workdir, monkeypatch, capsys):
    (workdir / "cache").write_text("a file")
    monkeypatch.setenv("MDISTILLER_EXT_CACHE", str(workdir / "cache"))
    record, _ = train(digits_cfg("dkd", "SOLVER.EPOCHS", "1"), "auto", CPU)
    assert record["status"] == "finished" and record["teacher_table"] is None
    assert "cache/" in capsys.readouterr().out
    with pytest.raises(RunError, match=r"name another folder with DISTILLER\.TEACHER_TABLE_ROOT"):
        train(digits_cfg("dkd", "DISTILLER.TEACHER_TABLE", "on"), "on", CPU)
