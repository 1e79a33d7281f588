// What the page was made from, unpacked: times as whole ns since the first event, one column for each property.
const find = id => document.getElementById(id);
const dark = window.matchMedia("(prefers-color-scheme: dark)");
const data = JSON.parse(find("data").textContent);
const RANGE_ROLE = data.roles.length - 1;
const UNITS = [["s", 1e9], ["ms", 1e6], ["µs", 1e3], ["ns", 1]];
const MARKED = 1, NOT_CLOSED = 2;

/** Running sums of differences. */
function summed(steps, column) {
  let sum = 0;
  for (let i = 0; i < steps.length; i++) column[i] = sum += steps[i];
  return column;
}

function unpacked(lane, index) {
  const n = lane.start.length;
  const start = new Float64Array(n), end = new Float64Array(n), rows = [];
  let first = 0;
  for (const count of lane.rows) {
    let at = 0;
    for (let i = first; i < first + count; i++) {
      start[i] = at += lane.start[i];
      end[i] = at + lane.length[i];
    }
    rows.push([first, first + count]);
    first += count;
  }
  return {
    index, start, end, rows, kind: lane.kind, rank: lane.rank, device: lane.device, number: lane.number,
    name: lane.name, main: lane.main, names: Uint32Array.from(lane.name_of), roles: Uint8Array.from(lane.role),
    layer: summed(lane.layer, new Int32Array(n)), iteration: summed(lane.iteration, new Int32Array(n)),
    count: lane.count, flags: lane.flags,
  };
}

const lanes = data.lanes.map(unpacked);
const exposed = data.exposed.map(one => {
  const edges = summed(one.times, new Float64Array(one.times.length));
  return {rank: one.rank, device: one.device, start: edges.filter((_, i) => i % 2 === 0),
          end: edges.filter((_, i) => i % 2 === 1)};
});

/** The first index of [first, beyond) whose value in an ascending column is greater. */
function firstAfter(column, value, first, beyond) {
  while (first < beyond) {
    const middle = (first + beyond) >> 1;
    if (column[middle] > value) beyond = middle; else first = middle + 1;
  }
  return first;
}

/** A time in the largest unit that it fills, exact to the ns: 1.234567 ms. */
function timeText(ns) {
  const [unit, size] = UNITS.find(([, size]) => Math.abs(ns) >= size) || UNITS[3];
  const digits = Math.round(Math.log10(size));
  const text = (ns / size).toFixed(digits);
  return (digits ? text.replace(/\.?0+$/, "") : text) + " " + unit;
}

/** Ticks of an axis: moments, their labels, and the moment that the labels count from. */
function ticksOf(from, to, wanted) {
  const rough = Math.max((to - from) / Math.max(wanted, 1), 1);
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map(f => f * power).find(s => s >= rough * 0.999);
  let base = 0;
  if (to / step > 20000) {  // labels would need more digits than can be told apart at a glance
    const block = 10 ** Math.ceil(Math.log10(step * 500));
    base = Math.floor(from / block) * block;
  }
  const [unit, size] = UNITS.find(([, size]) => to - base >= size) || UNITS[3];
  const decimals = Math.max(0, Math.ceil(Math.log10(size / step) - 1e-9));
  const ticks = [];
  for (let n = Math.ceil((from - base) / step); base + n * step <= to; n++)
    ticks.push([base + n * step, (base ? "+" : "") + ((n * step) / size).toFixed(decimals) + " " + unit]);
  return {ticks, base, step};
}
