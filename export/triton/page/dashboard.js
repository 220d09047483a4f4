// Draws what /data says, every few seconds. Names come from the server and are text, never markup.
"use strict";

const FIGURES = [
  ["images/s", "images_per_s", 1], ["requests/s", "requests_per_s", 1], ["mean batch", "mean_batch", 1],
  ["p50, ms", "p50_ms", 1], ["p95, ms", "p95_ms", 1], ["p99, ms", "p99_ms", 1],
  ["queue, ms", "queue_ms", 1], ["pending", "pending", 0],
  ["failures/s", "failures_per_s", 1], ["rejected/s", "rejections_per_s", 1],
];
const CHARTS = [
  ["images/s", 0, [["images_per_s", ""]]],
  ["latency, ms", 1, [["p50_ms", "p50"], ["p95_ms", "p95"], ["p99_ms", "p99"]]],
  ["queue, ms", 1, [["queue_ms", ""]]],
  ["pending", 0, [["pending", ""]]],
];
const WIDTH = 300, HEIGHT = 60;
const SVG = "http://www.w3.org/2000/svg";

function element(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

function shown(value, digits) {
  if (value === undefined || value === null) return "–";
  const few = value >= 100 || value === 0 ? 0 : digits && value < 1 ? digits + 1 : digits;
  return value.toLocaleString("en", { minimumFractionDigits: few, maximumFractionDigits: few });
}

// Of a line with gaps: where nothing is known, nothing is drawn. The newest point is on the right.
function outline(values, most, kept) {
  let path = "", open = false;
  values.forEach((value, index) => {
    if (value === null) { open = false; return; }
    const x = WIDTH * (1 - (values.length - 1 - index) / (kept - 1));
    const y = HEIGHT - 2 - (HEIGHT - 4) * (most ? value / most : 0);
    path += `${open ? "L" : "M"}${x.toFixed(1)} ${y.toFixed(1)}`;
    // A point alone is a dot: round ends make one of a line without length.
    if (!open) path += `L${x.toFixed(1)} ${y.toFixed(1)}`;
    open = true;
  });
  return path;
}

function mostOf(models, lines) {
  const values = models.flatMap((model) => lines.flatMap(([what]) => model.series[what]));
  return values.reduce((most, value) => Math.max(most, value ?? 0), 0);
}

function chart(title, digits, lines, model, most, kept) {
  const figure = element("figure");
  const caption = element("figcaption", "", title);
  const range = element("span", "range");
  lines.forEach(([, label], number) => label && range.append(element("span", `key${number}`, `${label} `)));
  range.append(most > 0 ? `0 to ${shown(most, digits)}` : "0");
  caption.append(range);
  const drawing = document.createElementNS(SVG, "svg");
  drawing.setAttribute("viewBox", `0 0 ${WIDTH} ${HEIGHT}`);
  drawing.setAttribute("preserveAspectRatio", "none");
  drawing.setAttribute("aria-hidden", "true");  // the newest figures are above, as text
  [...lines.entries()].reverse().forEach(([number, [what]]) => {
    const path = document.createElementNS(SVG, "path");
    path.setAttribute("class", `line${number}`);
    path.setAttribute("d", outline(model.series[what], most, kept));
    drawing.append(path);
  });
  figure.append(caption, drawing);
  return figure;
}

function card(model, pair, kept) {
  const made = element("article");
  const heading = element("h2", "", model.name);
  const serves = model.version === null ? "serves no version" : `serves version ${model.version}`;
  heading.append(element("span", model.version === null ? "warn" : "soft", serves));
  made.append(heading);
  model.failed.forEach((reason) => made.append(element("p", "warn reason", `Does not load: ${reason}`)));
  const list = element("dl");
  FIGURES.forEach(([label, what, digits]) => {
    const entry = element("div");
    const alarming = /failures|rejections/.test(what) && model.now[what] > 0;
    entry.append(element("dt", "", label), element("dd", alarming ? "warn" : "", shown(model.now[what], digits)));
    list.append(entry);
  });
  const charts = element("div", "charts");
  CHARTS.forEach(([title, digits, lines]) =>
    charts.append(chart(title, digits, lines, model, mostOf(pair, lines), kept)));
  made.append(list, charts);
  return made;
}

function say(text, warn) {
  const state = document.getElementById("state");
  if (state.textContent !== text) state.textContent = text;  // a screen reader says it once
  state.className = warn ? "warn" : "";
}

function draw(data) {
  const models = data.pairs.flat();
  const idle = models.filter((model) => model.version === null).length;
  if (!data.up) say("The server does not answer.", true);
  else if (!models.length) say("The server answers and has no model.", true);
  else if (idle) say(`The server answers; ${idle} of ${models.length} models serve no version.`, true);
  else say(`The server answers; models: ${models.length}, all of which serve.`, false);
  document.getElementById("models").replaceChildren(...data.pairs.map((pair) => {
    const made = element("section", "pair");
    made.append(...pair.map((model) => card(model, pair, data.kept)));
    return made;
  }));
}

let held = false;
async function go() {
  let pause = 2;
  try {
    const answer = await fetch("/data");
    if (!answer.ok) throw new Error(String(answer.status));
    const data = await answer.json();
    pause = data.every_s;
    if (!held) draw(data);
  } catch {
    say("This page's own server has ended; the figures are old.", true);
  }
  setTimeout(go, 1000 * pause);
}

document.getElementById("hold").addEventListener("click", (event) => {
  held = !held;
  event.currentTarget.setAttribute("aria-pressed", String(held));
});
go();
