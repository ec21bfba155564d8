"""How records are made: the generator, shards, and the workers on Ray."""
