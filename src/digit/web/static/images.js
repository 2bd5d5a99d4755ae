// Images in the browser: tokens as colours, grids, files to download, and the viewer.

import { make } from "./dom.js";

export const dataUrl = (png) => `data:image/png;base64,${png}`;

/** One colour per token: hues by the golden ratio, so that near ids look different. As digit.core.grids. */
export function tokenColor(id) {
  const hue = ((id * 0.618033988749895) % 1) * 6;
  const saturation = 0.45 + 0.25 * (Math.floor(id / 7) % 3);
  const value = 0.65 + (0.35 * (Math.floor(id / 3) % 4)) / 3;
  const channel = (shift) => {
    const k = (shift + hue) % 6;
    return Math.round(255 * (value - value * saturation * Math.max(0, Math.min(k, 4 - k, 1))));
  };
  return [channel(5), channel(3), channel(1)];
}

/** Tokens as a canvas with one pixel per token; where `shown` is false, or a token is -1, it is transparent. */
export function tokenCanvas(tokens, [rows, columns], shown = () => true) {
  const canvas = make("canvas", { width: columns, height: rows, className: "pixels open" });
  const context = canvas.getContext("2d");
  const pixels = context.createImageData(columns, rows);
  tokens.forEach((token, place) => {
    if (token >= 0 && shown(place)) pixels.data.set([...tokenColor(token), 255], place * 4);
  });
  context.putImageData(pixels, 0, 0);
  return canvas;
}

async function load(url) {
  const image = make("img", { src: url });
  await image.decode();
  return image;
}

/** Images side by side on white, as `digit generate` writes grid.png. */
async function gridUrl(urls) {
  const images = await Promise.all(urls.map(load));
  const columns = Math.min(8, images.length), side = images[0].naturalWidth;
  const scale = Math.max(1, Math.ceil(96 / side)), gap = 2, step = side * scale + gap;
  const rows = Math.ceil(images.length / columns);
  const canvas = make("canvas", { width: columns * step - gap, height: rows * step - gap });
  const context = canvas.getContext("2d");
  context.fillStyle = "white";
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.imageSmoothingEnabled = false;
  images.forEach((image, place) => {
    context.drawImage(image, (place % columns) * step, Math.floor(place / columns) * step, side * scale, side * scale);
  });
  return canvas.toDataURL();
}

function save(url, name) {
  make("a", { href: url, download: name }).click();
}

export async function saveGrid(items) {
  save(await gridUrl(items.map((item) => item.url)), "grid.png");
}

/** All images in one ZIP file, without compression: PNG files are compressed already. */
export function saveAll(items) {
  const text = new TextEncoder(), parts = [], directory = [];
  let offset = 0;
  for (const { url, file } of items) {
    const name = text.encode(file), data = Uint8Array.from(atob(url.split(",")[1]), (c) => c.charCodeAt(0));
    // version, flags, method, time, date (1980-01-01), checksum, sizes, lengths of name and extra field
    const about = [
      [20, 2], [0, 2], [0, 2], [0, 2], [33, 2], [crc32(data), 4], [data.length, 4], [data.length, 4],
      [name.length, 2], [0, 2],
    ];
    const local = bytes([[0x04034b50, 4], ...about]);
    parts.push(local, name, data);
    directory.push(bytes([[0x02014b50, 4], [20, 2], ...about, [0, 2], [0, 2], [0, 2], [0, 4], [offset, 4]]), name);
    offset += local.length + name.length + data.length;
  }
  const size = directory.reduce((sum, part) => sum + part.length, 0);
  const count = [items.length, 2];
  const end = bytes([[0x06054b50, 4], [0, 2], [0, 2], count, count, [size, 4], [offset, 4], [0, 2]]);
  const url = URL.createObjectURL(new Blob([...parts, ...directory, end], { type: "application/zip" }));
  save(url, "images.zip");
  setTimeout(() => URL.revokeObjectURL(url), 60_000);
}

/** Numbers as little-endian bytes: [[value, how many bytes], ...]. */
function bytes(fields) {
  const split = (value, count) => Array.from({ length: count }, (_, i) => (value >>> (8 * i)) & 255);
  return Uint8Array.from(fields.flatMap(([value, count]) => split(value, count)));
}

function crc32(data) {
  let sum = -1;
  for (const byte of data) {
    sum ^= byte;
    for (let bit = 0; bit < 8; bit += 1) sum = (sum >>> 1) ^ (sum & 1 ? 0xedb88320 : 0);
  }
  return ~sum >>> 0;
}

// ---- the viewer

const viewer = document.getElementById("viewer");
let shown = { items: [], place: 0 };

/** Show one of several images, {url, about, file}, enlarged. */
export function enlarge(items, place) {
  shown = { items, place };
  const { url, about } = items[place];
  Object.assign(viewer.querySelector("img"), { src: url, alt: about });
  viewer.querySelector("p").textContent = about;
  for (const name of ["previous", "next"]) viewer.querySelector(`[name=${name}]`).hidden = items.length < 2;
  if (!viewer.open) viewer.showModal();
}

function turn(step) {
  const count = shown.items.length;
  enlarge(shown.items, (shown.place + step + count) % count);
}

async function saveEnlarged() {
  const { url, file } = shown.items[shown.place];
  const image = await load(url), scale = Math.max(1, Math.ceil(512 / image.naturalWidth));
  const canvas = make("canvas", { width: image.naturalWidth * scale, height: image.naturalHeight * scale });
  const context = canvas.getContext("2d");
  context.imageSmoothingEnabled = viewer.querySelector("[name=smooth]").checked;
  context.imageSmoothingQuality = "high";
  context.drawImage(image, 0, 0, canvas.width, canvas.height);
  save(canvas.toDataURL(), file.replace(/\.png$/, `-x${scale}.png`));
}

viewer.addEventListener("click", ({ target }) => {
  const act = { previous: () => turn(-1), next: () => turn(1), save: saveEnlarged, close: () => viewer.close() };
  if (target === viewer) viewer.close();
  else act[target.name]?.();
});
viewer.addEventListener("change", ({ target }) => {
  viewer.querySelector("img").classList.toggle("smooth", target.checked);
});
viewer.addEventListener("keydown", ({ key }) => {
  if (key === "ArrowLeft") turn(-1);
  if (key === "ArrowRight") turn(1);
});
