"""Training that keeps little between forward and backward: see `settings.Recompute`."""
