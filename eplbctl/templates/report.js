// Hands, eyes and ears of the page: pointer, keyboard, search, lists, legend, map.
const canvas = find("timeline"), frame = find("frame"), spacer = find("spacer"), tip = find("tip");
const picture = new Picture(canvas);
const whole = [0, data.span], margin = data.span * 0.02;
let scheduled = false;

function refresh() {
  if (scheduled) return;
  scheduled = true;
  requestAnimationFrame(() => {
    scheduled = false;
    picture.top = frame.scrollTop;
    picture.draw();
  });
}

function fit() {
  const full = AXIS + picture.layout.height + 2;
  const height = Math.min(full, Math.max(240, Math.round(window.innerHeight * 0.8)));
  frame.style.height = height + "px";
  spacer.style.height = Math.max(full - height, 0) + "px";
  picture.fit(frame.clientWidth, height, dark.matches);
  refresh();
  legend();
  drawMap();
}

/** Look at a stretch of time, no shorter than 20 ns and no longer than everything. */
function look(from, to) {
  const most = whole[1] - whole[0] + 2 * margin;
  const span = Math.min(Math.max(to - from, 20), Math.max(most, 20));
  const middle = (from + to) / 2;
  from = Math.min(Math.max(middle - span / 2, whole[0] - margin), Math.max(whole[1] + margin - span, whole[0] - margin));
  picture.from = from;
  picture.to = from + span;
  refresh();
  const fine = 10 ** Math.max(0, Math.floor(Math.log10(span)) - 3), about = ns => timeText(Math.round(ns / fine) * fine);
  const shown = `${about(Math.max(from, 0))} to ${about(Math.min(from + span, whole[1]))}`;
  canvas.setAttribute("aria-label", `Timeline, showing ${shown} of ${timeText(whole[1])}`);
  find("range").textContent = `In view: ${shown}, ${about(Math.min(span, whole[1]))} of ${about(whole[1])}`;
}

function zoom(factor, x) {
  const at = picture.time(x === undefined ? (picture.gutter + picture.width) / 2 : x);
  look(at - (at - picture.from) * factor, at + (picture.to - at) * factor);
}

function pan(pixels) {
  const by = pixels / picture.scale;
  look(picture.from + by, picture.to + by);
}

const everything = () => look(whole[0] - margin, whole[1] + margin);

// ---- pointer
const pointers = new Map();
let dragged = false;

function place(event) {
  const box = canvas.getBoundingClientRect();
  return [event.clientX - box.left, event.clientY - box.top];
}

canvas.addEventListener("wheel", event => {
  const [x] = place(event), sideways = event.shiftKey || Math.abs(event.deltaX) > Math.abs(event.deltaY);
  if (x < picture.gutter && !event.ctrlKey) return;  // over the names the page scrolls as everywhere
  event.preventDefault();
  const unit = event.deltaMode === 1 ? 30 : event.deltaMode === 2 ? 300 : 1;
  if (sideways && !event.ctrlKey) pan((event.deltaX || event.deltaY) * unit);
  else zoom(Math.exp(Math.max(-240, Math.min(240, event.deltaY * unit)) * (event.ctrlKey ? 0.01 : 0.002)), x);
}, {passive: false});

canvas.addEventListener("pointerdown", event => {
  if (event.button !== 0) return;
  pointers.set(event.pointerId, place(event));
  canvas.setPointerCapture(event.pointerId);
  dragged = false;
});

canvas.addEventListener("pointermove", event => {
  const now = place(event), before = pointers.get(event.pointerId);
  if (!before) return hover(now[0], now[1]);
  const other = [...pointers].find(([id]) => id !== event.pointerId);
  if (Math.abs(now[0] - before[0]) + Math.abs(now[1] - before[1]) < 3 && !dragged) return;
  dragged = true;
  hide();
  if (other) {
    const [was, is] = [before, now].map(point => Math.max(Math.abs(point[0] - other[1][0]), 10));
    zoom(was / is, (now[0] + other[1][0]) / 2);
  } else {
    pan(before[0] - now[0]);
    if (event.pointerType === "mouse") frame.scrollTop += before[1] - now[1];
  }
  pointers.set(event.pointerId, now);
});

for (const kind of ["pointerup", "pointercancel"])
  canvas.addEventListener(kind, event => {
    const [x, y] = place(event);
    if (pointers.delete(event.pointerId) && kind === "pointerup" && !dragged) pick(picture.at(x, y));
  });
canvas.addEventListener("pointerleave", hide);
frame.addEventListener("scroll", refresh);

function hover(x, y) {
  const found = picture.at(x, y);
  if (!found) return hide();
  picture.hovered = found;
  refresh();
  describe(tip, found);
  tip.hidden = false;
  const box = canvas.getBoundingClientRect(), room = document.documentElement.clientWidth;
  const left = Math.min(box.left + x + 14, room - tip.offsetWidth - 8);
  const below = box.top + y + 18, above = box.top + y - tip.offsetHeight - 10;
  tip.style.left = Math.max(left, 4) + "px";
  tip.style.top = (below + tip.offsetHeight > window.innerHeight && above > 0 ? above : below) + "px";
}

function hide() {
  tip.hidden = true;
  if (picture.hovered) { picture.hovered = null; refresh(); }
}

function pick(found) {
  picture.picked = found;
  find("picked").replaceChildren();
  if (found) describe(find("picked"), found);
  refresh();
}

/** Everything known of an event, as text and never as markup. */
function describe(element, {lane, i}) {
  const role = data.roles[lane.roles[i]], count = lane.count ? lane.count[i] : 1, flags = lane.flags ? lane.flags[i] : 0;
  const rows = [["role", `${role.name}: ${role.meaning}`], ["start", timeText(lane.start[i])]];
  if (!(flags & MARKED)) rows.push(["duration", timeText(lane.end[i] - lane.start[i])]);
  if (flags & NOT_CLOSED) rows.push(["end", "it was never closed"]);
  if (count > 1) rows.push(["stands for", `${count} short events, this is the longest one's name`]);
  if (lane.iteration[i] >= 0) rows.push(["iteration", lane.iteration[i]]);
  if (lane.layer[i] >= 0) rows.push(["layer", lane.layer[i]]);
  const number = lane.kind === "stream" ? `stream ${lane.number} of device ${lane.device}` :
    lane.kind === "host" ? `thread ${lane.number}` : "the balancer's own thread";
  rows.push(["where", `rank ${lane.rank}, ${lane.name === "stream " + lane.number ? "" : lane.name + ", "}${number}`]);
  const title = document.createElement("strong"), list = document.createElement("dl");
  title.textContent = data.names[lane.names[i]];
  title.className = "name";
  for (const [key, value] of rows) {
    const term = document.createElement("dt"), said = document.createElement("dd");
    term.textContent = key;
    said.textContent = value;
    list.append(term, said);
  }
  element.replaceChildren(title, list);
}

// ---- keyboard
const KEYS = {
  "+": () => zoom(1 / 1.5), "=": () => zoom(1 / 1.5), "-": () => zoom(1.5), "_": () => zoom(1.5),
  "ArrowLeft": () => pan(-(picture.width - picture.gutter) / 8), "ArrowRight": () => pan((picture.width - picture.gutter) / 8),
  "ArrowUp": () => { frame.scrollTop -= 40; }, "ArrowDown": () => { frame.scrollTop += 40; },
  "0": everything, "Home": everything, "n": () => step(1), "p": () => step(-1), "Escape": () => { hide(); pick(null); },
};
canvas.addEventListener("keydown", event => {
  const action = KEYS[event.key];
  if (!action || event.ctrlKey || event.metaKey || event.altKey) return;
  event.preventDefault();
  action();
});
const BUTTONS = {"zoom-in": "+", "zoom-out": "-", "zoom-all": "0", "next": "n", "previous": "p"};
for (const [id, key] of Object.entries(BUTTONS)) find(id).addEventListener("click", () => KEYS[key]());

// ---- exposed stretches
let current = -1;

function jump(number) {
  const one = data.stretches[number];
  if (!one) return;
  current = number;
  const room = Math.max(one.end - one.start, 20) * 2;
  look(one.start - room, one.end + room);
  const band = picture.layout.bands.find(b => b.strip && b.strip.rank === one.rank && b.strip.device === one.device);
  if (band) frame.scrollTop = Math.max(0, band.y - HEAD);
  document.querySelectorAll("[data-stretch]").forEach(button =>
    button.setAttribute("aria-pressed", String(Number(button.dataset.stretch) === number)));
  say(`Exposed stretch ${number + 1} of ${data.stretches.length}: rank ${one.rank}, ${timeText(one.end - one.start)} at ${timeText(one.start)}`);
}

function step(by) {
  const count = data.stretches.length;
  if (!count) return say("No balancer work is exposed.");
  const from = current < 0 && by < 0 ? 0 : current;
  jump((from + by + count) % count);
}

function say(text) { find("said").textContent = text; }

document.querySelectorAll("[data-stretch]").forEach(button => button.addEventListener("click", () => {
  jump(Number(button.dataset.stretch));
  find("picture").scrollIntoView({block: "start"});
}));

// ---- search
let hits = [], hit = -1;

function search() {
  const text = find("search").value.trim().toLowerCase();
  hits = [];
  hit = -1;
  picture.matched = null;
  if (text) {
    const matched = Uint8Array.from(data.names, name => name.toLowerCase().includes(text) ? 1 : 0);
    picture.matched = matched;
    for (const band of picture.layout.bands)
      if (band.lane) band.lane.names.forEach((name, i) => { if (matched[name]) hits.push([band, i]); });
    hits.sort(([a, i], [b, j]) => a.lane.start[i] - b.lane.start[j]);
    const names = matched.reduce((sum, one) => sum + one, 0);
    find("found").textContent = `${hits.length} events of ${names} names` + (hits.length ? ", Enter shows the next" : "");
  } else find("found").textContent = "";
  refresh();
}

function nextHit(by) {
  if (!hits.length) return;
  hit = (hit + by + hits.length) % hits.length;
  const [band, i] = hits[hit], {start, end, rows} = band.lane;
  const half = Math.max((picture.to - picture.from) / 2, (end[i] - start[i]) * 2), middle = (start[i] + end[i]) / 2;
  look(middle - half, middle + half);
  frame.scrollTop = Math.max(0, band.y - HEAD);
  pick({lane: band.lane, i, band, row: rows.findIndex(([first, beyond]) => i >= first && i < beyond)});
  find("found").textContent = `${hit + 1} of ${hits.length} events`;
}

find("search").addEventListener("input", search);
find("search").addEventListener("keydown", event => {
  if (event.key === "Enter") { event.preventDefault(); nextHit(event.shiftKey ? -1 : 1); }
  if (event.key === "Escape") { find("search").value = ""; search(); }
});

// ---- legend
function legend() {
  const present = new Set();
  lanes.forEach(lane => lane.roles.forEach(role => present.add(role)));
  find("legend").replaceChildren(...data.roles.flatMap((role, i) => {
    if (!present.has(i)) return [];
    return [entry(role.name, role.meaning, c => {
      c.fillStyle = picture.colours[i];
      c.globalAlpha = role.pattern === "outline" ? 0.22 : 1;
      c.fillRect(0, 0, 26, 16);
      c.globalAlpha = 1;
      if (picture.patterns[i]) { c.fillStyle = picture.patterns[i]; c.fillRect(0, 0, 26, 16); }
      if (role.pattern === "outline") { c.strokeStyle = picture.colours[i]; c.strokeRect(0.5, 0.5, 25, 15); }
    })];
  }), ...(exposed.some(strip => strip.start.length) ? [entry("exposed", "balancer work that nothing hides", c => {
    c.fillStyle = picture.scheme.exposed;
    c.fillRect(0, 0, 26, 16);
    c.fillStyle = picture.mark;
    c.fillRect(1, 1, 24, 14);
  })] : []));
}

function entry(name, meaning, paint) {
  const item = document.createElement("li"), swatch = document.createElement("canvas"), text = document.createElement("span");
  const c = swatch.getContext("2d");
  swatch.width = 26 * picture.dpr;
  swatch.height = 16 * picture.dpr;
  swatch.className = "swatch";
  swatch.setAttribute("aria-hidden", "true");
  c.scale(picture.dpr, picture.dpr);
  paint(c);
  text.textContent = `${name}: ${meaning}`;
  item.append(swatch, text);
  return item;
}

// ---- begin
dark.addEventListener("change", fit);
new ResizeObserver(() => { if (frame.clientWidth !== picture.width) fit(); }).observe(frame);
fit();
if (data.asked) look(picture.from, picture.to);
else look(picture.from - (picture.to - picture.from) * 0.01, picture.to + (picture.to - picture.from) * 0.01);
window.eplbTimeline = {picture, look, jump, data, lanes};  // for the console
document.documentElement.dataset.ready = "yes";
