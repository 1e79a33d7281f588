"""How rows reach the ranks that hold their slots, and how the results come back."""

from moe_eplb.moe.dispatch.allgather import AllGather
from moe_eplb.moe.dispatch.alltoall import AllToAll
from moe_eplb.moe.dispatch.base import Dispatcher, Exchange, Received
from moe_eplb.moe.dispatch.symm_mem import SymmMem

__all__ = ["AllGather", "AllToAll", "Dispatcher", "Exchange", "Received", "SymmMem"]
