"""Writing down what a run does: the event log of each rank and its export."""
