// The view "Ensembles": what is served, how well its confidence is calibrated, and what differs between its versions.
import { element, fill, number, percent } from "/ui/parts.js";

function card(one) {
  const score = one.validation;
  const calibration = one.calibration;
  const facts = [
    ["Version", one.version],
    ["Method", one.method],
    ["Members", one.members ?? "not shown"],
    ["Takes", takes(one)],
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
  const compared = element("div", {});
  compare(one, compared);
  return element("article", { class: "card" }, [
    element("h3", {}, one.name + (one.default ? " (answers when no ensemble is named)" : "")),
    element("div", { class: "scroll" }, [
      element("table", {}, facts.map(([name, value]) => element("tr", {}, [element("th", { scope: "row" }, name), element("td", {}, String(value))]))),
    ]),
    ...(calibration ? reliability(calibration) : []),
    compared,
  ]);
}

export function takes(one) {
  if (one.texts) return "texts";
  if (one.input_kind === "tokens") return `texts of at most ${one.input_shape[0]} tokens, ids 1 to ${one.vocabulary - 1}`;
  if (one.input_kind === "image") return `images of ${one.input_shape.join(" × ")} (channels, height, width)`;
  return one.fields ? `rows with the fields ${one.fields.map((field) => field.name).join(", ")}` : `features of ${one.input_shape.join(" × ")}`;
}

// Accuracy against confidence on the calibration images; the size of a dot is the share of images in its bin.
function reliability(calibration) {
  const [side, left, top] = [200, 62, 12];
  const x = (confidence) => left + side * confidence;
  const y = (accuracy) => top + side * (1 - accuracy);
  const bins = calibration.reliability;
  const gap = bins.reduce((total, bin) => total + bin.images * Math.abs(bin.accuracy - bin.confidence), 0) / calibration.images;
  const said = `Reliability diagram: the accuracy differs from the confidence by ${percent(gap)} on average (ECE)`;
  const dots = bins.map((bin) => {
    const words = `Confidence ${percent(bin.confidence)}, accuracy ${percent(bin.accuracy)}, ${bin.images} images`;
    const radius = 2.5 + 8 * Math.sqrt(bin.images / calibration.images);
    return element("circle", { class: "dot", cx: x(bin.confidence), cy: y(bin.accuracy), r: radius }, [element("title", {}, words)]);
  });
  const ticks = [0, 0.5, 1].flatMap((value) => [
    element("text", { x: left - 6, y: y(value) + 4, "text-anchor": "end" }, percent(value, 0)),
    element("text", { x: x(value), y: top + side + 16, "text-anchor": "middle" }, percent(value, 0)),
  ]);
  const chart = element("svg", { viewBox: `0 0 ${left + side + 24} ${top + side + 40}`, class: "reliability", role: "img", "aria-label": said }, [
    element("path", { class: "frame", d: `M${left} ${top} V${top + side} H${left + side}` }),
    element("path", { class: "mark", d: `M${x(0)} ${y(0)} L${x(1)} ${y(1)}` }), ...dots, ...ticks,
    element("text", { x: left + side / 2, y: top + side + 34, "text-anchor": "middle" }, "confidence"),
    element("text", { x: 11, y: top + side / 2, "text-anchor": "middle", transform: `rotate(-90 11 ${top + side / 2})` }, "accuracy"),
  ]);
  return [
    element("h4", {}, "Reliability"),
    element("p", { class: "quiet" }, `Calibration images by confidence. A dot on the dashed line is calibrated; a larger dot stands for more images. ECE ${number(gap)}.`),
    chart,
  ];
}

async function compare(one, place) {
  if (one.members === null) return; // a defended ensemble
  const response = await fetch(`/ensembles/${encodeURIComponent(one.name)}/versions`).catch(() => null);
  if (!response?.ok) return; // the operator does not show them, or the service is away
  const { versions, damaged } = await response.json();
  const lost = damaged.length ? [element("p", { class: "error" }, `Damaged versions: ${damaged.join(", ")}. Run: python -m models_store verify.`)] : [];
  if (versions.length < 2) {
    fill(place, [element("h4", {}, "Versions"), element("p", { class: "quiet" }, "There is one version."), ...lost]);
    return;
  }
  const served = versions.find((version) => version.served) ?? versions[0];
  const other = versions.find((version) => version !== served);
  const table = element("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": `Differences between versions of ${one.name}` });
  const choice = (name, first) => {
    const select = element("select", { "aria-label": `${name} version of ${one.name}` },
      versions.map((version) => element("option", { value: version.version }, `version ${version.version}${version.served ? " (served)" : ""}`)));
    select.value = first.version;
    select.addEventListener("change", render);
    return select;
  };
  const [before, after] = [choice("First", other), choice("Second", served)];
  function render() {
    const [a, b] = [before, after].map((select) => versions.find((version) => version.version === Number(select.value)));
    fill(table, [differences(a, b)]);
  }
  render();
  fill(place, [element("h4", {}, "Versions"), element("p", { class: "buttons" }, [before, after]), table, ...lost]);
}

const SCORES = [["accuracy", "Accuracy"], ["nll", "NLL (nats)"], ["brier", "Brier score"], ["ece", "ECE"]];

function differences(a, b) {
  const listed = (version) => version.classes.filter((name) => !(version === a ? b : a).classes.includes(name));
  const lines = [
    ["Published", a.created, b.created],
    ["Method", a.method, b.method],
    ["Members", a.members, b.members],
    ["Shape of an input", a.input_shape.join(" × "), b.input_shape.join(" × ")],
    ["Other sizes", a.resize, b.resize],
    ["Classes", a.classes.length, b.classes.length],
    ["Classes that only it has", listed(a).join(", ") || "none", listed(b).join(", ") || "none"],
    ["Temperature", number(a.temperature), number(b.temperature)],
    ["Calibration images", a.calibration_images ?? "not calibrated", b.calibration_images ?? "not calibrated"],
    ...SCORES.map(([key, name]) => [name, ...[a, b].map((version) => (version.validation ? number(version.validation[key], 4) : "not measured"))]),
  ];
  const head = element("tr", {}, ["Validation, and what was published", `Version ${a.version}`, `Version ${b.version}`, "Difference"].map((title) => element("th", { scope: "col" }, title)));
  const rows = lines.map(([name, first, second]) => {
    const [low, high] = [Number(first), Number(second)];
    const change = Number.isNaN(low) || Number.isNaN(high) ? (first === second ? "" : "differs") : high === low ? "" : `${high > low ? "+" : "−"}${Number(Math.abs(high - low).toFixed(4))}`;
    return element("tr", {}, [element("th", { scope: "row" }, name), ...[first, second, change].map((value) => element("td", {}, String(value)))]);
  });
  return element("table", { class: "versions" }, [head, ...rows]);
}

function show(listed) {
  fill(document.getElementById("listed"), listed.map(card));
}

export const ensembles = { show };
