from __future__ import annotations
import heapq
from dataclasses import dataclass
import numpy as np
from moe_eplb.core.placement import Placement

@dataclass(frozen=True)
class Plan:
    placement: Placement
    changed: np.ndarray
    predicted: np.ndarray

def replicate(load, num_slots):
    load=np.asarray(load,dtype=np.float64); E=len(load); N=num_slots
    if N==E: return np.ones(E,dtype=np.int64)
    if load.sum()==0:
        c=np.full(E,N//E,dtype=np.int64); c[:N%E]+=1; return c
    c=np.ones(E,dtype=np.int64)
    for _ in range(N-E):
        r=load/c; m=r.max(); i=np.flatnonzero(r==m)[-1]; c[i]+=1
    return c
def place(load, counts, ranks):
    size=np.asarray(load)/counts
    items=sorted(((-size[e],e) for e in range(len(load)) for _ in range(int(counts[e]))))
    per=len(items)//ranks; heap=[(0.0,r) for r in range(ranks)]; out=np.zeros(len(items),dtype=np.int32); fill=[0]*ranks
    for s,e in items:
        l,r=heapq.heappop(heap); out[r*per+fill[r]]=e; fill[r]+=1
        if fill[r]<per: heapq.heappush(heap,(l-s,r))
    return out
def keep_slots(cur,new,ranks):
    out=np.empty_like(new); per=len(new)//ranks
    for r in range(ranks):
        c=cur[r*per:(r+1)*per]; rest=list(new[r*per:(r+1)*per]); res=[-1]*per
        for i,e in enumerate(c):
            if e in rest: res[i]=e; rest.remove(e)
        for i in range(per):
            if res[i]<0: res[i]=rest.pop(0)
        out[r*per:(r+1)*per]=res
    return out
def plan(load,current,*,preserve_slots=True):
    c=replicate(load,current.slots); new=place(load,c,current.ranks)
    if preserve_slots: new=keep_slots(current.slot_to_expert,new,current.ranks)
    p=Placement(current.ranks,current.experts,new)
    return Plan(p,p.changed_slots(current),p.rank_load(np.asarray(load)))
def initial_slots(experts,ranks,slots_per_rank):
    return np.array([(r*experts//ranks+j)%experts for r in range(ranks) for j in range(slots_per_rank)],dtype=np.int32)
