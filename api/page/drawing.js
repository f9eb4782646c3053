// Canvases: curves over time and the map of KV blocks. Colours come from the style sheet.

const colours = {};
const NAMES = ["accent", "line", "dim", "second", "used", "shared", "cached", "free"];

export function readColours() {
  const style = getComputedStyle(document.documentElement);
  for (const name of NAMES) colours[name] = style.getPropertyValue(`--${name}`).trim();
}

// A canvas of that many CSS pixels, sharp on any screen.
function prepare(canvas, width, height) {
  const ratio = window.devicePixelRatio || 1;
  const [w, h] = [Math.max(1, Math.round(width * ratio)), Math.max(1, Math.round(height * ratio))];
  if (canvas.width !== w || canvas.height !== h) {
    canvas.width = w;
    canvas.height = h;
  }
  canvas.style.height = `${height}px`;
  const context = canvas.getContext("2d");
  context.setTransform(1, 0, 0, 1, 0, 0);
  context.clearRect(0, 0, w, h);
  return [context, ratio];
}

// Lines over the same time, newest on the right; null values leave gaps. `slots` samples fit.
export function drawCurve(canvas, lines, slots) {
  const width = canvas.parentElement.clientWidth;
  const height = 56;
  if (!width) return;
  const [context, ratio] = prepare(canvas, width, height);
  context.scale(ratio, ratio);
  const top = Math.max(1e-9, ...lines.flat().filter((value) => value !== null));
  const place = (index, length) => width - 2 - ((length - 1 - index) * (width - 4)) / (slots - 1);
  const level = (value) => height - 2 - (value / top) * (height - 6);
  context.strokeStyle = colours.line;
  context.lineWidth = 1;
  context.beginPath();
  context.moveTo(0, height - 1.5);
  context.lineTo(width, height - 1.5);
  context.stroke();
  lines.forEach((line, number) => {
    const colour = number === 0 ? colours.accent : colours.second;
    for (const piece of pieces(line)) {
      context.beginPath();
      for (const [index, value] of piece) context.lineTo(place(index, line.length), level(value));
      context.strokeStyle = colour;
      context.lineWidth = 1.75;
      context.lineJoin = "round";
      context.stroke();
      const [first, last] = [piece[0], piece.at(-1)];
      if (piece.length === 1) dot(context, place(first[0], line.length), level(first[1]), colour);
      if (number === 0 && piece.length > 1) {
        context.lineTo(place(last[0], line.length), height - 2);
        context.lineTo(place(first[0], line.length), height - 2);
        context.globalAlpha = 0.12;
        context.fillStyle = colour;
        context.fill();
        context.globalAlpha = 1;
      }
    }
  });
}

function dot(context, x, y, colour) {
  context.beginPath();
  context.arc(x, y, 1.75, 0, 7);
  context.fillStyle = colour;
  context.fill();
}

function pieces(line) {
  const found = [];
  let open = null;
  line.forEach((value, index) => {
    if (value === null) open = null;
    else if (open) open.push([index, value]);
    else found.push((open = [[index, value]]));
  });
  return found;
}

// Two bits a block, see /status/live. One byte a block.
export function unpack(blocks) {
  const packed = atob(blocks.states);
  const states = new Uint8Array(blocks.count);
  for (let i = 0; i < blocks.count; i += 1) {
    states[i] = (packed.charCodeAt(i >> 2) >> ((i & 3) * 2)) & 3;
  }
  return states;
}

// How blocks are laid out: `side` CSS pixels each, or `group` blocks a cell where they are too many.
export function layout(count, width, height, ratio) {
  for (let side = 14; side >= 3; side -= 1) {
    const columns = Math.floor(width / side);
    if (columns && Math.ceil(count / columns) * side <= height) return { side, columns, group: 1 };
  }
  const side = 2 / ratio < 1 ? 1 : 2;
  const columns = Math.floor(width / side);
  const cells = columns * Math.floor(height / side);
  return { side, columns, group: Math.max(1, Math.ceil(count / cells)) };
}

const ORDER = ["free", "cached", "used", "shared"];

// Draws one cell a block, or the busiest of a group. Returns the layout.
export function drawBlocks(canvas, states) {
  const width = canvas.parentElement.clientWidth;
  if (!width) return null;
  const ratio = window.devicePixelRatio || 1;
  const place = layout(states.length, width, 190, ratio);
  const cells = Math.ceil(states.length / place.group);
  const rows = Math.ceil(cells / place.columns);
  const [context] = prepare(canvas, width, Math.max(place.side, rows * place.side));
  const side = place.side * ratio;
  const gap = place.side >= 5 ? Math.max(1, Math.round(ratio)) : 0;
  for (let state = 0; state < 4; state += 1) {
    context.fillStyle = colours[ORDER[state]];
    for (let cell = 0; cell < cells; cell += 1) {
      let most = states[cell * place.group];
      for (let i = 1; i < place.group; i += 1) {
        most = Math.max(most, states[cell * place.group + i] || 0);
      }
      if (most !== state) continue;
      const x = Math.round((cell % place.columns) * side);
      const y = Math.round(Math.floor(cell / place.columns) * side);
      const next = Math.round(((cell % place.columns) + 1) * side);
      const below = Math.round((Math.floor(cell / place.columns) + 1) * side);
      context.fillRect(x, y, next - x - gap, below - y - gap);
    }
  }
  return place;
}
