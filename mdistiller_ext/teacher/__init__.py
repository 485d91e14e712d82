"""Where a teacher's weights come from, and the table of its outputs."""

from .table import TeacherTable, Unwritable, digest
from .tabled import TabledTeacher, features_taken
from .weights import (
    PRETRAINED,
    Weights,
    fetch_weights,
    find_weights,
    kept_at,
    load_into,
    load_weights,
)
