// Elements and numbers.

const SVG = "http://www.w3.org/2000/svg";
const DRAWN = ["svg", "rect", "circle", "path", "text", "title", "g"];

export function element(name, attributes = {}, children = []) {
  const made = DRAWN.includes(name) ? document.createElementNS(SVG, name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  for (const child of Array.isArray(children) ? children : [children]) made.append(child);
  return made;
}

export function fill(place, children) {
  place.replaceChildren(...children);
}

export const number = (value, digits = 3) => Number(value).toFixed(digits);
export const percent = (value, digits = 1) => `${(100 * value).toFixed(digits)} %`;
