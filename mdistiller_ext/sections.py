"""The sections that all methods share, as the toolkit has them and as far as this project adds."""

from dataclasses import dataclass

from yacs.config import CfgNode

from .data import Dataset, facts
from .distillers import distiller_dict, source
from .models import EXPECTED, is_network
from .plugins import MODULES
from .settings import (
    NAME,
    PATH,
    SWITCH,
    TEXT,
    Rule,
    Settings,
    count,
    list_of,
    number,
    number_to,
    one_of,
    or_empty,
    setting,
)
from .solver import ARGUMENTS, OPTIMIZERS

ASSISTANTS: Rule = (
    lambda v: all(type(n) is str and (is_network(n) or n.endswith((".yaml", ".yml"))) for n in v),
    "a list of networks, or of YAML files that train one each",
)


@dataclass(frozen=True)
class Experiment(Settings):
    PROJECT: str = setting("distill", NAME, "folder of the runs, in LOG.PREFIX")
    NAME: str = setting("", or_empty(NAME), "folder of the run; empty: tag, options and seed")
    TAG: str = setting("default", TEXT, "begins the default name")
    IMPORT: list = setting([], MODULES, "modules that register what the config names")


@dataclass(frozen=True)
class DatasetTest(Settings):
    BATCH_SIZE: int = setting(64, count(1), "images at once; at least 2,500 on a GPU")


@dataclass(frozen=True)
class Networks(Settings):
    TYPE: str = setting("NONE", lambda: one_of(*distiller_dict), "the method")
    TEACHER: str = setting("ResNet50", (is_network, EXPECTED))
    STUDENT: str = setting("resnet32", (is_network, EXPECTED))
    ASSISTANTS: list = setting([], ASSISTANTS, "trained one after the other between the two")
    TEACHER_CKPT: str = setting(
        "", or_empty(PATH), "its weights; empty: the usual places; pretrained: the library's own"
    )
    TEACHER_CFG: str = setting("", or_empty(PATH), "trains the teacher where no weights are found")
    TEACHER_TABLE: str = setting("auto", one_of("auto", "on", "off"), "keep the teacher's logits")
    TEACHER_TABLE_DTYPE: str = setting(
        "float32", one_of("float32", "float16"), "float16 halves its 3.34 GB"
    )
    TEACHER_TABLE_TF32: bool = setting(
        False, SWITCH, "a GPU computes its logits in TF32: faster, to about 2e-3 of the largest"
    )
    TEACHER_TABLE_ROOT: str = setting("", or_empty(PATH), "empty: the user's cache folder")
    SOURCE: str = setting(
        "auto",
        one_of("auto", "ext", "mdistiller"),
        "whose method; auto: ours where we have it",
    )
    FIX_UPSTREAM: bool = setting(False, SWITCH, "mend the known faults of the toolkit's methods")


ALPHA: Rule = (lambda v: v == 0 or 0.01 <= v <= 100, "0 or a number from 0.01 to 100")
STACKS = ("auto", "none", "grouped", "dense64", "dense128")


@dataclass(frozen=True)
class Solver(Settings):
    TRAINER: str = setting("base", one_of("base", "crd"), "the toolkit's; no effect here")
    TYPE: str = setting("SGD", one_of(*OPTIMIZERS), "the optimizer, as in torch.optim")
    OPTIMIZER_ARGS: str = setting("", or_empty(ARGUMENTS), "further ones of the optimizer's")
    BATCH_SIZE: int = setting(64, count(1), "images a step, over all processes")
    EPOCHS: int = setting(240, count(1))
    LR: float = setting(0.05, number(0), "learning rate, the largest of a schedule")
    SCHEDULE: str = setting("step", one_of("step", "cosine", "one_cycle"), "of the learning rate")
    LR_WARMUP: float = setting(0.0, number(0), "epochs in which the learning rate rises")
    LR_DECAY_STAGES: list = setting(
        [150, 180, 210],
        list_of(number(0), least=0, rising=True),
        "the last epoch of each, with SCHEDULE step",
    )
    LR_DECAY_RATE: float = setting(0.1, number_to(0, 1), "factor after each stage")
    WEIGHT_DECAY: float = setting(0.0001, number(0, 1))
    MOMENTUM: float = setting(0.9, number(0, 1), "of SGD")
    CLIP_NORM: float = setting(0.0, number(0), "largest norm of a step's gradient; 0: any")
    LABEL_SMOOTHING: float = setting(
        0.0, number(0, 1), "share of a label that all classes have, in the cross-entropy"
    )
    MIXUP: float = setting(0.0, ALPHA, "α of mixup; 0: none")
    CUTMIX: float = setting(0.0, ALPHA, "α of CutMix; 0: none; of both, each batch takes one")
    EMA_DECAY: float = setting(0.0, number(0, 1), "of an average of the weights; 0: none")
    SEED: int = setting(0, number(0, 2**63), "of weights, order, views and what methods draw")
    AMP: str = setting("none", one_of("none", "bf16"), "bf16: the student in mixed precision")
    TF32: bool = setting(False, SWITCH, "on a GPU: float32 convolutions on tensor cores")
    COMPILE: bool = setting(False, SWITCH, "torch.compile for students without features")
    STACK: str = setting(
        "auto",
        one_of(*STACKS),
        "of runs trained together: how the students' convolutions are one; auto: grouped on a GPU",
    )
    SYNC_BN: bool = setting(False, SWITCH, "on several devices: batch norm over the whole batch")
    CUDA_GRAPH: bool = setting(True, SWITCH, "on a GPU, where the method allows it")


@dataclass(frozen=True)
class Log(Settings):
    TENSORBOARD_FREQ: int = setting(500, count(1), "the toolkit's; no effect here")
    SAVE_CHECKPOINT_FREQ: int = setting(40, count(1), "epochs between student_N files")
    EVAL_EVERY: int = setting(
        1, count(1), "epochs from one evaluation to the next; the last epoch always has one"
    )
    PREFIX: str = setting("./output", PATH, "folder of all runs")
    WANDB: bool = setting(False, SWITCH, "log to wandb too")


SECTIONS: dict[str, type[Settings]] = {
    "EXPERIMENT": Experiment,
    "DATASET": Dataset,
    "DATASET.TEST": DatasetTest,
    "DISTILLER": Networks,
    "SOLVER": Solver,
    "LOG": Log,
}
SHARED = tuple(dict.fromkeys(section.split(".")[0] for section in SECTIONS))


@dataclass(frozen=True)
class Parts:
    """A checked config, read once: what a run is put together from.

    Attributes:
        cfg: the whole, as methods take it and records keep it.
        ours: whether the method is this project's; else it is the toolkit's.
        classes: of the data set.
        test_batch: images that are evaluated at once.
    """

    cfg: CfgNode
    dataset: Dataset
    networks: Networks
    solver: Solver
    log: Log
    ours: bool
    classes: int
    test_batch: int

    @classmethod
    def read(cls, cfg: CfgNode) -> "Parts":
        return cls(
            cfg,
            Dataset.read(cfg.DATASET),
            Networks.read(cfg.DISTILLER),
            Solver.read(cfg.SOLVER),
            Log.read(cfg.LOG),
            source(cfg.DISTILLER) == "ext",
            facts(cfg.DATASET).classes,
            cfg.DATASET.TEST.BATCH_SIZE,
        )
