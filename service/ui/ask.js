// The view "Ask": an image, and what the ensemble thinks of it.
import { takes } from "/ui/ensembles.js";
import { element, fill, number, percent } from "/ui/parts.js";

const SENT_AS_THEY_ARE = ["image/png", "image/jpeg", "image/webp"];
const SHOWN_CLASSES = 10;
const SHOWN_MEMBERS = 24;
const MEASURES = [
  ["predictive_entropy", "Predictive entropy", "How uncertain the average is, in nats."],
  ["expected_entropy", "Expected entropy", "How uncertain the members are on average, each alone, in nats."],
  ["mutual_information", "Mutual information", "What the members disagree on: the first minus the second, in nats."],
  ["disagreement", "Disagreement", "Share of the members that name another class."],
];
const by = (id) => document.getElementById(id);
let ensembles = [];
let source = null; // {blob, bitmap} of a file; null if the pad was drawn on
let drawn = false;
let wanted = false; // an answer to what was typed
let place = null; // of the slider along a curve, kept between answers
let asked = 0; // number of the newest question; answers to older ones are not shown

const chosen = () => ensembles.find((one) => one.name === by("ensemble").value);

function offer(offered) {
  const before = by("ensemble").value;
  ensembles = offered;
  fill(by("ensemble"), offered.map((one) => element("option", { value: one.name }, one.name)));
  const first = offered.find((one) => one.name === before) ?? offered.find((one) => one.default) ?? offered[0];
  if (first) by("ensemble").value = first.name;
  describe();
}

function describe() {
  const one = chosen();
  if (!one) return;
  const images = one.input_kind === "image";
  by("imaged").hidden = !images;
  by("typed").hidden = images;
  if (images) {
    const [channels, height, width] = one.input_shape;
    by("takes").textContent = `It takes ${channels === 1 ? "grey" : channels === 3 ? "colour" : `${channels}-channel`} images of ${height} × ${width} pixels.`;
  } else {
    by("takes").textContent = `It takes ${takes(one)}.`;
    by("values-label").textContent = one.fields ? "One row, as a JSON object" : "One input, as a JSON list";
    if (by("values").dataset.of !== `${one.name}@${one.version}`) by("values").value = JSON.stringify(plain(one), null, one.fields ? 1 : 0);
    by("values").dataset.of = `${one.name}@${one.version}`;
  }
  by("deciding").hidden = !(one.calibration && one.modes.includes("average"));
  if (one.calibration) {
    by("coverage").max = Math.floor(100 * one.calibration.most_coverage);
    by("risk-line").hidden = one.calibration.least_risk === null;
    by("risk").min = Math.max(1, Math.ceil(100 * (one.calibration.least_risk ?? 0)));
  }
  by("coverage-shown").textContent = `${by("coverage").value} %`;
  by("risk-shown").textContent = `${by("risk").value} %`;
}

// An input to begin with: zeros, the first categories, or one token.
function plain(one) {
  if (one.fields) return Object.fromEntries(one.fields.map((field) => [field.name, field.categories ? field.categories[0] : zeros(field.shape ?? [])]));
  if (one.texts) return "a text";
  if (one.input_kind === "tokens") return [1];
  return zeros(one.input_shape);
}

function zeros(shape) {
  return shape.reduceRight((inner, size) => Array.from({ length: size }, () => inner), 0);
}

function clear() {
  const pad = by("pad").getContext("2d");
  pad.fillStyle = "#000";
  pad.fillRect(0, 0, 280, 280);
  source = null;
  drawn = false;
}

async function take(blob) {
  const own = ++asked; // what was asked before is not what the pad shows
  let bitmap;
  try {
    bitmap = await createImageBitmap(blob);
  } catch {
    if (own === asked) refuse(`${blob.name ?? "This"} is not an image that the browser can read. Choose a PNG, JPEG or WebP file.`);
    return;
  }
  if (own !== asked) return;
  clear();
  const scale = Math.min(280 / bitmap.width, 280 / bitmap.height);
  const [width, height] = [bitmap.width * scale, bitmap.height * scale];
  const pad = by("pad").getContext("2d");
  pad.imageSmoothingEnabled = bitmap.width > 64;
  pad.drawImage(bitmap, (280 - width) / 2, (280 - height) / 2, width, height);
  source = { blob, bitmap };
  await question();
}

// The pixels of the pad or of a file as (channels, height, width), scaled by the browser.
function pixels(shape) {
  const [channels, height, width] = shape;
  const canvas = new OffscreenCanvas(width, height);
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.imageSmoothingQuality = "high";
  context.drawImage(source ? source.bitmap : by("pad"), 0, 0, width, height);
  const levels = context.getImageData(0, 0, width, height).data;
  return Array.from({ length: channels }, (_, c) => Array.from({ length: height }, (_, y) => Array.from({ length: width }, (_, x) => {
    const at = 4 * (y * width + x);
    const grey = 0.299 * levels[at] + 0.587 * levels[at + 1] + 0.114 * levels[at + 2];
    return (channels === 3 ? levels[at + c] : grey) / 255;
  })));
}

async function send(one, options) {
  if (one.input_kind !== "image") {
    let row;
    try {
      row = JSON.parse(by("values").value);
    } catch {
      throw Object.assign(new Error("The input is not JSON. Numbers are separated by commas, texts are in double quotes."), { status: 400 });
    }
    const given = typeof row === "string" ? { texts: [row] } : { inputs: [row] };
    const body = JSON.stringify({ ...given, ensemble: one.name, ...options });
    return read(await fetch("/predict", { method: "POST", headers: { "Content-Type": "application/json" }, body }));
  }
  const [, height, width] = one.input_shape;
  const fits = source && (one.resize !== "refuse" || (source.bitmap.width === width && source.bitmap.height === height));
  if (fits && SENT_AS_THEY_ARE.includes(source.blob.type)) {
    const query = new URLSearchParams({ ensemble: one.name, ...options });
    return read(await fetch(`/predict?${query}`, { method: "POST", headers: { "Content-Type": source.blob.type }, body: source.blob }));
  }
  const body = JSON.stringify({ inputs: [pixels(one.input_shape)], ensemble: one.name, ...options });
  return read(await fetch("/predict", { method: "POST", headers: { "Content-Type": "application/json" }, body }));
}

async function along(one) {
  const address = `/ensembles/${encodeURIComponent(one.name)}/path`;
  const body = JSON.stringify({ inputs: [pixels(one.input_shape)] });
  return read(await fetch(address, { method: "POST", headers: { "Content-Type": "application/json" }, body }));
}

async function read(response) {
  const body = await response.json();
  if (!response.ok) throw Object.assign(new Error(body.error), { status: response.status });
  return body;
}

async function question() {
  const one = chosen();
  if (!one || (one.input_kind === "image" ? !(drawn || source) : !wanted)) return;
  const own = ++asked;
  const options = { mode: one.modes[0] };
  if (options.mode === "average") {
    options.members = true;
    if (one.calibration) {
      options.coverage = by("coverage").value / 100;
      options.percentiles = true;
      if (one.calibration.least_risk !== null) options.risk = by("risk").value / 100;
    }
  }
  try {
    let body;
    try {
      body = await send(one, options);
    } catch (error) {
      if (error.status !== 403) throw error;
      body = await send(one, { mode: options.mode }); // the operator shows less
    }
    const path = one.path ? await along(one).catch(() => null) : null;
    const cascade = one.modes.includes("cascade") ? await send(one, { mode: "cascade" }).catch(() => null) : null;
    if (own === asked) render(one, body, cascade, path);
  } catch (error) {
    if (own === asked) refuse(error.status ? error.message : "The service does not answer. Try again when it is back.");
  }
}

function refuse(message) {
  fill(by("answer"), [element("p", { class: "error", role: "alert" }, message)]);
}

function render(one, body, cascade, path) {
  const row = body.predictions[0];
  const shown = [element("p", { class: "label" }, row.confidence === undefined ? row.class_name : `${row.class_name}, ${percent(row.confidence)}`)];
  if (row.decision) {
    const why = { uncertain: "the answer is not sure enough", unlike_training: "it is unlike what the training saw" };
    shown.push(element("p", { class: row.decision === "predict" ? "good" : "bad" },
      row.decision === "predict" ? `Rely on it: at most ${by("risk").value} % of such answers are wrong.` : `Ask a person: ${why[row.reason]}.`));
  }
  if (row.probs) shown.push(...distribution(one, row));
  if (row.prediction_set) {
    shown.push(element("p", {}, `Prediction set at a coverage of ${by("coverage").value} %: ${row.prediction_set.map((label) => one.classes[label]).join(", ") || "empty"}.`));
  }
  if (row.uncertainty) shown.push(...measures(row));
  if (row.novelty) {
    shown.push(element("p", {}, `Novelty: further from the images of the training than ${number(row.novelty.percentile, 1)} % of the calibration images.`));
  }
  if (row.members) shown.push(...members(one, row));
  if (path) shown.push(...curve(one, path));
  if (cascade) shown.push(element("p", {}, `A cascade stopped after ${cascade.predictions[0].members_used} of ${one.members} members.`));
  shown.push(element("p", { class: "quiet" }, `${body.ensemble}@${body.version}, mode ${body.mode}, request ${body.request_id}`));
  fill(by("answer"), shown);
}

function distribution(one, row, title = "Average of the members") {
  const order = row.probs.map((_, label) => label).sort((a, b) => row.probs[b] - row.probs[a]);
  const inside = new Set(row.prediction_set ?? []);
  const lines = order.slice(0, SHOWN_CLASSES).map((label) => {
    const bar = element("div", { class: "fill" });
    bar.style.width = `${100 * row.probs[label]}%`;
    return element("tr", inside.has(label) ? { class: "in-set" } : {}, [
      element("td", {}, one.classes[label]),
      element("td", { class: "bar" }, [element("div", { class: "track", "aria-hidden": "true" }, [bar])]),
      element("td", { class: "number" }, percent(row.probs[label])),
    ]);
  });
  const rest = order.length > SHOWN_CLASSES ? [element("p", { class: "quiet" }, `and ${order.length - SHOWN_CLASSES} less probable classes`)] : [];
  return [element("h3", {}, title), element("table", { class: "classes" }, lines), ...rest];
}

function measures(row) {
  const head = element("tr", {}, ["Measure", "Value", ...(row.percentiles ? ["Percentile"] : [])].map((title, i) =>
    element("th", { scope: "col", ...(i ? { class: "number" } : {}) }, title)));
  const lines = MEASURES.map(([key, name, meaning]) => element("tr", {}, [
    element("td", {}, [name, element("br"), element("span", { class: "quiet" }, meaning)]),
    element("td", { class: "number" }, number(row.uncertainty[key])),
    ...(row.percentiles ? [element("td", { class: "number" }, number(row.percentiles[key], 0))] : []),
  ]));
  const note = row.percentiles ? [element("p", { class: "quiet" }, "Percentile: share of the calibration images that are at most as uncertain.")] : [];
  return [element("h3", {}, "Uncertainty"), element("table", { class: "measures" }, [head, ...lines]), ...note];
}

function members(one, row) {
  const classes = row.probs.map((_, label) => label).sort((a, b) => row.probs[b] - row.probs[a]).slice(0, SHOWN_CLASSES).sort((a, b) => a - b);
  const items = row.members.slice(0, SHOWN_MEMBERS).map((probs, index) => {
    const top = probs.indexOf(Math.max(...probs));
    const said = `Member ${index}: ${one.classes[top]}, ${percent(probs[top])}`;
    const bars = classes.map((label, i) => element("rect", { class: "live", x: 8 * i + 1, y: 40 * (1 - probs[label]), width: 6, height: 40 * probs[label] }));
    return element("li", {}, [element("svg", { width: 8 * classes.length, height: 40, role: "img", "aria-label": said }, [element("title", {}, said), ...bars]), one.classes[top]]);
  });
  const names = classes.map((label) => one.classes[label]).join(", ");
  const rest = row.members.length > SHOWN_MEMBERS ? ` The first ${SHOWN_MEMBERS} of ${row.members.length}.` : "";
  return [element("h3", {}, "Members"), element("p", { class: "quiet" }, `Bars from left to right: ${names}.${rest}`), element("ul", { class: "members" }, items)];
}

// The answer along a curve while t is dragged, above the error of each of its networks.
function curve(one, path) {
  const points = [...path.points].sort((a, b) => a.t - b.t);
  const [width, height, left] = [360, 110, 44];
  const errors = points.map((point) => 1 - point.accuracy);
  const most = Math.max(0.01, ...errors) * 1.1;
  const x = (t) => left + t * (width - left - 4);
  const y = (error) => 4 + height * (1 - error / most);
  const mark = element("path", { class: "mark", d: "" });
  const line = points.map((point, i) => `${i ? "L" : "M"}${x(point.t)} ${y(errors[i])}`).join(" ");
  const said = `Error on validation along the curve: from ${percent(Math.min(...errors))} to ${percent(Math.max(...errors))}`;
  const chart = element("svg", { viewBox: `0 0 ${width} ${height + 26}`, class: "curve", role: "img", "aria-label": said }, [
    element("text", { x: 0, y: 14 }, percent(most)), element("text", { x: 0, y: height + 4 }, "0 %"), element("path", { class: "line", d: line }), mark,
    element("text", { x: left, y: height + 22 }, "t = 0"), element("text", { x: width, y: height + 22, "text-anchor": "end" }, "t = 1"),
  ]);
  const answer = element("div", { class: "point" });
  const slider = element("input", { type: "range", id: "t", min: 0, max: points.length - 1, value: place ?? Math.floor(points.length / 2), step: 1 });
  const move = () => {
    place = Number(slider.value);
    const point = points[place];
    mark.setAttribute("d", `M${x(point.t)} 4 V${height + 4}`);
    const row = { probs: point.probs };
    fill(answer, [element("p", {}, `t = ${number(point.t)}: this network alone has an error of ${percent(1 - point.accuracy)} and an NLL of ${number(point.nll)} nats on validation.`), ...distribution(one, row, "Answer of this network")]);
  };
  slider.addEventListener("input", move);
  move();
  return [element("h3", {}, "Along the curve"), element("p", {}, [element("label", { for: "t" }, `Network on the ${path.shape} curve, from one end to the other`), slider]), element("p", { class: "quiet" }, "Error of each network on validation:"), chart, answer];
}

function example() {
  clear();
  const pad = by("pad").getContext("2d");
  pad.fillStyle = "#fff";
  pad.font = "bold 240px sans-serif";
  pad.textAlign = "center";
  pad.textBaseline = "middle";
  pad.fillText(String(Math.floor(Math.random() * 10)), 140, 150);
  drawn = true;
  question();
}

function start() {
  clear();
  const pad = by("pad");
  const context = pad.getContext("2d");
  let drawing = false;
  const at = (event) => {
    const box = pad.getBoundingClientRect();
    return [(event.clientX - box.left) * 280 / box.width, (event.clientY - box.top) * 280 / box.height];
  };
  pad.addEventListener("pointerdown", (event) => {
    if (source) clear();
    pad.setPointerCapture(event.pointerId);
    drawing = true;
    Object.assign(context, { strokeStyle: "#fff", lineWidth: 24, lineCap: "round", lineJoin: "round" });
    context.beginPath();
    context.moveTo(...at(event));
    context.lineTo(...at(event));
    context.stroke();
  });
  pad.addEventListener("pointermove", (event) => {
    if (!drawing) return;
    context.lineTo(...at(event));
    context.stroke();
  });
  pad.addEventListener("pointerup", () => {
    if (!drawing) return;
    drawing = false;
    drawn = true;
    question();
  });
  pad.addEventListener("keydown", (event) => {
    if (event.key === "Enter" || event.key === " ") by("file").click();
  });
  for (const name of ["dragover", "dragleave", "drop"]) {
    addEventListener(name, (event) => {
      event.preventDefault();
      pad.classList.toggle("over", name === "dragover");
      if (name === "drop" && event.dataTransfer.files.length) take(event.dataTransfer.files[0]);
    });
  }
  addEventListener("paste", (event) => {
    const file = [...event.clipboardData.files].find((one) => one.type.startsWith("image/"));
    if (file) take(file);
  });
  by("ask-values").addEventListener("click", () => { wanted = true; question(); });
  by("choose").addEventListener("click", () => by("file").click());
  by("file").addEventListener("change", () => {
    if (by("file").files.length) take(by("file").files[0]);
    by("file").value = ""; // the same file may be chosen again
  });
  by("example").addEventListener("click", example);
  by("clear").addEventListener("click", () => {
    asked += 1;
    clear();
    fill(by("answer"), [element("p", { class: "quiet" }, "The answer appears here.")]);
  });
  for (const name of ["coverage", "risk"]) by(name).addEventListener("input", () => { describe(); question(); });
  by("ensemble").addEventListener("change", () => {
    wanted = false;
    describe();
    if (chosen().input_kind === "image") question();
    else fill(by("answer"), [element("p", { class: "quiet" }, "The answer appears here.")]);
  });
}

export const ask = { start, offer };
