"""Where quantizers go: the traced graph, its operations, placement."""
