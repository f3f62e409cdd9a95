"""`python -m cli` is `clusterq`."""

from cli.main import main

main()
