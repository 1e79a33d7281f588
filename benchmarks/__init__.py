"""Costs and gains, measured; no part of the tests."""
