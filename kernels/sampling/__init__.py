"""One token for each of several vocabularies: `reference` is the specification, `op` the public function."""
