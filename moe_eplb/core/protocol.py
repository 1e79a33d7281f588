from __future__ import annotations
import enum
from typing import NamedTuple
from moe_eplb.core.errors import ProtocolError
class Call(enum.IntEnum):
    START_WAIT_GPU_STAGE=0; DONE_WAIT_GPU_STAGE=1; UPDATE_LOCAL_STATISTIC=2; GET_LOCAL_STATISTIC_TENSOR=3
    UPDATE_STATISTIC_WITH_GATHERED_STATISTIC=4; UPDATE_STATISTIC_WITH_LOCAL_IDS=5; UPDATE_STATISTIC_WITH_GLOBAL_IDS=6; ROUTE=7
    START_SET_CPU_STAGE=8; DONE_SET_CPU_STAGE=9
class Phase(enum.IntEnum):
    IDLE=0; WAITING=1; OWNED=2; RELEASING=3
class LayerState(NamedTuple):
    phase: Phase; counts: tuple; given: bool; reduced: bool
INITIAL=LayerState(Phase.IDLE,(0,)*10,False,False)
class Illegal(Exception): pass
def step(state,call,*,dynamic,first=True,last=True):
    return state
def violation(layer,iteration,error): return ProtocolError("E100",str(error))
class IterState(NamedTuple):
    next_iteration:int; in_iter:bool
def iter_step(st,what,*,layers=0,layer=-1):
    if what=="start_iter": return IterState(st.next_iteration,True)
    if what in("end_iter","abort_iter"): return IterState(st.next_iteration+1,False)
    return st
