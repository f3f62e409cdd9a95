"""The stages of a run, in a file each; see `run.stage.Kind` for their functions, and `pipeline` for their order."""
