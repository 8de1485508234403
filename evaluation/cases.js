"use strict";
// The address holds the case and the filters (#answers=wrong&condition=dent&case=ID), so that every view has a link.
(() => {
const index = JSON.parse(document.getElementById("index").textContent);
const CASES_PER_BLOCK = index.block, ROW = 60;
const [ID, PRODUCT, CONDITION, IMAGE, KINDS, STATUS, DIFFER] = [0, 1, 2, 3, 4, 5, 6];
const cases = index.cases, runs = index.runs, last = runs.length - 1;
const element = name => document.getElementById(name);
const form = element("filters"), list = element("list"), rows = element("rows"), shownCase = element("case");
const named = name => form.elements.namedItem(name);
let matching = [], current = -1;

function make(tag, properties, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties ?? {})) {
    if (name === "style") made.style.cssText = value;
    else if (name in made) made[name] = value;
    else made.setAttribute(name, value);
  }
  made.append(...children.filter(child => child !== null && child !== ""));
  return made;
}

function drawn(tag, attributes) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}

const colour = run => `var(--run${runs.length === 1 ? 1 : run % 7})`;

function imageAddress(number) {
  if (number < 0) return "";
  const embedded = element(`image-${number}`)?.textContent;
  return embedded ? `data:image/jpeg;base64,${embedded}` : index.images[number];
}

// ---- Filters. `answers` selects questions by the answers of the runs; a case matches if one of its questions does.

const choices = {"": "any"};
const tests = {};
function choice(value, label, test) { choices[value] = label; tests[value] = test; }
if (runs.length === 1) {
  choice("wrong", "wrong", (one, place) => one[STATUS][0][place] !== "1");
  choice("right", "right", (one, place) => one[STATUS][0][place] === "1");
} else {
  choice("differ", "runs disagree", (one, place) => one[DIFFER][place] === "1");
  choice("newly-right", `newly right in ${runs[last]}`, (one, place) => one[STATUS][0][place] !== "1" && one[STATUS][last][place] === "1");
  choice("newly-wrong", `newly wrong in ${runs[last]}`, (one, place) => one[STATUS][0][place] === "1" && one[STATUS][last][place] !== "1");
  runs.forEach((run, place) => choice(`wrong-${place}`, `wrong in ${run}`, (one, question) => one[STATUS][place][question] !== "1"));
  choice("wrong", "wrong in every run", (one, place) => one[STATUS].every(status => status[place] !== "1"));
}
choice("none", "unparsed or failed", (one, place) => one[STATUS].some(status => "-!".includes(status[place])));

function offer(name, values) {
  for (const [value, label] of values) named(name).append(make("option", {value, textContent: label}));
}
offer("answers", Object.entries(choices).slice(1));
for (const [name, values] of [["kind", index.kinds], ["product", index.products], ["condition", index.conditions]]) {
  offer(name, values.map(value => [value, value]));
}

function matches(one, wanted) {
  if (wanted.product >= 0 && one[PRODUCT] !== wanted.product) return false;
  if (wanted.condition >= 0 && one[CONDITION] !== wanted.condition) return false;
  if (wanted.name && !one[ID].toLowerCase().includes(wanted.name)) return false;
  if (wanted.kind < 0 && !wanted.test) return true;
  for (let place = 0; place < one[KINDS].length; place++) {
    if (wanted.kind >= 0 && one[KINDS][place] !== wanted.kind) continue;
    if (!wanted.test || wanted.test(one, place)) return true;
  }
  return false;
}

// A value that the page does not know, as in an old link, matches nothing.
const place = (values, value) => !value ? -1 : values.includes(value) ? values.indexOf(value) : Infinity;

function applyFilters(wanted) {
  for (const name of ["answers", "kind", "product", "condition", "name"]) named(name).value = wanted.get(name) ?? "";
  const answers = wanted.get("answers");
  const parsed = {
    test: answers ? tests[answers] ?? (() => false) : null,
    kind: place(index.kinds, wanted.get("kind")),
    product: place(index.products, wanted.get("product")),
    condition: place(index.conditions, wanted.get("condition")),
    name: (wanted.get("name") ?? "").toLowerCase(),
  };
  matching = [];
  cases.forEach((one, number) => { if (matches(one, parsed)) matching.push(number); });
  element("shown").textContent = `${matching.length.toLocaleString("en")} of ${cases.length.toLocaleString("en")} cases`;
  rows.style.height = `${matching.length * ROW}px`;  // the caller draws the rows, once it knows the current case
}

// ---- The list. Only the visible rows exist in the document.

// One row of dots per run, with one dot per question. Three runs or more have one dot each, filled by their share of right answers.
const MANY_RUNS = 3;
const countRight = status => [...status].filter(found => found === "1").length;

function dotOfRun(status, run) {
  const right = countRight(status), percent = 100 * right / status.length;
  return make("i", {className: right ? "share" : "wrong", title: `${runs[run]}: ${right} of ${status.length} right`,
    style: right ? `background: linear-gradient(to top, var(--good) ${percent}%, transparent ${percent}%)` : ""});
}

function dots(one) {
  if (runs.length >= MANY_RUNS) return [make("div", {className: "dots", role: "img",
    "aria-label": one[STATUS].map((status, run) => `${runs[run]}: ${countRight(status)} of ${status.length} right`).join(", ")},
    ...one[STATUS].map(dotOfRun))];
  const names = {"1": "right", "0": "wrong", "-": "unparsed", "!": "failed"};
  return one[STATUS].map((status, run) => make("div", {className: "dots", role: "img",
    "aria-label": `${runs[run]}: ${countRight(status)} of ${status.length} right`},
    ...[...status].map((found, place) => make("i", {className: found === "1" ? "" : found === "0" ? "wrong" : "unparsed",
      title: `${index.kinds[one[KINDS][place]]}: ${names[found]}`}))));
}

function drawRows() {
  const first = Math.max(0, Math.floor(list.scrollTop / ROW) - 4);
  const end = Math.min(matching.length, first + Math.ceil(list.clientHeight / ROW) + 9);
  rows.replaceChildren(...matching.slice(first, end).map((number, offset) => {
    const one = cases[number], address = imageAddress(one[IMAGE]);
    return make("div", {className: "row", role: "option", id: `row-${number}`, style: `top: ${(first + offset) * ROW}px`,
      "aria-selected": String(number === current), onclick: () => show(number)},
      address ? make("img", {src: address, alt: "", loading: "lazy"}) : make("span", {className: "none"}),
      make("div", {}, make("b", {textContent: one[ID]}),
        make("small", {textContent: `${index.products[one[PRODUCT]].split("/").pop()}, ${index.conditions[one[CONDITION]]}`}),
        ...dots(one)));
  }));
  list.setAttribute("aria-activedescendant", `row-${current}`);
}

function scrollToCurrent() {
  const at = matching.indexOf(current) * ROW;
  if (at < 0) return;
  if (at < list.scrollTop) list.scrollTop = at;
  else if (at + ROW > list.scrollTop + list.clientHeight) list.scrollTop = at + ROW - list.clientHeight;
}

// ---- One case

const blocks = new Map();
function block(number) {
  if (!blocks.has(number)) {
    const bytes = Uint8Array.from(atob(element(`block-${number}`).textContent), letter => letter.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    blocks.set(number, new Response(stream).json());
  }
  return blocks.get(number);
}

function picture(number, label, outlines, boxes, caption, large) {
  const address = imageAddress(number);
  const frame = make("div", {className: address ? "picture" : "picture missing"});
  if (address) frame.append(make("img", {src: address, alt: label}));
  else frame.textContent = "no image";
  if (address && outlines) {
    const [width, height, path] = outlines;
    const svg = drawn("svg", {viewBox: `0 0 ${width} ${height}`, preserveAspectRatio: "none", "aria-hidden": "true"});
    svg.append(drawn("path", {class: "outline", d: path}));
    frame.append(svg);
  }
  for (const [run, [x0, y0, x1, y1]] of address ? boxes : []) {
    const svg = drawn("svg", {viewBox: "0 0 1000 1000", preserveAspectRatio: "none", "aria-hidden": "true"});
    svg.append(drawn("rect", {class: "box", x: x0, y: y0, width: x1 - x0, height: y1 - y0, style: `stroke: ${colour(run)}`}));
    frame.append(svg);
  }
  return make("figure", {className: large ? "large" : ""}, frame, make("figcaption", {textContent: caption}));
}

// Each distinct value that runs have, with the names of those runs unless all have it.
function perRun(values) {
  return [...new Set(values)].filter(value => value !== null).map(value => [value,
    values.every(other => other === value) ? "" : ` of ${runs.filter((_, run) => values[run] === value).join(", ")}`]);
}

function pictures(one, found) {
  const label = `${index.products[one[PRODUCT]]}, ${index.conditions[one[CONDITION]]}`;
  const boxes = found.questions.flatMap(question =>
    question.runs.flatMap(([, , , , predicted], run) => (predicted ?? []).map(box => [run, box])));
  const outlined = [found.query.outlines ? "defect outlined" : "", boxes.length ? "predicted boxes dashed" : ""];
  return make("div", {className: "pictures"},
    picture(found.query.image, `query image: ${label}`, found.query.outlines, boxes,
      ["query", ...outlined.filter(text => text), ...perRun(index.corruptions).map(([text, who]) =>
        `shown to the experts${who} with ${text}`)].join(", "), true),
    ...found.references.map(reference => ({...reference,
      caption: perRun(reference.numbers).map(([number, who]) => `candidate ${number}${who}`).join("; ")}))
      .sort((one, other) => (other.chosen.length > 0) - (one.chosen.length > 0))
      .map(({image, chosen, caption}) => {
        const by = runs.length === 1 ? "" : ` of ${chosen.map(run => runs[run]).join(", ")}`;
        const text = chosen.length ? `${caption}, shown to the experts${by}` : caption;
        return picture(image, `normal reference, ${text}`, null, [], text, chosen.length > 0);
      }));
}

function question(asked) {
  const made = make("div", {className: "question"}, make("b", {textContent: asked.kind}), make("p", {textContent: asked.text}));
  for (const [letter, text] of asked.options) {
    const truth = letter === asked.answer;
    const words = make("div", {textContent: `${letter}. ${text}`});
    if (truth) words.append(make("span", {className: "mark soft", textContent: "correct"}));
    asked.runs.forEach(([parsed], run) => {
      if (parsed === letter) words.append(make("span", {className: `mark ${truth ? "right" : "wrong"}`,
        textContent: `${truth ? "✓" : "✗"} ${runs.length === 1 ? "chosen" : runs[run]}`}));
    });
    const bars = make("div", {className: "bars"});
    asked.runs.forEach(([, , , probabilities], run) => {
      const p = probabilities?.[letter];
      if (p !== undefined) bars.append(make("div", {className: "bar", role: "img", "aria-label": `${runs[run]}: probability ${p.toFixed(2)}`},
        make("span", {}, make("i", {style: `width: ${100 * p}%; background: ${colour(run)}`})), p.toFixed(2)));
    });
    made.append(make("div", {className: truth ? "option truth" : "option"}, words, bars));
  }
  if (!asked.options.length) made.append(make("div", {className: "soft", textContent: `correct: ${asked.answer}`}));
  asked.runs.forEach(([parsed, text, error], run) => {
    const who = runs.length === 1 ? "" : `${runs[run]}: `;
    if (error !== null) made.append(make("div", {className: "wrong", textContent: `${who}failed: ${error}`}));
    else if (parsed === null) made.append(make("div", {className: "wrong", textContent: `${who}unparsed: “${text}”`}));
    else if (!asked.options.length) made.append(make("div", {textContent: `${who}${parsed}`}));
  });
  return made;
}

function words(found) {
  return found.words.flatMap((traces, run) => traces.length === 0 ? [] : [
    make("h4", {textContent: runs.length === 1 ? "What the experts saw and said" : `What the experts of ${runs[run]} saw and said`}),
    ...traces.map(([role, branch, text, cut, images, prompt]) => {
      const about = typeof branch === "number" ? found.questions[branch - 1].kind
        : {best: "best candidate", normal: "what is normal", guide: ""}[branch] ?? branch;
      return make("div", {className: "expert"},
        make("div", {}, make("span", {textContent: index.roles[role]}), about ? make("div", {textContent: about}) : ""),
        make("div", {}, make("div", {className: "text", textContent: `${text || "(nothing)"}${cut ? " … cut at the token limit" : ""}`}),
          make("details", {}, make("summary", {textContent: `saw ${images.join(", ")} and a prompt`}), make("pre", {textContent: prompt}))));
    })]);
}

async function draw() {
  const number = current;
  if (number < 0) { shownCase.replaceChildren(make("p", {className: "soft", textContent: "No case matches these filters."})); return; }
  const one = cases[number], condition = index.conditions[one[CONDITION]];
  const found = (await block(Math.floor(number / CASES_PER_BLOCK)))[number % CASES_PER_BLOCK];
  if (number !== current) return;
  const link = make("a", {href: `#${new URLSearchParams({case: one[ID]})}`, textContent: "link to this case"});
  shownCase.replaceChildren(
    make("header", {}, make("h3", {textContent: one[ID]}),
      make("span", {className: `tag ${condition === "good" ? "good" : "bad"}`, textContent: condition}),
      make("span", {className: "soft", textContent: `${index.products[one[PRODUCT]]}${found.group === one[ID] ? "" : ` · part ${found.group}`}`}), link),
    pictures(one, found),
    make("h4", {textContent: "Questions"}),
    runs.length === 1 ? "" : make("p", {className: "soft"}, ...runs.flatMap((run, place) =>
      [make("span", {className: "key", style: `background: ${colour(place)}`}), `${run}  `])),
    ...found.questions.map(question),
    ...words(found));
  shownCase.dataset.case = one[ID];
}

// ---- The address, the mouse and the keys

const address = () => new URLSearchParams(location.hash.slice(1));

function setAddress(wanted) {
  for (const [name, value] of [...wanted]) if (!value) wanted.delete(name);
  history.replaceState(null, "", `#${wanted}`);
}

function show(number) {
  current = number;
  const wanted = address();
  wanted.set("case", number < 0 ? "" : cases[number][ID]);
  setAddress(wanted);
  scrollToCurrent();
  drawRows();
  return draw();
}

function read(scroll) {
  const wanted = address();
  applyFilters(wanted);
  const asked = cases.findIndex(one => one[ID] === wanted.get("case"));
  current = asked >= 0 ? asked : matching[0] ?? -1;
  scrollToCurrent();
  drawRows();
  if (scroll) element("cases").scrollIntoView();
  return draw();
}

function filtersChanged() {
  const wanted = new URLSearchParams();
  for (const name of ["answers", "kind", "product", "condition", "name"]) wanted.set(name, named(name).value);
  applyFilters(wanted);
  setAddress(wanted);
  if (!matching.includes(current)) { list.scrollTop = 0; show(matching[0] ?? -1); } else show(current);
}

function move(steps) {
  if (!matching.length) return;
  const at = matching.indexOf(current);
  show(matching[Math.max(0, Math.min(matching.length - 1, at + steps))]);
}

function setOutlines(on) {
  element("outlines").checked = on;
  document.body.classList.toggle("plain", !on);
}

form.addEventListener("input", event => {
  if (event.target.id === "outlines") setOutlines(event.target.checked);
  else filtersChanged();
});
form.addEventListener("submit", event => event.preventDefault());
form.addEventListener("reset", () => { setOutlines(true); setTimeout(filtersChanged); });
list.addEventListener("scroll", drawRows);
addEventListener("resize", drawRows);
addEventListener("hashchange", () => {
  if (location.hash === "#cases" || address().size && location.hash.includes("=")) read(true);  // else a section
});
addEventListener("keydown", event => {
  const typing = event.target.matches("input[type=search], select");
  if (typing || event.ctrlKey || event.metaKey || event.altKey) return;
  const inList = event.target === list;
  const steps = {j: 1, k: -1, ...(inList ? {ArrowDown: 1, ArrowUp: -1, PageDown: 10, PageUp: -10, Home: -cases.length, End: cases.length} : {})}[event.key];
  if (steps !== undefined) { move(steps); event.preventDefault(); }
  else if (event.key === "o") setOutlines(!element("outlines").checked);
});
element("viewer").hidden = false;
read(location.hash.includes("="));
})();
