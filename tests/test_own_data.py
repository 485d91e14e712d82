"""One's own images: folders and arrays, how they are normalised and augmented, a part held out."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import CPU, ROOT
from PIL import Image

from mdistiller_ext import distill, inert, memory, register_dataset
from mdistiller_ext.config import load_cfg
from mdistiller_ext.data import (
    DATASETS,
    Dataset,
    ImageSet,
    digits,
    facts,
    get_dataset,
    identity,
    stratified,
    trained_on,
)
from mdistiller_ext.engine import default_name, train
from mdistiller_ext.engine.record import read_record
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


@pytest.mark.parametrize("form", ["train", "root"])
def test_a_folder_without_a_test_set_holds_a_part_out(workdir, capsys, form):
    """With train/ alone, or the classes in the root itself; each class gives its share."""
    whole = pictures(workdir / "whole", count=5, splits=("train", "test"))
    root = pictures(workdir / "d", count=5, splits=("train",))
    root = root / "train" if form == "root" else root
    options = ["DATASET.TYPE", "folder", "DATASET.ROOT", str(root), "DATASET.SIDE", "8"]
    options += ["DISTILLER.STUDENT", "resnet8", "SOLVER.EPOCHS", "1"]
    missing = "val/ or test/" if form == "train" else "train/"
    with pytest.raises(ConfigError, match=f"holds no folder {missing}: expected .*DATASET.HOLDOUT"):
        load_cfg(None, options)
    cfg = load_cfg(None, [*options, "DATASET.HOLDOUT", "0.4"])
    record, _ = train(cfg, "r", CPU)
    said = capsys.readouterr().out
    assert f"DATASET.ROOT {root}: holds no test set: DATASET.HOLDOUT takes its place" in said
    assert record["data"]["evaluated_on"] == "6 training images, held out"
    assert record["data"]["class_names"] == ["cat", "dog", "eel"]
    assert [sum(map(int, row.split())) for row in record["by_class"]["confusion"]] == [2, 2, 2]
    assert facts(cfg.DATASET) == (9, 3, 8)
    split = section(TYPE="folder", ROOT=str(whole), SIDE=8)  # with test/ for val/
    for one, other in zip(
        get_dataset(cfg.DATASET), get_dataset({**split, "HOLDOUT": 0.4}), strict=True
    ):
        assert torch.equal(one.padded, other.padded) and torch.equal(one.targets, other.targets)
    assert len(get_dataset(split)[1]) == 15


def test_a_folder_with_a_test_set_and_no_training_set_is_refused(tmp_path):
    root = pictures(tmp_path / "d", splits=("val",))
    for node in (section(TYPE="folder", ROOT=str(root), SIDE=8), section(TYPE="folder", SIDE=8)):
        with pytest.raises(ConfigError, match="holds no folder train/"):
            get_dataset({**node, "HOLDOUT": 0.4})


def test_class_names_that_are_not_those_of_the_labels_are_refused():
    images = torch.zeros(4, 3, 8, 8, dtype=torch.uint8), torch.arange(4) % 2
    for names, fault in (([], ""), (["a", "b"], ""), (["a"], "has 1 class names, and labels of 2")):
        data = ImageSet.build(*images, (0.5,) * 3, (0.5,) * 3, 1, False, names)
        register_dataset("mine")(lambda settings, data=data: (data, data))
        try:
            if fault:
                with pytest.raises(ConfigError, match=f"DATASET.TYPE mine: {fault}"):
                    get_dataset(section(TYPE="mine"))
                continue
            for part in get_dataset(section(TYPE="mine", PADDING=2, HOLDOUT=0.5, LIMIT=0)):
                assert part.class_names == (names or ["0", "1"])
        finally:
            del DATASETS["mine"]


def test_a_limit_is_the_first_images_of_each_class_with_the_same_tests_and_table(tmp_path):
    whole, test = digits.load()
    node = section(TYPE="digits", LIMIT=3)
    few, same = get_dataset(node)
    places = [(whole.targets == n).nonzero().flatten()[:3] for n in range(10)]
    assert torch.equal(few.places, torch.cat(places).sort().values)
    assert torch.equal(few.padded, whole.padded[few.places]) and facts(node) == (30, 10, 8)
    assert torch.equal(same.padded, test.padded)
    network = cifar_model_dict["resnet8"][0](num_classes=10).eval()
    tables = [TeacherTable(tmp_path, network, data) for data in (whole, few)]
    assert tables[0].folder == tables[1].folder
    held = {**node, "HOLDOUT": 0.2}
    few, same = get_dataset(held)
    assert few.targets.bincount().tolist() == [3] * 10 and facts(held).images == len(few)
    assert torch.equal(same.padded, get_dataset({**held, "LIMIT": 0})[1].padded)
    assert set(few.places.tolist()) <= set(get_dataset({**held, "LIMIT": 0})[0].places.tolist())
    for share, most in ((0.0, 55), (0.2, 44)):
        message = f"DATASET.LIMIT: {most} leaves out no image: a class has at most {most} training"
        with pytest.raises(ConfigError, match=message):
            load_cfg(None, ["DATASET.TYPE", "digits", "DATASET.LIMIT", most, *holding(share)])
    assert load_cfg(None, ["DATASET.TYPE", "digits", "DATASET.LIMIT", 54])


def holding(share):
    return ["DATASET.HOLDOUT", share]


def test_a_limited_run_is_never_taken_for_a_full_one(digits_cfg, capfd, tool):
    """It is another run, under another name, it is said, and so is a teacher of it."""
    options = ["DATASET.LIMIT", "5", "SOLVER.EPOCHS", "1"]
    cfg, full = digits_cfg("vanilla", *options), digits_cfg("vanilla", *options[2:])
    assert default_name(cfg, options).split(",")[2:4] == ["LIMIT=5", "EPOCHS=1"]
    assert inert.effect(cfg) != inert.effect(full)
    assert trained_on(cfg.DATASET) == "digits_limit5" and trained_on(full.DATASET) == "digits"
    record, folder = train(cfg, "r", CPU)
    line = "warning: DATASET.LIMIT 5: trained on 50 images of the data set, as a quick try"
    assert line in capfd.readouterr().out and record["data"]["train_images"] == 50
    with pytest.raises(ConfigError, match=r"LIMIT 5 -> 0"):
        train(full, "r", CPU, resume=True)
    assert " on digits (at most 5 training images of a class), " in tool("show", str(folder))[1]
    words = ["-m", "resnet8", "-d", "digits", "-c", str(folder / "student_last")]
    said = "was trained with DATASET.LIMIT 5, so without some of the images"
    assert said in tool("eval", *words)[1]
    assert said in tool("eval", *words, "DATASET.LIMIT", "6")[1]
    assert said not in tool("eval", *words, "DATASET.LIMIT", "4")[1]
    assert said not in tool("eval", "-c", str(folder))[1]


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


def sixteen_bits(root):
    Image.fromarray(np.full((9, 9), 40_000, np.uint16)).save(root / "train" / "dog" / "0.png")


def cut_off(root):
    file = root / "val" / "eel" / "0.png"
    file.write_bytes(file.read_bytes()[:60])


def a_bomb(root):
    Image.new("1", (16_000, 16_000)).save(root / "train" / "cat" / "0.png")


@pytest.mark.parametrize(
    ("change", "side", "message"),
    [
        (no_split, 8, "holds no folder val/"),
        (no_images, 8, r"train: holds no images in folders of classes; left out: \.txt files \(12"),
        (an_empty_class, 8, "ant: holds no images"),
        (one_class, 8, "has 1 classes, expected two or more"),
        (a_strange_class, 8, "has classes that train/ has not: fox"),
        (no_image, 8, r"0\.png: no image that can be read"),
        (nothing, 0, "DATASET.SIDE: 0 is not allowed"),
        (sixteen_bits, 8, r"0\.png: no image .*more than 8 bits a channel"),
        (cut_off, 8, r"eel/0\.png: no image that can be read"),
        (a_bomb, 8, r"cat/0\.png: no image .*decompression bomb"),
    ],
)
def test_folders_that_are_refused(tmp_path, change, side, message):
    change(pictures(tmp_path / "d"))
    with pytest.raises((ConfigError, RunError), match=message) as error:
        get_dataset(section(TYPE="folder", ROOT=str(tmp_path / "d"), SIDE=side))
    assert "\n" not in str(error.value)


def hidden(folder, content):
    """What notebooks, file managers and archivers leave behind."""
    for name in (".ipynb_checkpoints", "__MACOSX"):
        (folder / name).mkdir()
        shutil.copy(content, folder / name / "x.png")
    (folder / "._x.png").write_bytes(b"no image")


def test_of_a_folder_only_images_in_classes_count_and_the_rest_is_told(tmp_path, capsys):
    root = pictures(tmp_path / "d")
    node = section(TYPE="folder", ROOT=str(root), SIDE=8)
    before = get_dataset(node)
    assert capsys.readouterr().out == ""
    image = root / "train" / "cat" / "0.png"
    for folder in (root / "train", root / "val", root / "train" / "cat", root / "val" / "eel"):
        hidden(folder, image)
    (root / "train" / "dog" / "0.png").rename(root / "train" / "dog" / "a.png")
    (root / "train" / "dog" / "0.png").mkdir()  # named like a file
    (root / "train" / "dog" / "a.png").rename(root / "train" / "dog" / "0.png" / "x.png")
    (root / "train" / "eel" / "more").symlink_to(root / "val" / "eel")
    shutil.copy(image, root / "train" / "stray.png")
    for name in ("a.jfif", "b.PGM", "c.pgm"):
        (root / "train" / "cat" / name).touch()
    after = get_dataset(node)
    for one, other in zip(before, after, strict=True):
        assert torch.equal(one.padded, other.padded) and torch.equal(one.targets, other.targets)
    assert facts(node) == (12, 3, 8)
    (line,) = capsys.readouterr().out.splitlines()
    kinds = "hidden entries (12), .pgm files (2), images beside the folders of classes (1), "
    assert line == f"DATASET.ROOT {root}: left out: {kinds}.jfif files (1), linked folders (1)"


def test_what_is_left_out_is_no_part_of_the_json_of_eval(workdir, tool):
    root = pictures(workdir / "d")
    (root / "val" / "cat" / "a.jfif").touch()
    torch.save(cifar_model_dict["resnet8"][0](num_classes=3).state_dict(), "a.pth")
    words = ["-m", "resnet8", "-c", "a.pth", "-d", "folder", "--root", str(root), "--json"]
    status, output, errors = tool("eval", *words, "DATASET.SIDE", "8")
    assert status == 0 and json.loads(output)["images"] == 12
    assert "left out: .jfif files (1)" in errors


def test_an_image_is_turned_as_its_camera_says(tmp_path):
    root = pictures(tmp_path / "d")
    pixels = np.zeros((8, 8, 3), np.uint8)
    pixels[:4] = 255  # white above
    upright = Image.fromarray(pixels)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter, clockwise
    upright.rotate(90).save(root / "train/cat/0.png", exif=exif)
    upright.save(root / "train/cat/1.jpg", exif=b"Exif\0\0no such thing")
    train_set, _ = get_dataset(section(TYPE="folder", ROOT=str(root), SIDE=8, PADDING=0))
    assert (train_set.padded[:2, :, :4] > 250).all() and (train_set.padded[:2, :, 4:] < 5).all()


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


def test_a_damaged_copy_of_the_decoded_images_is_decoded_anew(tmp_path, monkeypatch):
    monkeypatch.setenv("MDISTILLER_EXT_CACHE", str(tmp_path / "cache"))
    node = section(TYPE="folder", ROOT=str(pictures(tmp_path / "d")), SIDE=8)
    before = get_dataset(node)[0]
    for file in (tmp_path / "cache" / "images").glob("*.npy"):
        file.write_bytes(file.read_bytes()[:200])
    assert torch.equal(get_dataset(node)[0].padded, before.padded)


def test_images_in_every_mode_are_colours(tmp_path):
    root = pictures(tmp_path / "d")
    for number, mode in enumerate(["L", "1", "P", "RGBA", "LA"]):
        Image.new(mode, (9, 9), 1).save(root / "train" / "cat" / f"mode{number}.png")
    Image.new("CMYK", (9, 9)).save(root / "train" / "cat" / "mode.jpg")
    train_set, _ = get_dataset(section(TYPE="folder", ROOT=str(root), SIDE=8))
    assert len(train_set) == 18


def test_a_folder_that_does_not_fit_is_said_before_anything_is_decoded(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "open", lambda file: pytest.fail("it was begun"))
    monkeypatch.setattr(memory, "free_memory", lambda: 10**9)
    node = section(TYPE="folder", ROOT=str(pictures(tmp_path / "d")), SIDE=4000)
    with pytest.raises(RunError) as error:
        get_dataset(node)
    size = 24 * 3 * (4000**2 + 5000**2) / 1e9
    assert str(error.value).startswith(
        f"24 images of 4000 x 4000, and padded: {size:.2f} GB of memory, where 1.00 GB are free: "
    )


def test_what_padding_and_a_holdout_take_is_said(monkeypatch, all_digits):
    monkeypatch.setattr(memory, "free_memory", lambda: 10**8)
    for node, what in (
        (section(TYPE="digits", PADDING=500), "images padded by 500 pixels: 5.48 GB of memory"),
        (section(TYPE="digits", PADDING=80, HOLDOUT=0.1), "images padded by 80 pixels: 0.15 GB"),
    ):
        with pytest.raises(RunError, match=what):
            get_dataset(node)


def test_a_table_whose_keys_do_not_fit_is_not_begun(digits_cfg, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(memory, "free_memory", lambda: 10**6)
    options = ["DATASET.PADDING", "12", "SOLVER.EPOCHS", "1"]
    options += ["DISTILLER.TEACHER_TABLE_ROOT", str(tmp_path / "tables")]
    monkeypatch.setattr("mdistiller_ext.data.check_memory", lambda *words: None)
    with pytest.raises(RunError, match=r"336,875 views of 539 images, whose keys take: 0\.00"):
        train(digits_cfg("dkd", *options, "DISTILLER.TEACHER_TABLE", "on"), "r", CPU)
    record, _ = train(digits_cfg("dkd", *options), "s", CPU)
    assert record["teacher_table"] is None and "it is not used" in capsys.readouterr().out
    assert not (tmp_path / "tables").exists()


def test_a_holdout_leaves_every_class_an_image_and_the_facts_are_exact():
    targets = torch.tensor([0] * 10 + [1])
    kept, held = stratified(targets, 0.9, 0)
    assert targets[kept].tolist() == [0, 1] and len(held) == 9
    for share in (0.03, 0.1, 0.55, 0.9):
        node = section(TYPE="digits", HOLDOUT=share)
        assert facts(node).images == len(get_dataset(node)[0])


def test_other_images_under_the_same_name_are_another_run(workdir):
    np.savez("one.npz", **arrays())
    np.savez("two.npz", **arrays(test_labels=np.arange(8)[::-1] % 4))
    options = ["DATASET.TYPE", "arrays", "DISTILLER.STUDENT", "resnet8", "SOLVER.EPOCHS", "1"]
    one, two = (load_cfg(None, [*options, "DATASET.ROOT", f"{n}.npz"]) for n in ("one", "two"))
    assert identity(one.DATASET) != identity(two.DATASET)
    names = [default_name(c, [*options, "DATASET.ROOT", c.DATASET.ROOT]) for c in (one, two)]
    assert names[0] != names[1]
    record, _ = train(one, "r", CPU)
    assert len(record["environments"][0]["data"]) == 64
    with pytest.raises(ConfigError, match="holds a finished run of other images or labels: "):
        train(two, "r", CPU, resume=True)
    np.savez("two.npz", **arrays())  # the same ones in another place
    assert train(two, "r", CPU, resume=True)[0] == record
    np.savez("one.npz", **arrays(train_labels=np.arange(20)[::-1] % 4))
    other, _ = train(load_cfg(None, [*options, "DATASET.ROOT", "one.npz"]), "s", CPU)
    assert other["environments"][0]["data"] != record["environments"][0]["data"]


def test_a_teacher_that_is_trained_first_is_of_these_images(workdir, monkeypatch, capsys):
    root = pictures(workdir / "d", count=8, side=8)
    place = ["DATASET.TYPE", "folder", "DATASET.ROOT", str(root), "DATASET.SIDE", "8"]
    tree = {"DATASET": {"TYPE": "folder"}, "DISTILLER": {"STUDENT": "resnet8"}}
    tree["SOLVER"] = {"EPOCHS": 1, "LR_DECAY_STAGES": []}
    (workdir / "teacher.yaml").write_text(yaml.safe_dump({**tree, "DATASET": {"TYPE": "digits"}}))
    options = [*place, "DISTILLER.TYPE", "DKD", "DISTILLER.TEACHER", "nets:small"]
    options += ["DISTILLER.STUDENT", "resnet8", "SOLVER.EPOCHS", "1"]
    module = "from mdistiller_ext import cifar_model_dict\nsmall = cifar_model_dict['resnet8'][0]"
    (workdir / "nets.py").write_text(module)
    monkeypatch.syspath_prepend(str(workdir))
    tree["DISTILLER"]["STUDENT"] = "nets:small"
    (workdir / "teacher.yaml").write_text(
        yaml.safe_dump({**tree, "DATASET": {"TYPE": "folder", "ROOT": str(root), "SIDE": 8}})
    )
    cfg = load_cfg(None, [*options, "DISTILLER.TEACHER_CFG", "teacher.yaml"])
    record, _ = train(cfg, "r", CPU)
    file = Path("checkpoints", identity(cfg.DATASET), "nets_small.pth")  # no colon, as in folders
    assert record["teacher"]["file"] == str(file) and file.exists()
    assert identity(cfg.DATASET).startswith("folder_")
    train(cfg, "s", CPU)
    assert "was trained on other images" not in capsys.readouterr().out
    Image.new("RGB", (8, 8), "white").save(root / "train/cat/0.png")
    train(cfg, "t", CPU)
    assert f"warning: {file}: this teacher was trained on other images" in capsys.readouterr().out


def test_a_teacher_knows_no_image_that_is_held_out_or_it_is_said(workdir, capfd, tool):
    """Of one seed a larger share holds out what a smaller one does, and more."""
    root = pictures(workdir / "d", count=8, side=8)
    tree = {"DATASET": {"TYPE": "folder"}, "DISTILLER": {"STUDENT": "resnet8"}}
    tree["DATASET"] |= {"ROOT": str(root), "SIDE": 8}
    tree["SOLVER"] = {"EPOCHS": 1, "LR_DECAY_STAGES": []}
    (workdir / "teacher.yaml").write_text(yaml.safe_dump(tree))
    tree["DISTILLER"] |= {"TYPE": "KD", "TEACHER": "resnet8"}
    (workdir / "kd.yaml").write_text(yaml.safe_dump(tree))

    def run(name, *options):
        record, folder = train(load_cfg("kd.yaml", options), name, CPU)
        lines = [line for line in capfd.readouterr().out.splitlines() if "warning" in line]
        return record, folder / "student_last", [line for line in lines if "HOLDOUT" in line]

    train(load_cfg("teacher.yaml"), default_name(load_cfg("teacher.yaml")), CPU)
    held = "DATASET.HOLDOUT", "0.25"
    record, student, said = run("own", "DISTILLER.TEACHER_CFG", "teacher.yaml", *held)
    kept = Path(record["teacher"]["file"])
    assert kept.parent.name.endswith("_holdout0.25_seed0") and not said
    its = read_record(kept.with_suffix(".json"))
    assert its["data"]["train_images"] == record["data"]["train_images"] == 18
    for file, options, message in (
        (kept, [], "so without some of the images that are trained on here"),
        (student, ["DATASET.HOLDOUT", "0.125"], "so without some of the images"),
        (kept, held, ""),
        (student, ["DATASET.HOLDOUT", "0.5"], "so on held-out images"),
        (kept, [*held, "DATASET.HOLDOUT_SEED", "1"], "HOLDOUT_SEED 0, so on held-out images"),
    ):
        _, _, said = run(f"with {options}", "DISTILLER.TEACHER_CKPT", str(file), *options)
        assert bool(said) == bool(message)
        assert not message or re.search(f"{file} was .*{message}", said[0]), said

    shutil.copy(kept, "public.pth")
    public = "DISTILLER.TEACHER_CKPT", "public.pth"
    for options in ([], ["DISTILLER.ASSISTANTS", "['resnet14']"]):
        *_, said = run(f"public {options}", *public, *held, *options)
        assert all(
            "public.pth may have been trained on the held-out images" in line for line in said
        )
        assert len(said) == 1 + bool(options)
    words = ["-m", "resnet8", "-c", "public.pth", "-d", "folder", "--root", str(root), *held]
    assert "may have been trained on" in tool("eval", *words, "DATASET.SIDE", "8")[1]


@pytest.mark.parametrize(
    ("load", "message"),
    [
        (lambda s: None, "gives a NoneType, expected .train, test., each an ImageSet"),
        (lambda s: digits.load()[0], "gives a ImageSet, expected"),
        (lambda s: (1, 2), "gives a tuple, expected"),
        (lambda s: [d.subset(torch.arange(0)) for d in digits.load()], "has 0 training and 0 test"),
        (lambda s: (digits.load()[0], digits.load()[1].changed(padding=0)), None),
    ],
)
def test_a_registered_data_set_that_is_none(load, message):
    register_dataset("mine")(load)
    try:
        if message is None:
            assert get_dataset(section(TYPE="mine"))
            return
        with pytest.raises(ConfigError, match=f"DATASET.TYPE mine: {message}") as error:
            load_cfg(None, ["DATASET.TYPE", "mine"])
        assert "\n" not in str(error.value)
    finally:
        del DATASETS["mine"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": torch.zeros(64, 3, 8, 8)}, "train_images is torch.float32, expected uint8"),
        ({"images": np.zeros((64, 3, 8, 8), np.uint8)}, "train_images is a ndarray, expected a t"),
        ({"images": torch.zeros(64, 1, 8, 8, dtype=torch.uint8)}, r"has shape \(64, 1, 8, 8\)"),
        ({"labels": torch.zeros(63, dtype=torch.int64)}, r"train_labels has shape \(63,\)"),
        ({"labels": torch.arange(64) - 1}, "has labels below 0"),
        ({"labels": torch.zeros(64, dtype=torch.int64)}, "has training images of one class"),
    ],
)
def test_tensors_from_python_that_are_refused(workdir, changes, message):
    split = {"images": torch.zeros(64, 3, 8, 8, dtype=torch.uint8), "labels": torch.arange(64) % 4}
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 4))
    with pytest.raises(ConfigError, match=message):
        distill(network, network, tuple((split | changes).values()), tuple(split.values()))


@pytest.mark.parametrize("gap", [0, 2])
def test_labels_that_leave_a_class_empty_are_said_and_counted_right(workdir, capsys, gap):
    labels = torch.arange(64) % 3
    labels[labels >= gap] += 1
    split = torch.randint(256, (64, 3, 8, 8), dtype=torch.uint8), labels
    networks = [torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 4)) for _ in range(2)]
    options = ["SOLVER.EPOCHS", 1, "SOLVER.LR_DECAY_STAGES", [], "DATASET.HOLDOUT", 0.25]
    options += ["SOLVER.BATCH_SIZE", 48]
    record, _ = distill(*networks, split, split, options=options, device="cpu")
    warning = f"warning: no training image has label {gap}: 1 of 4 classes have no image; if labels"
    assert capsys.readouterr().out.count(warning) == 1
    data = record["data"]
    assert (data["train_images"], data["evaluated_images"], data["classes"]) == (48, 16, 4)


def test_a_class_without_a_test_image_is_said(workdir, capsys):
    np.savez("a.npz", **arrays(test_labels=np.arange(8) % 3))
    options = ["DATASET.TYPE", "arrays", "DISTILLER.STUDENT", "resnet8", "SOLVER.EPOCHS", "1"]
    train(load_cfg(None, [*options, "DATASET.ROOT", "a.npz"]), "r", CPU)
    said = [line for line in capsys.readouterr().out.splitlines() if "has label" in line]
    assert said == ["warning: no test image has label 3: 1 of 4 classes are not tested"]


@pytest.mark.parametrize("kind", ["arrays", "folder"])
def test_a_share_that_holds_out_nothing_is_refused_with_the_config(workdir, kind):
    root = pictures(workdir / "d", count=3)
    np.savez("a.npz", **arrays(train_labels=np.arange(20) % 10))
    place = ["DATASET.ROOT", "a.npz" if kind == "arrays" else str(root), "DATASET.SIDE", "8"]
    options = ["DATASET.TYPE", kind, *place, "DISTILLER.STUDENT", "resnet8"]
    most = "a class has at most [23] training images; expected a larger share, or 0"
    with pytest.raises(ConfigError, match=rf"\ADATASET.HOLDOUT: 0.1 holds out no image: {most}\Z"):
        load_cfg(None, [*options, "DATASET.HOLDOUT", "0.1"])
    assert load_cfg(None, [*options, "DATASET.HOLDOUT", "0.5"])
