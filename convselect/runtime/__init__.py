"""What runs at each call: the compiled graph, its weights, CUDA graphs, and calls without guards."""
