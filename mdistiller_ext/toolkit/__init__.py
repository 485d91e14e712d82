"""The bridge to the real mdistiller, the only place that imports it."""

from .compat import mend
from .locate import find_toolkit
from .registration import register
