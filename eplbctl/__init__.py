"""The command line of moe_eplb: parse, call, print. It computes nothing itself."""
