"""Judging a run from what it left behind, without torch and without the code that ran."""
