// The view "Watch": what /metrics says, and how it changes.
import { element, fill, number, percent } from "/ui/parts.js";

const READ_MS = 2000;
const BINS = { predictive_entropy: "predictive entropy", novelty: "novelty", input_mean: "mean of the pixels", input_std: "contrast of the pixels", predicted: "predicted class" };
let before = null;

// Prometheus's text format: [{name, labels, value}, …].
function parse(text) {
  const samples = [];
  for (const line of text.split("\n")) {
    const found = /^(\w+)(?:\{(.*)\})? (\S+)$/.exec(line);
    if (!found) continue;
    const labels = {};
    for (const [, key, value] of (found[2] ?? "").matchAll(/(\w+)="((?:[^"\\]|\\.)*)"/g)) labels[key] = value.replace(/\\(.)/g, (_, c) => (c === "n" ? "\n" : c));
    samples.push({ name: found[1], labels, value: Number(found[3]) });
  }
  return samples;
}

const sum = (samples, name, matches = {}) => samples
  .filter((one) => one.name === name && Object.entries(matches).every(([key, value]) => one.labels[key] === value))
  .reduce((total, one) => total + one.value, 0);

const grouped = (samples, name, label, matches = {}) => {
  const found = new Map();
  for (const one of samples) {
    if (one.name !== name || !Object.entries(matches).every(([key, value]) => one.labels[key] === value)) continue;
    found.set(one.labels[label], (found.get(one.labels[label]) ?? 0) + one.value);
  }
  return found;
};

async function look() {
  const response = await fetch("/metrics", { cache: "no-store" });
  if (!response.ok) {
    fill(place(), [element("p", {}, "This service gives its metrics on another port (MODEPATH_METRICS_PORT). Prometheus and Grafana show them: see deploy/compose.yaml.")]);
    return;
  }
  const now = { samples: parse(await response.text()), time: performance.now() };
  if (before) render(before, now);
  before = now;
}

const place = () => document.getElementById("watched");

function render(old, now) {
  const seconds = (now.time - old.time) / 1000;
  const keys = new Map();
  for (const one of now.samples) {
    if (one.name === "modepath_predictions_total") keys.set(`${one.labels.ensemble}@${one.labels.version}, ${one.labels.mode}`, { ensemble: one.labels.ensemble, version: one.labels.version, mode: one.labels.mode });
  }
  const shown = [...keys].map(([title, labels]) => panel(title, labels, old.samples, now.samples, seconds));
  if (!shown.length) shown.push(element("p", { class: "quiet" }, "Nothing was answered yet."));
  const refused = [...grouped(now.samples, "modepath_refused_total", "reason")].filter(([, count]) => count > 0);
  shown.push(element("section", { class: "card" }, [
    element("h3", {}, "Refused requests"),
    element("p", {}, refused.length ? refused.map(([reason, count]) => `${reason.replaceAll("_", " ")} ${count}`).join(", ") : "none"),
  ]));
  fill(place(), shown);
}

function panel(title, labels, old, now, seconds) {
  const rate = (sum(now, "modepath_predictions_total", labels) - sum(old, "modepath_predictions_total", labels)) / seconds;
  const mean = (name) => {
    const count = sum(now, `${name}_count`, labels);
    return count ? sum(now, `${name}_sum`, labels) / count : NaN;
  };
  const labelled = sum(now, "modepath_feedback_rows_total", labels);
  const facts = [["Images", `${sum(now, "modepath_predictions_total", labels)}, ${number(rate, 1)} a second`]];
  const confidence = mean("modepath_confidence_ratio");
  if (!Number.isNaN(confidence)) facts.push(["Estimated accuracy", `${percent(confidence)}, the mean confidence`]);
  if (labelled) {
    const of = (name) => sum(now, `modepath_feedback_${name}_total`, labels);
    const correct = grouped(now, "modepath_feedback_correct_total", "bin", labels);
    const sure = grouped(now, "modepath_feedback_confidence_total", "bin", labels);
    const ece = [...correct].reduce((total, [bin, count]) => total + Math.abs(count - (sure.get(bin) ?? 0)), 0) / labelled;
    facts.push(["By reported labels", `accuracy ${percent(of("correct") / labelled)} of ${labelled}`
      + (sure.size ? `, NLL ${number(of("nll") / labelled)} nats, Brier score ${number(of("brier") / labelled)}, ECE ${number(ece)}` : "")]);
  } else {
    facts.push(["By reported labels", "none yet: POST /feedback"]);
  }
  const alarms = [...grouped(now, "modepath_drift_alarms_total", "measure", labels)].filter(([, count]) => count > 0);
  const measures = Object.keys(BINS).filter((measure) => sum(now, "modepath_drift_baseline_rows_total", { ...labels, measure }) > 0);
  if (measures.length) {
    facts.push(["Drift", alarms.length ? `alarms: ${alarms.map(([measure, count]) => `${BINS[measure] ?? measure} ${count}`).join(", ")}` : "no alarm"]);
  }
  const lines = facts.map(([name, value]) => element("tr", {}, [
    element("th", { scope: "row" }, name),
    element("td", name === "Drift" ? { class: alarms.length ? "bad" : "good" } : {}, value),
  ]));
  const plots = measures.map((measure) => plot(measure, grouped(now, "modepath_drift_baseline_rows_total", "bin", { ...labels, measure }), grouped(now, "modepath_drift_rows_total", "bin", { ...labels, measure })));
  return element("section", { class: "card" }, [
    element("h3", {}, title),
    element("table", {}, lines),
    ...(plots.length ? [element("p", { class: "quiet" }, "Share of images in each bin: bars for those that arrived, lines for the calibration images. The bins are deciles of the calibration images, or classes."), element("div", { class: "plots" }, plots)] : []),
  ]);
}

function plot(measure, base, live) {
  const bins = [...base.keys()].map(Number).sort((a, b) => a - b);
  const total = (counts) => [...counts.values()].reduce((a, b) => a + b, 0) || 1;
  const share = (counts, bin) => (counts.get(String(bin)) ?? 0) / total(counts);
  const most = Math.max(0.2, ...bins.map((bin) => Math.max(share(base, bin), share(live, bin))));
  const [width, height, left] = [220, 90, 38];
  const step = (width - left) / bins.length;
  const y = (value) => height * (1 - value / most) + 4;
  const bars = bins.map((bin, i) => element("rect", { class: "live", x: left + i * step + 1, y: y(share(live, bin)), width: Math.max(1, step - 2), height: height + 4 - y(share(live, bin)) }));
  const line = bins.map((bin, i) => `M${left + i * step} ${y(share(base, bin))} H${left + (i + 1) * step}`).join(" ");
  const said = `${BINS[measure]}: largest share of a bin ${percent(Math.max(...bins.map((bin) => share(live, bin))), 0)} of ${total(live)} images, ${percent(Math.max(...bins.map((bin) => share(base, bin))), 0)} of the calibration images`;
  return element("figure", {}, [
    element("svg", { viewBox: `0 0 ${width} ${height + 22}`, role: "img", "aria-label": said }, [
      element("text", { x: 0, y: 12 }, percent(most, 0)), element("text", { x: 0, y: height + 4 }, "0 %"), ...bars,
      element("path", { class: "base", d: line }), element("text", { x: left, y: height + 18 }, measure === "predicted" ? "class 0" : "lowest tenth"),
      element("text", { x: width, y: height + 18, "text-anchor": "end" }, measure === "predicted" ? `class ${bins.length - 1}` : "highest tenth"),
    ]),
    element("figcaption", {}, BINS[measure]),
  ]);
}

function start(visible) {
  setInterval(() => { if (visible()) look().catch(() => {}); }, READ_MS);
  addEventListener("hashchange", () => { if (visible()) look().catch(() => {}); });
  if (visible()) look().catch(() => {});
}

export const watch = { start };
