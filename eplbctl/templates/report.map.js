// The map: a cell for each layer and iteration, darker the more balancer work is exposed there.
const map = find("map"), LEFT = 64, UNDER = 26;
let cell = null;

function mapSize() {
  const {layers, iterations} = data.heat, room = find("map-frame").clientWidth - LEFT - 8;
  const width = Math.max(3, Math.min(72, Math.floor(room / Math.max(iterations.length, 1))));
  const height = Math.max(6, Math.min(26, Math.floor(520 / Math.max(layers.length, 1))));
  return {width, height, columns: iterations.length, rows: layers.length};
}

const most = (data.heat.exposed || []).reduce((top, row) => row.reduce((m, v) => v > m ? v : m, top), 0);

/** Colour of a cell: from the faintest step at 0 to the strongest at the largest exposed time. */
function heatColour(value) {
  const [low, high] = dark.matches ? [[52, 30, 34], [255, 190, 180]] : [[253, 236, 233], [103, 0, 13]];
  const t = most ? Math.sqrt(value / most) : 0;
  return low.map((v, i) => Math.round(v + (high[i] - v) * t));
}

function drawMap() {
  if (!map) return;
  const {width, height, columns, rows} = mapSize(), dpr = picture.dpr, c = map.getContext("2d");
  map.width = (LEFT + width * columns + 2) * dpr;
  map.height = (height * rows + UNDER) * dpr;
  map.style.width = map.width / dpr + "px";
  map.style.height = map.height / dpr + "px";
  c.scale(dpr, dpr);
  c.textBaseline = "middle";
  const nothing = patternOf(c, "slash", picture.scheme.faint, picture.scheme, dpr);
  data.heat.exposed.forEach((row, y) => row.forEach((value, x) => {
    const colour = value === null ? null : heatColour(value);
    c.globalAlpha = value === null ? 0.35 : 1;
    c.fillStyle = value === null ? nothing : `rgb(${colour})`;
    c.fillRect(LEFT + x * width, y * height, width > 5 ? width - 1 : width, height > 7 ? height - 1 : height);
    c.globalAlpha = 1;
    if (value !== null && width >= 56 && height >= 14) {
      c.font = SMALL;
      c.textAlign = "center";
      c.fillStyle = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2] > 140 ? "#000000" : "#ffffff";
      c.fillText(value ? timeShort(value) : "0", LEFT + x * width + width / 2, y * height + height / 2, width - 4);
    }
  }));
  mapNames(c, width, height);
  if (cell) {
    c.strokeStyle = picture.scheme.ink;
    c.lineWidth = 2;
    c.strokeRect(LEFT + cell[0] * width - 1, cell[1] * height, width + 1, height);
  }
}

function timeShort(ns) {
  const [unit, size] = UNITS.find(([, size]) => ns >= size) || UNITS[3];
  return (ns / size).toPrecision(3).replace(/\.?0+$/, text => text.includes(".") ? "" : text) + " " + unit;
}

const span = ([first, last]) => first < 0 ? "none" : first === last ? String(first) : `${first}–${last}`;

function mapNames(c, width, height) {
  c.font = SMALL;
  c.fillStyle = picture.scheme.ink;
  c.textAlign = "right";
  let free = 0;
  data.heat.layers.forEach((layer, y) => {
    if (y * height + height / 2 < free) return;
    c.fillText((y ? "" : "layer ") + span(layer), LEFT - 8, y * height + height / 2, LEFT - 10);
    free = y * height + height / 2 + 13;
  });
  c.fillText("iteration", LEFT - 8, data.heat.layers.length * height + 10);
  free = LEFT;
  c.textAlign = "center";
  data.heat.iterations.forEach((iteration, x) => {
    const text = span(iteration), at = LEFT + x * width + width / 2, half = c.measureText(text).width / 2;
    if (x && at - half < free) return;
    c.fillText(text, at, data.heat.layers.length * height + 10);
    free = at + half + 10;
  });
}

function tellCell(x, y) {
  const {columns, rows} = mapSize();
  if (x < 0 || y < 0 || x >= columns || y >= rows) return;
  cell = [x, y];
  const exposedNs = data.heat.exposed[y][x], total = data.heat.total[y][x];
  const where = `layer ${span(data.heat.layers[y])}, iteration ${span(data.heat.iterations[x])}: `;
  find("map-said").textContent = where + (total === null ? "no balancer work" :
    `${timeText(exposedNs)} of ${timeText(total)} exposed, ${((1 - exposedNs / total) * 100).toFixed(1)} % hidden`);
  drawMap();
}

function showCell() {
  if (!cell) return;
  const [first, last] = data.heat.iterations[cell[0]];
  const inside = data.iterations.filter(([number]) => number >= first && number <= last);
  if (!inside.length) return;
  look(Math.min(...inside.map(one => one[1])), Math.max(...inside.map(one => one[2])));
  find("picture").scrollIntoView({block: "start"});
}

if (map) {
  const cellAt = event => {
    const box = map.getBoundingClientRect(), {width, height} = mapSize();
    return [Math.floor((event.clientX - box.left - LEFT) / width), Math.floor((event.clientY - box.top) / height)];
  };
  map.addEventListener("pointermove", event => tellCell(...cellAt(event)));
  map.addEventListener("click", event => { tellCell(...cellAt(event)); showCell(); });
  map.addEventListener("keydown", event => {
    const move = {ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1]}[event.key];
    if (!move && event.key !== "Enter") return;
    event.preventDefault();
    if (event.key === "Enter") showCell();
    else tellCell(...(cell ? [cell[0] + move[0], cell[1] + move[1]] : [0, 0]));
  });
}
