// The plan that the engine was built from, and what conformance reports say of each backend.

import { $, element, getJson, sentence } from "/page/api.js";
import { seconds } from "/page/live.js";

const GIB = 2 ** 30;

function bytes(count) {
  if (count >= GIB) return `${(count / GIB).toFixed(count >= 10 * GIB ? 0 : 1)} GiB`;
  if (count >= 2 ** 20) return `${(count / 2 ** 20).toFixed(0)} MiB`;
  return `${Math.max(0, count).toLocaleString("en")} bytes`;
}

function card(title, ...content) {
  const made = element("section", "card");
  made.append(element("h3", "", title), ...content);
  return made;
}

function facts(pairs) {
  const list = element("dl", "pairs");
  for (const [name, value] of pairs) {
    list.append(element("dt", "", name), element("dd", "", String(value)));
  }
  return list;
}

async function load(where, path, draw) {
  try {
    where.replaceChildren(...draw(await getJson(path)));
  } catch (error) {
    where.replaceChildren(element("p", "empty", sentence(error)));
  }
}

// ---- the plan ---------------------------------------------------------------------------------

export function loadPlan() {
  return load($("plan-body"), "/status/plan", (told) => {
    if (!told.plan) return [element("p", "empty", "The plan is known once the engine is loaded.")];
    return drawPlan(told.plan, told.start_seconds, told.fallbacks);
  });
}

function drawPlan(plan, phases, fallbacks) {
  const { model, memory, device } = plan;
  const heading = element("p", "lead");
  heading.append(
    element("b", "", model.name), " runs on ", element("b", "", plan.backend),
    ` (${plan.status}): ${plan.kernels["paged attention"]} kernels, `,
    `${plan.kernels["between attentions"]} between them, on ${device.name}.`,
  );
  const grid = element("div", "cards");
  grid.append(
    card("Model", facts([
      ["architecture", model.architecture],
      ["parameters", `${(model.parameters / 1e6).toLocaleString("en", { maximumFractionDigits: 1 })} M`],
      ["layers", model.layers],
      ["heads", `${model.heads}, ${model.kv_heads} for keys and values, ${model.head_dim} wide`],
      ["context", `${model.context.toLocaleString("en")} tokens`],
      ["computed in", `${plan.dtype.name} (${plan.dtype.reason})`],
    ])),
    card("Capacity", facts([
      ["KV blocks", `${memory.num_blocks.toLocaleString("en")} of ${plan.block_size} tokens`],
      ["limited by", memory.limited_by],
      ["host blocks", memory.num_host_blocks.toLocaleString("en")],
      ["KV a token", bytes(memory.kv_bytes_per_token)],
      ["longest request", `${memory.max_model_len.toLocaleString("en")} tokens`],
      ["of these at once", memory.concurrency.toLocaleString("en", { maximumFractionDigits: 1 })],
      ["tokens a step", plan.max_batched_tokens.toLocaleString("en")],
    ])),
  );
  const fell = Object.entries(fallbacks);
  return [
    heading,
    ...(fell.length ? [card("Slower ways taken", facts(fell.map(([part, n]) => [part, `${n} times: see the log`])))] : []),
    card("Memory", ...drawMemory(plan)),
    grid,
    ...drawStart(phases),
    drawRejected(plan),
  ];
}

function drawMemory({ memory, block_size: size }) {
  const kv = memory.num_blocks * size * memory.kv_bytes_per_token;
  const parts = [
    ["weights", memory.weight_bytes, "used"],
    ["a step's intermediates", memory.activation_bytes, "shared"],
    ["KV blocks", kv, "cached"],
  ];
  const whole = Math.max(memory.total_bytes, parts.reduce((sum, part) => sum + part[1], 0));
  const bar = element("div", "stack");
  bar.setAttribute("aria-hidden", "true");
  const legend = element("ul", "legend");
  for (const [name, count, kind] of parts) {
    const piece = element("i", `k-${kind}`);
    piece.style.width = `${(100 * count) / whole}%`;
    bar.append(piece);
    const item = element("li");
    item.append(element("i", `k-${kind}`), `${name}: ${bytes(count)}`);
    legend.append(item);
  }
  const mark = element("i", "mark");
  mark.style.left = `${(100 * memory.budget_bytes) / whole}%`;
  bar.append(mark);
  const rest = element("li");
  rest.append(element("i", "k-mark"),
    `budget: ${bytes(memory.budget_bytes)} of the device's ${bytes(memory.total_bytes)}`);
  legend.append(rest);
  return [bar, legend];
}

function drawStart(phases) {
  const known = Object.entries(phases);
  if (!known.length) return [];
  const total = known.reduce((sum, [, took]) => sum + took, 0);
  return [card(`Start: ${seconds(total)}`, facts(known.map(([name, took]) => [name, seconds(took)])))];
}

function drawRejected(plan) {
  const list = element("dl", "pairs wide-names");
  for (const { backend, reasons } of plan.rejected) {
    list.append(element("dt", "", backend), element("dd", "", reasons.join("; ")));
  }
  return card("Why not another backend", list);
}

// ---- conformance ------------------------------------------------------------------------------

export function loadConformance() {
  return load($("conformance-body"), "/status/conformance", drawConformance);
}

function drawConformance({ levels, rows, running }) {
  const lead = element("p", "lead",
    "Cases passed, by backend, data type and level, from the reports that ship with this version. " +
      "A dash: no such case, or no report yet.");
  const table = element("table", "matrix");
  const head = element("tr");
  for (const text of ["Backend", "Status", "Type"]) {
    const cell = element("th", "", text);
    cell.scope = "col";
    head.append(cell);
  }
  for (const [name, title] of Object.entries(levels)) {
    const cell = element("th", "level");
    cell.scope = "col";
    cell.append(element("b", "", name === "mutants" ? "M" : name), element("small", "", title));
    head.append(cell);
  }
  table.append(element("thead"), element("tbody"));
  table.tHead.append(head);
  for (const row of rows) table.tBodies[0].append(...drawBackend(row, Object.keys(levels), running));
  const scroll = element("div", "table-scroll tall");
  scroll.tabIndex = 0;
  scroll.setAttribute("role", "region");
  scroll.setAttribute("aria-label", "Conformance matrix");
  scroll.append(table);
  return [lead, scroll];
}

function drawBackend(row, levels, running) {
  const dtypes = Object.keys(row.dtypes).sort((a, b) => (a === "any") - (b === "any"));
  const lines = dtypes.length ? dtypes : [null];
  return lines.map((dtype, number) => {
    const line = element("tr", row.backend === running ? "current" : "");
    if (number === 0) {
      const name = element("th");
      name.scope = "rowgroup";
      name.rowSpan = lines.length;
      name.append(element("b", "", row.backend));
      if (row.backend === running) name.append(" ", element("span", "chip", "serving"));
      name.append(element("small", "", row.role));
      const status = element("td");
      status.rowSpan = lines.length;
      status.append(element("span", `status ${row.status}`, row.status));
      if (row.date) status.append(element("small", "", row.date));
      if (row.hardware) status.append(element("small", "", row.hardware));
      line.append(name, status);
    }
    line.append(element("td", "", dtype === "any" ? "any type" : dtype || "–"));
    for (const level of levels) line.append(drawCell(dtype && row.dtypes[dtype][level], level));
    return line;
  });
}

function drawCell(cell, level) {
  if (!cell) return element("td", "cell none", "–");
  const { passed, failed, not_claimed: without } = cell;
  const kind = failed ? "bad" : passed ? "good" : "none";
  const text = failed ? `${failed} failed` : passed ? `${passed} ✓` : "not claimed";
  const made = element("td", `cell ${kind}`, text);
  made.title = `${level}: ${passed} passed, ${failed} failed, ${without} not claimed`;
  return made;
}
