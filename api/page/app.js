"use strict";

// Model text goes into the page as text nodes only: nothing a model writes is ever read as HTML.

const $ = (id) => document.getElementById(id);
const messages = []; // the conversation so far, as the API takes it
let running = null; // AbortController of the answer under way
let state = { ready: false, reason: "connecting", has_chat_template: true };

const CHAT_EXAMPLES = [
  "What does textwrap.dedent do?",
  "Write a function that reverses a list.",
  "What is a context manager?",
];
const TEXT_EXAMPLES = ["def fibonacci(n):\n", "import os\n\ndef ", "class Stack:\n"];

function element(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

// ---- what runs ------------------------------------------------------------------------------

async function refresh() {
  try {
    const answer = await fetch("/status");
    show(await answer.json());
  } catch {
    show({ ...state, ready: false, reason: "the server can't be reached", running: 0, waiting: 0 });
  }
  setTimeout(refresh, running ? 500 : state.ready ? 2000 : 700);
}

function show(next) {
  const before = state;
  state = next;
  $("model").textContent = next.model || (next.ready ? "model" : next.reason);
  $("backend").textContent = next.backend || "–";
  $("device").textContent = next.device ? `${next.device}, ${next.dtype}` : "–";
  $("device").title = next.device || "";
  $("running").textContent = next.running || 0;
  $("waiting").textContent = next.waiting || 0;
  const total = next.kv_blocks_total || 0;
  $("blocks").textContent = total ? `${next.kv_blocks_used} of ${total}` : "–";
  $("blocks").title = `${next.kv_blocks_cached || 0} more hold cached prefixes`;
  const share = (count) => `${total ? (100 * count) / total : 0}%`;
  $("used").style.width = share(next.kv_blocks_used);
  $("cached").style.width = share(next.kv_blocks_cached);
  $("bar").setAttribute("aria-valuemax", total || 1);
  $("bar").setAttribute("aria-valuenow", next.kv_blocks_used || 0);
  $("send").disabled = !next.ready;
  $("hint").textContent = next.ready
    ? next.has_chat_template
      ? "Everything stays on this machine."
      : "This model has no chat template: it continues your text."
    : `Not ready yet: ${next.reason}`;
  if (next.ready !== before.ready || next.has_chat_template !== before.has_chat_template) {
    offerExamples();
  }
  if (next.ready && !before.ready) complain("");
}

function offerExamples() {
  const examples = state.has_chat_template ? CHAT_EXAMPLES : TEXT_EXAMPLES;
  $("examples").replaceChildren(
    ...(state.ready ? examples : []).map((text) => {
      const button = element("button", "", text.trim());
      button.type = "button";
      button.addEventListener("click", () => send(text));
      return button;
    }),
  );
}

function complain(sentence) {
  $("notice").textContent = sentence;
  $("notice").hidden = !sentence;
}

// ---- the conversation -----------------------------------------------------------------------

function addTurn(role, text) {
  $("welcome").hidden = true;
  const turn = element("article", `turn ${role}`);
  turn.setAttribute("aria-label", role === "user" ? "You" : "Model");
  const body = element("div", "text");
  turn.append(body);
  $("log").append(turn);
  write(body, text);
  turn.scrollIntoView({ block: "end" });
  return turn;
}

// Text becomes paragraphs, fenced code becomes <pre>. An open fence at the end is code, too.
function write(body, text) {
  const made = text.split(/^```/m).map((piece, index) => {
    if (index % 2 === 0) {
      const trimmed = piece.replace(/^\n+|\n+$/g, "");
      return trimmed || index === 0 ? paragraph(trimmed) : null;
    }
    const pre = element("pre");
    pre.append(element("code", "", piece.replace(/^[^\n]*\n?/, "").replace(/\n$/, "")));
    return pre;
  });
  const pieces = made.filter((piece) => piece && (piece.textContent || made.length === 1));
  body.replaceChildren(...(pieces.length ? pieces : [element("p")]));
}

function paragraph(text) {
  const made = element("p");
  text.split("`").forEach((piece, index, all) => {
    const closed = index % 2 === 1 && index < all.length - 1;
    if (closed) made.append(element("code", "", piece));
    else made.append(index % 2 === 1 ? `\`${piece}` : piece);
  });
  return made;
}

function question(text) {
  const limit = Number.parseInt($("max-tokens").value, 10);
  const asked = {
    model: state.model,
    stream: true,
    stream_options: { include_usage: true },
    temperature: Number($("temperature").value),
    max_tokens: limit > 0 ? limit : 512,
  };
  if (!state.has_chat_template) return ["/v1/completions", { ...asked, prompt: text }];
  const system = $("system").value.trim();
  const start = system ? [{ role: "system", content: system }] : [];
  return ["/v1/chat/completions", { ...asked, messages: [...start, ...messages] }];
}

async function send(text) {
  if (running || !text.trim()) return;
  if (!state.ready) return complain(`The server is not ready: ${state.reason}.`);
  complain("");
  const own = { role: "user", content: text };
  messages.push(own);
  addTurn("user", text);
  const turn = addTurn("assistant", "");
  turn.classList.add("writing");
  const answer = { text: "", tokens: 0, usage: null, finish: null, first: 0, begun: performance.now() };
  running = new AbortController();
  busy(true);
  try {
    const [path, body] = question(text);
    await stream(path, body, (chunk) => take(chunk, answer, turn));
    note(turn, answer);
  } catch (error) {
    if (error.name === "AbortError") note(turn, answer, "stopped");
    else {
      complain(sentence(error));
      if (!answer.text) turn.remove();
    }
  } finally {
    turn.classList.remove("writing");
    running = null;
    busy(false);
    // An answer that never came is no part of the conversation, and neither is its question.
    if (messages.at(-1) === own) {
      if (answer.text) messages.push({ role: "assistant", content: answer.text });
      else messages.pop();
    }
  }
}

function take(chunk, answer, turn) {
  if (chunk.error) throw new Error(chunk.error.message);
  if (chunk.usage) answer.usage = chunk.usage;
  const choice = chunk.choices && chunk.choices[0];
  if (!choice) return;
  const gained = choice.delta ? choice.delta.content : choice.text;
  if (choice.finish_reason) answer.finish = choice.finish_reason;
  if (!gained) return;
  answer.first ||= performance.now();
  answer.tokens += 1;
  answer.text += gained;
  const log = $("log");
  const atEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 80;
  write(turn.querySelector(".text"), answer.text);
  if (atEnd) log.scrollTop = log.scrollHeight;
}

function note(turn, answer, how) {
  const now = performance.now();
  const tokens = answer.usage ? answer.usage.completion_tokens : answer.tokens;
  const seconds = (now - (answer.first || answer.begun)) / 1000;
  const rate = tokens > 1 && seconds > 0 ? (tokens - 1) / seconds : 0;
  const facts = [`${tokens} tokens`];
  if (rate) facts.push(`${rate.toFixed(1)} tokens/s`);
  if (answer.first) facts.push(`first after ${((answer.first - answer.begun) / 1000).toFixed(2)} s`);
  const cached = answer.usage ? answer.usage.prompt_tokens_details.cached_tokens : 0;
  if (cached) facts.push(`${cached} prompt tokens from the cache`);
  if (how) facts.push(how);
  else if (answer.finish === "length") facts.push("cut at the token limit");
  turn.append(element("div", "note", facts.join(" · ")));
  turn.scrollIntoView({ block: "end" });
  if (rate) $("rate").textContent = rate.toFixed(1);
}

function sentence(error) {
  const offline = error instanceof TypeError;
  const text = offline ? "the server can't be reached" : error.message || "something went wrong";
  return `${text[0].toUpperCase()}${text.slice(1)}${/[.!?]$/.test(text) ? "" : "."}`;
}

// Server-sent events of a POST. Calls `take` for each, until [DONE].
async function stream(path, body, take) {
  const answer = await fetch(path, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(body),
    signal: running.signal,
  });
  if (!answer.ok) {
    const told = await answer.json().catch(() => null);
    throw new Error(told && told.error ? told.error.message : `the server answered ${answer.status}`);
  }
  const reader = answer.body.getReader();
  const decoder = new TextDecoder();
  let held = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) throw new Error("the answer was cut off");
    held += decoder.decode(value, { stream: true });
    const events = held.split("\n\n");
    held = events.pop();
    for (const event of events) {
      const data = event.replace(/^data: /, "");
      if (data === "[DONE]") return;
      take(JSON.parse(data));
    }
  }
}

// ---- controls -------------------------------------------------------------------------------

function busy(is) {
  $("send").hidden = is;
  $("stop").hidden = !is;
  if (!is) $("prompt").focus();
}

function grow() {
  const prompt = $("prompt");
  prompt.style.height = "auto";
  prompt.style.height = `${prompt.scrollHeight + 2}px`;
}

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = $("prompt").value;
  if (running || !text.trim() || !state.ready) return;
  $("prompt").value = "";
  grow();
  send(text);
});
$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    $("form").requestSubmit();
  }
});
$("prompt").addEventListener("input", grow);
$("stop").addEventListener("click", () => running && running.abort());
$("clear").addEventListener("click", () => {
  if (running) running.abort();
  messages.length = 0;
  document.querySelectorAll(".turn").forEach((turn) => turn.remove());
  $("welcome").hidden = false;
  complain("");
  $("prompt").focus();
});
$("temperature").addEventListener("input", () => {
  $("temperature-shown").textContent = Number($("temperature").value).toFixed(1);
});

$("send").disabled = true;
refresh();
