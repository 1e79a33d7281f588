"""Placements from loads: policies, what they cost and how good they are, and the files that others keep them in."""
