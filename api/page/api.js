// Requests to this server, with the API key if there is one.

const KEPT = "halyard-key";
let asking = null; // the dialog's promise, while it is open

export const $ = (id) => document.getElementById(id);

export function element(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

export class ApiError extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

function keyHeader() {
  const key = sessionStorage.getItem(KEPT);
  return key ? { Authorization: `Bearer ${key}` } : {};
}

// Opens the dialog, once for any number of callers that were refused.
function askForKey(refused) {
  asking ||= new Promise((resolve) => {
    const dialog = $("key-dialog");
    $("key-problem").hidden = !refused;
    $("key").value = "";
    const done = () => {
      const key = $("key").value.trim();
      asking = null;
      if (key) sessionStorage.setItem(KEPT, key);
      resolve(Boolean(key));
    };
    dialog.addEventListener("close", done, { once: true });
    if (!dialog.open) dialog.showModal();
  });
  return asking;
}

// fetch, with the key; a 401 asks for one and tries again.
export async function call(path, options = {}) {
  for (;;) {
    const used = keyHeader();
    const headers = { Accept: "application/json", ...used, ...options.headers };
    const answer = await fetch(path, { ...options, headers });
    if (answer.status !== 401) return answer;
    const newer = keyHeader().Authorization !== used.Authorization; // another call got one meanwhile
    if (newer) continue;
    if (!(await askForKey(Boolean(used.Authorization)))) {
      throw new ApiError("this server asks for an API key", 401);
    }
  }
}

export async function problem(answer) {
  const told = await answer.json().catch(() => null);
  const text = told && told.error ? told.error.message : `the server answered ${answer.status}`;
  return new ApiError(text, answer.status);
}

export async function getJson(path, signal) {
  const answer = await call(path, { signal });
  if (!answer.ok) throw await problem(answer);
  return answer.json();
}

// Server-sent events of a POST. Calls `take` for each, until [DONE].
export async function stream(path, body, signal, take) {
  const answer = await call(path, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(body),
    signal,
  });
  if (!answer.ok) throw await problem(answer);
  const reader = answer.body.getReader();
  const decoder = new TextDecoder();
  let held = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) throw new ApiError("the answer was cut off");
    held += decoder.decode(value, { stream: true });
    const events = held.split("\n\n");
    held = events.pop();
    for (const event of events) {
      const data = event.replace(/^data: /, "");
      if (data === "[DONE]") return;
      if (!event.startsWith(":")) take(JSON.parse(data));
    }
  }
}

export function sentence(error) {
  const offline = error instanceof TypeError;
  const text = offline ? "the server can't be reached" : error.message || "something went wrong";
  return `${text[0].toUpperCase()}${text.slice(1)}${/[.!?]$/.test(text) ? "" : "."}`;
}
