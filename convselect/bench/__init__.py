"""Timing whole networks against other runtimes."""
