"""CIFAR-100 in both official forms, its download, and digits."""

import hashlib
import io
import pickle
import tarfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from conftest import read_digits

from mdistiller_ext.data import cifar100
from mdistiller_ext.errors import RunError
from mdistiller_ext.files import download

PIXELS = np.random.default_rng(0).integers(256, size=(5, 3072), dtype=np.uint8)
LABELS = np.array([3, 99, 0, 42, 7], np.uint8)


def binary_file() -> bytes:
    coarse = np.zeros_like(LABELS)
    return np.concatenate([coarse[:, None], LABELS[:, None], PIXELS], axis=1).tobytes()


def python_file() -> bytes:
    return pickle.dumps({"data": PIXELS, "fine_labels": LABELS.tolist()}, protocol=2)


def md5(content: bytes) -> str:
    return hashlib.md5(content).hexdigest()


def archive(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


@pytest.fixture
def small(monkeypatch):
    """Makes the five images above the official files."""
    official = {"train.bin": md5(binary_file()), "test.bin": md5(binary_file())}
    monkeypatch.setattr(cifar100, "BINARY", official)
    monkeypatch.setattr(cifar100, "PYTHON", dict.fromkeys(("train", "test"), md5(python_file())))


@pytest.fixture
def server():
    """Serves `content[path]` on the loopback; a negative length breaks off in the middle."""
    content: dict[str, bytes] = {}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            body = content.get(self.path)
            self.send_response(200 if body is not None else 404)
            broken = self.path.endswith("broken")
            self.send_header("Content-Length", str(len(body or b"") * (2 if broken else 1)))
            self.end_headers()
            self.wfile.write(body or b"")

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield content, f"http://127.0.0.1:{http.server_address[1]}"
        http.shutdown()


def write(folder, name, content):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(content)


def check(train):
    batch = next(iter(train.plain(5)))
    assert batch.target.tolist() == LABELS.tolist()
    assert torch.equal(
        train.padded[:, :, 4:-4, 4:-4], torch.from_numpy(PIXELS.reshape(5, 3, 32, 32))
    )


@pytest.mark.parametrize("form", ["binary", "python"])
def test_both_forms(small, tmp_path, form):
    folder = tmp_path / f"cifar-100-{form}"
    for name in cifar100.BINARY if form == "binary" else cifar100.PYTHON:
        write(folder, name, binary_file() if form == "binary" else python_file())
    train, test = cifar100.load(tmp_path)
    check(train)
    check(test)


def test_a_damaged_file_is_named(small, tmp_path):
    for name in cifar100.BINARY:
        write(tmp_path / "cifar-100-binary", name, binary_file())
    write(tmp_path / "cifar-100-binary", "test.bin", binary_file()[:-1])
    with pytest.raises(RunError, match=r"test\.bin: not the official file \(15369 bytes, md5 "):
        cifar100.load(tmp_path)


def test_a_pickle_that_is_not_the_official_file_is_not_run(small, tmp_path):
    class Hostile:
        def __reduce__(self):
            return (open, (str(tmp_path / "executed"), "w"))

    for name in cifar100.PYTHON:
        write(tmp_path / "cifar-100-python", name, pickle.dumps(Hostile()))
    with pytest.raises(RunError, match="not the official file"):
        cifar100.load(tmp_path)
    assert not (tmp_path / "executed").exists()


def test_download(small, tmp_path, server, monkeypatch, capfd):
    content, address = server
    members = {f"cifar-100-binary/{name}": binary_file() for name in cifar100.BINARY}
    content["/c.tar.gz"] = archive(members)
    monkeypatch.setattr(cifar100, "URL", f"{address}/c.tar.gz")
    monkeypatch.setattr(cifar100, "ARCHIVE_MD5", md5(content["/c.tar.gz"]))
    train, _ = cifar100.load(tmp_path / "data")
    check(train)
    assert [p.name for p in (tmp_path / "data").iterdir()] == ["cifar-100-binary"]
    output = capfd.readouterr()
    assert "downloading it from http://127.0.0.1" in output.out
    assert "c.tar.gz: 100%" in output.err


def test_a_root_that_is_the_data_itself_is_understood(tmp_path, monkeypatch):
    folder = tmp_path / "cifar-100-binary"
    folder.mkdir()
    for name in cifar100.BINARY:
        (folder / name).write_bytes(binary_file())
    monkeypatch.setattr(cifar100, "BINARY", dict.fromkeys(cifar100.BINARY, md5(binary_file())))
    monkeypatch.setattr(cifar100, "fetch", lambda root: pytest.fail("it is there"))
    check(cifar100.load(folder)[0])


def test_failed_download_says_where_to_put_the_data(tmp_path, server, monkeypatch):
    monkeypatch.setattr(cifar100, "URL", f"{server[1]}/missing.tar.gz")
    with pytest.raises(RunError, match=r"DATASET\.ROOT .*404.*unpack the official archive there"):
        cifar100.load(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("path", "md5", "message"),
    [("/f", "0" * 32, "md5 .* expected 0000"), ("/broken", None, "broke off after 4 of 8 bytes")],
)
def test_wrong_or_broken_downloads_leave_nothing(tmp_path, server, path, md5, message):
    content, address = server
    content[path] = b"1234"
    (tmp_path / "f").write_bytes(b"before")
    with pytest.raises(RunError, match=message):
        download(address + path, tmp_path / "f", md5)
    assert [p.name for p in tmp_path.iterdir()] == ["f"]
    assert (tmp_path / "f").read_bytes() == b"before"


def test_download_from_nowhere(tmp_path):
    with pytest.raises(RunError, match="download failed"):
        download("http://127.0.0.1:9/f", tmp_path / "f")


def test_real_cifar100(shared):
    train, test = cifar100.load(shared)
    assert (len(train), len(test)) == (50_000, 10_000)
    assert train.targets.bincount().tolist() == [500] * 100
    names = (shared / "cifar-100-binary" / "fine_label_names.txt").read_text().split()
    assert train.class_names == test.class_names == names
    pixels = train.padded[:, :, 4:-4, 4:-4].float() / 255
    assert pixels.mean(dim=(0, 2, 3)).tolist() == pytest.approx(cifar100.MEAN, abs=2e-4)


def test_digits_split_is_fixed_and_balanced():
    (train, test), (again, _) = read_digits(), read_digits()
    assert len(train) + len(test) == 1797
    assert torch.equal(train.padded, again.padded)
    shares = test.targets.bincount() / (train.targets.bincount() + test.targets.bincount())
    assert shares.max() - shares.min() < 0.02
    plain = torch.cat([b.image for b in train.plain(100)])
    assert plain.mean().abs() < 1e-3 and (plain.std() - 1).abs() < 1e-3
