"""Readers of traces, one a format; each gives a `moe_eplb.analysis.capture.Capture` or one clear error."""
