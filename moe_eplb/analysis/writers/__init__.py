"""Captures to files; each writer says what its format cannot hold."""
