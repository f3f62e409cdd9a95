"""The installed version."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("clusterq-deploy")
except PackageNotFoundError:  # the sources are used without being installed
    __version__ = "0+unknown"
