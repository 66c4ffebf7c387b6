"""Attention inside many tiny padded blocks: `reference` is the specification, `op` the public function."""
