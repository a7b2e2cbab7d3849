"""How weights change: optimizers, learning-rate schedules and the loss scale."""
