// What runs now: curves, the map of KV blocks, the table of requests.

import { $, element, getJson } from "/page/api.js";
import { drawBlocks, drawCurve, readColours, unpack } from "/page/drawing.js";

const WORDS = ["free", "free, prefix cached", "used", "shared"];
const SLOTS = 150;

export function short(number) {
  if (number >= 1e6) return `${(number / 1e6).toFixed(1)}M`;
  if (number >= 1e4) return `${(number / 1e3).toFixed(0)}k`;
  if (number >= 100 || Number.isInteger(number)) return number.toFixed(0);
  return number.toFixed(1);
}

export function seconds(value) {
  if (value === null || value === undefined) return "–";
  if (value < 0.001) return `${(value * 1e6).toFixed(0)} µs`;
  if (value < 0.1) return `${(value * 1000).toFixed(1)} ms`;
  if (value < 1) return `${(value * 1000).toFixed(0)} ms`;
  if (value < 100) return `${value.toFixed(1)} s`;
  return `${Math.floor(value / 60)} min ${Math.floor(value % 60)} s`;
}

// What it shows: its lines, the first line now, and below it the second.
const CURVES = [
  {
    title: "Tokens/s",
    lines: (s) => [s.map((x) => x.tokens_per_second)],
    now: (x) => short(x.tokens_per_second),
    note: (x) => `prompts: ${short(x.prompt_tokens_per_second)}`,
  },
  {
    title: "Running",
    lines: (s) => [s.map((x) => x.running), s.map((x) => x.waiting)],
    now: (x) => short(x.running),
    note: (x) => `${short(x.waiting)} waiting`,
  },
  {
    title: "First token",
    lines: (s) => [s.map((x) => x.first_token_p50), s.map((x) => x.first_token_p95)],
    now: (x) => seconds(x.first_token_p50),
    note: (x) => `p95 ${seconds(x.first_token_p95)}`,
  },
  {
    title: "Between tokens",
    lines: (s) => [s.map((x) => x.between_tokens_p50), s.map((x) => x.between_tokens_p95)],
    now: (x) => seconds(x.between_tokens_p50),
    note: (x) => `p95 ${seconds(x.between_tokens_p95)}`,
  },
  {
    title: "KV in use",
    lines: (s) => [s.map((x) => x.kv_usage)],
    now: (x) => `${(100 * x.kv_usage).toFixed(x.kv_usage && x.kv_usage < 0.1 ? 1 : 0)} %`,
    note: () => "of device blocks",
  },
];

let samples = [];
let blocks = { device: null, host: null }; // states, one byte a block
let places = { device: null, host: null };
let sequences = [];
const rows = new Map(); // request id -> its row

export function begin() {
  readColours();
  for (const curve of CURVES) {
    const card = element("article", "curve");
    curve.value = element("b", "", "–");
    const two = curve.lines([]).length === 2; // then the note says what the second line is
    curve.told = element("span", two ? "note-line second" : "note-line", "");
    curve.canvas = element("canvas");
    curve.canvas.setAttribute("role", "img");
    const head = element("div", "curve-head");
    head.append(element("h3", "", curve.title), curve.value);
    const box = element("div");
    box.append(curve.canvas);
    card.append(head, box, curve.told);
    $("curves").append(card);
  }
  $("filter").addEventListener("change", showRows);
  for (const tier of ["device", "host"]) {
    $(`${tier}-map`).addEventListener("mousemove", (event) => point(tier, event));
  }
  window.addEventListener("resize", redraw);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
    readColours();
    redraw();
  });
}

export async function refresh(signal) {
  const [history, live] = await Promise.all([
    getJson("/status/history", signal),
    getJson("/status/live", signal),
  ]);
  samples = history.samples;
  if (live.available) {
    sequences = live.sequences;
    blocks = {
      device: live.device && unpack(live.device),
      host: live.host && unpack(live.host),
    };
    showMemory(live);
    showCounts(live);
    showRows();
  } else {
    $("requests-note").textContent = sequences.length ? "as of a moment ago: the engine is in a long step" : "";
  }
  redraw();
}

function redraw() {
  const latest = samples.at(-1);
  for (const curve of CURVES) {
    if (latest) {
      curve.value.textContent = curve.now(latest);
      curve.told.textContent = curve.note(latest);
    }
    drawCurve(curve.canvas, curve.lines(samples), SLOTS);
    const label = `${curve.title}: ${curve.value.textContent}, ${curve.told.textContent}`;
    curve.canvas.setAttribute("aria-label", `${label}; the last five minutes`);
  }
  for (const tier of ["device", "host"]) {
    if (blocks[tier]) places[tier] = drawBlocks($(`${tier}-map`), blocks[tier]);
  }
}

// ---- blocks -----------------------------------------------------------------------------------

function showMemory(live) {
  $("memory-note").textContent = `${live.block_size} tokens a block`;
  $("memory").hidden = false;
  $("host-figure").hidden = !live.host;
  for (const tier of ["device", "host"]) {
    const told = live[tier];
    if (!told) continue;
    const held = told.used + told.shared;
    const parts = [`${held} of ${told.count} in use`];
    if (told.shared) parts.push(`${told.shared} shared`);
    if (told.cached) parts.push(`${told.cached} cached`);
    $(`${tier}-count`).textContent = parts.join(" · ");
    $(`${tier}-map`).setAttribute(
      "aria-label",
      `${tier} blocks: ${told.used} used by one, ${told.shared} shared, ` +
        `${told.cached} free with a cached prefix, ${told.free} free`,
    );
  }
}

function point(tier, event) {
  const place = places[tier];
  const states = blocks[tier];
  if (!place || !states) return;
  const column = Math.floor(event.offsetX / place.side);
  const cell = Math.floor(event.offsetY / place.side) * place.columns + column;
  const first = cell * place.group;
  const inside = column < place.columns && first < states.length;
  const last = Math.min(states.length, first + place.group) - 1;
  event.target.title = !inside
    ? ""
    : place.group === 1
      ? `block ${first}: ${WORDS[states[first]]}`
      : `blocks ${first} to ${last}`;
}

// ---- requests ---------------------------------------------------------------------------------

function showCounts(live) {
  const all = live.running + live.waiting + live.swapped;
  const parts = [`${live.running} running`, `${live.waiting} waiting`];
  if (live.swapped) parts.push(`${live.swapped} swapped out`);
  if (all > live.sequences.length) parts.push(`the first ${live.sequences.length} are shown`);
  $("requests-note").textContent = parts.join(" · ");
}

// Rows are kept from one look to the next, so that what is selected or read stays in place.
function showRows() {
  const wanted = $("filter").value;
  const shown = sequences.filter((one) => !wanted || one.state === wanted);
  const body = $("requests").tBodies[0];
  const keys = new Set();
  let number = 0;
  let before = null;
  for (const one of shown) {
    // Others' requests have no names here; their place in the list is as good.
    const key = one.tenant || !one.id.includes(" ") ? one.id : `${one.id} ${(number += 1)}`;
    keys.add(key);
    let row = rows.get(key);
    if (!row) rows.set(key, (row = makeRow()));
    fillRow(row, one);
    const next = before ? before.nextSibling : body.firstChild;
    if (row.element !== next) body.insertBefore(row.element, next);
    before = row.element;
  }
  for (const [key, row] of rows) {
    if (!keys.has(key)) {
      row.element.remove();
      rows.delete(key);
    }
  }
  $("requests").hidden = !shown.length;
  $("no-requests").hidden = Boolean(shown.length);
  $("no-requests").textContent = wanted && sequences.length
    ? `Nothing is in state ${wanted}.`
    : "Nothing runs and nothing waits.";
}

function makeRow() {
  const row = element("tr");
  const cells = {};
  for (const name of ["id", "tenant", "state", "prompt", "answer", "blocks", "age"]) {
    const cell = element(name === "id" ? "th" : "td", ["id", "tenant", "state"].includes(name) ? name : "number");
    if (name === "id") cell.scope = "row";
    cells[name] = cell;
    row.append(cell);
  }
  cells.tag = element("span", "tag");
  cells.state.append(cells.tag);
  return { element: row, cells };
}

function fillRow({ cells }, one) {
  const put = (cell, text) => cell.textContent === text || (cell.textContent = text);
  put(cells.id, one.id);
  cells.id.title = one.id;
  put(cells.tenant, one.tenant || "–");
  put(cells.tag, one.state);
  cells.tag.dataset.state = one.state;
  const read = Math.min(one.computed_tokens, one.prompt_tokens);
  const cached = one.cached_tokens ? `, ${one.cached_tokens} cached` : "";
  put(cells.prompt, one.state === "prefill" && read < one.prompt_tokens
    ? `${read} of ${one.prompt_tokens}${cached}`
    : `${one.prompt_tokens}${cached}`);
  put(cells.answer, `${one.answer_tokens} of ${one.max_tokens}`);
  put(cells.blocks, String(one.blocks));
  put(cells.age, seconds(one.age_seconds));
}
