"""One's own images: folders and arrays, how they are normalised and augmented, a part held out."""

import numpy as np
import pytest
import torch
from conftest import CPU, ROOT
from PIL import Image

from mdistiller_ext import distill, register_dataset
from mdistiller_ext.config import load_cfg
from mdistiller_ext.data import DATASETS, Dataset, digits, facts, get_dataset, stratified
from mdistiller_ext.engine import train
from mdistiller_ext.errors import ConfigError, RunError
from mdistiller_ext.models import cifar_model_dict
from mdistiller_ext.teacher import TeacherTable


def section(**keys):
    return {**Dataset.defaults(), **keys}


def pictures(root, side=12, classes=("cat", "dog", "eel"), count=4, splits=("train", "val")):
    """A folder of noisy squares, each class of one colour."""
    rng = np.random.default_rng(0)
    for split in splits:
        for label, name in enumerate(classes):
            folder = root / split / name
            folder.mkdir(parents=True)
            for n in range(count):
                pixels = rng.integers(0, 60, (side, side + 3 * n, 3), np.uint8)
                pixels[..., label % 3] += 180
                Image.fromarray(pixels).save(folder / f"{n}.{('png', 'jpg', 'bmp')[n % 3]}")
    return root


def test_a_folder_is_decoded_once_scaled_and_measured(tmp_path, monkeypatch):
    node = section(TYPE="folder", ROOT=str(pictures(tmp_path / "d")), SIDE=8)
    train_set, test_set = get_dataset(node)
    assert facts(node) == (12, 3, 8) == (len(train_set), train_set.classes, train_set.side)
    assert train_set.targets.tolist() == [0] * 4 + [1] * 4 + [2] * 4 and len(test_set) == 12
    pixels = torch.cat([b.image for b in train_set.plain(5)])
    assert pixels.shape == (12, 3, 8, 8)
    torch.testing.assert_close(pixels.mean((0, 2, 3)), torch.zeros(3), rtol=0, atol=1e-4)
    torch.testing.assert_close(
        pixels.std((0, 2, 3), correction=0), torch.ones(3), rtol=1e-3, atol=0
    )
    monkeypatch.setattr(Image, "open", lambda file: pytest.fail("it is kept"))
    assert torch.equal(get_dataset(node)[0].padded, train_set.padded)


def test_a_folder_that_changed_is_decoded_again(tmp_path):
    node = section(TYPE="folder", ROOT=str(pictures(tmp_path / "d")), SIDE=8)
    before = get_dataset(node)[0]
    Image.new("RGB", (8, 8), "white").save(tmp_path / "d/train/cat/0.png")
    assert not torch.equal(get_dataset(node)[0].padded, before.padded)


def no_split(root):
    (root / "val").rename(root / "other")


def no_images(root):
    for file in (root / "train").rglob("*.*"):
        file.rename(file.with_suffix(".txt"))


def an_empty_class(root):
    (root / "train" / "ant").mkdir()


def one_class(root):
    for split in ("train", "val"):
        for name in ("dog", "eel"):
            for file in (root / split / name).iterdir():
                file.unlink()
            (root / split / name).rmdir()


def a_strange_class(root):
    (root / "val" / "fox").mkdir()


def no_image(root):
    (root / "train" / "dog" / "0.png").write_text("no image")


def nothing(root):
    pass


@pytest.mark.parametrize(
    ("change", "side", "message"),
    [
        (no_split, 8, "holds no folder val/"),
        (no_images, 8, "train: holds no images in folders of classes"),
        (an_empty_class, 8, "ant: holds no images"),
        (one_class, 8, "has 1 classes, expected two or more"),
        (a_strange_class, 8, "has classes that train/ has not: fox"),
        (no_image, 8, r"0\.png: no image that can be read"),
        (nothing, 0, "DATASET.SIDE: 0 is not allowed"),
    ],
)
def test_folders_that_are_refused(tmp_path, change, side, message):
    change(pictures(tmp_path / "d"))
    with pytest.raises((ConfigError, RunError), match=message) as error:
        get_dataset(section(TYPE="folder", ROOT=str(tmp_path / "d"), SIDE=side))
    assert "\n" not in str(error.value)


def arrays(**changes):
    rng = np.random.default_rng(0)
    content = {
        "train_images": rng.integers(0, 255, (20, 3, 8, 8), np.uint8),
        "train_labels": np.arange(20) % 4,
        "test_images": rng.integers(0, 255, (8, 3, 8, 8), np.uint8),
        "test_labels": np.arange(8) % 4,
    }
    return {k: v for k, v in {**content, **changes}.items() if v is not None}


@pytest.mark.parametrize("kind", ["npz", "pt"])
def test_arrays_in_each_layout(tmp_path, kind):
    content = arrays()
    sets = []
    for layout in (lambda x: x, lambda x: x.transpose(0, 2, 3, 1)):
        parts = {k: layout(v) if "images" in k else v for k, v in content.items()}
        file = tmp_path / f"{len(sets)}.{kind}"
        if kind == "npz":
            np.savez(file, **parts)
        else:
            torch.save({k: torch.from_numpy(v.copy()) for k, v in parts.items()}, file)
        node = section(TYPE="arrays", ROOT=str(file))
        sets.append(get_dataset(node))
        assert facts(node) == (20, 4, 8)
    for one, other in zip(*sets, strict=True):
        assert torch.equal(one.padded, other.padded) and torch.equal(one.targets, other.targets)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"test_images": None}, "holds no array test_images, found train_images"),
        ({"train_images": np.zeros((20, 3, 8, 8), np.float32)}, "is torch.float32, expected uint8"),
        ({"train_images": np.zeros((20, 4, 8, 8), np.uint8)}, r"has shape \(20, 4, 8, 8\)"),
        ({"train_images": np.zeros((20, 3, 8, 9), np.uint8)}, r"has shape \(20, 3, 8, 9\)"),
        ({"train_labels": np.zeros(19, int)}, r"has shape \(19,\) .* each of the 20 images"),
        ({"train_labels": np.zeros(20)}, "type torch.float64, expected an integer"),
        ({"train_labels": np.full(20, -1)}, "DATASET.TYPE arrays: has labels below 0"),
        (
            {"test_labels": np.full(8, 7)},
            "has a label 7 in the test set, in the training set at most 3",
        ),
    ],
)
def test_arrays_that_are_refused(tmp_path, changes, message):
    np.savez(tmp_path / "a.npz", **arrays(**changes))
    with pytest.raises(ConfigError, match=message) as error:
        get_dataset(section(TYPE="arrays", ROOT=str(tmp_path / "a.npz")))
    assert "\n" not in str(error.value)


def test_a_file_that_is_none_is_a_fault_of_the_config(tmp_path):
    (tmp_path / "a.npz").write_text("no archive")
    with pytest.raises(ConfigError, match=r"a\.npz: cannot be read"):
        load_cfg(None, ["DATASET.TYPE", "arrays", "DATASET.ROOT", str(tmp_path / "a.npz")])


def test_keys_change_how_images_are_normalised_and_augmented():
    own, _ = get_dataset(section(TYPE="digits"))
    node = section(TYPE="digits", PADDING=2, FLIPS="on", MEAN=[0.1] * 3, STD=[0.5] * 3)
    changed, test_set = get_dataset(node)
    assert (own.num_views, changed.num_views) == (9, 50)
    one, other = (next(s.plain(4)).image for s in (own, changed))
    pixels = one * own.std[:, None, None] + own.mean[:, None, None]
    torch.testing.assert_close(other, (pixels - 0.1) / 0.5)
    assert test_set.padding == 2


def test_a_holdout_is_a_part_of_every_class_and_its_own_seed():
    targets = torch.arange(1000) % 10
    kept, held = stratified(targets, 0.1, 0)
    assert sorted([*kept.tolist(), *held.tolist()]) == list(range(1000))
    assert torch.bincount(targets[held]).tolist() == [10] * 10
    assert torch.equal(held, stratified(targets, 0.1, 0)[1])
    assert not torch.equal(held, stratified(targets, 0.1, 1)[1])


def test_what_is_held_out_is_evaluated_on_and_the_table_is_that_of_all(digits_cfg, tmp_path):
    whole, _ = digits.load()
    node = section(TYPE="digits", HOLDOUT=0.2)
    train_set, held = get_dataset(node)
    assert len(train_set) + len(held) == len(whole) and held.whole is None
    network = cifar_model_dict["resnet8"][0](num_classes=10).eval()
    tables = [TeacherTable(tmp_path, network, data) for data in (whole, train_set)]
    assert tables[0].folder == tables[1].folder
    index, view = train_set.draw(torch.Generator().manual_seed(0))
    answers = tables[1].logits(index, view)
    with torch.no_grad():
        torch.testing.assert_close(answers, network(train_set.batch(index, view).image)[0])
    tables[0].logits(train_set.places[index], view)
    assert tables[0].misses == 0
    record, _ = train(digits_cfg("dkd", "DATASET.HOLDOUT", "0.2", "SOLVER.EPOCHS", "1"), "r", CPU)
    assert record["data"]["evaluated_on"] == f"{len(held)} training images, held out"
    assert record["data"]["train_images"] == len(train_set)


def test_a_registered_data_set_is_allowed_and_trains(workdir):
    @register_dataset("mine")
    def load(settings):
        return digits.load()

    try:
        options = ["DATASET.TYPE", "mine", "DISTILLER.STUDENT", "resnet8", "SOLVER.EPOCHS", "1"]
        record, _ = train(load_cfg(None, options), "r", CPU)
        assert record["config"]["DATASET"]["TYPE"] == "mine" and record["status"] == "finished"
    finally:
        del DATASETS["mine"]


def test_a_folder_trains_to_what_a_classifier_should_reach(workdir):
    root = pictures(workdir / "d", count=30, side=8)
    options = ["DATASET.TYPE", "folder", "DATASET.ROOT", str(root), "DATASET.SIDE", "8"]
    options += ["DISTILLER.STUDENT", "resnet8", "SOLVER.EPOCHS", "4", "SOLVER.BATCH_SIZE", "16"]
    record, _ = train(load_cfg(None, [*options, "SOLVER.LR_DECAY_STAGES", "[3]"]), "r", CPU)
    assert record["last_epoch_top1"] > 95


def test_networks_and_tensors_from_python(workdir):
    images = torch.randint(256, (64, 3, 8, 8), dtype=torch.uint8)
    labels = torch.arange(64) % 4
    networks = [torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 4)) for _ in range(2)]
    student, teacher = networks
    before = [parameter.clone() for parameter in teacher.parameters()]
    options = ["SOLVER.EPOCHS", 1, "SOLVER.LR_DECAY_STAGES", []]
    split = images, labels
    record, folder = distill(student, teacher, split, split, options=options, device="cpu")
    saved = torch.load(folder / "student_last", weights_only=True)["model"]
    assert all(torch.equal(value, student.state_dict()[key]) for key, value in saved.items())
    assert all(torch.equal(a, b) for a, b in zip(before, teacher.parameters(), strict=True))
    assert record["method"]["type"] == "DKD" and record["teacher_table"] is not None
    with pytest.raises(ConfigError, match="'given' is not allowed"):
        load_cfg(ROOT / "configs/digits/kd.yaml", ["DATASET.TYPE", "given"])
