"""Training: the loop and what it stands on: devices, losses, checkpoints, several processes, packs and graphs."""
