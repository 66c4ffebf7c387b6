"""Rotary embedding with Gaussian damping: `reference` is the specification, `op` the public function."""
