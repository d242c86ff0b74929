"""The graph pass: find the convolutions, fold and fuse around them, assign layouts, lower to primitives."""
