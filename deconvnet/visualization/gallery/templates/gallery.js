// What all views share: elements, tiles, numbers, addresses, and the data that is loaded on demand.
// The address after "#" selects the view: layer=...&map=..., image=...&repaint=..., photo=...
"use strict";

const gallery = (() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const layers = new Map(data.layers.map((layer) => [layer.name, layer]));
  // What the data are called: images or recordings.
  const words = data.words;
  const Words = Object.fromEntries(Object.entries(words).map(([key, word]) => [key, word[0].toUpperCase() + word.slice(1)]));
  const METHODS = {
    generative: ["Projections", "projection", `The activation is sent down through the filters of the network, with the switches of its ${words.image}.`],
    deconv: ["Deconvnet", "deconvnet projection", "The activation is sent down through the transposed filters and the switches of max pooling; only positive signals pass a rectifier (Zeiler and Fergus 2014)."],
    guided: ["Guided", "guided backpropagation", "As for a deconvnet, but the signal is also zero wherever the forward pass was zero (Springenberg et al. 2015). This is the sharper picture. Part of it is the edges of the image: for a classifier, it hardly changes when the weights of the upper layers are random (Adebayo et al. 2018)."],
    gradient: ["Gradient", "gradient", "This is the derivative of the activation with respect to the pixels."],
  };
  const KINDS = { ...METHODS, patches: [`${Words.image} patches`, `${words.image} patch`, `A patch is the ${words.image} at the same position.`], filters: ["Filters", "filter", "A filter of this layer acts on the pixels themselves."] };
  // Below this side, in pixels, every pixel of a tile is shown as a square.
  const SHARP = 25;

  // ---- elements -------------------------------------------------------------------------------

  // Text only ever becomes text: names of images and layers may be anything.
  function element(tag, attributes, ...children) {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes || {})) {
      if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
      else if (value === true) made.setAttribute(name, "");
      else if (value !== false && value !== null && value !== undefined) made.setAttribute(name, value);
    }
    made.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined));
    return made;
  }

  function svg(tag, attributes, ...children) {
    const made = document.createElementNS(document.querySelector(".flow svg").namespaceURI, tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    made.append(...children);
    return made;
  }

  // A rectangle of a sheet as the background of an element that has its shape, at any size.
  function showCell(made, sheet, cell, height, width) {
    const whole = [sheet.columns * (sheet.width + data.gap) - data.gap, sheet.rows * (sheet.height + data.gap) - data.gap];
    const corner = [
      (cell % sheet.columns) * (sheet.width + data.gap) + Math.floor((sheet.width - width) / 2),
      Math.floor(cell / sheet.columns) * (sheet.height + data.gap) + Math.floor((sheet.height - height) / 2),
    ];
    const side = [width, height];
    made.style.aspectRatio = `${width} / ${height}`;
    made.style.backgroundImage = `url("${sheet.file}")`;
    made.style.backgroundSize = whole.map((all, axis) => `${(100 * all) / side[axis]}%`).join(" ");
    made.style.backgroundPosition = whole.map((all, axis) =>
      `${all > side[axis] ? (100 * corner[axis]) / (all - side[axis]) : 0}%`).join(" ");
  }

  // One tile of a sheet, as wide as its parent; hatched if the sheet does not have it. Projections
  // are stored with little contrast; which one they need depends on how large they are shown.
  function tile(sheet, index, label, isFull = false) {
    const made = element("span", { class: "tile", role: "img", "aria-label": label });
    if (!sheet || index >= sheet.count || (sheet.empty || []).includes(index)) {
      made.classList.add("none");
      made.setAttribute("aria-label", `${label}: none`);
      made.style.aspectRatio = sheet ? `${sheet.width} / ${sheet.height}` : "1";
      return made;
    }
    const page = sheet.pages ? { ...sheet, file: sheet.pages[Math.floor(index / sheet.per_page)] } : sheet;
    showCell(made, page, sheet.first + (sheet.pages ? index % sheet.per_page : index), sheet.height, sheet.width);
    if (Math.max(sheet.width, sheet.height) < SHARP) made.classList.add("sharp");
    if (sheet.contrast) made.style.filter = `contrast(${sheet.contrast[index][Number(isFull)]})`;
    return made;
  }

  // The photograph of an example with the window of its tiles framed; null if there is none.
  function photograph(example) {
    const shown = thumbnail(example);
    if (!shown) return null;
    const hot = heat(example);
    return element("span", { class: hot ? "framed hot" : "framed" }, shown, hot, frame(example.window || example.box, pixelsOf(example)));
  }

  // Where a map is active, over the photograph of an example: clear where it is zero, then red,
  // orange and, at its strongest activation of all, nearly white.
  function heat(example) {
    const found = example.heat;
    if (!found || !data.photographs || !data.photographs.images[example.photograph]) return null;
    const canvas = element("canvas", { width: found.columns, height: found.rows });
    const picture = new ImageData(found.columns, found.rows);
    const values = atob(found.values);
    for (let n = 0; n < values.length; n += 1) {
      const share = values.charCodeAt(n) / 255;
      picture.data.set([180 + 75 * Math.min(1, 3 * share), 250 * share ** 0.9, 200 * share ** 3, 235 * Math.min(1, 1.6 * share) ** 0.8], 4 * n);
    }
    canvas.getContext("2d").putImageData(picture, 0, 0);
    const over = placed(canvas, found.box, pixelsOf(example));
    over.classList.replace("frame", "heat");
    over.setAttribute("aria-hidden", "true");
    return over;
  }

  function thumbnail(example) {
    const all = data.photographs;
    const found = all && all.images[example.photograph];
    if (!found) return null;
    const [name, , [height, width]] = found;
    const sheet = all.sheets[Math.floor(example.photograph / all.per_sheet)];
    const shown = element("span", { class: "tile", role: "img", "aria-label": `${name}${example.window ? `, framed at ${place(example)}` : ""}` });
    showCell(shown, sheet, example.photograph % all.per_sheet, height, width);
    return shown;
  }

  // The rows and columns of the photograph of an example.
  function pixelsOf(example) {
    return data.photographs.images[example.photograph][1];
  }

  // The photograph of an example in its own size; its thumbnail below it until it is loaded.
  function wholePhotograph(example) {
    const shown = thumbnail(example);
    const file = shown && data.photographs.images[example.photograph][4];
    if (file) overlay(shown, { ...file, columns: 1, rows: 1 }, 0);
    return shown;
  }

  function fullTile(sheet, index, label) {
    return tile(sheet, index, label, true);
  }

  function overlay(made, sheet, cell) {
    const over = element("span", { class: "tile whole-size" });
    showCell(over, sheet, cell, sheet.height, sheet.width);
    over.style.aspectRatio = "auto";
    made.append(over);
  }

  // An element in a frame of [rows, columns], at a box (top, left, bottom, right) in it; what
  // reaches beyond the frame is cut off.
  function placed(inner, box, [rows, columns], ...below) {
    const shares = { top: box[0] / rows, left: box[1] / columns, height: (box[2] - box[0]) / rows, width: (box[3] - box[1]) / columns };
    for (const [name, share] of Object.entries(shares)) inner.style[name] = `${100 * share}%`;
    inner.classList.add("placed");
    const made = element("span", { class: "frame" }, ...below, inner);
    made.style.aspectRatio = `${columns} / ${rows}`;
    return made;
  }

  function frame(box, [rows, columns]) {
    if (!box) return null;
    const limit = (n, most) => Math.max(0, Math.min(n, most));
    const [top, bottom] = [limit(box[0], rows), limit(box[2], rows)];
    const [left, right] = [limit(box[1], columns), limit(box[3], columns)];
    const made = element("span", { class: "box" });
    const percent = { top: top / rows, left: left / columns, height: (bottom - top) / rows, width: (right - left) / columns };
    for (const [name, share] of Object.entries(percent)) made.style[name] = `${100 * share}%`;
    return made;
  }

  function facts(pairs, kind) {
    return element("dl", { class: kind }, pairs.map(([name, value]) =>
      element("div", {}, element("dt", {}, name), element("dd", {}, value))));
  }

  // ---- words ----------------------------------------------------------------------------------

  function number(value) {
    if (value === null || value === undefined) return "–";
    if (typeof value !== "number") return value;
    const size = Math.abs(value);
    const text = Number.isInteger(value) ? String(value) : size >= 1000 && size < 1e6 ? value.toFixed(0)
      : String(Number(value.toPrecision(3)));
    return text.replace("-", "−");
  }

  // Where an example lies, in pixels of its image.
  function place(example) {
    const box = example.window || example.box;
    if (!box) return "";
    const columns = `${Math.max(0, box[1])}–${box[3]}`;
    return words.image === "image" ? `rows ${Math.max(0, box[0])}–${box[2]}, columns ${columns}` : `times ${columns}`;
  }

  function sentence(example) {
    const where = place(example);
    return `${number(example.value)} in ${example.image}${where ? `, ${where}` : ""}${example.border ? ", at the border" : ""}`;
  }

  function mapName(layer, index) {
    const label = layer.labels[index];
    return label ? `${words.map} ${layer.maps[index]}, ${label}` : `${words.map} ${layer.maps[index]}`;
  }

  // ---- addresses ------------------------------------------------------------------------------

  function address(hash = location.hash) {
    const at = Object.fromEntries(new URLSearchParams(hash.slice(1)));
    for (const key of ["map", "image", "photo"]) if (at[key] !== undefined) at[key] = Number(at[key]);
    at.show = at.show ? at.show.split(",") : [];
    return at;
  }

  // The choice of pictures and their order are kept in the addresses of the maps of a layer.
  function link(at) {
    const parts = [];
    for (const key of ["layer", "map", "image", "photo", "repaint", "sort"]) {
      if (at[key] !== undefined && at[key] !== "") parts.push(`${key}=${encodeURIComponent(at[key])}`);
    }
    if (at.show && at.show.length) parts.push(`show=${at.show.map(encodeURIComponent).join(",")}`);
    return `#${parts.join("&")}`;
  }

  // The tiles that stand for a map where there is room for one only.
  function face(layer) {
    return layer.sheets.guided || layer.sheets[layer.methods[0]] || layer.sheets.filters;
  }

  // A link to a map with its tile from the wall; text: below the tile.
  function mapTile(layer, map, text) {
    const index = layer.maps.indexOf(map);
    if (index < 0) return element("span", { class: "card" }, tile(null, 0, `${words.map} ${map}`), element("span", { class: "number" }, text || `${words.map} ${map}`));
    return element("a", { class: "card", href: link({ layer: layer.name, map }), title: mapName(layer, index) },
      tile(face(layer), index, `${layer.title}, ${mapName(layer, index)}`),
      element("span", { class: "number" }, text || mapName(layer, index)));
  }

  // The control of a layer, whichever map is shown: the maps of the two networks do not correspond.
  function controlStrip(layer, most) {
    const control = layer.control;
    if (!control) return null;
    const alive = control.maps.filter(([, , count]) => count);
    const dead = control.maps.filter(([, , count]) => !count).map(([map]) => map);
    const each = Math.max(1, Math.floor(most / Math.max(1, alive.length)));
    const tiles = alive.slice(0, most).flatMap(([map, first, count]) => [...Array(Math.min(count, each)).keys()].map((n) =>
      element("li", {}, tile(control.sheet, first + n, `control, ${words.map} ${map}`), element("span", { class: "number" }, `control, ${words.map} ${map}`))));
    const said = dead.length ? ` ${dead.length === 1 ? Words.map : Words.maps} ${dead.join(", ")}: dead in the control, that is, never active there.` : "";
    return element("section", { class: "control", "aria-labelledby": "control" },
      element("h2", { id: "control" }, "The control: this layer with shuffled weights"),
      element("p", { class: "note" }, `Some of its ${words.maps}, searched and projected in the same way. What looks like this comes from the ${words.images} and the architecture, not from learning.${said}`),
      tiles.length ? element("ul", { class: "row", role: "list" }, tiles) : null);
  }

  // ---- data of layers and images, loaded on demand ----------------------------------------------

  const loaded = new Map();
  const waiting = new Map();

  function add(file, content) {
    loaded.set(file, content);
  }

  function load(file) {
    if (loaded.has(file)) return Promise.resolve(loaded.get(file));
    if (!waiting.has(file)) {
      waiting.set(file, new Promise((resolve, reject) => {
        const script = element("script", { src: file });
        script.onload = () => resolve(loaded.get(file));
        script.onerror = () => {
          waiting.delete(file);
          reject(new Error(`${file} is missing: copy the whole folder of the gallery`));
        };
        document.head.append(script);
      }));
    }
    return waiting.get(file);
  }

  // The data of a layer, of which `maps` holds those that lie in the same script as one of them.
  async function features(layer, index) {
    const part = Math.floor(index / layer.per_script);
    const found = await load(layer.scripts[part]);
    return { ...found, at: (other) => found.maps[other - part * layer.per_script] };
  }

  // The data of all maps of a layer.
  async function allFeatures(layer) {
    const parts = await Promise.all(layer.scripts.map(load));
    return { ...parts[0], maps: parts.flatMap((part) => part.maps) };
  }

  return { data, words, Words, layers, METHODS, KINDS, element, svg, tile, photograph, heat, wholePhotograph, pixelsOf, fullTile, placed, frame, facts, number, place, sentence, mapName, address, link, mapTile, controlStrip, add, load, features, allFeatures, views: {} };
})();
