from __future__ import annotations
def update_groups(layers,u,*,empty_group="reference"):
    if u==0: return ()
    F=-(-layers//u)
    g=[tuple(l for l in range(layers) if l%F==i) for i in range(F)]
    if empty_group=="reference" and len(g[0])==len(g[-1]): g.append(())
    return tuple(g)
class UpdateSchedule:
    def __init__(self,layers,u,*,empty_group="reference"):
        self.groups=update_groups(layers,u,empty_group=empty_group); self.warm_up_until=-1; self._i=0
    def begin(self,iteration):
        if not self.groups or iteration<=self.warm_up_until: return ()
        g=self.groups[self._i%len(self.groups)]; self._i+=1; return g
