"""Pure data and rules: no torch, no processes, no clocks. Everything else may import it; it imports nothing of ours."""
