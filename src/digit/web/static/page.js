// Starts the page: asks what the model is, and sets up the three tabs.

import { get } from "./api.js";
import { notice, showTab, startTabs } from "./dom.js";
import { classCount, fillForm, readForm } from "./form.js";
import { results } from "./results.js";
import { startTokens } from "./tokens.js";
import { well } from "./well.js";

const panel = (name) => document.getElementById(name);
const wells = {};

/** Take an image to another tab. */
function send(tab, url) {
  showTab(tab);
  wells[tab].take(url);
  scrollTo({ top: 0 });
}

function startGenerate(model) {
  const form = panel("generate").querySelector("form"), shown = results(panel("generate"), model, send);
  fillForm(form, model);
  shown.say("Choose a class and press Generate.");
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    const { body, label } = readForm(form, model);
    if (label === "all") {
      body.labels = [...Array(Math.min(classCount(model), model.limits.pictures)).keys()];
      body.num = body.labels.length;
    } else if (label !== "none") {
      body.labels = [Number(label)];
    }
    shown.run("/api/generate", body, label);
  });
  form.elements.other.addEventListener("click", () => {
    const select = form.elements.label;
    const others = [...select.options].filter((option) => /^\d+$/.test(option.value) && !option.selected);
    if (others.length) select.value = others[Math.floor(Math.random() * others.length)].value;
    form.dispatchEvent(new Event("change"));
    form.requestSubmit();
  });
}

function startEdit(model) {
  const form = panel("edit").querySelector("form"), shown = results(panel("edit"), model, send, "edited");
  let image = null, extends_rows = false;
  fillForm(form, model);
  const ask = "Take an image and paint the cells to resample, with the pointer or with arrow keys and space.";
  shown.say(ask);
  wells.edit = well(form.querySelector(".well"), model, (url) => {
    image = url;
    shown.say("Paint the cells to resample.");
  });
  form.elements.extend.addEventListener("click", () => {
    extends_rows = true;
    form.requestSubmit();
    extends_rows = false;
  });
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    const { body, label } = readForm(form, model), cells = wells.edit.painted();
    if (!image) return shown.fail("Take an image first.");
    if (!extends_rows && !cells.length) return shown.fail("Paint some cells of the image first.");
    if (label !== "none") body.label = Number(label);
    const what = extends_rows ? { rows: Number(form.elements.rows.value) } : { cells };
    return shown.run("/api/edit", { ...body, ...what, image }, label);
  });
}

function lacks(name, text) {
  panel(name).replaceChildren(notice(text));
}

async function start() {
  const about = panel("about");
  startTabs();
  let model;
  try {
    model = await get("/api/model");
  } catch (error) {
    about.replaceWith(notice(error.message, true));
    return;
  }
  const named = (space) => `${space === "vq" ? "VQ" : space} tokens`;
  const grids = Object.entries(model.grids).map(([space, [rows, columns]]) => `${rows} x ${columns} ${named(space)}`);
  const classes = classCount(model) ? [`${classCount(model)} classes`] : [];
  about.textContent = `${model.name}: ${[`${model.image_size} px`, ...grids, ...classes].join(", ")}`;
  document.title = `digit: ${model.name}`;
  wells.tokens = startTokens(panel("tokens"), model);
  if (model.can.generate) startGenerate(model);
  else lacks("generate", "This model lacks a prior, a decoder or a VQGAN, so it cannot generate images.");
  if (model.can.edit) startEdit(model);
  else lacks("edit", "Editing needs a model with all its components; this one lacks some.");
  document.body.dataset.ready = "yes";
}

start();
