"""How a run trains: the tuned model, the objective, the Lightning module, checkpoints."""
