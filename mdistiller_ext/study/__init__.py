"""Studies: many runs under the same conditions, and what can be concluded from them."""
