// Draws the timeline. A frame looks only at what lies in view; what is thinner than a pixel shares its column.
const AXIS = 40, ROW = 20, HOST_ROW = 17, STRIP = 14, HEAD = 22, GAP = 4, THIN = 1.5;
const FONT = "12px system-ui, sans-serif", SMALL = "11px system-ui, sans-serif";

/** Where each band of the picture stands: heads of ranks, strips of exposed stretches, lanes. */
function bandsOf() {
  const bands = [], many = new Set(lanes.map(lane => lane.rank)).size > 1;
  let y = 0, rank = null, gpu = "";
  const add = (band, height) => { bands.push({...band, y, height}); y += height; };
  for (const lane of lanes) {
    if (lane.rank !== rank) {
      add({head: "rank " + lane.rank, rank: lane.rank}, HEAD);
      rank = lane.rank;
    }
    if (lane.kind === "stream" && gpu !== lane.rank + "/" + lane.device) {
      gpu = lane.rank + "/" + lane.device;
      const strip = exposed.find(one => one.rank === lane.rank && one.device === lane.device);
      if (strip && strip.start.length) add({strip, rank: lane.rank, name: "exposed"}, STRIP + GAP);
    }
    const row = lane.kind === "host" ? HOST_ROW : ROW;
    add({lane, rank: lane.rank, name: lane.name, row}, row * lane.rows.length + GAP);
  }
  return {bands, height: y, many};
}

class Picture {
  constructor(canvas) {
    this.canvas = canvas;
    this.context = canvas.getContext("2d", {alpha: false});
    this.layout = bandsOf();
    this.from = data.view[0];
    this.to = data.view[1];
    this.top = 0;
    this.matched = null;
    this.hovered = this.picked = null;
    this.frame = {ms: 0, boxes: 0, number: 0};
  }

  /** Take on the size of the page's column, and the colours of its scheme. */
  fit(width, height, dark) {
    const dpr = Math.max(1, Math.min(3, window.devicePixelRatio || 1));
    this.width = width;
    this.height = height;
    this.gutter = Math.round(Math.min(190, width * 0.28));
    this.canvas.width = Math.round(width * dpr);
    this.canvas.height = Math.round(height * dpr);
    this.canvas.style.width = width + "px";
    this.canvas.style.height = height + "px";
    this.dpr = dpr;
    this.scheme = data.schemes[dark ? "dark" : "light"];
    this.colours = data.roles.map(role => dark ? role.dark : role.light);
    this.inks = data.roles.map(role => dark ? role.dark_ink : role.light_ink);
    this.patterns = data.roles.map((role, i) => patternOf(this.context, role.pattern, this.colours[i], this.scheme, dpr));
    this.mark = patternOf(this.context, "slash", this.scheme.exposed, this.scheme, dpr);
  }

  get scale() { return (this.width - this.gutter) / (this.to - this.from); }
  x(time) { return this.gutter + (time - this.from) * this.scale; }
  time(x) { return this.from + (x - this.gutter) / this.scale; }

  draw() {
    const began = performance.now(), c = this.context;
    c.setTransform(this.dpr, 0, 0, this.dpr, 0, 0);
    c.globalAlpha = 1;
    c.fillStyle = this.scheme.background;
    c.fillRect(0, 0, this.width, this.height);
    this.frame.boxes = 0;
    const {ticks, base} = ticksOf(this.from, this.to, (this.width - this.gutter) / 110);
    const visible = this.layout.bands.filter(b => this.y(b) < this.height && this.y(b) + b.height > AXIS);
    this.stripes(visible);
    c.save();
    c.beginPath();
    c.rect(this.gutter, AXIS, this.width - this.gutter, this.height - AXIS);
    c.clip();
    this.grid(ticks);
    this.shades(visible);
    for (const band of visible) this.band(band);
    this.outline(this.picked, 2.5);
    this.outline(this.hovered, 1.5);
    c.restore();
    this.names(visible);
    this.axis(ticks, base);
    this.frame.ms = performance.now() - began;
    this.frame.number++;
  }

  y(band) { return AXIS + band.y - this.top; }

  stripes(visible) {
    const c = this.context;
    visible.forEach(band => {
      if (band.head) return;
      c.fillStyle = this.layout.bands.indexOf(band) % 2 ? this.scheme.stripe : this.scheme.background;
      c.fillRect(0, this.y(band), this.width, band.height);
    });
  }

  grid(ticks) {
    const c = this.context;
    c.fillStyle = this.scheme.faint;
    c.globalAlpha = 0.18;
    for (const [time] of ticks) c.fillRect(Math.round(this.x(time)), AXIS, 1, this.height);
    c.globalAlpha = 0.7;
    c.strokeStyle = this.scheme.faint;
    c.setLineDash([3, 4]);
    c.beginPath();
    let last = -Infinity;
    for (const [, start] of data.iterations) {
      const x = Math.round(this.x(start)) + 0.5;
      if (x < this.gutter || x > this.width || x - last < 10) continue;
      c.moveTo(last = x, AXIS);
      c.lineTo(x, this.height);
    }
    c.stroke();
    c.setLineDash([]);
    c.globalAlpha = 1;
  }

  band(band) {
    const y = this.y(band) + GAP / 2;
    if (band.strip) return this.strip(band.strip, y);
    if (!band.lane) return;
    band.lane.rows.forEach(([first, beyond], row) => {
      const top = y + row * band.row;
      if (top < this.height && top + band.row > AXIS) this.row(band.lane, first, beyond, top, band.row - 2);
    });
  }

  row(lane, first, beyond, y, height) {
    const {start, end, roles, names} = lane, {from, to, scale, gutter, matched} = this;
    const column = new Column(this, y, height);
    for (let i = firstAfter(end, from - THIN / scale, first, beyond); i < beyond && start[i] <= to; i++) {
      const x = gutter + (start[i] - from) * scale, w = (end[i] - start[i]) * scale;
      const dim = matched !== null && !matched[names[i]];
      if (w < THIN) {
        column.add(Math.floor(x), roles[i] + (dim ? data.roles.length : 0), w);
      } else {
        column.end();
        this.box(lane, i, x, w, y, height, dim);
      }
    }
    column.end();
  }

  box(lane, i, x, w, y, height, dim) {
    const c = this.context, role = lane.roles[i], host = lane.kind === "host";
    const left = Math.max(x, this.gutter - 2), right = Math.min(x + w, this.width + 2), wide = right - left;
    const drawn = wide > 4 ? wide - 1 : wide;
    this.frame.boxes++;
    c.globalAlpha = dim ? 0.15 : host ? 0.22 : 1;
    c.fillStyle = this.colours[role];
    c.fillRect(left, y, drawn, height);
    if (!host && wide >= 5 && this.patterns[role]) {
      c.fillStyle = this.patterns[role];
      c.fillRect(left, y, drawn, height);
    }
    c.globalAlpha = dim ? 0.3 : 1;
    if (host && wide >= 3) {
      c.strokeStyle = this.colours[role];
      c.lineWidth = 1;
      if (lane.flags && lane.flags[i] & NOT_CLOSED) c.setLineDash([4, 3]);
      c.strokeRect(left + 0.5, y + 0.5, drawn - 1, height - 1);
      c.setLineDash([]);
    }
    if (wide >= 30) this.label(data.names[lane.names[i]], left, drawn, y, height, host ? null : role);
    c.globalAlpha = 1;
  }

  label(text, x, width, y, height, role) {
    const c = this.context, room = Math.floor((width - 8) / 6.2);
    if (room < 3) return;
    const shown = text.length > room ? text.slice(0, room - 1) + "…" : text;
    c.font = SMALL;
    c.textBaseline = "middle";
    c.textAlign = "left";
    if (role !== null && this.patterns[role]) {  // letters over a pattern need ground of their own
      c.fillStyle = this.colours[role];
      c.fillRect(x + 2, y + 2, Math.min(c.measureText(shown).width + 4, width - 4), height - 4);
    }
    c.fillStyle = role === null ? this.scheme.ink : this.inks[role];
    c.fillText(shown, x + 4, y + height / 2 + 0.5, width - 6);
  }

  strip(strip, y) {
    const c = this.context;
    let filled = -Infinity;
    for (let i = firstAfter(strip.end, this.from, 0, strip.end.length); i < strip.start.length; i++) {
      if (strip.start[i] > this.to) break;
      const x = this.x(strip.start[i]), right = Math.max(this.x(strip.end[i]), x + 2);
      if (right <= filled) continue;
      c.fillStyle = this.scheme.exposed;
      c.fillRect(Math.max(x, filled), y, right - Math.max(x, filled), STRIP);
      if (right - x >= 6) {
        c.fillStyle = this.mark;
        c.fillRect(x + 1, y + 1, right - x - 2, STRIP - 2);
      }
      filled = right;
    }
    this.numbers(strip, y);
  }

  numbers(strip, y) {
    const c = this.context;
    c.font = "bold " + SMALL;
    c.textBaseline = "middle";
    c.textAlign = "center";
    data.stretches.forEach((one, i) => {
      if (one.rank !== strip.rank || one.device !== strip.device) return;
      const left = Math.max(this.x(one.start), this.gutter), right = Math.min(this.x(one.end), this.width);
      const text = "#" + (i + 1), wide = c.measureText(text).width + 6;
      if (right - left < wide) return;
      c.fillStyle = this.scheme.background;
      c.fillRect((left + right - wide) / 2, y + 1, wide, STRIP - 2);
      c.fillStyle = this.scheme.exposed;
      c.fillText(text, (left + right) / 2, y + STRIP / 2 + 0.5);
    });
  }

  /** Exposed stretches across the streams of their GPU, behind the events so that colours stay what they are. */
  shades(visible) {
    const c = this.context;
    c.fillStyle = this.scheme.exposed;
    c.globalAlpha = 0.13;
    for (const {strip} of visible.filter(band => band.strip)) {
      const streams = this.layout.bands.filter(b => b.lane && b.lane.kind === "stream" && b.lane.rank === strip.rank &&
        b.lane.device === strip.device);
      const top = this.y(streams[0]), last = streams[streams.length - 1], bottom = this.y(last) + last.height;
      for (let i = firstAfter(strip.end, this.from, 0, strip.end.length); i < strip.start.length; i++) {
        if (strip.start[i] > this.to) break;
        const x = this.x(strip.start[i]), w = (strip.end[i] - strip.start[i]) * this.scale;
        if (w >= 2) c.fillRect(x, top, w, bottom - top);
      }
    }
    c.globalAlpha = 1;
  }

  outline(found, width) {
    if (!found) return;
    const {lane, i, band, row} = found, c = this.context;
    const x = Math.max(this.x(lane.start[i]), this.gutter - 4), right = Math.min(this.x(lane.end[i]), this.width + 4);
    c.strokeStyle = this.scheme.ink;
    c.lineWidth = width;
    c.strokeRect(x - 1, this.y(band) + GAP / 2 + row * band.row - 1, Math.max(right - x, 2) + 1, band.row);
  }

  names(visible) {
    const c = this.context;
    c.textBaseline = "middle";
    for (const band of visible) {
      const y = this.y(band);
      c.textAlign = "left";
      if (band.head) {
        c.fillStyle = this.scheme.background;
        c.fillRect(0, y, this.width, band.height);
        c.fillStyle = this.scheme.ink;
        c.font = "bold " + FONT;
        c.fillText(band.head, 8, y + band.height / 2 + 1);
        c.fillStyle = this.scheme.faint;
        c.fillRect(0, y + band.height - 1, this.width, 1);
        continue;
      }
      c.fillStyle = band.strip ? this.scheme.exposed : this.scheme.ink;
      c.font = band.strip ? "bold " + SMALL : FONT;
      const text = band.lane && band.lane.main ? band.name + " (main)" : band.name;
      c.fillText(shortened(c, text, this.gutter - 26), 18, y + Math.min(band.height, (band.row || STRIP) + GAP) / 2);
    }
    c.fillStyle = this.scheme.faint;
    c.fillRect(this.gutter - 1, AXIS, 1, this.height);
  }

  axis(ticks, base) {
    const c = this.context, right = this.width - 4;
    c.fillStyle = this.scheme.background;
    c.fillRect(0, 0, this.width, AXIS);
    c.font = SMALL;
    c.textBaseline = "middle";
    c.textAlign = "left";
    c.fillStyle = this.scheme.faint;
    c.fillText(shortened(c, base ? "from " + timeText(base) : "time since start", this.gutter - 12), 8, 11);
    if (data.iterations.length) c.fillText("iteration", 8, 29);
    c.fillRect(0, AXIS - 1, this.width, 1);
    c.textAlign = "center";
    let free = this.gutter;
    for (const [time, text] of ticks) {
      const x = this.x(time), half = c.measureText(text).width / 2;
      c.fillStyle = this.scheme.faint;
      c.fillRect(Math.round(x), 17, 1, 4);
      if (x - half < free || x + half > right) continue;
      c.fillStyle = this.scheme.ink;
      c.fillText(text, x, 10);
      free = x + half + 14;
    }
    this.iterations();
  }

  iterations() {
    const c = this.context;
    let free = this.gutter;
    c.textAlign = "left";
    for (const [number, start, end] of data.iterations) {
      const x = this.x(start), stop = Math.min(this.x(end), this.width);
      if (stop < this.gutter || x > this.width) continue;
      c.fillStyle = this.scheme.faint;
      if (x >= this.gutter && x >= free - 4) c.fillRect(Math.round(x), 23, 1, AXIS - 24);
      const left = Math.max(x, this.gutter) + 4, wide = c.measureText(String(number)).width;
      if (left < free || left + wide > this.width - 2) continue;
      c.fillStyle = this.scheme.ink;
      c.fillText(String(number), left, 30);
      free = left + wide + 10;
    }
  }

  /** What lies at a point: of what is too thin to hit, the longest nearby. */
  at(x, y) {
    if (x < this.gutter || y < AXIS) return null;
    const band = this.layout.bands.find(b => b.lane && y >= this.y(b) && y < this.y(b) + b.height);
    if (!band) return null;
    const row = Math.min(Math.max(Math.floor((y - this.y(band) - GAP / 2) / band.row), 0), band.lane.rows.length - 1);
    const {start, end, rows} = band.lane, time = this.time(x), near = 2 / this.scale;
    let found = null, best = -1;
    for (let i = firstAfter(end, time - near, rows[row][0], rows[row][1]), looked = 0;
         i < rows[row][1] && start[i] <= time + near && looked < 5000; i++, looked++) {
      if (start[i] <= time && time < end[i]) return {lane: band.lane, i, band, row};
      if (end[i] - start[i] > best) {
        best = end[i] - start[i];
        found = {lane: band.lane, i, band, row};
      }
    }
    if (!found && end.length) {  // the end of the last one before may lie exactly at the edge of what is near
      const i = firstAfter(end, time - near, rows[row][0], rows[row][1]) - 1;
      if (i >= rows[row][0] && end[i] >= time - near) found = {lane: band.lane, i, band, row};
    }
    return found;
  }
}

/** One column of pixels: it shows the role with most time in it, and the next one in its lowest third. One that stands for
 *  several events is as high as it is busy, but at least half. */
class Column {
  constructor(picture, y, height) {
    Object.assign(this, {picture, y, height, at: null, left: 0, beyond: 0, key: -1, any: 0, busy: 0});
    this.times = new Float64Array(2 * data.roles.length);
  }

  add(pixel, role, width) {
    if (pixel !== this.at) this.close(pixel);
    this.times[role] += width + 1e-9;
    this.busy += width;
    this.any++;
  }

  close(next) {
    if (this.any) {
      let one = -1, two = -1;
      for (let r = 0, n = data.roles.length; r < 2 * n; r++) {
        if (this.times[r] === 0) continue;
        if (one < 0 || (this.times[r] > this.times[one] && (r < n || one >= n))) { two = one; one = r; }
        else if (two < 0 || this.times[r] > this.times[two]) two = r;
      }
      const level = this.any < 2 ? 4 : Math.min(4, Math.max(2, Math.ceil(this.busy * 4)));
      const key = (one * 64 + two + 1) * 8 + level;
      if (key !== this.key || this.at > this.beyond) { this.paint(); this.left = this.at; this.key = key; }
      this.beyond = this.at + 1;
      this.times.fill(0);
      this.any = this.busy = 0;
    }
    this.at = next;
  }

  end() {
    this.close(null);
    this.paint();
    this.key = -1;
  }

  paint() {
    if (this.key < 0) return;
    const one = this.key >> 9, two = ((this.key >> 3) & 63) - 1, width = this.beyond - this.left;
    const height = Math.round(this.height * (this.key & 7) / 4), bottom = this.y + this.height;
    this.fill(one, bottom - height, height, width);
    if (two >= 0) this.fill(two, bottom - Math.floor(height / 3), Math.floor(height / 3), width);
    this.picture.frame.boxes++;
  }

  fill(role, y, height, width) {
    const c = this.picture.context, n = data.roles.length;
    c.globalAlpha = role >= n ? 0.15 : 1;
    c.fillStyle = this.picture.colours[role % n];
    c.fillRect(this.left, y, Math.max(width, 1), height);
    c.globalAlpha = 1;
  }
}

function shortened(context, text, width) {
  if (context.measureText(text).width <= width) return text;
  let low = 0, high = text.length;
  while (low < high) {
    const middle = (low + high + 1) >> 1;
    if (context.measureText(text.slice(0, middle) + "…").width <= width) low = middle; else high = middle - 1;
  }
  return text.slice(0, low) + "…";
}

/** A pattern that leaves the role's colour and cuts the background into it; null for a plain one. */
function patternOf(context, pattern, colour, scheme, dpr) {
  const strokes = {
    slash: [[-2, 10, 10, -2], [-2, 2, 2, -2], [6, 10, 10, 6]],
    backslash: [[-2, -2, 10, 10], [6, -2, 10, 2], [-2, 6, 2, 10]],
    lines: [[0, 2, 8, 2], [0, 6, 8, 6]], bars: [[3, 0, 3, 8]],
    cross: [[0, 0, 8, 8], [8, 0, 0, 8]], dots: [],
  }[pattern];
  if (!strokes) return null;
  const tile = document.createElement("canvas"), c = tile.getContext("2d");
  tile.width = tile.height = 8 * dpr;
  c.scale(dpr, dpr);
  c.fillStyle = colour;
  c.fillRect(0, 0, 8, 8);
  c.strokeStyle = c.fillStyle = scheme.background;
  c.globalAlpha = 0.75;
  c.lineWidth = 1.3;
  for (const [x, y, toX, toY] of strokes) {
    c.beginPath();
    c.moveTo(x, y);
    c.lineTo(toX, toY);
    c.stroke();
  }
  if (pattern === "dots") for (const [x, y] of [[2, 2], [6, 6]]) c.fillRect(x - 1, y - 1, 2, 2);
  const made = context.createPattern(tile, "repeat");
  made.setTransform(new DOMMatrix().scale(1 / dpr));
  return made;
}
