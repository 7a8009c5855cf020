// The page at /ui. It uses only what the API offers, so it shows no more than the API does.
import { ask } from "/ui/ask.js";
import { ensembles } from "/ui/ensembles.js";
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
  ensembles.show(state.ensembles);
}

addEventListener("hashchange", show);
show();
ask.start();
watch.start(() => state.view === "watch");
await probe();
setInterval(probe, PROBE_MS);
