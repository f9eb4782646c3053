// The page as a whole: which view is open, what is asked of the server and how often.

import { $, ApiError, getJson, sentence } from "/page/api.js";
import * as chat from "/page/chat.js";
import * as live from "/page/live.js";
import { loadConformance, loadPlan } from "/page/plan.js";

const VIEWS = ["chat", "live", "plan", "conformance"];
const WORDS = {
  loading: "Loading",
  ready: "Ready",
  restarting: "Restarting",
  asleep: "Asleep",
  stopping: "Stopping",
  failed: "Failed",
  unreachable: "Unreachable",
  locked: "Locked",
};
const TITLES = {
  loading: "The engine is loading.",
  restarting: "The engine is being replaced.",
  asleep: "The engine sleeps.",
  stopping: "The server is shutting down.",
  failed: "The engine has failed.",
  unreachable: "The server can't be reached.",
  locked: "An API key is needed.",
};

let view = "chat";
let status = { ready: false, reason: "connecting", state: "loading", has_chat_template: true };
let timer = 0;
let asked = null; // AbortController of the polls under way

// ---- what the server is -----------------------------------------------------------------------

function show(next) {
  status = next;
  $("model").textContent = next.model || "…";
  $("backend").textContent = next.backend || "–";
  $("device").textContent = next.device ? `${next.device}, ${next.dtype}` : "–";
  $("device").title = next.device || "";
  $("running").textContent = next.running || 0;
  $("waiting").textContent = next.waiting || 0;
  $("rate").textContent = live.short(next.tokens_per_second || 0);
  const total = next.kv_blocks_total || 0;
  $("blocks").textContent = total ? `${next.kv_blocks_used} of ${total}` : "–";
  $("blocks").title = `${next.kv_blocks_cached || 0} more hold cached prefixes`;
  const share = (count) => `${total ? (100 * count) / total : 0}%`;
  $("used").style.width = share(next.kv_blocks_used);
  $("cached").style.width = share(next.kv_blocks_cached);
  $("bar").setAttribute("aria-valuemax", total || 1);
  $("bar").setAttribute("aria-valuenow", next.kv_blocks_used || 0);
  $("state").dataset.state = next.state;
  $("state-text").textContent = WORDS[next.state] || next.state;
  const fine = next.state === "ready";
  if ($("banner").hidden !== fine || !fine) {
    $("banner").hidden = fine;
    $("banner").dataset.state = next.state;
    setText($("banner-title"), TITLES[next.state] || "");
    setText($("banner-text"), fine ? "" : next.reason.replace(/^(loading|restarting|asleep): /, ""));
  }
  document.title = fine ? `${next.model} · Halyard` : `${WORDS[next.state]} · Halyard`;
  chat.showState(next);
}

// Screen readers announce what changes, so nothing is written twice.
function setText(where, text) {
  if (where.textContent !== text) where.textContent = text;
}

function absent(state, reason) {
  show({ ...status, ready: false, state, reason, running: 0, waiting: 0, tokens_per_second: 0 });
}

// ---- asking -----------------------------------------------------------------------------------

async function refresh() {
  clearTimeout(timer);
  if (document.hidden) return; // nobody looks: nothing is asked
  if (asked) asked.abort();
  const own = (asked = new AbortController());
  try {
    const before = status;
    const polls = [getJson("/status", own.signal)];
    if (view === "live") polls.push(live.refresh(own.signal));
    const [next] = await Promise.all(polls);
    show(next);
    const loaded = next.ready && (!before.ready || before.backend !== next.backend);
    if (loaded) open(view); // the plan is another one
  } catch (error) {
    if (error.name === "AbortError") return;
    if (error instanceof ApiError && error.status === 401) absent("locked", "reload to enter one");
    else absent("unreachable", error instanceof TypeError ? "trying again" : sentence(error));
  }
  if (own !== asked) return;
  asked = null;
  timer = setTimeout(refresh, pause());
}

function pause() {
  if (!status.ready) return 700;
  return view === "live" || chat.isAnswering() ? 1000 : 2000;
}

// ---- views ------------------------------------------------------------------------------------

function open(name) {
  view = VIEWS.includes(name) ? name : "chat";
  for (const other of VIEWS) $(other).hidden = other !== view;
  for (const link of document.querySelectorAll("nav a")) {
    if (link.dataset.view === view) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  if (view === "plan") loadPlan();
  if (view === "conformance") loadConformance();
}

function follow() {
  open(location.hash.slice(1));
  if (view === "chat") $("prompt").focus({ preventScroll: true });
  window.scrollTo(0, 0);
  refresh();
}

chat.begin();
live.begin();
window.addEventListener("hashchange", follow);
document.addEventListener("visibilitychange", () => {
  if (document.hidden) {
    clearTimeout(timer);
    if (asked) asked.abort();
    asked = null;
  } else refresh();
});
follow();
