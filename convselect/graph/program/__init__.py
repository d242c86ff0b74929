"""Stretches of the lowered graph that run as one operator."""
