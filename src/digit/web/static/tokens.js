// The Tokens tab: what an image looks like to the model, and which tokens noise changes.

import { get, post } from "./api.js";
import { addRange, cellGrid, make, notice } from "./dom.js";
import { dataUrl, tokenCanvas, tokenColor } from "./images.js";
import { zoomable } from "./results.js";
import { well } from "./well.js";

const KINDS = { semantic: "semantic tokens", vq: "VQ tokens" };
const UNKNOWN = "What each cluster looks like is not known here: the model has no patches of real images. " +
  "Its owner can add them with: digit atlas MODEL --data D";
const PAUSE = 150; // ms after the last move of the slider

export function startTokens(panel, model) {
  const stage = panel.querySelector(".stage"), changed = panel.querySelector(".changed");
  addRange(panel.querySelector("[data-range=snr]"));
  const snr = panel.querySelector("form").elements.snr;
  stage.append(notice("Take an image to see its tokens, and move the slider to see which of them noise changes."));
  let image = null, asked = new AbortController(), timer = null;

  const place = well(panel.querySelector(".well"), model, async (url) => {
    image = url;
    stage.replaceChildren(notice("Reading the image."));
    changed.replaceChildren();
    try {
      const found = await post("/api/tokenize", { image: url });
      if (image !== url) return;
      stage.replaceChildren(...inspection(found, model));
      await addNoise();
    } catch (error) {
      if (image === url) stage.replaceChildren(notice(error.message, true));
    }
  });

  async function addNoise() {
    asked.abort();
    asked = new AbortController();
    if (!image || !snr.checkValidity()) return;
    try {
      const found = await post("/api/stability", { image, snr: Number(snr.value) }, asked.signal);
      changed.replaceChildren(stability(found, model));
    } catch (error) {
      if (error.name !== "AbortError") changed.replaceChildren(notice(error.message, true));
    }
  }
  panel.querySelector("[data-range=snr]").addEventListener("input", () => {
    clearTimeout(timer);
    timer = setTimeout(addNoise, PAUSE);
  });
  panel.querySelector("form").addEventListener("submit", (event) => event.preventDefault());
  return place;
}

function inspection(found, model) {
  const size = model.image_size;
  const items = [["The image", found.picture, `${size} x ${size} pixels, as the model sees it`]];
  if (found.vqgan) items.push(["VQGAN alone", found.vqgan, "what VQ tokens keep"]);
  if (found.full) items.push(["Full path", found.full, "from semantic tokens alone"]);
  const shown = items.map(([title, png, about]) => ({ title, url: dataUrl(png), about, file: `${title}.png` }));
  const figures = shown.map((item, number) => captioned(zoomable(shown, number), item.title, item.about));
  if (found.vq) {
    const [rows, columns] = model.grids.vq, count = model.vocabulary.vq.toLocaleString("en");
    const about = `${rows} x ${columns} of ${count} codes`;
    figures.splice(1, 0, captioned(tokenCanvas(found.vq, model.grids.vq), "VQ tokens", about));
  }
  if (found.semantic) {
    const over = tokensOver(found, model);
    figures.splice(1, 0, over.figure, over.box);
  }
  return [make("div", { className: "images wide" }, ...figures)];
}

function captioned(content, title, about) {
  const lines = [make("b", { textContent: title }), make("span", { textContent: about })];
  return make("figure", {}, content, make("figcaption", {}, ...lines));
}

/** Coloured cells over an image; the chosen one shows what its cluster looks like. */
function tokensOver({ semantic, picture }, model) {
  const [rows, columns] = model.grids.semantic;
  const { grid, cells } = cellGrid(rows, columns, "Semantic tokens", (place) => `token ${semantic[place]}`);
  grid.style.backgroundImage = `url(${dataUrl(picture)})`;
  cells.forEach((cell, place) => {
    cell.dataset.token = semantic[place];
    cell.style.setProperty("--color", `rgb(${tokenColor(semantic[place])})`);
  });
  const box = make("div", { className: "cluster", hidden: model.can.clusters });
  if (!model.can.clusters) {
    box.append(notice(UNKNOWN));
  }
  let chosen = null;
  const choose = async ({ target }) => {
    const token = target.dataset.token;
    if (token === undefined || token === chosen) return;
    chosen = token;
    cells.forEach((cell) => cell.classList.toggle("same", cell.dataset.token === token));
    if (!model.can.clusters) return;
    const patches = await clusterPatches(token);
    if (chosen !== token) return;
    const count = semantic.filter((other) => String(other) === token).length;
    const images = patches.map((png) => make("img", { src: dataUrl(png), alt: "", className: "pixels" }));
    const title = make("b", { textContent: `Cluster ${token}` });
    const about = make("p", {}, title, ` (${count} here): the nearest patches of ${model.clusters_from}`);
    const shown = images.length ? images : ["No image that was looked through has it."];
    box.replaceChildren(about, make("div", { className: "patches" }, ...shown));
    box.hidden = false;
  };
  for (const kind of ["focusin", "pointerover", "click"]) grid.addEventListener(kind, choose);
  const used = new Set(semantic).size, count = model.vocabulary.semantic.toLocaleString("en");
  const numbers = `${rows} x ${columns} of ${count} clusters, ${used} in use here.`;
  const about = `${numbers} Point at a cell, or walk with the arrow keys.`;
  return { figure: captioned(grid, "Semantic tokens", about), box };
}

const known = new Map();

async function clusterPatches(token) {
  if (!known.has(token)) known.set(token, get(`/api/clusters/${token}`).then((found) => found.patches, () => []));
  return known.get(token);
}

/** The noisy image, and the places of the tokens that change. */
function stability({ realised_snr: snr, picture, flips }, model) {
  const about = snr === null ? "no noise" : `${snr.toFixed(1)} dB after clipping`;
  const noisy = [{ url: dataUrl(picture), about: "With noise", file: "noise.png" }];
  const figures = [captioned(zoomable(noisy, 0), "With noise", about)];
  for (const [space, found] of Object.entries(flips)) {
    const places = new Set(found.places);
    const canvas = tokenCanvas(found.after, model.grids[space], (place) => places.has(place));
    const meter = make("meter", { max: found.of, value: found.count });
    meter.setAttribute("aria-label", `changed ${KINDS[space]}`);
    const change = `${KINDS[space]} change: ${Math.round(found.share * 100)}%`;
    const figure = captioned(canvas, `${found.count} of ${found.of}`, change);
    canvas.after(meter);
    Object.assign(figure.dataset, { space, flips: found.count });
    figures.push(figure);
  }
  return make("div", { className: "images three" }, ...figures);
}
