// The conversation: questions, streamed answers, settings.

import { $, element, sentence, stream } from "/page/api.js";
import { write } from "/page/text.js";

const CHAT_EXAMPLES = [
  "What does textwrap.dedent do?",
  "Write a function that reverses a list.",
  "What is a context manager?",
];
const TEXT_EXAMPLES = ["def fibonacci(n):\n", "import os\n\ndef ", "class Stack:\n"];

const messages = []; // the conversation so far, as the API takes it
let running = null; // AbortController of the answer under way
let state = { ready: false, reason: "connecting", has_chat_template: true };

export const isAnswering = () => running !== null;

// What the server is, and whether it answers now.
export function showState(next) {
  const before = state;
  state = next;
  $("send").disabled = !next.ready;
  $("hint").textContent = next.ready
    ? next.has_chat_template
      ? "Everything stays on this machine."
      : "This model has no chat template: it continues your text."
    : `Not ready yet: ${next.reason.replace(/^(loading|restarting|asleep): /, "")}`;
  if (next.ready !== before.ready || next.has_chat_template !== before.has_chat_template) {
    offerExamples();
  }
  if (next.ready && !before.ready) complain("");
}

function offerExamples() {
  const examples = state.has_chat_template ? CHAT_EXAMPLES : TEXT_EXAMPLES;
  $("examples").replaceChildren(
    ...(state.ready ? examples : []).map((text) => {
      const button = element("button", "quiet", text.trim());
      button.type = "button";
      button.addEventListener("click", () => send(text));
      return button;
    }),
  );
}

function complain(text) {
  $("notice").textContent = text;
  $("notice").hidden = !text;
}

function addTurn(role, text) {
  $("welcome").hidden = true;
  const turn = element("article", `turn ${role}`);
  turn.setAttribute("aria-label", role === "user" ? "You" : "Model");
  const body = element("div", "text");
  turn.append(body);
  $("log").append(turn);
  if (role === "user") body.append(element("p", "", text));
  else write(body, text);
  turn.scrollIntoView({ block: "end" });
  return turn;
}

function question(text) {
  const limit = Number.parseInt($("max-tokens").value, 10);
  const seed = Number.parseInt($("seed").value, 10);
  const asked = {
    model: state.model,
    stream: true,
    stream_options: { include_usage: true },
    temperature: Number($("temperature").value),
    top_p: Number($("top-p").value),
    max_tokens: limit > 0 ? limit : 512,
  };
  if (Number.isFinite(seed)) asked.seed = seed;
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
  const answer = new Answer(turn);
  running = new AbortController();
  busy(true);
  try {
    const [path, body] = question(text);
    await stream(path, body, running.signal, (chunk) => answer.take(chunk));
    answer.note();
  } catch (error) {
    if (error.name === "AbortError") answer.note("stopped");
    else {
      complain(sentence(error));
      if (answer.text) answer.note("cut off");
      else turn.remove();
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

// An answer as it grows. It is drawn once a frame, however fast tokens come.
class Answer {
  constructor(turn) {
    this.turn = turn;
    this.text = "";
    this.thoughts = "";
    this.tokens = 0;
    this.usage = null;
    this.finish = null;
    this.begun = performance.now();
    this.first = 0;
    this.drawing = false;
  }

  take(chunk) {
    if (chunk.error) throw new Error(chunk.error.message);
    if (chunk.usage) this.usage = chunk.usage;
    const choice = chunk.choices && chunk.choices[0];
    if (!choice) return;
    const gained = choice.delta ? choice.delta.content : choice.text;
    const thought = choice.delta && choice.delta.reasoning_content;
    if (choice.finish_reason) this.finish = choice.finish_reason;
    if (!gained && !thought) return;
    this.first ||= performance.now();
    this.tokens += 1;
    this.text += gained || "";
    this.thoughts += thought || "";
    if (!this.drawing) {
      this.drawing = true;
      // A hidden tab has no frames.
      const later = document.hidden ? (draw) => setTimeout(draw, 200) : requestAnimationFrame;
      later(() => this.draw());
    }
  }

  draw() {
    this.drawing = false;
    const log = $("log");
    const atEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 80;
    if (this.thoughts) this.drawThoughts();
    write(this.turn.querySelector(".text"), this.text);
    if (atEnd) log.scrollTop = log.scrollHeight;
  }

  drawThoughts() {
    let box = this.turn.querySelector(".thoughts");
    if (!box) {
      box = element("details", "thoughts");
      box.append(element("summary", "", "Thoughts"), element("p"));
      this.turn.prepend(box);
    }
    box.querySelector("p").textContent = this.thoughts.trim();
  }

  // What it took, below the answer.
  note(how) {
    this.draw();
    const now = performance.now();
    const tokens = this.usage ? this.usage.completion_tokens : this.tokens;
    const seconds = (now - (this.first || this.begun)) / 1000;
    const rate = tokens > 1 && seconds > 0 ? (tokens - 1) / seconds : 0;
    const facts = [tokens === 1 ? "1 token" : `${tokens} tokens`];
    if (rate) facts.push(`${rate.toFixed(1)} tokens/s`);
    if (this.first) facts.push(`first after ${((this.first - this.begun) / 1000).toFixed(2)} s`);
    const details = this.usage && this.usage.prompt_tokens_details;
    const cached = details ? details.cached_tokens : 0;
    if (cached) facts.push(`${cached} prompt tokens from the cache`);
    if (how) facts.push(how);
    else if (this.finish === "length") facts.push("cut at the token limit");
    this.turn.append(element("div", "note", facts.join(" · ")));
    this.turn.scrollIntoView({ block: "end" });
  }
}

function busy(is) {
  $("send").hidden = is;
  $("stop").hidden = !is;
  // Read out when it is whole, not token by token.
  $("log").setAttribute("aria-busy", String(is));
  if (!is) $("prompt").focus({ preventScroll: true });
}

function grow() {
  const prompt = $("prompt");
  prompt.style.height = "auto";
  prompt.style.height = `${prompt.scrollHeight + 2}px`;
}

export function begin() {
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
    if (event.key === "Escape" && running) running.abort();
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
  $("top-p").addEventListener("input", () => {
    $("top-p-shown").textContent = Number($("top-p").value).toFixed(2);
  });
  $("send").disabled = true;
}
