"""The toolkit's own training loop, to measure ours against."""

import importlib
import tempfile
from collections.abc import Iterator
from contextlib import redirect_stderr
from os import devnull
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .locate import import_toolkit


def toolkit_steps(
    method: str,
    teacher: str,
    student: str,
    images: Tensor,
    targets: Tensor,
    batch_size: int,
    workers: int,
) -> Iterator[None]:
    """Training steps of the real BaseTrainer with the real data set class, loader and networks.

    On a machine without a GPU `compat.mend` must have been called. Weights are random.

    Args:
        images: raw, (N, 3, 32, 32), uint8.
        workers: processes of the loader.
    """
    _, _, registry, config = import_toolkit()
    models = importlib.import_module("mdistiller.models").cifar_model_dict
    data = importlib.import_module("mdistiller.dataset.cifar100")
    trainers = importlib.import_module("mdistiller.engine").trainer_dict
    instances: Any = data.CIFAR100Instance.__new__(data.CIFAR100Instance)
    instances.data = images.permute(0, 2, 3, 1).contiguous().numpy()
    instances.targets = targets.tolist()
    instances.transform, instances.target_transform = data.get_cifar100_train_transform(), None
    loader = torch.utils.data.DataLoader(
        instances, batch_size=batch_size, shuffle=True, num_workers=workers
    )
    networks = (models[name][0](num_classes=100) for name in (student, teacher))
    distiller = torch.nn.DataParallel(registry[method](*networks, config).cuda())
    with tempfile.TemporaryDirectory() as folder:
        cfg = config.clone()
        cfg.defrost()
        cfg.LOG.PREFIX, cfg.SOLVER.BATCH_SIZE = folder, batch_size
        trainer = trainers["base"](Path(folder).name, distiller, loader, loader, cfg)
        trainer.tf_writer.close()
        meter = importlib.import_module("mdistiller.engine.utils").AverageMeter
        names = ("training_time", "data_time", "losses", "top1", "top5")
        distiller.train()
        with open(devnull, "w") as nowhere:
            while True:
                meters = {name: meter() for name in names}
                with redirect_stderr(nowhere):
                    bar = importlib.import_module("tqdm").tqdm(range(len(loader)))
                for batch in loader:
                    bar.set_description(trainer.train_iter(batch, 1, meters))
                    bar.update()
                    yield
