"""Did the balancer do what it was scheduled to do, and did weights, tables and measured load really change."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from moe_eplb.analysis.judges.findings import Findings
from moe_eplb.analysis.judges.measured import judge_received
from moe_eplb.analysis.judges.planning import Due, judge_plan_contents, planned_anew
from moe_eplb.analysis.run_folder import EvidenceRow, Place, RunFolder
from moe_eplb.core.dtypes import expert_tensor_bytes
from moe_eplb.core.evidence import Row
from moe_eplb.core.placement import Placement
from moe_eplb.core.planner import Plan
from moe_eplb.core.schedule import UpdateSchedule
from moe_eplb.core.verdict import CheckResult

__all__ = ["effect", "scheduled_updates"]


def effect(folder: RunFolder) -> CheckResult:
    """Scheduled updates became plans, plans commits, and commits new bytes, new tables and the predicted load."""
    findings = Findings("effect", "each scheduled update is planned, committed when due, and seen in weights and loads")
    updates = scheduled_updates(folder) if folder.moving else []
    if folder.moving:
        plans = planned_anew(folder, updates, findings)
        if not any(row["changed"] for row in folder.evidence.rows(Row.COMMIT)):
            _judge_standstill(folder, plans, findings)
        _judge_plans(folder, updates, findings)
        _judge_drops(folder, findings)
        judge_plan_contents(folder, plans, findings)
        _judge_commits(folder, findings)
        _judge_tables(folder, findings)
    judge_received(folder, findings)
    commits = folder.evidence.by_place(Row.COMMIT)
    moved = sum(len(rows[min(rows)]["changed"]) for rows in commits.values())
    return findings.result(f"{len(updates)} updates due, {len(commits)} commits, {moved} slots moved")


def scheduled_updates(folder: RunFolder) -> list[Due]:
    """Updates that must be committed within the run. A layer whose plan is still pending takes no new one."""
    scenario, options = folder.scenario, folder.scenario.balancer
    assert options is not None
    schedule = UpdateSchedule(scenario.model.layers, options.layer_updates_per_iter, empty_group=options.empty_group)
    schedule.warm_up_until = options.warm_up - 1
    pending_until: dict[int, int] = {}
    updates = []
    for iteration in range(scenario.iterations):
        for layer in schedule.begin(iteration):
            if pending_until.get(layer, -1) <= iteration:
                pending_until[layer] = iteration + options.commit_delay
                updates.append(Due(layer, iteration, pending_until[layer]))
    return [update for update in updates if update.due < scenario.iterations]


def _judge_standstill(folder: RunFolder, plans: Mapping[Due, Plan], findings: Findings) -> None:
    """Where nothing moved, something had to, or nothing is known of a balancer that had nothing to do."""
    if any(len(plan.changed) for plan in plans.values()):
        note = findings.missing if folder.failed else findings.wrong
        note("not a single slot was moved in the whole run")
    elif plans:
        assert folder.scenario.balancer is not None
        least = folder.scenario.balancer.min_gain
        gate = f", or a lower min_gain than {least:g}" if least else ""
        findings.missing(
            f"nothing had to move: none of {len(plans)} plans changes a slot; loads that are skewed or drift, or more "
            f"slots than experts{gate}, would make it move some"
        )
    else:
        findings.missing("not a single slot was moved, and what had to move is not known")


def _judge_plans(folder: RunFolder, updates: list[Due], findings: Findings) -> None:
    dropped = {(row["layer"], row["due"]): row["reason"] for row in folder.evidence.rows(Row.DROPPED)}
    plans: dict[tuple[Due, int], EvidenceRow] = {}
    for row in folder.evidence.rows(Row.PLAN):
        plans[Due(row["layer"], row["taken"], row["due"]), row["rank"]] = row
    commits = folder.evidence.by_place(Row.COMMIT)
    for update in updates:
        where = Place(update.layer, update.due)
        for rank in folder.ranks:
            plan = plans.pop((update, rank), None)
            commit = commits.get(where, {}).get(rank)
            if plan is None or (plan["changed"] and commit is None):
                what = "no plan" if plan is None else "a plan but no commit"
                why = dropped.get((update.layer, update.due), "no reason was recorded")
                note = findings.missing if folder.failed else findings.wrong
                note(f"rank {rank}: the update taken in iteration {update.taken} led to {what}: {why}", where)
            elif commit is not None and (commit["digest"], commit["changed"]) != (plan["digest"], plan["changed"]):
                findings.wrong(f"rank {rank} committed another placement than it planned", where)
    for (update, rank), plan in plans.items():
        if update.due < folder.scenario.iterations:
            findings.wrong(
                f"rank {rank}: a plan taken in iteration {plan['taken']} that the schedule does not know", update
            )


def _judge_drops(folder: RunFolder, findings: Findings) -> None:
    """What a rank gave up it did not commit."""
    commits = folder.evidence.by_place(Row.COMMIT)
    for row in folder.evidence.rows(Row.DROPPED):
        where = Place(row["layer"], row["due"])
        if row["rank"] in commits.get(where, {}):
            findings.wrong(f"rank {row['rank']} committed the update that it dropped: {row['reason']}", where)


def _judge_commits(folder: RunFolder, findings: Findings) -> None:
    """Commits, and nothing else, changed the contents of just the slots they name, by the digests of their bytes."""
    per_rank, slot_bytes = folder.scenario.slots_per_rank, _slot_bytes(folder)
    moved: dict[tuple[Place, int], int] = {}
    for place, rows in folder.evidence.by_place(Row.COMMIT).items():
        for rank, row in rows.items():
            mine = [slot - rank * per_rank for slot in row["changed"] if slot // per_rank == rank]
            moved[place, rank] = len(mine)
            if sorted(row["local_changed"]) != sorted(mine):
                findings.wrong(f"rank {rank} changed local slots {row['local_changed']}, planned were {mine}", place)
            if row["bytes"] != len(mine) * slot_bytes:
                findings.wrong(f"rank {rank} moved {row['bytes']} bytes, {len(mine)} slots of {slot_bytes}", place)
            _judge_sources(folder, row, place, findings)
    if folder.scenario.checks.attestation:
        _judge_contents(folder, moved, findings)


def _judge_sources(folder: RunFolder, row: EvidenceRow, place: Place, findings: Findings) -> None:
    """Weights came from where the scenario wants them from."""
    balancer = folder.scenario.balancer
    wanted = {"own", "peer"} if balancer is not None and balancer.weights_from == "peer" else {"host"}
    found = row.get("sources")
    if found is None:
        findings.missing(f"rank {row['rank']}: no word of where {row['bytes']} bytes came from", place)
    elif sum(found.values()) != row["bytes"]:
        findings.wrong(f"rank {row['rank']} moved {row['bytes']} bytes, {found} is known to have been copied", place)
    elif any(size and source not in wanted for source, size in found.items()):
        findings.wrong(f"rank {row['rank']}: bytes came from {found}, wanted were {sorted(wanted)} only", place)


def _slot_bytes(folder: RunFolder) -> int:
    """Bytes of one expert's weights: w1, w3 and w2 of I x D values each, and their rows' scales where they have any."""
    model = folder.scenario.model
    return sum(expert_tensor_bytes(model.dtype, model.hidden, model.intermediate))


def _judge_contents(folder: RunFolder, moved: dict[tuple[Place, int], int], findings: Findings) -> None:
    changed: dict[tuple[Place, int], int] = {}
    # The first reading of a layer, before the first iteration, has nothing to differ from.
    for row in folder.evidence.rows(Row.ATTEST):
        if row["iteration"] >= 0:
            key = (Place(row["layer"], row["iteration"]), row["rank"])
            changed[key] = changed.get(key, 0) + row["changed_bytes"]
    for key in sorted(moved.keys() | changed.keys(), key=lambda key: (key[0].iteration, key)):
        place, rank = key
        if key not in changed:
            findings.missing(f"rank {rank}: no digests of slot contents after the commit", place)
        elif changed[key] != moved.get(key, 0):
            findings.wrong(
                f"rank {rank}: the contents of {changed[key]} slots changed, {moved.get(key, 0)} moved", place
            )


def _judge_tables(folder: RunFolder, findings: Findings) -> None:
    """Route used the committed placement from its commit on, and changed in nothing else."""
    commits = folder.evidence.by_place(Row.COMMIT)
    known: dict[tuple[int, ...], int] = {}
    last: dict[int, EvidenceRow] = {}
    for place, rank in folder.evidence.repeated(Row.PLACEMENT):
        findings.wrong(f"rank {rank}: the tables changed between two forwards of the layer", place)
    for place in folder.places:
        rows = folder.placements.get(place)
        if not rows:
            findings.missing("no placement row", place)
            continue
        row = rows[min(rows)]
        if _digest(folder, row["slots"], known) != row["digest"]:
            findings.wrong(f"the placement's slots have another digest than {row['digest']}", place)
        previous = last.get(place.layer)
        if previous is not None:
            _judge_step(previous, row, next(iter(commits.get(place, {}).values()), None), place, findings)
        last[place.layer] = row


def _judge_step(
    previous: EvidenceRow, row: EvidenceRow, commit: EvidenceRow | None, place: Place, findings: Findings
) -> None:
    expected = previous["digest"] if commit is None else commit["digest"]
    changed = np.flatnonzero(np.not_equal(previous["slots"], row["slots"])).tolist()
    if row["digest"] != expected:
        what = "without a commit" if commit is None else f"not to the committed {expected}"
        findings.wrong(f"the tables changed from {previous['digest']} to {row['digest']}, {what}", place)
    elif commit is not None and changed != sorted(commit["changed"]):
        findings.wrong(f"the tables changed in slots {changed}, the commit says {commit['changed']}", place)


def _digest(folder: RunFolder, slots: list[int], known: dict[tuple[int, ...], int]) -> int:
    key = tuple(slots)
    if key not in known:
        experts = np.array(slots, dtype=np.int32)
        placement = Placement(ranks=len(folder.ranks), experts=folder.scenario.model.experts, slot_to_expert=experts)
        known[key] = placement.digest()
    return known[key]
