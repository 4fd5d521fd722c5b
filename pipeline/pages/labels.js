"use strict";
// Reads what contents.py packs. Every text goes into the page by textContent, never as markup.
const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const { head: K, draws: D, temperatures } = data;
const J = temperatures.length;
const controlNames = (text) => text.replace(/[\u0000-\u0008\u000b-\u001f\u007f\u200b-\u200f\u202a-\u202e\u2066-\u2069\ufeff]/g,
  (char) => `\\u${char.charCodeAt(0).toString(16).padStart(4, "0")}`);
const textOf = (id) => data.texts[id] ?? `[${id}]`;
const visible = (text) => controlNames(text).replaceAll("\n", "⏎").replaceAll("\t", "⇥").replaceAll(" ", "·") || "∅";
const percent = (p) => p >= 0.9995 ? "100 %" : p >= 0.0995 ? `${(100 * p).toFixed(1)} %` : p >= 0.001 ? `${(100 * p).toFixed(2)} %` : p > 0 ? p.toExponential(0) : "0";

function make(name, properties = {}, ...children) {
  const node = Object.assign(document.createElement(name), properties);
  node.append(...children);
  return node;
}

async function unpack(entry) {
  if (entry.label) return entry.label;
  const packed = Uint8Array.from(atob(entry.data), (char) => char.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  const view = new DataView(await new Response(stream).arrayBuffer());
  const { tokens: L, positions: N } = entry;
  let at = 0;
  const read = (count, Type, bytes, get) => {
    const values = new Type(count);
    for (let i = 0; i < count; i++, at += bytes) values[i] = view[get](at, true);
    return values;
  };
  const ids = (count) => read(count, Int32Array, 4, "getInt32");
  const nats = (count) => read(count, Float32Array, 2, "getInt16").map((step) => step / data.steps);
  const label = { ids: ids(L), headIds: ids(N * K), drawIds: ids(N * D), head: nats(N * K), draws: nats(N * D), gold: nats(N),
    partition: nats(N * J), tail: nats(N * J), entropy: nats(N) };
  if (data.student !== null) Object.assign(label, { studentHead: nats(N * K), studentDraws: nats(N * D), studentGold: nats(N), kl: nats(N) });
  label.counts = read(N * D, Uint16Array, 2, "getUint16");
  label.mask = read(L, Uint8Array, 1, "getUint8");
  label.rowOf = new Int32Array(L).fill(-1); // the row of the label that predicts a token
  for (let t = 0, row = 0; t < L; t++) if (label.mask[t]) label.rowOf[t + 1] = row++;
  label.surprise = label.gold.map((value) => -value);
  delete entry.data;
  return (entry.label = label);
}

// colours ------------------------------------------------------------------------------------------------------------
const colours = [["surprise", "teacher's surprise at the text, nats", 6], ["entropy", `teacher's entropy at T=${temperatures[0]}, nats`, 4]];
if (data.student !== null) colours.push(["kl", `KL(teacher ‖ student) at T=${temperatures[0]}, nats`, 2]);

function paint(entry) {
  if (!entry.spans) return;
  const [name, , most] = colours[$("colour").selectedIndex];
  entry.spans.forEach((span, t) => {
    const row = entry.label.rowOf[t];
    if (row >= 0) span.style.backgroundColor = `rgb(var(--heat) / ${(0.85 * Math.min(1, Math.max(0, entry.label[name][row] / most))).toFixed(3)})`;
  });
}

function paintAll() {
  $("most").textContent = `${colours[$("colour").selectedIndex][2]} or more`;
  data.examples.forEach(paint);
}

// text ---------------------------------------------------------------------------------------------------------------
async function show(entry) {
  if (entry.spans || entry.showing) return entry.showing;
  return (entry.showing = (async () => {
    const label = await unpack(entry);
    const text = entry.section.querySelector(".text");
    text.replaceChildren();
    entry.spans = Array.from(label.ids, (id, t) => {
      const words = controlNames(textOf(id));
      const span = make("span", { className: label.rowOf[t] >= 0 ? "target" : "prompt", textContent: words });
      span.dataset.t = t;
      if (words.includes("\n")) span.textContent = words.replaceAll("\n", "⏎\n");
      return span;
    });
    text.append(...entry.spans);
    paint(entry);
    if (query) mark(entry);
  })());
}

const watcher = new IntersectionObserver((seen) => seen.forEach((one) => one.isIntersecting && show(one.target.entry)), { rootMargin: "600px" });

function sectionOf(entry) {
  const figures = [`example ${entry.index}`, entry.why, ...Object.entries(entry.metadata).map(([k, v]) => `${k}: ${v}`),
    `${entry.positions.toLocaleString("en")} target positions`, `surprise ${entry.surprise.toFixed(2)}`, `entropy ${entry.entropy.toFixed(2)}`];
  if (entry.kl !== null) figures.push(`KL ${entry.kl.toFixed(3)}`);
  const text = make("div", { className: "text", tabIndex: 0, textContent: "…" });
  text.setAttribute("role", "group");
  text.setAttribute("aria-label", `Text of example ${entry.index}; arrow keys choose a token`);
  entry.section = make("section", { entry }, make("h2", { textContent: controlNames(figures.join(" · ")) }), text);
  entry.section.style.containIntrinsicSize = `auto ${60 + Math.ceil(entry.tokens / 18) * 23}px`;
  watcher.observe(entry.section);
  return entry.section;
}

// detail -------------------------------------------------------------------------------------------------------------
let chosen = null; // [entry, token]

function choose(entry, t, focus = false) {
  if (chosen) chosen[0].spans[chosen[1]]?.classList.remove("chosen");
  chosen = [entry, t];
  const span = entry.spans[t];
  span.classList.add("chosen");
  if (focus) {
    entry.section.querySelector(".text").focus({ preventScroll: true });
    span.scrollIntoView({ block: "nearest" });
  }
  detail(entry.label, t);
}

function detail(label, t) {
  const id = label.ids[t], row = label.rowOf[t];
  const facts = make("dl");
  const fact = (name, value) => facts.append(make("dt", { textContent: name }), make("dd", { textContent: value }));
  fact("token", `${id}, place ${t}`);
  const parts = [make("h2", { textContent: visible(textOf(id)) }), facts];
  if (row < 0) {
    fact("label", t === 0 ? "none: nothing stands before it" : "none: prompt");
  } else {
    fact("teacher", `${percent(Math.exp(label.gold[row]))}, surprise ${label.surprise[row].toFixed(2)} nats`);
    fact("entropy", `${label.entropy[row].toFixed(2)} nats at T=${temperatures[0]}`);
    if (label.kl) {
      fact("student", percent(Math.exp(label.studentGold[row])));
      fact("KL", `${label.kl[row].toFixed(3)} nats at T=${temperatures[0]}`);
    }
    parts.push(entries(label, row, id, "head", K), ...(D ? [entries(label, row, id, "draws", D)] : []));
  }
  $("detail").replaceChildren(...parts);
}

function entries(label, row, gold, kind, width) {
  const isHead = kind === "head";
  const ids = isHead ? label.headIds : label.drawIds;
  const titles = ["token", ...temperatures.map((t) => `T=${t}`), ...(label.kl ? ["student"] : []), ...(isHead ? [] : ["drawn"])];
  const body = make("tbody");
  const tempered = (logprob, j) => Math.exp(logprob / temperatures[j] - label.partition[row * J + j]);
  for (let i = row * width; i < (row + 1) * width; i++) {
    if (!isHead && label.counts[i] === 0) continue;
    const cells = [make("td", { textContent: visible(textOf(ids[i])), title: `token ${ids[i]}` })];
    for (let j = 0; j < J; j++) {
      const p = tempered(label[kind][i], j);
      const cell = make("td", { textContent: percent(p) });
      if (j === 0) cell.append(bar(p, ""));
      cells.push(cell);
    }
    if (label.kl) {
      const q = Math.exp((isHead ? label.studentHead : label.studentDraws)[i]);
      cells.push(make("td", { className: "student", textContent: percent(q) }, bar(q, " student")));
    }
    if (!isHead) cells.push(make("td", { textContent: `× ${label.counts[i]}` }));
    body.append(make("tr", { className: ids[i] === gold ? "gold" : "" }, ...cells));
  }
  if (isHead) {
    const tail = temperatures.map((_, j) => make("td", { textContent: percent(Math.exp(label.tail[row * J + j])) }));
    const rest = label.kl ? [make("td", { className: "student", textContent: percent(Math.max(0, 1 - sum(label.studentHead, row, K))) })] : [];
    body.append(make("tr", {}, make("td", { textContent: "all others" }), ...tail, ...rest));
  }
  const shown = isHead ? `head: the ${K} most probable tokens` : `tail: ${D} most probable of the tokens drawn in ${data.drawn} draws`;
  return make("table", {}, make("caption", { textContent: shown }),
    make("thead", {}, make("tr", {}, ...titles.map((title) => make("th", { textContent: title, scope: "col" })))), body);
}

const sum = (logs, row, width) => logs.subarray(row * width, (row + 1) * width).reduce((total, log) => total + Math.exp(log), 0);

function bar(p, kind) {
  const line = make("span", { className: `bar${kind}` });
  line.style.width = `${(100 * Math.min(1, p)).toFixed(1)}%`;
  return line;
}

// search -------------------------------------------------------------------------------------------------------------
let query = "", hits = [], hit = -1, searching = null;

async function search() {
  const wanted = $("search").value.toLowerCase();
  query = wanted;
  const found = [];
  if (wanted) {
    for (const entry of data.examples) {
      const label = await unpack(entry);
      if (query !== wanted) return; // another search has begun
      entry.starts ??= label.ids.reduce((starts, id) => (starts.push(starts.at(-1) + textOf(id).length), starts), [0]);
      entry.lower ??= Array.from(label.ids, textOf).join("").toLowerCase();
      for (let at = entry.lower.indexOf(wanted); at >= 0; at = entry.lower.indexOf(wanted, at + wanted.length)) {
        found.push([entry, place(entry.starts, at), place(entry.starts, at + wanted.length - 1)]);
      }
    }
  }
  [hits, hit] = [found, -1];
  $("hits").textContent = wanted ? `${found.length.toLocaleString("en")} hits` : "";
  data.examples.forEach(mark);
}

function place(starts, at) { // the token that holds a character
  let low = 0, high = starts.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (starts[middle] <= at) low = middle; else high = middle;
  }
  return low;
}

function mark(entry) {
  if (!entry.spans) return;
  entry.section.querySelectorAll(".hit").forEach((span) => span.classList.remove("hit"));
  for (const [where, first, last] of hits) if (where === entry) for (let t = first; t <= last; t++) entry.spans[t].classList.add("hit");
}

async function nextHit() {
  await searching;
  if (!hits.length) return;
  hit = (hit + 1) % hits.length;
  $("hits").textContent = `${hit + 1} of ${hits.length.toLocaleString("en")} hits`;
  const [entry, t] = hits[hit];
  await reach(entry, t);
}

async function reach(entry, t) {
  entry.section.scrollIntoView({ block: "nearest" });
  await show(entry);
  choose(entry, t, true);
}

// keys and pointer ---------------------------------------------------------------------------------------------------
function step(by) {
  const [entry, t] = chosen;
  choose(entry, Math.min(entry.spans.length - 1, Math.max(0, t + by)), true);
}

function line(by) { // the nearest token of the line above or below
  const [entry, t] = chosen;
  const from = entry.spans[t].getBoundingClientRect();
  let best = null, least = Infinity;
  for (let i = t + by; i >= 0 && i < entry.spans.length; i += by) {
    const box = entry.spans[i].getClientRects()[0];
    if (!box || (by > 0 ? box.top < from.bottom - 2 : box.bottom > from.top + 2)) continue;
    const apart = Math.abs(box.left - from.left), away = Math.abs(box.top - from.top);
    if (best !== null && away > best.away + 4) break;
    if (apart < least) [least, best] = [apart, { i, away }];
  }
  if (best) choose(entry, best.i, true);
}

async function example(by) {
  const order = [...$("examples").children].map((section) => section.entry);
  const now = chosen ? order.indexOf(chosen[0]) + by : 0;
  const entry = order[Math.min(order.length - 1, Math.max(0, now))];
  await show(entry);
  await reach(entry, Math.max(0, entry.label.rowOf.findIndex((row) => row >= 0)));
}

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.target === $("search")) {
    if (event.key === "Enter") { event.preventDefault(); nextHit(); }
    if (event.key === "Escape") event.target.blur();
    return;
  }
  if (event.target.tagName === "SELECT") return;
  const keys = { n: () => example(1), p: () => example(-1), "/": () => $("search").focus(), Enter: nextHit };
  if (chosen) Object.assign(keys, { ArrowRight: () => step(1), ArrowLeft: () => step(-1), ArrowDown: () => line(1), ArrowUp: () => line(-1) });
  if (keys[event.key]) { event.preventDefault(); keys[event.key](); }
});
const under = (event) => event.target.dataset?.t !== undefined && event.target.closest("section");
for (const kind of ["mouseover", "click"]) {
  $("examples").addEventListener(kind, (event) => {
    const section = under(event);
    if (section) choose(section.entry, Number(event.target.dataset.t), kind === "click");
  });
}
$("examples").addEventListener("focusin", async (event) => {
  const section = event.target.closest("section");
  await show(section.entry);
  if (!chosen || chosen[0] !== section.entry) choose(section.entry, Math.max(0, section.entry.label.rowOf.findIndex((row) => row >= 0)));
});

// the page -----------------------------------------------------------------------------------------------------------
const orders = [["as chosen", () => 0], ["index", (a, b) => a.index - b.index], ["most surprising first", (a, b) => b.surprise - a.surprise],
  ["least surprising first", (a, b) => a.surprise - b.surprise]];
if (data.student !== null) orders.push(["largest KL first", (a, b) => b.kl - a.kl]);

$("title").textContent = controlNames(`Labels of ${data.cache}`);
$("about").textContent = controlNames(`${data.examples.length} of ${data.total.toLocaleString("en")} examples, labelled by ${data.teacher}`
  + (data.student === null ? "" : `; beside it ${data.student}`));
colours.forEach(([, title]) => $("colour").append(make("option", { textContent: title })));
orders.forEach(([title]) => $("order").append(make("option", { textContent: title })));
$("examples").append(...data.examples.map(sectionOf));
$("colour").addEventListener("change", paintAll);
$("order").addEventListener("change", () => {
  $("examples").append(...[...data.examples].sort(orders[$("order").selectedIndex][1]).map((entry) => entry.section));
});
$("search").addEventListener("input", () => { searching = search(); });
$("controls").addEventListener("submit", (event) => event.preventDefault());
paintAll();
if (data.examples.length) {
  const [first] = data.examples;
  show(first).then(() => chosen ?? choose(first, Math.max(0, first.label.rowOf.findIndex((row) => row >= 0))));
}
