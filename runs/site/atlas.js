"use strict";
// The map: search and filters. The pair: two scripts, part by part.
const by = (id) => document.getElementById(id);

function map() {
  const form = by("filter"), items = [...document.querySelectorAll("li.method")].reverse();
  const all = items.length;
  form.hidden = false;
  function show() {
    const words = by("find").value.toLowerCase().split(/\s+/).filter(Boolean);
    const wanted = { changes: by("changes").value, costs: by("costs").value, verdict: by("verdict").value };
    const quiet = !words.length && !Object.values(wanted).some(Boolean);
    let n = 0;
    for (const item of items) { // from the last to the first: what stands below is known before what it stands below
      const fits = words.every((w) => item.dataset.find.includes(w))
        && Object.entries(wanted).every(([key, value]) => !value || item.dataset[key].split("|").includes(value));
      n += fits;
      item.hidden = !fits && !item.querySelector("li.method:not([hidden])");
      item.classList.toggle("aside", !fits);
    }
    for (const box of document.querySelectorAll(".branch, .family")) {
      box.hidden = !box.querySelector("li.method:not([hidden])");
    }
    for (const link of document.querySelectorAll(".families a")) link.hidden = by(link.hash.slice(1)).closest("section").hidden;
    by("found").textContent = quiet ? "" : n === 1 ? "1 script" : `${n} of ${all} scripts`;
  }
  for (const kind of ["input", "change"]) form.addEventListener(kind, show);
  form.addEventListener("submit", (event) => event.preventDefault());
  show();
}

// Rows of [left line or null, right line or null], equal ones beside each other: a longest common subsequence.
function rows(a, b) {
  const m = a.length, n = b.length, best = Array.from({ length: m + 1 }, () => new Uint16Array(n + 1));
  for (let i = m - 1; i >= 0; i--) {
    for (let j = n - 1; j >= 0; j--) {
      best[i][j] = a[i] === b[j] ? best[i + 1][j + 1] + 1 : Math.max(best[i + 1][j], best[i][j + 1]);
    }
  }
  const out = [];
  let i = 0, j = 0;
  while (i < m || j < n) {
    const gone = [], fresh = [];
    while (i < m && !(j < n && a[i] === b[j]) && (j >= n || best[i + 1][j] >= best[i][j + 1])) gone.push(a[i++]);
    while (j < n && !(i < m && a[i] === b[j]) && (i >= m || best[i][j + 1] > best[i + 1][j])) fresh.push(b[j++]);
    for (let k = 0; k < Math.max(gone.length, fresh.length); k++) out.push([gone[k] ?? null, fresh[k] ?? null, false]);
    if (i < m && j < n && a[i] === b[j]) out.push([a[i++], b[j++], true]);
  }
  return out;
}

const code = (lines) => `<pre class="code"><code>${lines.join("\n")}</code></pre>`;

function column(found, side, tag) {
  return `<pre class="code"><code>${found.map((row) => {
    const line = row[side], t = line !== null && line.trim() && !row[2] ? tag : "span";
    return `<${t} class="row ${line === null ? "pad" : "same"}">${line ?? ""}\n</${t}>`;
  }).join("")}</code></pre>`;
}

function fold(summary, lines) {
  return `<details class="part"><summary>${summary}</summary>${code(lines)}</details>`;
}

function pair() {
  const names = Object.keys(ATLAS.scripts), left = by("left"), right = by("right");
  const lines = (id) => {
    const found = ATLAS.parts[id].split("\n");
    while (found.length && !found[0].trim()) found.shift();
    return found;
  };
  by("choose").hidden = false;

  function show() {
    const [a, b] = [left.value, right.value], [mine, theirs] = [a, b].map((n) => new Map(ATLAS.scripts[n].map(([p, id, f]) => [p, { id, f }])));
    document.title = `${a} and ${b} side by side`;
    // The left one's order; what only the right one has goes before what follows it there.
    const order = [], rest = [...theirs.keys()];
    for (const part of mine.keys()) {
      const at = rest.indexOf(part);
      if (at >= 0) order.push(...rest.splice(0, at + 1).filter((p) => p === part || !mine.has(p)));
      else order.push(part);
    }
    order.push(...rest.filter((p) => !mine.has(p)));
    let html = "", same = [], code = [], changed = 0;
    const flush = () => {
      const more = same.length > 4 ? ` and ${same.length - 4} more setting${same.length > 5 ? "s" : ""}` : "";
      const title = same.length ? `<code>${same.slice(0, 4).join(", ")}</code>${more}` : "Imports, or where it starts";
      if (code.length) html += fold(`${title} <span class="word">the same</span>`, code);
      [same, code] = [[], []];
    };
    for (const part of order) {
      const [x, y] = [mine.get(part), theirs.get(part)];
      const title = part.replace("own fields", "flags of its own").replace(/&/g, "&amp;").replace(/</g, "&lt;");
      if (x && y && x.id === y.id) {
        if (x.f) flush();
        if (x.f || (/^\w+$/.test(part) && part !== "Args")) same.push(title);
        code.push(...lines(x.id));
        if (x.f) flush();
        continue;
      }
      flush();
      if (!x || !y) {
        const found = lines((x ?? y).id).map((line) => [line, line, false]);
        changed += found.filter((row) => row[0].trim()).length;
        html += `<section class="part"><h2><code>${title}</code> <span class="word">only in ${x ? a : b}</span></h2><div class="one ${x ? "gone" : "new"}">${column(found, 0, x ? "del" : "ins")}</div></section>`;
        continue;
      }
      const found = rows(lines(x.id), lines(y.id));
      changed += found.filter((row) => !row[2]).reduce((n, row) => n + !!row[0]?.trim() + !!row[1]?.trim(), 0);
      html += `<section class="part"><h2><code>${title}</code></h2>${hunks(found, a, b)}</section>`;
    }
    flush();
    by("out").innerHTML = html;
    by("said").textContent = a === b ? "Twice the same script." : `${changed} lines differ, flags and all.`;
  }

  function hunks(found, a, b) {
    const near = found.map((_, i) => found.slice(Math.max(0, i - 3), i + 4).some((row) => !row[2]));
    let html = "", i = 0;
    while (i < found.length) {
      let j = i;
      while (j < found.length && near[j] === near[i]) j++;
      const run = found.slice(i, j);
      html += near[i]
        ? `<div class="two"><div><p class="side">${a}</p>${column(run, 0, "del")}</div><div><p class="side">${b}</p>${column(run, 1, "ins")}</div></div>`
        : `<details class="fold"><summary>${run.length} lines the same</summary>${code(run.map((row) => row[0]))}</details>`;
      i = j;
    }
    return html;
  }

  function read() {
    const [a, b] = location.hash.slice(1).split("/");
    left.value = names.includes(a) ? a : "grpo";
    right.value = names.includes(b) ? b : "sapo";
    show();
  }
  const write = () => { history.replaceState(null, "", `#${left.value}/${right.value}`); show(); };
  left.addEventListener("change", write);
  right.addEventListener("change", write);
  by("swap").addEventListener("click", () => { [left.value, right.value] = [right.value, left.value]; write(); });
  addEventListener("hashchange", read);
  read();
}

const two = () => /^#\w+\/\w+$/.test(location.hash) && location.replace("pair.html" + location.hash);
if (by("filter")) {
  if (!two()) map();
  addEventListener("hashchange", two);
}
if (by("choose")) pair();
