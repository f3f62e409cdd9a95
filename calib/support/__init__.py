"""What all of synthesis needs, and nothing of ClusterQ: progress, checkpoints, settings, errors, precision."""
