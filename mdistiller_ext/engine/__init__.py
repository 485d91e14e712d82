"""Training and evaluating: the loop, its checkpoints and records."""

from .build import pick_device
from .evaluation import fidelity, numbers, performance, predict
from .folder import default_name, former_name
from .own import distill
from .replicas import World
from .stop import StopSignals
from .student import Student, left_by, load_student
from .training import teacher_weights, train, train_many
