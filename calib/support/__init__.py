"""What all of synthesis needs and what is not ClusterQ: progress, checkpoints, settings, errors, precision."""
