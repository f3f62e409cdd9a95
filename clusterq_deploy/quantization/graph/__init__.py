"""Where quantizers go: the folded graph, its operations, placement."""
