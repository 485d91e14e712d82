"""The bridge to the real mdistiller, the only place that imports it."""
