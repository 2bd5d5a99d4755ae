// The form of the Generate and the Edit tab: filled from what the model can do, and read into a request.

import { addRange, make, setNumber } from "./dom.js";

const DECODERS = {
  ar: "draws the VQ tokens one after another. The slowest.",
  masked: "fills in all VQ tokens in a few steps, the surest first.",
  onepass: "feed-forward: makes the whole image at once. The fastest.",
  rae: "makes the whole image at once of the tokens' centroids.",
};
const SETTINGS = ["cfg_scale", "steps", "top_k", "top_p", "temperature"];

/** Put classes, decoders and limits into a form. */
export function fillForm(form, model) {
  const prior = model.settings.prior, most = model.limits.pictures;
  const needs = { classes: classCount(model) > 0, guide: model.can.guide, decoders: model.decoders.length > 1 };
  for (const part of form.querySelectorAll("[data-needs]")) part.hidden = !needs[part.dataset.needs];
  const words = model.vocabulary[model.space], stepped = model.stepped[0];
  const ranges = {
    num: [most, Math.min(4, most)],
    cfg_scale: [10, prior.cfg_scale],
    steps: [32, stepped ? model.settings[stepped].steps : 8],
    top_k: [words, Math.min(prior.top_k, words)],
    top_p: [1, prior.top_p],
    temperature: [2, prior.temperature],
    rows: model.grids[model.space] && [model.grids[model.space][0] - 1, Math.floor(model.grids[model.space][0] / 2)],
  };
  for (const field of form.querySelectorAll("[data-range]")) addRange(field, ...(ranges[field.dataset.range] ?? []));
  form.elements.seed.max = Number.MAX_SAFE_INTEGER;
  fillClasses(form.elements.label, model);
  const box = form.querySelector(".decoder");
  for (const kind of model.decoders) {
    const checked = kind === model.default_decoder;
    const input = make("input", { type: "radio", name: "decoder", value: kind, checked });
    const about = make("small", { textContent: DECODERS[kind] ?? "" });
    box.append(make("label", {}, input, make("span", {}, make("b", { textContent: kind }), " ", about)));
  }
  const adapt = () => {
    form.querySelector("[data-range=steps]").hidden = !stepsOf(model, chosenDecoder(form));
    form.querySelector("[data-range=num]").classList.toggle("unused", form.elements.label.value === "all");
    form.querySelector("[data-range=cfg_scale]").classList.toggle("unused", form.elements.label.value === "none");
  };
  form.addEventListener("change", adapt);
  adapt();
  form.elements.fresh.addEventListener("click", () => {
    setNumber(form, "seed", Math.floor(Math.random() * 1_000_000));
    form.requestSubmit();
  });
}

export const classCount = (model) => (Array.isArray(model.classes) ? model.classes.length : model.classes);

export function className(model, label) {
  if (label === null || label === undefined) return "no class";
  return Array.isArray(model.classes) ? model.classes[label] : `class ${label}`;
}

function fillClasses(select, model) {
  const count = classCount(model), most = model.limits.pictures;
  const option = (value, textContent) => make("option", { value, textContent });
  const numbers = [...Array(count).keys()].map((label) => option(label, className(model, label)));
  if (select.dataset.all) {
    const which = count <= most ? "all classes" : `the first ${most} classes`;
    const all = option("all", `${which}, one image each`);
    select.append(...numbers, ...(count > 1 ? [all] : []), option("none", "none"));
  } else {
    select.append(option("none", "none"), ...numbers);
  }
}

/** The stage that `steps` sets: the prior if it takes steps, else the decoder. */
export const stepsOf = (model, decoder) => ["prior", decoder].find((stage) => model.stepped.includes(stage));

const chosenDecoder = (form) => form.elements.decoder?.value || null;

/** What the form asks for: the fields that both kinds of requests have, and `label` as chosen. */
export function readForm(form, model) {
  const number = (name) => Number(form.elements[name].value);
  const label = form.elements.label.value;
  const body = { seed: number("seed"), num: number("num"), decoder: chosenDecoder(form) };
  for (const name of SETTINGS) if (form.elements[name]) body[name] = number(name);
  if (!stepsOf(model, body.decoder)) delete body.steps;
  if (label === "none" || !model.can.guide) delete body.cfg_scale;
  return { body, label };
}

/** Set the form to what an earlier request asked for. */
export function writeForm(form, body, label) {
  for (const name of ["seed", "num", "rows", ...SETTINGS]) setNumber(form, name, body[name]);
  form.elements.label.value = label;
  for (const input of form.querySelectorAll("[name=decoder]")) input.checked = input.value === body.decoder;
  form.dispatchEvent(new Event("change"));
}
