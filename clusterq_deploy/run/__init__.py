"""A run: its directory, manifest and checkpoints, and what its stages share."""
