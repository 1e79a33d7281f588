"""Mixture-of-Experts layers with an online expert-parallel load balancer, and the means to prove that it is right.

Symbols, used everywhere: T tokens of a rank, K top-k, E experts (logical), P physical slots (P = R x slots per rank,
P >= E), R expert-parallel ranks, L MoE layers, D hidden size, I intermediate size. Slot s lies on rank s // (P / R).
"""
