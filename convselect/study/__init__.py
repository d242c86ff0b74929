"""The transfer study: how well a model of one machine, and a few samples of another, tell the other's times."""
