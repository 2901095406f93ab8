"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const form = document.getElementById("choices");
const detail = document.getElementById("detail");
const buttons = new Map();
for (const button of document.querySelectorAll(".lens button"))
  buttons.set(button.dataset.row + "," + button.dataset.column, button);
let pressed = null;

const chosen = name => new FormData(form).get(name);
const isModel = row => row === data.layers.length;
const listOf = (lens, row, column) => isModel(row) ? data.model.top[column] : data[lens].top[row][column];

function paint() {
  const lens = chosen("lens"), colour = chosen("colour");
  for (const button of buttons.values()) {
    const row = Number(button.dataset.row), column = Number(button.dataset.column);
    button.firstChild.textContent = listOf(lens, row, column)[0][1];
    const levels = isModel(row) ? data.levels.model : data.levels[lens];
    const level = isModel(row) ? levels[colour][column] : levels[colour][row][column];
    button.className = "s" + level;
  }
  document.getElementById("low").textContent = data.legend[colour][0];
  document.getElementById("high").textContent = data.legend[colour][1];
}

function element(name, text, attributes = {}) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

function number(value) {
  return value >= 0.001 ? value.toFixed(3) : value.toExponential(1);
}

function list(title, rows, intervals) {
  const part = document.createDocumentFragment();
  part.append(element("h3", title));
  const table = element("table"), head = table.createTHead().insertRow(), body = table.createTBody();
  for (const name of ["token", "probability", intervals ? "logit, 95 %" : "logit"]) head.append(element("th", name, { scope: "col" }));
  rows.forEach(([, text, logit, share], i) => {
    const row = body.insertRow();
    row.append(element("th", text, { scope: "row" }));
    row.insertCell().textContent = number(share);
    const interval = intervals ? ` [${intervals[i].map(value => value.toFixed(1)).join(", ")}]` : "";
    row.insertCell().textContent = logit.toFixed(2) + interval;
  });
  part.append(table);
  return part;
}

function show(button) {
  if (pressed) pressed.removeAttribute("aria-pressed");
  pressed = button;
  button.setAttribute("aria-pressed", "true");
  const row = Number(button.dataset.row), column = Number(button.dataset.column);
  detail.replaceChildren();
  const where = isModel(row) ? "The model itself" : "After layer " + data.layers[row];
  detail.append(element("h2", where + ", at position " + data.positions[column]));
  const place = element("p");
  place.append("What follows “", element("span", data.tokens[column], { class: "token" }), "”");
  if (data.skipped[column]) place.append("; the lens was not fitted at tokens this early");
  detail.append(place);
  if (isModel(row)) {
    detail.append(list("What the model says", listOf("model", row, column)));
    return;
  }
  for (const [lens, title] of [["jacobian", "Jacobian lens"], ["logit", "Logit lens"]]) {
    const rank = data[lens].rank[row][column];
    const intervals = lens === "jacobian" && data.intervals ? data.intervals.logits[row][column] : null;
    detail.append(list(title, listOf(lens, row, column), intervals));
    let sentence = "The model’s own choice has rank " + rank;
    if (lens === "jacobian" && data.intervals)
      sentence += " (95 %: " + data.intervals.ranks[row][column].join(" to ") + ")";
    detail.append(element("p", sentence + ".", { class: "note" }));
  }
}

for (const button of buttons.values()) {
  button.addEventListener("click", () => {
    for (const other of buttons.values()) other.tabIndex = -1;
    button.tabIndex = 0;
    show(button);
  });
  button.addEventListener("keydown", event => {
    const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
    if (!step) return;
    const next = buttons.get([Number(button.dataset.row) + step[0], Number(button.dataset.column) + step[1]].join(","));
    if (!next) return;
    event.preventDefault();
    button.tabIndex = -1;
    next.tabIndex = 0;
    next.focus();
    show(next);
  });
}
form.addEventListener("change", paint);
form.hidden = false;
