// What the page does in the browser alone: wells for pictures, painting, walking over cells, the history.
"use strict";
window.digit = (() => {
  const HISTORY = 48;
  const wells = {}, sent = {};
  const TYPES = "image/png,image/jpeg,image/webp,image/gif,image/bmp";
  const make = (tag, properties = {}, ...children) => {
    const made = Object.assign(document.createElement(tag), properties);
    made.append(...children);
    return made;
  };

  // ---- a place for a picture: props.value is {file} on the way in, {picture, cells} once the server has looked at it
  function well(element, trigger, props, watch) {
    const root = element.querySelector("[data-well]");
    const input = make("input", { type: "file", accept: TYPES, className: "dg-file" });
    input.setAttribute("aria-label", "Choose a picture");
    const image = make("img", { className: "dg-pixels", alt: "", hidden: true });
    const words = make("span", { textContent: "Drop or paste a picture here, or press to choose one" });
    const frame = make("label", { className: "dg-well" }, input, image, words);
    const note = make("p", { className: "dg-notice dg-error", hidden: true });
    note.setAttribute("role", "alert");
    const painter = props.rows ? paint(props) : null;
    root.append(frame, ...(painter ? [painter.board] : []), note);

    const say = (text) => Object.assign(note, { textContent: text, hidden: !text });
    const show = () => {
      const picture = (props.value || {}).picture;
      image.hidden = !picture;
      if (picture) image.src = picture;
      words.textContent = picture ? "Another picture" : "Drop or paste a picture here, or press to choose one";
      frame.classList.toggle("dg-has", Boolean(picture));
      if (painter) painter.show(picture);
    };
    const send = (url) => { say(""); props.value = { file: url }; trigger("upload"); };
    const take = (file) => {
      if (!file) return;
      if (file.size > props.megabytes * 1048576) return say(`This file is larger than ${props.megabytes} MiB.`);
      const reader = new FileReader();
      reader.onload = () => send(reader.result);
      reader.onerror = () => say("This file cannot be read.");
      reader.readAsDataURL(file);
    };
    input.addEventListener("change", () => { take(input.files[0]); input.value = ""; });
    for (const kind of ["dragover", "dragleave", "drop"]) {
      root.addEventListener(kind, (event) => {
        event.preventDefault();
        frame.classList.toggle("dg-over-it", kind === "dragover");
        if (kind === "drop") take(event.dataTransfer.files[0]);
      });
    }
    document.addEventListener("paste", (event) => {
      if (root.offsetParent && event.clipboardData.files.length) take(event.clipboardData.files[0]);
    });
    wells[root.dataset.well] = send;
    follow("dg-edited");
    watch("value", show);
    show();
    if (sent[root.dataset.well]) send(sent[root.dataset.well]);
    delete sent[root.dataset.well];
  }

  // ---- painting cells on a picture
  function paint(props) {
    const { rows, columns } = props;
    const cells = [...Array(rows * columns).keys()].map((place) => {
      const cell = make("button", { type: "button", tabIndex: place ? -1 : 0 });
      cell.dataset.place = place;
      cell.setAttribute("aria-label", `row ${Math.floor(place / columns) + 1}, column ${(place % columns) + 1}`);
      return cell;
    });
    const grid = make("div", { className: "dg-over dg-paint" }, ...cells);
    grid.style.setProperty("--columns", columns);
    grid.dataset.columns = columns;
    grid.setAttribute("role", "grid");
    grid.setAttribute("aria-label", "cells to sample anew");
    const clear = make("button", { type: "button", textContent: "Clear" });
    const all = make("button", { type: "button", textContent: "All" });
    const board = make("div", { hidden: true, className: "dg-board" }, grid, make("div", { className: "dg-links" }, clear, all));
    let value = false;
    const chosen = () => cells.filter((cell) => cell.getAttribute("aria-pressed") === "true").map((c) => Number(c.dataset.place));
    const mark = (cell, on) => cell.setAttribute("aria-pressed", String(on));
    const keep = () => { props.value = { ...props.value, cells: chosen() }; };
    grid.addEventListener("pointerdown", (event) => {
      if (!event.target.dataset.place) return;
      event.preventDefault();
      value = event.target.getAttribute("aria-pressed") !== "true";
      mark(event.target, value);
      event.target.focus();
      grid.setPointerCapture(event.pointerId);
    });
    grid.addEventListener("pointermove", (event) => {
      if (!grid.hasPointerCapture(event.pointerId)) return;
      const cell = document.elementFromPoint(event.clientX, event.clientY);
      if (cell && cell.parentElement === grid) mark(cell, value);
    });
    grid.addEventListener("pointerup", keep);
    grid.addEventListener("keydown", (event) => {
      if (event.key !== " " && event.key !== "Enter") return;
      event.preventDefault();
      mark(event.target, event.target.getAttribute("aria-pressed") !== "true");
      keep();
    });
    clear.addEventListener("click", () => { cells.forEach((cell) => mark(cell, false)); keep(); });
    all.addEventListener("click", () => { cells.forEach((cell) => mark(cell, true)); keep(); });
    return {
      board,
      show(picture) {
        board.hidden = !picture;
        if (!picture) return;
        grid.style.backgroundImage = `url(${picture})`;
        const marked = new Set((props.value || {}).cells || []);
        cells.forEach((cell, place) => mark(cell, marked.has(place)));
      },
    };
  }

  // ---- walking over any grid of cells, and what the cluster of a cell looks like
  document.addEventListener("keydown", (event) => {
    const grid = event.target.closest && event.target.closest(".dg-over");
    if (!grid) return;
    const columns = Number(grid.dataset.columns), cells = [...grid.children], now = cells.indexOf(event.target);
    const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns }[event.key];
    if (!step || !cells[now + step]) return;
    event.preventDefault();
    cells[now].tabIndex = -1;
    cells[now + step].tabIndex = 0;
    cells[now + step].focus();
  });
  for (const kind of ["focusin", "pointerover", "click"]) {
    document.addEventListener(kind, (event) => {
      if (event.target.dataset && event.target.dataset.token) cluster(event.target);
    });
  }

  function cluster(cell) {
    const { token } = cell.dataset, place = cell.closest(".dg-inside");
    const same = [...cell.parentElement.children];
    same.forEach((other) => other.classList.toggle("dg-same", other.dataset.token === token));
    const box = place.querySelector(".dg-cluster");
    if (!box) return;
    box.hidden = false;
    const count = same.filter((other) => other.dataset.token === token).length;
    box.querySelector("b").textContent = `Cluster ${token} (${count} here)`;
    const [row, patches] = JSON.parse(box.dataset.where)[token];
    const { rows, columns, url } = box.dataset;
    const tiles = [...Array(patches).keys()].map((column) => {
      const tile = make("span");
      Object.assign(tile.style, {
        backgroundImage: `url(${url})`,
        backgroundSize: `${columns * 100}% ${rows * 100}%`,
        backgroundPosition: `${columns > 1 ? (column / (columns - 1)) * 100 : 0}% ${rows > 1 ? (row / (rows - 1)) * 100 : 0}%`,
      });
      return tile;
    });
    box.querySelector(".dg-patches").replaceChildren(...(tiles.length ? tiles : ["No picture of the atlas has it."]));
  }

  // ---- from a finished picture to another tab
  document.addEventListener("click", (event) => {
    const { send } = event.target.dataset || {};
    if (!send) return;
    const url = event.target.closest("figure").querySelector("img").src;
    document.getElementById(`dg-tab-${send}-button`).click();
    if (wells[send]) wells[send](url);
    else sent[send] = url; // its tab was never open: the well takes it when it is made
  });

  // ---- on a narrow screen the results are below the form: go there when they begin
  function follow(id) {
    const place = document.getElementById(id);
    if (!place || place.dataset.followed) return;
    place.dataset.followed = "yes";
    let busy = false;
    new MutationObserver(() => {
      const now = Boolean(place.querySelector("progress"));
      if (now && !busy && place.getBoundingClientRect().top > window.innerHeight * 0.7) place.scrollIntoView();
      busy = now;
    }).observe(place, { childList: true, subtree: true });
  }

  // ---- the history: finished pictures stay until the page is closed
  function history(element) {
    const root = element.querySelector("#dg-history");
    const list = make("div", { className: "dg-pictures dg-past" });
    const forget = make("button", { type: "button", textContent: "Forget" });
    const part = make("section", { hidden: true }, make("h2", { textContent: "Before" }), list, make("div", { className: "dg-links" }, forget));
    root.append(part);
    follow("dg-stage");
    forget.addEventListener("click", () => { list.replaceChildren(); part.hidden = true; });
    let last = [];
    new MutationObserver(() => {
      const done = document.querySelector("#dg-stage .dg-done");
      if (!done) {
        if (last.length) list.prepend(...last);
        while (list.children.length > HISTORY) list.lastChild.remove();
        part.hidden = !list.children.length;
        last = [];
      } else {
        last = [...done.querySelectorAll("figure")].map((figure) => figure.cloneNode(true));
      }
    }).observe(document.getElementById("dg-stage"), { childList: true, subtree: true, attributes: true });
  }

  return { well, history };
})();
