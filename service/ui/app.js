// The page at /ui. It uses only what the API offers, so it shows no more than the API does.
import { ask } from "/ui/ask.js";
import { element, fill, number, percent } from "/ui/parts.js";
import { watch } from "/ui/watch.js";

const VIEWS = ["ask", "ensembles", "watch"];
const PROBE_MS = 3000;
const state = { ensembles: [], view: "ask" };

function show() {
  const wanted = location.hash.slice(1);
  state.view = VIEWS.includes(wanted) ? wanted : "ask";
  for (const view of VIEWS) document.getElementById(view).hidden = view !== state.view;
  for (const link of document.querySelectorAll("nav a")) {
    if (link.getAttribute("href") === `#${state.view}`) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
}

function connected(message) {
  const place = document.getElementById("connection");
  const text = message ?? "connected";
  if (place.textContent !== text) place.textContent = text;
  place.classList.toggle("away", message !== undefined);
}

async function probe() {
  try {
    const ready = await fetch("/readyz", { cache: "no-store" });
    const body = await ready.json();
    connected(ready.ok ? undefined : body.error);
    if (ready.ok) await list();
  } catch {
    connected("The service does not answer. Trying again.");
  }
}

async function list() {
  const body = await (await fetch("/ensembles")).json();
  if (JSON.stringify(body.ensembles) === JSON.stringify(state.ensembles)) return;
  state.ensembles = body.ensembles;
  ask.offer(state.ensembles);
  fill(document.getElementById("listed"), state.ensembles.map(card));
}

function card(one) {
  const score = one.validation;
  const calibration = one.calibration;
  const facts = [
    ["Version", one.version],
    ["Method", one.method],
    ["Members", one.members ?? "not shown"],
    ["Images", `${one.input_shape.join(" × ")} (channels, height, width)`],
    ["Classes", one.classes.length > 12 ? `${one.classes.length}: ${one.classes.slice(0, 12).join(", ")}, …` : one.classes.join(", ")],
    ["Modes", one.modes.join(", ")],
    ["Runs on", one.providers.join(", ")],
  ];
  if (score) {
    facts.push(["Validation", `accuracy ${percent(score.accuracy, 2)}, NLL ${number(score.nll)} nats, Brier score ${number(score.brier)}, ECE ${number(score.ece)}`]);
  }
  if (calibration) {
    facts.push(["Calibration", `${calibration.images} images; prediction sets up to a coverage of ${percent(calibration.most_coverage, 2)}; `
      + (calibration.least_risk ? `risk from ${percent(calibration.least_risk, 2)}` : "no risk can be guaranteed")]);
    if (calibration.note) facts.push(["Note", calibration.note]);
  }
  return element("article", { class: "card" }, [
    element("h3", {}, one.name + (one.default ? " (answers when no ensemble is named)" : "")),
    element("div", { class: "scroll" }, [
      element("table", {}, facts.map(([name, value]) => element("tr", {}, [element("th", { scope: "row" }, name), element("td", {}, String(value))]))),
    ]),
  ]);
}

addEventListener("hashchange", show);
show();
ask.start();
watch.start(() => state.view === "watch");
await probe();
setInterval(probe, PROBE_MS);
