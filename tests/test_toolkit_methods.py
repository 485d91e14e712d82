"""The real mdistiller's methods in our engine."""

import pytest
import torch
from conftest import CPU, ROOT, batches, networks, signal_at, theirs, train_on, untrained_teacher
from fuzz_losses import Answer

from mdistiller_ext import distiller_dict
from mdistiller_ext.config import load_cfg
from mdistiller_ext.data import ImageSet, cifar100
from mdistiller_ext.engine import train
from mdistiller_ext.engine.build import build_distiller, build_optimizer
from mdistiller_ext.engine.loop import Meter
from mdistiller_ext.errors import ConfigError, RunError
from mdistiller_ext.models import cifar_model_dict
from mdistiller_ext.teacher import Weights, load_weights
from mdistiller_ext.toolkit.compat import mend
from mdistiller_ext.toolkit.registration import NAMES

FILES = sorted((ROOT / "configs/cifar100/toolkit").rglob("*.yaml"))
METHODS = sorted(file.stem for file in FILES if file.parent.name == "toolkit")
# What the toolkit itself does on a recent PyTorch, Python or Pillow.
pytestmark = pytest.mark.filterwarnings("default")


def build(shared, method, *options):
    """A method between a seeded student and the real ResNet-56, and its config."""
    file = ROOT / "configs/cifar100/toolkit" / f"{method}.yaml"
    cfg = load_cfg(file, ["DISTILLER.TEACHER", "resnet56", *options])
    weights = load_weights(shared / "teachers" / "cifar100_resnet56.pth")
    torch.manual_seed(0)
    return build_distiller(cfg, weights, cifar100.load(shared)[0]), cfg


def steps(distiller, cfg, data, epoch=1):
    """Train on the batches; the terms of the loss, (steps, terms)."""
    meter = Meter(epoch, len(data))
    optimizer = build_optimizer(cfg.SOLVER, distiller)
    train_on(data, distiller, optimizer, meter)
    return meter.terms


def test_every_method_of_the_registry_has_a_config(toolkit):
    import mdistiller.distillers as there

    assert {m.upper() for m in METHODS} == {
        name for name in there.distiller_dict if name not in ("NONE", *NAMES)
    }


@pytest.mark.parametrize("file", FILES, ids=lambda f: f"{f.parent.name}-{f.stem}")
def test_each_config_fits_its_pair(toolkit, file):
    assert file.read_text().startswith(f"# python tools/train.py --cfg {file.relative_to(ROOT)}\n")
    cfg = load_cfg(file)
    student = "resnet20" if file.parent.name == "res110_res20" else "resnet8"
    node = cfg.DISTILLER
    found = node.TYPE.lower(), node.SOURCE, node.TEACHER, node.STUDENT
    assert found == (file.stem, "mdistiller", "resnet110", student)
    assert (cfg.SOLVER.EPOCHS, cfg.SOLVER.LR_DECAY_STAGES) == (80, [50, 60, 70])
    weights = Weights(cifar_model_dict["resnet110"][0](num_classes=100).state_dict(), file, "")
    images = torch.zeros(200, 3, 32, 32, dtype=torch.uint8)
    data = ImageSet.build(images, torch.arange(200) % 100, (0.5,) * 3, (0.25,) * 3, 4, True)
    distiller = build_distiller(cfg, weights, data).train()
    image, index = torch.randn(4, 3, 32, 32), torch.arange(4)
    _, losses = distiller(image=image, target=data.targets[:4], index=index, epoch=1)
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in distiller.student.parameters())


@pytest.mark.parametrize("method", METHODS)
def test_losses_are_the_toolkits_own(toolkit, shared, method):
    """Three steps of our engine and of the toolkit's class in a plain loop: the same bits."""
    data = batches(shared, 3, 16)
    distiller, cfg = build(shared, method)
    chosen = []
    if method == "crd":
        draw = distiller.sampler.forward
        distiller.sampler.forward = lambda *args: chosen.append(draw(*args)) or chosen[-1]
    terms = steps(distiller, cfg, data)

    mend()  # CRD asks for a GPU
    name = method.upper()
    cls, config = theirs(name)
    if name in config:
        config[name].merge_from_other_cfg(cfg[name])
    targets = cifar100.load(shared)[0].targets
    other = cls(*networks(shared), config, *([len(targets)] if method == "crd" else []))
    other.train()
    optimizer = build_optimizer(cfg.SOLVER, other)
    for step, batch in enumerate(data):
        inputs = {"image": batch.image, "target": batch.target, "index": batch.index, "epoch": 1}
        if chosen:
            inputs["contrastive_index"] = chosen[step]
        _, losses = other(**inputs)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
        assert [loss.item() for loss in losses.values()] == terms[step].tolist()


def teacher_state(distiller):
    return {key: value.clone() for key, value in distiller.teacher.state_dict().items()}


@pytest.mark.parametrize(("method", "construction"), [("ofd", 0), ("vid", 1), ("fitnet", 1)])
def test_the_teacher_drifts_unless_mended(toolkit, shared, capsys, method, construction):
    """VID and FITNET run it in training mode to learn its shapes, which is said; OFD in every
    step."""
    weights = load_weights(shared / "teachers" / "cifar100_resnet56.pth").state
    for fix in (False, True):
        distiller, cfg = build(shared, method, "DISTILLER.FIX_UPSTREAM", str(fix))
        said = f"{method.upper()}: its constructor changes the teacher, as bn1.running_mean"
        assert (said in capsys.readouterr().out) == (construction and not fix)
        if not construction:
            steps(distiller, cfg, batches(shared, 1, 16))
            assert distiller.teacher.training != fix
        moved = [k for k, v in teacher_state(distiller).items() if not torch.equal(v, weights[k])]
        assert bool(moved) != fix, moved[:3]


def test_vids_scales_are_trained_only_when_mended(toolkit, shared):
    for fix in (False, True):
        distiller, cfg = build(shared, "vid", "DISTILLER.FIX_UPSTREAM", str(fix))
        before = [scale.detach().clone() for scale in distiller.log_scales]
        steps(distiller, cfg, batches(shared, 1, 16))
        still = [torch.equal(a, b) for a, b in zip(before, distiller.log_scales, strict=True)]
        assert not any(still) if fix else all(still)
        assert any("log_scales" in key for key in distiller.state_dict()) == fix


def test_kdsvd_dies_unless_mended(toolkit, shared):
    """Of an image without content, the features' singular values are equal."""
    data = batches(shared, 3, 16)
    data[0].image[0] = 0
    distiller, cfg = build(shared, "kdsvd")
    with pytest.raises(RunError, match=r"KDSVD in epoch 1: .*FIX_UPSTREAM True mends"):
        steps(distiller, cfg, data)
    distiller, cfg = build(shared, "kdsvd", "DISTILLER.FIX_UPSTREAM", "True")
    assert steps(distiller, cfg, data).isfinite().all()
    assert all(p.isfinite().all() for p in distiller.student.parameters())


@pytest.mark.parametrize("fix", ["False", "True"])
def test_a_mend_changes_no_loss_that_was_right(toolkit, shared, fix):
    """KDSVD's first step, before any gradient, and a method that needs no mend."""
    data = batches(shared, 1, 16)
    for method in ("kdsvd", "sp"):
        distiller = build(shared, method, "DISTILLER.FIX_UPSTREAM", fix)[0].train()
        inputs = {"image": data[0].image, "target": data[0].target, "index": None, "epoch": 1}
        _, losses = distiller(**inputs)
        plain = build(shared, method)[0].train()
        assert torch.equal(sum(losses.values()), sum(plain(**inputs)[1].values()))


def test_dkd_has_no_finite_gradient_at_a_large_margin(toolkit):
    """The toolkit's, once the student's probability of the target rounds to 0; nobody else's."""
    student, teacher = torch.zeros(2, 1, 10)
    student[0, 3] = -100 * 4.0
    for cfg in (load_cfg(ROOT / "configs/digits" / f"{name}.yaml") for name in ("kd", "dkd")):
        name = cfg.DISTILLER.TYPE
        for cls in (theirs(name)[0], distiller_dict[name]):
            networks = Answer(student), Answer(teacher)
            distiller = cls(*networks, cfg)
            _, losses = distiller.train()(
                image=torch.empty(1, 0), target=torch.tensor([3]), epoch=20
            )
            sum(losses.values()).backward()
            finite = bool(networks[0].logits.grad.isfinite().all())
            assert finite != (cls.__module__ == "mdistiller.distillers.DKD")


@pytest.mark.parametrize("name", ["KD", "DKD"])
def test_source_says_whose_method_runs(toolkit, digits_cfg, name):
    records = {}
    for source in ("auto", "ext", "mdistiller"):
        cfg = digits_cfg(name.lower(), "DISTILLER.SOURCE", source, "SOLVER.EPOCHS", "1")
        records[source], _ = train(cfg, source, CPU)
    assert records["auto"]["method"] == records["ext"]["method"] == {"type": name, "source": "ext"}
    theirs = records["mdistiller"]["method"]
    assert (theirs["source"], theirs["mended"]) == ("mdistiller", None)
    assert theirs["file"] == f"mdistiller/distillers/{name}.py" and len(theirs["sha256"]) == 64
    losses = [record["epochs"][0]["loss"] for record in records.values()]
    assert losses[0] == losses[1] == pytest.approx(losses[2], rel=1e-5)


def test_crd_resumes_to_the_same_weights(toolkit, workdir):
    """Its memory, embeddings and contrastive samples go on where they stopped."""
    teacher = ["DISTILLER.TEACHER_CKPT", str(untrained_teacher(workdir))]
    teacher += ["DISTILLER.TEACHER", "resnet20", "DATASET.TYPE", "digits"]
    file = ROOT / "configs/cifar100/toolkit/crd.yaml"
    cfg = load_cfg(file, [*teacher, "SOLVER.EPOCHS", "3", "CRD.NCE.K", "64"])
    _, whole = train(cfg, "whole", CPU)
    with signal_at(2, 4):
        train(cfg, "parts", CPU)
    _, parts = train(cfg, "parts", CPU, resume=True)
    states = [torch.load(f / "latest", weights_only=True)["model"] for f in (whole, parts)]
    assert any("contrast.memory" in key for key in states[0])
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        (["DISTILLER.TYPE", "AT2"], "'AT2' is not allowed, expected one of NONE, KD, .* or a m"),
        (
            ["DISTILLER.TYPE", "AT2", "DISTILLER.SOURCE", "mdistiller"],
            "'AT2' is not allowed, expected a method of mdistiller \\(",
        ),
        (["DISTILLER.TYPE", "AT", "DISTILLER.SOURCE", "ext"], "'AT' is not allowed, expected one"),
        (["DISTILLER.TYPE", "AT", "AT.P2", "3"], r"AT\.P2: no such key; did you mean AT\.P\?"),
        (["DISTILLER.TYPE", "CRD", "CRD.MODE", "no"], "CRD.MODE: 'no' is not allowed, expected"),
    ],
)
def test_faults_of_a_toolkit_method(toolkit, options, fault):
    with pytest.raises(ConfigError, match=fault):
        load_cfg(ROOT / "configs/cifar100/kd.yaml", options)
