"""Training with Ray Train: everything that happens once per step."""
