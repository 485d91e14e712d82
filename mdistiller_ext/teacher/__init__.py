"""Where a teacher's weights come from."""

from .weights import Weights, fetch_weights, find_weights, load_into, load_weights
