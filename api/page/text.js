// A model's text as elements: paragraphs, lists, headings, code. Made of text nodes only: nothing
// that a model writes is ever read as HTML.

import { element } from "/page/api.js";

const FENCE = /^ {0,3}(```+|~~~+)[ \t]*([^\s`]*)[^\n]*$/;
const ITEM = /^\s{0,3}([-*+]|\d{1,3}[.)])\s+(.*)$/;
const HEADING = /^(#{1,6})\s+(.*)$/;

// Replaces the content of `body` by `text`. An open fence at the end is code already.
export function write(body, text) {
  const made = blocks(text).map(block);
  body.replaceChildren(...(made.length ? made : [element("p")]));
}

function blocks(text) {
  const found = [];
  let open = null; // the paragraph or list that goes on
  let fence = null;
  for (const line of text.split("\n")) {
    if (fence) {
      const closes = line.trim().startsWith(fence.mark) && !line.trim().slice(fence.mark.length).trim();
      if (closes) fence = null;
      else fence.lines.push(line);
      continue;
    }
    const fenced = FENCE.exec(line);
    const heading = HEADING.exec(line);
    const item = ITEM.exec(line);
    if (fenced) {
      fence = { kind: "code", mark: fenced[1], language: fenced[2], lines: [] };
      found.push(fence);
      open = null;
    } else if (!line.trim()) {
      if (open && open.kind === "text") open = null;
    } else if (heading) {
      found.push({ kind: "heading", level: heading[1].length, text: heading[2] });
      open = null;
    } else if (item) {
      const ordered = /\d/.test(item[1]);
      if (!open || open.kind !== "list" || open.ordered !== ordered) {
        open = { kind: "list", ordered, start: Number.parseInt(item[1], 10) || 1, items: [] };
        found.push(open);
      }
      open.items.push(item[2]);
    } else if (open && open.kind === "list" && /^\s{2,}/.test(line)) {
      open.items[open.items.length - 1] += `\n${line.trim()}`;
    } else {
      if (!open || open.kind !== "text") {
        open = { kind: "text", lines: [] };
        found.push(open);
      }
      open.lines.push(line);
    }
  }
  return found;
}

function block(told) {
  if (told.kind === "code") return code(told);
  if (told.kind === "heading") {
    // The page has h1 and h2 already.
    return spans(element(`h${Math.min(6, told.level + 2)}`), told.text);
  }
  if (told.kind === "list") {
    const list = element(told.ordered ? "ol" : "ul");
    if (told.ordered && told.start !== 1) list.start = told.start;
    list.append(...told.items.map((text) => spans(element("li"), text)));
    return list;
  }
  return spans(element("p"), told.lines.join("\n"));
}

function code(told) {
  const figure = element("figure", "code");
  const bar = element("figcaption", "", told.language || "text");
  const copy = element("button", "copy", "Copy");
  copy.type = "button";
  copy.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(told.lines.join("\n"));
      copy.textContent = "Copied";
    } catch {
      copy.textContent = "Can't copy";
    }
    setTimeout(() => (copy.textContent = "Copy"), 1500);
  });
  bar.append(copy);
  const pre = element("pre");
  pre.tabIndex = 0; // it scrolls sideways
  pre.append(element("code", "", told.lines.join("\n")));
  figure.append(bar, pre);
  return figure;
}

// `code`, **strong** and *emphasis*; a mark without its partner is a character.
function spans(parent, text) {
  const pattern = /`([^`\n]+)`|\*\*([^*\n]+)\*\*|(?<![\w*])\*([^*\s][^*\n]*)\*(?![\w*])/g;
  let at = 0;
  for (const found of text.matchAll(pattern)) {
    parent.append(text.slice(at, found.index));
    const [whole, coded, strong, soft] = found;
    if (coded !== undefined) parent.append(element("code", "", coded));
    else parent.append(element(strong !== undefined ? "strong" : "em", "", strong ?? soft));
    at = found.index + whole.length;
  }
  parent.append(text.slice(at));
  return parent;
}
