"""Errors of the synthesis stage, and the root of the project's error tree."""


class ClusterQError(Exception):
    """Root of every error that this project raises on purpose.

    Its message is one line for a person: what was received, what was expected, what to do.
    """


class NoBatchNormError(ClusterQError, ValueError):
    """The model has no BatchNorm statistics, so ClusterQ has nothing to align to."""


class SynthesisError(ClusterQError, RuntimeError):
    """Synthesis could not produce a usable calibration set."""
