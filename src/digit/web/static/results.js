// The right side of the Generate and the Edit tab: progress, finished images, and the history of earlier ones.

import { postWithProgress, get } from "./api.js";
import { make, notice } from "./dom.js";
import { className, stepsOf, writeForm } from "./form.js";
import { dataUrl, enlarge, saveAll, saveGrid, tokenCanvas } from "./images.js";

const HISTORY = 48; // images that are kept until the page is closed
const KINDS = { semantic: "Semantic tokens", vq: "VQ tokens" };

/**
 * Runs one request at a time and shows what comes of it.
 * `send(tab, url)` takes an image to another tab; `title` is how captions call images, instead of by their class.
 */
export function results(panel, model, send, title = null) {
  const form = panel.querySelector("form"), stage = panel.querySelector(".stage");
  const history = panel.querySelector(".history");
  const stop = form.elements.stop, past = make("div");
  let running = null;

  const clear = make("button", { type: "button", textContent: "Clear history" });
  clear.addEventListener("click", () => { past.replaceChildren(); history.hidden = true; });
  history.append(make("h2", { textContent: "Earlier images" }), clear, past);
  stop.addEventListener("click", () => running?.abort());

  function keep() {
    const done = stage.querySelector(".done");
    if (!done) return;
    past.prepend(done);
    while (past.querySelectorAll("figure").length > HISTORY && past.children.length > 1) past.lastChild.remove();
    history.hidden = false;
  }

  async function run(path, body, label) {
    running?.abort();
    const mine = new AbortController();
    running = mine;
    keep();
    stage.replaceChildren(notice("Starting."));
    stop.disabled = false;
    if (stage.getBoundingClientRect().top > innerHeight * 0.7) stage.scrollIntoView();
    let begun = false;
    get("/health").then(({ waiting }) => {
      if (begun || waiting <= 1 || running !== mine) return;
      stage.replaceChildren(notice(`Waiting: ${waiting - 1} before you.`));
    }, () => {});
    try {
      const made = await postWithProgress(path, body, mine.signal, (progress) => {
        begun = true;
        if (running === mine) stage.replaceChildren(filling(progress, model));
      });
      if (running === mine) stage.replaceChildren(finished(made, body, label));
    } catch (error) {
      const stopped = error.name === "AbortError";
      if (running === mine) stage.replaceChildren(stopped ? notice("Stopped.") : notice(error.message, true));
    } finally {
      if (running === mine) {
        running = null;
        stop.disabled = true;
      }
    }
  }

  function finished(made, body, label) {
    const how = describe(made, model);
    const items = made.pictures.map((png, number) => {
      const name = title ?? className(model, made.labels[number]), which = `seed ${body.seed}, no. ${number}`;
      const file = `${name} ${which}`.replace(/[^\p{L}\p{N}]+/gu, "-");
      return { url: dataUrl(png), about: `${name}, ${which}; ${how}`, lines: [which, how], name, file: `${file}.png` };
    });
    const space = made.semantic ? "semantic" : "vq";
    const figures = items.map((item, number) => {
      const tokens = made[space] && tokenCanvas(made[space][number], model.grids[space]);
      if (tokens) tokens.title = KINDS[space];
      tokens?.classList.add("small");
      return make(
        "figure", { dataset: { label: made.labels[number] ?? -1, seed: body.seed } },
        zoomable(items, number),
        make("figcaption", {}, ...(tokens ? [tokens] : []), make("span", {}, item.name, ...item.lines.map(small))),
        buttons(
          make("a", { href: item.url, download: item.file, textContent: "Download" }),
          press("Tokens", () => send("tokens", item.url)),
          model.can.edit ? press("Edit", () => send("edit", item.url)) : null,
        ),
      );
    });
    const all = buttons(
      press("Use these settings", () => { writeForm(form, body, label); form.scrollIntoView({ block: "nearest" }); }),
      items.length > 1 ? press("Download all", () => saveAll(items)) : null,
      items.length > 1 ? press("Download grid", () => saveGrid(items)) : null,
    );
    return make("section", { className: "done" }, all, make("div", { className: "images" }, ...figures));
  }

  const say = (text) => { keep(); stage.replaceChildren(notice(text)); };
  return { run, say, fail: (text) => stage.replaceChildren(notice(text, true)) };
}

/** Guidance, decoder and steps, as a caption names them. */
function describe(made, model) {
  const guidance = made.settings.prior?.cfg_scale ?? 1;
  const stage = stepsOf(model, made.decoder);
  return [
    guidance === 1 ? "no guidance" : `guidance ${guidance}`,
    made.decoder,
    stage && `${stage === "prior" ? "prior " : ""}${made.settings[stage].steps} steps`,
  ].filter(Boolean).join(", ");
}

const buttons = (...children) => make("div", { className: "buttons" }, ...children);

const small = (textContent) => make("small", { textContent });

function press(text, act) {
  const made = make("button", { type: "button", textContent: text });
  made.addEventListener("click", act);
  return made;
}

/** An image that enlarges when it is pressed. */
export function zoomable(items, number) {
  const made = press("", () => enlarge(items, number));
  made.className = "zoom";
  made.title = "Enlarge";
  made.append(make("img", { src: items[number].url, alt: items[number].about, className: "pixels" }));
  return made;
}

/** Grids that fill while tokens are sampled. */
function filling({ stage, space, done, total, tokens }, model) {
  const unit = model.stepped.includes(stage) ? "step" : "token";
  const bar = make("progress", { max: total, value: done });
  bar.setAttribute("aria-label", KINDS[space]);
  const open = tokens[0].filter((token) => token < 0).length;
  const grids = tokens.map((row) => make("figure", {}, tokenCanvas(row, model.grids[space])));
  return make(
    "section", { className: "filling", dataset: { stage, open } },
    notice(`${KINDS[space]}: ${unit} ${done} of ${total}`), bar, make("div", { className: "images" }, ...grids),
  );
}
