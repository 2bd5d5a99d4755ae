// Small helpers for elements and forms.

/** An element with properties and children. */
export function make(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  const { dataset, ...others } = properties;
  Object.assign(made, others);
  Object.assign(made.dataset, dataset);
  made.append(...children.filter((child) => child !== null));
  return made;
}

/** A sentence in the place of a result. */
export function notice(text, error = false) {
  const made = make("p", { className: error ? "notice error" : "notice", textContent: text });
  made.setAttribute("role", error ? "alert" : "status");
  return made;
}

/** Put a slider, its number and its ends into a field; a form reads the number by the field's name. */
export function addRange(field, max, value) {
  const { range: name, min, step = "1" } = field.dataset;
  const most = max ?? field.dataset.max;
  const start = value ?? field.dataset.value;
  const slider = make("input", { type: "range", min, max: most, step, value: start });
  const number = make("input", { type: "number", name, min, max: most, step, value: start, required: true });
  slider.setAttribute("aria-label", `${field.firstChild.textContent.trim()}, slider`);
  slider.addEventListener("input", () => { number.value = slider.value; });
  number.addEventListener("input", () => { slider.value = number.value; });
  const end = (text) => make("span", { textContent: text });
  const ends = make("span", { className: "ends" }, end(min), end(most));
  field.append(make("span", { className: "range" }, slider, number), ends);
}

export function setNumber(form, name, value) {
  const input = form.elements[name];
  if (!input || value === undefined) return;
  input.value = value;
  input.dispatchEvent(new Event("input", { bubbles: true }));
}

/** Tabs: pointer, arrow keys, and by name. */
export function showTab(name) {
  for (const tab of document.querySelectorAll("[role=tab]")) {
    const chosen = tab.id === `tab-${name}`;
    tab.setAttribute("aria-selected", String(chosen));
    tab.tabIndex = chosen ? 0 : -1;
    document.getElementById(tab.getAttribute("aria-controls")).hidden = !chosen;
  }
}

export function startTabs() {
  const list = document.querySelector("[role=tablist]"), tabs = [...list.children];
  list.addEventListener("click", ({ target }) => { if (target.id) showTab(target.id.slice(4)); });
  list.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!step) return;
    const next = tabs[(tabs.indexOf(event.target) + step + tabs.length) % tabs.length];
    showTab(next.id.slice(4));
    next.focus();
  });
}

/** Walk over the cells of a grid with the arrow keys. */
export function walkCells(grid, columns) {
  grid.addEventListener("keydown", (event) => {
    const cells = [...grid.children], now = cells.indexOf(event.target);
    const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns }[event.key];
    if (!step || !cells[now + step]) return;
    event.preventDefault();
    cells[now].tabIndex = -1;
    cells[now + step].tabIndex = 0;
    cells[now + step].focus();
  });
}

/** A grid of buttons over an image, one per cell. */
export function cellGrid(rows, columns, label, describe) {
  const cells = Array.from({ length: rows * columns }, (_, place) => {
    const cell = make("button", { type: "button", tabIndex: place ? -1 : 0, dataset: { place } });
    cell.setAttribute("aria-label", describe(place));
    return cell;
  });
  const grid = make("div", { className: "cells" }, ...cells);
  grid.style.setProperty("--columns", columns);
  grid.setAttribute("role", "group");
  grid.setAttribute("aria-label", label);
  walkCells(grid, columns);
  return { grid, cells };
}
