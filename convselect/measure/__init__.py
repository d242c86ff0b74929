"""Timing primitives and operators on a CPU or GPU, and what is made of it: profiles and calibrations."""
