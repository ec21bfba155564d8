"""How a run trains: networks, objective, the Lightning module, checkpoints."""
