"""The assignment: costs in, choices out. Knows no convolutions and no torch."""

from convselect.selection.pbqp import Solution, solve

__all__ = ["Solution", "solve"]
