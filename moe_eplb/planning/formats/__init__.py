"""Files in which other stacks keep loads and placements."""
