"""Cross-entropy against several shifted targets: `reference` is the specification, `op` the public functions."""
