// A place for an image: drop, paste or choose a file, or take a sample; and painting cells on it.

import { cellGrid, make, notice } from "./dom.js";

const TYPES = ["image/png", "image/jpeg", "image/webp", "image/gif", "image/bmp"];
const SAMPLES = ["horse", "automobile", "dog"];
const ASK = "Drop or paste an image here, or press to choose a file";
const TRY = "Or try a sample, made by the packaged model:";

/** Fill `root`; `loaded(url)` is called with every new image, as a data URL. */
export function well(root, model, loaded) {
  const input = make("input", { type: "file", accept: TYPES.join(",") });
  input.setAttribute("aria-label", "Choose an image");
  const image = make("img", { alt: "", hidden: true }), words = make("span", { textContent: ASK });
  const frame = make("label", { className: "frame" }, input, image, words);
  const samples = make("div", { className: "samples" }, make("span", { textContent: TRY }));
  for (const name of SAMPLES) {
    const picture = make("img", { src: `/static/samples/${name}.png`, alt: name, className: "pixels" });
    const sample = make("button", { type: "button" }, picture);
    sample.addEventListener("click", async () => read(await (await fetch(`/static/samples/${name}.png`)).blob()));
    samples.append(sample);
  }
  const problem = make("div");
  const painter = root.dataset.paint ? paint(model) : null;
  root.append(frame, samples, ...(painter ? [painter.board] : []), problem);

  const fail = (text) => problem.replaceChildren(notice(text, true));
  async function take(url) {
    try {
      await make("img", { src: url }).decode();
    } catch {
      fail("This file is not an image in one of the formats PNG, JPEG, WebP, GIF and BMP.");
      return;
    }
    problem.replaceChildren();
    Object.assign(image, { src: url, hidden: false });
    words.textContent = "Another image";
    frame.classList.add("filled");
    samples.hidden = true;
    painter?.show(url);
    loaded(url);
  }
  function read(file) {
    if (!file) return;
    if (file.size > model.limits.upload_mb * 1048576) {
      fail(`This file is larger than ${model.limits.upload_mb} MiB.`);
      return;
    }
    const reader = new FileReader();
    reader.onload = () => take(reader.result);
    reader.onerror = () => fail("This file cannot be read.");
    reader.readAsDataURL(file);
  }
  input.addEventListener("change", () => { read(input.files[0]); input.value = ""; });
  for (const kind of ["dragover", "dragleave", "drop"]) {
    root.addEventListener(kind, (event) => {
      event.preventDefault();
      frame.classList.toggle("over", kind === "dragover");
      if (kind === "drop") read(event.dataTransfer.files[0]);
    });
  }
  document.addEventListener("paste", (event) => {
    if (root.offsetParent && event.clipboardData.files.length) read(event.clipboardData.files[0]);
  });
  return { take, painted: () => painter.painted() };
}

function paint(model) {
  const [rows, columns] = model.grids[model.space];
  const place = (cell) => `row ${Math.floor(cell / columns) + 1}, column ${(cell % columns) + 1}`;
  const { grid, cells } = cellGrid(rows, columns, "Cells to resample", place);
  grid.classList.add("paint");
  const marked = (cell) => cell.getAttribute("aria-pressed") === "true";
  const mark = (cell, on) => cell.setAttribute("aria-pressed", String(on));
  let value = false;
  grid.addEventListener("pointerdown", (event) => {
    if (!event.target.dataset.place) return;
    event.preventDefault();
    value = !marked(event.target);
    mark(event.target, value);
    event.target.focus();
    grid.setPointerCapture(event.pointerId);
  });
  grid.addEventListener("pointermove", (event) => {
    if (!grid.hasPointerCapture(event.pointerId)) return;
    const cell = document.elementFromPoint(event.clientX, event.clientY);
    if (cell?.parentElement === grid) mark(cell, value);
  });
  grid.addEventListener("keydown", (event) => {
    if (event.key !== " " && event.key !== "Enter") return;
    event.preventDefault();
    mark(event.target, !marked(event.target));
  });
  const all = (text, on) => {
    const button = make("button", { type: "button", textContent: text });
    button.addEventListener("click", () => cells.forEach((cell) => mark(cell, on)));
    return button;
  };
  const buttons = make("div", { className: "buttons" }, all("Clear", false), all("All", true));
  const board = make("div", { className: "board", hidden: true }, grid, buttons);
  return {
    board,
    painted: () => cells.filter(marked).map((cell) => Number(cell.dataset.place)),
    show(url) {
      board.hidden = false;
      grid.style.backgroundImage = `url(${url})`;
      cells.forEach((cell) => mark(cell, false));
    },
  };
}
