"""Attention with an ALiBi bias taken from positions: `reference` is the specification, `op` the public function."""
