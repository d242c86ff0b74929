"""Triton kernels for NVIDIA GPUs. Nothing here is imported before a GPU primitive runs: Triton is optional.

Every file has kernels, and a function that says which launches (`launch.Launch`) compute a convolution. A kernel is
specialised by its tile, its activation and the element type; the geometry comes at run time, so that a network needs
few compilations. Channels and pixels are counted in 32 bits, or in 64 where they need it; addresses have 64.
"""
