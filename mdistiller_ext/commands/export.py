"""Write a trained network for use elsewhere, each file checked on images of the test set.

%(prog)s -c output/digits/dkd_lp,digits,seed0
%(prog)s -m resnet56 -c FILE --root data --format onnx --output exported

.onnx and .pt2 (torch.export) take RGB images (batch, 3, side, side), float32 in [0, 1], and give
logits: the normalisation is inside. .safetensors has the weights alone.
"""

import argparse
import io
import json
import warnings
from collections.abc import Callable, Mapping
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..command import path
from ..errors import ConfigError, RunError, brief
from .eval import load, network_arguments

if TYPE_CHECKING:
    from torch import Tensor

    from ..engine import Student

IMAGES = 256  # of the test set, on which a file is checked
TOLERANCE = 1e-3  # relative to the largest logit


class Format(NamedTuple):
    """How a student becomes a file.

    Attributes:
        libraries: that it takes.
        write: (student, what is said of it) -> the file's content.
        answer: (content, student, images in [0, 1]) -> the logits of what the content holds.
    """

    libraries: tuple[str, ...]
    write: Callable[["Student", Mapping[str, str]], bytes]
    answer: Callable[[bytes, "Student", "Tensor"], "Tensor"]


def arguments(parser: argparse.ArgumentParser) -> None:
    network_arguments(parser)
    parser.add_argument(
        "--format", action="append", choices=FORMATS, help="may be given again; default: all"
    )
    parser.add_argument(
        "--output", type=path, metavar="FOLDER", help="default: where the weights are"
    )


def main(args: argparse.Namespace) -> None:
    formats = dict.fromkeys(args.format or FORMATS)
    for name in formats:
        for library in FORMATS[name].libraries:
            try:
                import_module(library)
            except ImportError as error:
                raise ConfigError(
                    f"--format {name}: {error}: pip install 'mdistiller-ext[export]'"
                ) from error
    import torch

    from ..engine import Student, predict
    from ..files import writing

    loaded = load(args)
    weights, test = loaded.weights.file, loaded.test
    folder = args.output or weights.parent
    files = {name: folder / f"{weights.stem}.{name}" for name in formats}
    if weights in files.values():
        raise ConfigError(f"--output: {weights} would be overwritten, expected another folder")
    some = test.subset(torch.arange(min(IMAGES, len(test))), alone=True)
    expected = predict(loaded.network, some, IMAGES)
    (raw,) = some.changed(mean=[0.0] * 3, std=[1.0] * 3, padding=0).plain(IMAGES)
    student = Student(loaded.network, test.mean, test.std, test.side, loaded.class_names)
    about: dict[str, Any] = {
        "network": loaded.name,
        "input": f"image (batch, 3, {test.side}, {test.side}), float32, RGB in [0, 1]",
        "output": f"logits (batch, {len(loaded.class_names)})",
        "mean": test.mean.tolist(),
        "std": test.std.tolist(),
        "class_names": loaded.class_names,
    }
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    for name, file in files.items():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of torch about itself
                content = FORMATS[name].write(student, {k: json.dumps(about[k]) for k in about})
                logits = FORMATS[name].answer(content, student, raw.image)
        except Exception as error:  # whatever a network does that an exporter does not know
            raise RunError(f"{loaded.name} as {name}: {brief(str(error))}") from error
        apart = (logits - expected).abs().max().item()
        if not apart <= TOLERANCE * expected.abs().max():  # a NaN is not
            raise RunError(f"{file}: not written: its logits differ by up to {apart:.1e}")
        _write(file, content)
        print(
            f"{file}: {len(content) / 1e3:,.0f} kB; its logits of {len(some)} test images differ "
            f"from the network's by at most {apart:.1e}, where the largest is "
            f"{expected.abs().max():.1f}"
        )
    print(f"input: {about['input']}; output: {about['output']}")


def _write(file: Path, content: bytes) -> None:
    from ..files import write_atomically

    write_atomically(file, lambda sink: sink.write(content))


@cache
def traced(student: "Student") -> Any:
    """The program of a student, for any number of images."""
    import torch

    images = torch.zeros(2, 3, student.side, student.side)
    batch = {"image": {0: torch.export.Dim("batch")}}
    return torch.export.export(student, (images,), dynamic_shapes=batch)


def write_onnx(student: "Student", about: Mapping[str, str]) -> bytes:
    import torch

    names: dict[str, Any] = {"input_names": ["image"], "output_names": ["logits"]}
    program = torch.onnx.export(traced(student), (), dynamo=True, verbose=False, **names)
    assert program is not None
    proto = program.model_proto
    for key, value in about.items():
        proto.metadata_props.add(key=key, value=value)
    return proto.SerializeToString()


def answer_onnx(content: bytes, student: "Student", image: "Tensor") -> "Tensor":
    import onnxruntime
    import torch

    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(["logits"], {"image": image.numpy()})[0])


def write_pt2(student: "Student", about: Mapping[str, str]) -> bytes:
    import torch

    sink = io.BytesIO()
    torch.export.save(traced(student), sink, extra_files={"about.json": json.dumps({**about})})
    return sink.getvalue()


def answer_pt2(content: bytes, student: "Student", image: "Tensor") -> "Tensor":
    import torch

    return torch.export.load(io.BytesIO(content)).module()(image)


def write_safetensors(student: "Student", about: Mapping[str, str]) -> bytes:
    from safetensors.torch import save

    state = student.network.state_dict()
    # Copies: of weights that are shared it takes none.
    return save({key: value.clone().contiguous() for key, value in state.items()}, {**about})


def answer_safetensors(content: bytes, student: "Student", image: "Tensor") -> "Tensor":
    import copy

    from safetensors.torch import load

    other = copy.deepcopy(student)
    for tensor in other.network.state_dict().values():
        tensor.zero_()
    other.network.load_state_dict(load(content))
    return other(image)


FORMATS = {
    "onnx": Format(("onnx", "onnxscript", "onnxruntime"), write_onnx, answer_onnx),
    "pt2": Format((), write_pt2, answer_pt2),
    "safetensors": Format(("safetensors",), write_safetensors, answer_safetensors),
}
