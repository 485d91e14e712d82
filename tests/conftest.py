"""What several tests share: the real data where it is, and small configs on digits."""

from pathlib import Path

import pytest
import torch

from mdistiller_ext.config import load_cfg

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
CPU = torch.device("cpu")


@pytest.fixture
def shared() -> Path:
    """The folder with the real CIFAR-100 and real teachers."""
    if not (SHARED / "cifar-100-binary").is_dir():
        pytest.skip("the real CIFAR-100 and its teachers are not in ../shared")
    return SHARED


@pytest.fixture
def workdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder, so that outputs and checkpoints land nowhere else."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def digits_cfg(workdir: Path):
    """Builds a config for the student alone, or for a method with an untrained teacher."""

    def build(name: str = "vanilla", *options: str):
        extra = ["SOLVER.EPOCHS", "3", *options]
        if name != "vanilla":
            extra += ["DISTILLER.TEACHER_CKPT", str(untrained_teacher(workdir))]
        return load_cfg(ROOT / "configs" / "digits" / f"{name}.yaml", extra)

    return build


def untrained_teacher(folder: Path) -> Path:
    """A file of random weights for the teacher of the digits configs."""
    from mdistiller_ext import cifar_model_dict

    file = folder / "teacher.pth"
    if not file.exists():
        torch.manual_seed(1)
        name = load_cfg(ROOT / "configs" / "digits" / "dkd.yaml").DISTILLER.TEACHER
        torch.save({"model": cifar_model_dict[name][0](num_classes=10).state_dict()}, file)
    return file
