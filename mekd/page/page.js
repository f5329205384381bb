"use strict";

// -- curves: what they are where the pointer is, or where the arrow keys went ------------------------------

let held = null; // the id of the figure that shows its values, and the place within it

function values(svg, at) {
  const lines = JSON.parse(svg.dataset.lines);
  const drawn = [...svg.querySelectorAll("polyline")].map((line) => [...line.points]);
  const best = drawn.map((points) => points.reduce((b, p, i) => (Math.abs(p.x - at) < Math.abs(points[b].x - at) ? i : b), 0));
  let first = 0; // the line with the nearest point says where the cursor stands
  best.forEach((i, l) => {
    if (Math.abs(drawn[l][i].x - at) < Math.abs(drawn[first][best[first]].x - at)) first = l;
  });
  const rows = lines.map((line, l) => `${line.name}: ${line.y[best[l]]}${svg.dataset.unit && " " + svg.dataset.unit}`);
  const x = lines[first].x[best[first]];
  return {
    at: drawn[first][best[first]].x,
    steps: drawn[first].map((p) => p.x),
    dots: best.map((i, l) => drawn[l][i]),
    text: [`${x.toLocaleString("en")} ${svg.dataset.across}`, ...rows].join("\n"),
  };
}

function hide() {
  held = null;
  document.querySelectorAll(".tip, .spot").forEach((old) => old.remove());
  document.querySelectorAll(".cursor").forEach((line) => (line.style.visibility = "hidden"));
}

function show(svg, at) {
  hide();
  const figure = svg.closest("figure"), found = values(svg, at);
  held = { id: figure.id, at: found.at, queries: svg.parentNode.classList.contains("by-queries") };
  const cursor = svg.querySelector(".cursor");
  cursor.setAttribute("transform", `translate(${found.at} 0)`);
  cursor.style.visibility = "visible";
  found.dots.forEach((p, l) => {
    const dot = document.createElementNS(svg.namespaceURI, "circle");
    dot.setAttribute("class", `spot dot l${l}`);
    dot.setAttribute("cx", p.x);
    dot.setAttribute("cy", p.y);
    dot.setAttribute("r", 4);
    svg.append(dot);
  });
  const tip = document.createElement("p");
  tip.className = "tip";
  tip.setAttribute("role", "status");
  tip.textContent = found.text;
  figure.append(tip);
  const box = svg.getBoundingClientRect(), place = (found.at / svg.viewBox.baseVal.width) * box.width;
  const left = svg.parentNode.offsetLeft + place + (place > box.width / 2 ? -tip.offsetWidth - 12 : 12);
  tip.style.left = `${Math.max(0, Math.min(left, figure.clientWidth - tip.offsetWidth))}px`;
  const high = found.dots.some((p) => p.y < svg.viewBox.baseVal.height * 0.4); // it covers no value that it tells
  tip.style.top = `${svg.parentNode.offsetTop + (high ? box.height * 0.82 - tip.offsetHeight : 6)}px`;
}

function chartOf(event) {
  return event.target.closest && event.target.closest("svg[data-lines]");
}

for (const kind of ["pointermove", "pointerdown"]) {
  document.addEventListener(kind, (event) => {
    const svg = chartOf(event);
    if (!svg) return hide();
    const box = svg.getBoundingClientRect();
    show(svg, ((event.clientX - box.left) / box.width) * svg.viewBox.baseVal.width);
  });
}
document.addEventListener("keydown", (event) => {
  const svg = chartOf(event), way = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (event.key === "Escape") hide();
  if (!svg || !way) return;
  event.preventDefault();
  const here = held && svg.closest("figure").id === held.id ? held.at : way > 0 ? -1 : 1e9;
  const steps = values(svg, here).steps;
  const next = way > 0 ? steps.find((x) => x > here + 0.05) : [...steps].reverse().find((x) => x < here - 0.05);
  show(svg, next === undefined ? here : next);
});
document.addEventListener("change", hide);

// -- paper: nothing stays folded ---------------------------------------------------------------------------

let folded = [];
addEventListener("beforeprint", () => {
  folded = [...document.querySelectorAll("details:not([open])")];
  folded.forEach((part) => (part.open = true));
});
addEventListener("afterprint", () => folded.forEach((part) => (part.open = false)));

// -- mekd watch: sections that changed take the place of those that stand there ------------------------------

function put(id, html) {
  const section = document.getElementById(id), active = document.activeElement;
  const open = [...section.querySelectorAll("details[open]")].map((part) => part.id);
  const focus = section.contains(active) ? active.closest("[id]").id : "";
  const chosen = document.querySelector("input[name=axis]:checked");
  const before = held && section.querySelector(`#${held.id}`) ? held : null;
  section.innerHTML = html;
  open.forEach((name) => document.getElementById(name)?.setAttribute("open", ""));
  if (chosen && document.getElementById(chosen.id)) document.getElementById(chosen.id).checked = true;
  if (before && document.getElementById(before.id)) {
    const half = before.queries ? ".by-queries svg" : ".by-steps svg";
    const svg = document.querySelector(`#${before.id} ${half}`);
    if (svg) show(svg, before.at);
  }
  const again = focus && document.getElementById(focus);
  if (again && again !== section) (again.matches("figure") ? again.querySelector("svg") : again).focus({ preventScroll: true });
}

async function refresh(known) {
  const status = document.getElementById("status");
  let wait = 2000;
  try {
    const answer = await fetch("page.json", { cache: "no-store" });
    if (!answer.ok) throw new Error(answer.statusText);
    const page = await answer.json();
    for (const [id, html] of Object.entries(page.sections)) {
      if (known[id] !== html) put(id, html);
      known[id] = html;
    }
    document.title = page.title;
    if (status.textContent !== page.status) status.textContent = page.status;
    wait = page.finished ? 10000 : 2000;
  } catch (error) {
    status.textContent = "mekd watch does not answer: this is how the run stood last";
    wait = 5000;
  }
  setTimeout(refresh, wait, known);
}
if (document.documentElement.dataset.live) refresh({});
