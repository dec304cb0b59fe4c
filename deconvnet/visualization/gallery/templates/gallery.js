// The behaviour of the gallery. The address after "#" selects the view: layer=...&map=..., image=...
"use strict";

const gallery = (() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const layers = new Map(data.layers.map((layer) => [layer.name, layer]));
  const view = document.getElementById("view");
  const overview = document.getElementById("overview");
  const zoom = document.getElementById("zoom");
  const KINDS = [
    ["projections", "projection", "Projections"],
    ["patches", "image patch", "Image patches"],
    ["control", "shuffled weights", "Shuffled weights"],
    ["filters", "filter", "Filters"],
  ];
  const SIZES = [48, 200];
  let size = innerWidth < 500 ? 72 : 84;
  let found = "";
  let overviewScroll = 0;

  // ---- elements -------------------------------------------------------------------------------

  // Text only ever becomes text: names of images and layers may be anything.
  function element(tag, attributes, ...children) {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes || {})) {
      if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
      else if (value === true) made.setAttribute(name, "");
      else if (value !== false && value !== null && value !== undefined) made.setAttribute(name, value);
    }
    made.append(...children.flat().filter((child) => child !== null && child !== undefined));
    return made;
  }

  function svg(tag, attributes, ...children) {
    const made = document.createElementNS(document.querySelector(".flow svg").namespaceURI, tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    made.append(...children);
    return made;
  }

  // The width of a tile on the screen: a whole number of screen pixels for each of its own, or reduced.
  function fitted(width, target, room) {
    const ratio = window.devicePixelRatio || 1;
    if (width > room) return room;
    const most = Math.max(1, Math.floor((room * ratio) / width));
    return (width * Math.min(most, Math.max(1, Math.round((target * ratio) / width)))) / ratio;
  }

  // One tile of a sheet, `width` pixels wide; hatched if the sheet does not have it.
  function tile(sheet, index, label, width) {
    const made = element("span", { class: "tile", role: "img", "aria-label": label });
    made.style.width = `${width}px`;
    if (!sheet || index >= sheet.count || (sheet.empty || []).includes(index)) {
      made.classList.add("none");
      made.setAttribute("aria-label", `${label}: none`);
      made.style.aspectRatio = sheet ? `${sheet.width} / ${sheet.height}` : "1";
      return made;
    }
    const rows = Math.ceil(sheet.count / sheet.columns);
    const whole = [sheet.columns * (sheet.width + data.gap) - data.gap, rows * (sheet.height + data.gap) - data.gap];
    const side = [sheet.width, sheet.height];
    const place = [index % sheet.columns, Math.floor(index / sheet.columns)];
    const percent = place.map((n, axis) =>
      whole[axis] > side[axis] ? (100 * n * (side[axis] + data.gap)) / (whole[axis] - side[axis]) : 0);
    made.style.aspectRatio = `${sheet.width} / ${sheet.height}`;
    made.style.backgroundImage = `url("${sheet.file}")`;
    made.style.backgroundSize = whole.map((w, axis) => `${(100 * w) / side[axis]}%`).join(" ");
    made.style.backgroundPosition = percent.map((p) => `${p}%`).join(" ");
    if (width < sheet.width) made.classList.add("shrunk");
    return made;
  }

  function facts(pairs, kind) {
    return element("dl", { class: kind }, pairs.map(([name, value]) =>
      element("div", {}, element("dt", {}, name), element("dd", {}, value))));
  }

  function room() {
    return document.getElementById("main").clientWidth - 32;
  }

  // ---- addresses ------------------------------------------------------------------------------

  function address(hash = location.hash) {
    const at = Object.fromEntries(new URLSearchParams(hash.slice(1)));
    if (at.map !== undefined) at.map = Number(at.map);
    if (at.image !== undefined) at.image = Number(at.image);
    at.show = (at.show || "projections").split(",");
    return at;
  }

  // The choice of pictures and their order are kept in the addresses of the maps of a layer.
  function link(at) {
    const parts = [];
    for (const key of ["layer", "map", "image", "sort"]) {
      if (at[key] !== undefined && at[key] !== "") parts.push(`${key}=${encodeURIComponent(at[key])}`);
    }
    if (at.show && at.show.join() !== "projections") parts.push(`show=${at.show.map(encodeURIComponent).join(",")}`);
    return `#${parts.join("&")}`;
  }

  function up(at) {
    if (at.map !== undefined) return link({ ...at, map: undefined });
    return "#";
  }

  // The indices of the maps of a layer, sorted: "density" or, reversed, "-density".
  function order(layer, sort) {
    const indices = layer.maps.map((_, index) => index);
    const backwards = (sort || "").startsWith("-");
    const key = layer.sort.find((each) => each.name === (sort || "").slice(backwards ? 1 : 0));
    const byNumber = (a, b) => layer.maps[a] - layer.maps[b];
    if (!key) return sort === "-number" ? indices.sort(byNumber).reverse() : indices.sort(byNumber);
    const sign = backwards ? -1 : 1;
    return indices.sort((a, b) => {
      const [x, y] = [key.values[a], key.values[b]];
      if (x === null || y === null) return (x === null) - (y === null) || byNumber(a, b);
      return sign * (y - x) || byNumber(a, b);
    });
  }

  // ---- data of maps and images, loaded on demand ----------------------------------------------

  const loaded = new Map();
  const waiting = new Map();

  function add(place, content) {
    loaded.set(place, content);
  }

  function load(file) {
    const place = file.slice(0, file.lastIndexOf("/"));
    if (loaded.has(place)) return Promise.resolve(loaded.get(place));
    if (!waiting.has(file)) {
      waiting.set(file, new Promise((resolve, reject) => {
        const script = element("script", { src: file });
        script.onload = () => resolve(loaded.get(place));
        script.onerror = () => {
          waiting.delete(file);
          reject(new Error(`${file} is missing: copy the whole folder of the gallery`));
        };
        document.head.append(script);
      }));
    }
    return waiting.get(file);
  }

  // ---- a layer --------------------------------------------------------------------------------

  function layerView(layer, at) {
    const kinds = KINDS.filter(([kind]) => layer.sheets[kind]);
    const chosen = kinds.filter(([kind]) => at.show.includes(kind));
    const shown = chosen.length ? chosen : kinds.slice(0, 1);
    const grid = element("ul", { class: "grid", role: "list", "aria-label": `Maps of ${layer.title}` });
    const count = element("output", { "aria-live": "polite" });

    function fill() {
      const wanted = found.trim();
      const sorted = order(layer, at.sort).filter((index) => String(layer.maps[index]).startsWith(wanted));
      const key = layer.sort.find((each) => each.name === (at.sort || "").replace(/^-/, ""));
      const width = Math.max(...shown.map(([kind]) => fitted(layer.sheets[kind].width, size, (room() - 8) / shown.length)));
      grid.style.setProperty("--cell", `${shown.length * width + 2 * (shown.length - 1)}px`);
      grid.style.setProperty("--between", shown.length > 1 ? "14px" : "4px");
      grid.replaceChildren(...sorted.map((index, position) => {
        const number = layer.maps[index];
        const value = key && key.values[index] !== null ? ` · ${Number(key.values[index].toPrecision(3))}` : "";
        return element("li", {}, element("a",
          { href: link({ ...at, map: number }), tabindex: position ? -1 : 0, "data-map": number, "aria-label": `Map ${number}${value}` },
          element("span", { class: "tiles" }, shown.map(([kind, name]) =>
            tile(layer.sheets[kind], index, `map ${number}, ${name}`, width))),
          element("span", { class: "number" }, `${number}${value}`)));
      }));
      count.textContent = sorted.length === layer.maps.length ? "" : `${sorted.length} of ${layer.maps.length}`;
    }

    const names = ["number", ...layer.sort.map((each) => each.name)];
    const backwards = (at.sort || "").startsWith("-");
    const current = backwards ? at.sort.slice(1) : at.sort || "number";
    const go = (sort) => location.replace(link({ ...at, sort: sort === "number" ? undefined : sort }));
    const tools = element("form", { class: "tools", "aria-label": "Choice and order of the maps", onsubmit: open },
      element("fieldset", {}, element("legend", {}, "Show"), kinds.map(([kind, , title]) => {
        const on = shown.some(([other]) => other === kind);
        return element("button", {
          type: "button", "aria-pressed": String(on), "data-key": `show-${kind}`,
          disabled: on && shown.length === 1,
          onclick: () => {
            const kept = kinds.map(([other]) => other).filter((other) => (other === kind ? !on : shown.some(([s]) => s === other)));
            location.replace(link({ ...at, show: kept }));
          },
        }, title);
      })),
      element("label", {}, "Sort by ", element("select", { "data-key": "sort", onchange: (event) => go(event.target.value) },
        names.map((name) => element("option", { value: name, selected: name === current }, name)))),
      element("button", { type: "button", "data-key": "turn", "aria-pressed": String(backwards), "aria-label": "Reverse the order",
        title: "Reverse the order", onclick: () => go(backwards ? current : `-${current}`) }, "⇅"),
      element("label", {}, "Map ", element("input", { type: "search", inputmode: "numeric", size: 5, value: found, placeholder: "number",
        "data-key": "search", oninput: (event) => { found = event.target.value; fill(); } })),
      element("label", {}, "Size ", element("input", { type: "range", min: SIZES[0], max: SIZES[1], value: size,
        "data-key": "size", oninput: (event) => { size = Number(event.target.value); fill(); } })),
      count);

    function open(event) {
      event.preventDefault();
      const first = grid.querySelector("a");
      if (first) location.hash = first.getAttribute("href");
    }

    fill();
    grid.addEventListener("keydown", moveInGrid);
    const place = data.layers.indexOf(layer);
    return {
      title: layer.title,
      path: [[layer.title, link({ ...at, map: undefined })]],
      before: neighbour(data.layers[place - 1], (other) => [link({ layer: other.name, show: at.show }), other.title]),
      after: neighbour(data.layers[place + 1], (other) => [link({ layer: other.name, show: at.show }), other.title]),
      content: [facts(layer.facts, "facts"), tools, controlNote(shown, layer), grid],
    };
  }

  function controlNote(shown, layer) {
    if (shown.some(([kind]) => kind === "control")) {
      return element("p", { class: "note" }, "Shuffled weights: the same pictures for the same network with its weights in random order. What looks alike in both comes from the image and the architecture, not from learning.");
    }
    if (layer.sheets.control) {
      return element("p", { class: "note" }, "Each tile is the strongest activation of a map. Grey is zero, and each tile has its own contrast. Compare with “Shuffled weights”.");
    }
    return element("p", { class: "note" }, "Each tile is the strongest activation of a map. Grey is zero, and each tile has its own contrast.");
  }

  function neighbour(other, describe) {
    return other === undefined ? null : describe(other);
  }

  // Arrow keys move the focus in a grid of links; Tab reaches one of them at a time.
  function moveInGrid(event) {
    const links = [...event.currentTarget.querySelectorAll("a")];
    const here = links.indexOf(document.activeElement);
    if (here < 0 || event.altKey || event.ctrlKey || event.metaKey) return;
    const top = links[0].getBoundingClientRect().top;
    let columns = links.findIndex((each) => each.getBoundingClientRect().top > top + 1);
    if (columns < 0) columns = links.length;
    const steps = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns, Home: -here, End: links.length - 1 - here };
    if (!(event.key in steps)) return;
    event.preventDefault();
    const there = here + steps[event.key];
    if (there < 0 || there >= links.length) return;
    links[here].tabIndex = -1;
    links[there].tabIndex = 0;
    links[there].focus();
  }

  // ---- a map ----------------------------------------------------------------------------------

  async function mapView(layer, at) {
    const index = layer.maps.indexOf(at.map);
    if (index < 0) throw new Error(`${layer.title} has no map ${at.map} in this gallery`);
    const map = (await load(layer.script))[index];
    const sorted = order(layer, at.sort);
    const position = sorted.indexOf(index);
    const at2 = (other) => [link({ ...at, map: layer.maps[other] }), `map ${layer.maps[other]}`];
    const where = map.captions;
    const line = element("p", { class: "line" }, where.length ? "Point at a tile to see where it comes from; click to enlarge it." : "");

    function light(rank) {
      for (const each of view.querySelectorAll("[data-rank]")) each.classList.toggle("lit", Number(each.dataset.rank) === rank);
      if (rank !== null && where[rank]) line.textContent = `${rank + 1}. ${sentence(where[rank])}`;
    }

    // Strongest first, in squares; as many panels side by side as there is room for.
    const kinds = KINDS.filter(([kind]) => map.sheets[kind]);
    const columns = (count) => (count <= 3 ? count : Math.ceil(Math.sqrt(count)));
    const most = Math.max(1, ...kinds.map(([kind]) => columns(map.sheets[kind].count)));
    const filters = layer.sheets.filters;
    const filtered = filters && !(filters.empty || []).includes(index);
    const space = room() - (filtered && room() > 700 ? 132 : 0);
    let beside = Math.max(1, kinds.length);
    const fits = () => Math.floor((space + 28) / beside - 28 - 4 * (most - 1)) / most;
    while (beside > 1 && fits() < 72) beside--;
    const side = Math.min(168, fits());

    const panels = kinds.map(([kind, name, title]) => {
      const sheet = map.sheets[kind];
      const width = fitted(sheet.width, side, side);
      const box = element("div", { class: "square" });
      box.style.gridTemplateColumns = `repeat(${columns(sheet.count)}, minmax(0, ${width}px))`;
      for (let rank = 0; rank < sheet.count; rank++) {
        const said = kind !== "control" && where[rank];
        const label = `${name} ${rank + 1}${said ? `: ${sentence(said)}` : ""}`;
        const lit = said ? rank : null;
        box.append(element("button", {
          type: "button", class: "plain", "data-rank": lit, "data-key": `${kind}-${rank}`,
          onclick: () => enlarge(map, rank), onfocus: () => light(lit), onblur: () => light(null),
          onmouseenter: () => light(lit), onmouseleave: () => light(null),
        }, tile(sheet, rank, `${label}, enlarge`, width)));
      }
      return element("figure", { class: "panel" }, element("figcaption", {}, title), box);
    });
    if (!panels.length) panels.push(element("p", { class: "notice" }, "This map is never active on these images, so there is nothing to project."));
    if (filtered) {
      panels.unshift(element("figure", { class: "panel" }, element("figcaption", {}, "Filter"),
        tile(filters, index, `filter of map ${at.map}`, fitted(filters.width, 104, 104))));
    }

    const rest = [];
    if (map.sheets.evolution) {
      const sheet = map.sheets.evolution;
      const width = fitted(sheet.width, 72, 120);
      rest.push(element("section", { "aria-labelledby": "evolution" }, element("h2", { id: "evolution" }, "During training"),
        element("ol", { class: "strip" }, map.epochs.map((epoch, n) =>
          element("li", {}, tile(sheet, n, `epoch ${epoch}`, width), element("span", { class: "number" }, epoch)))),
        element("p", { class: "note" }, "Each tile is the strongest activation after that epoch; its image may differ from that of the tile before.")));
    }
    if (where.length) {
      const images = new Map();
      data.images.forEach((image, n) => images.set(image.name, images.has(image.name) ? null : n + 1));
      rest.push(element("section", { "aria-labelledby": "activations" }, element("h2", { id: "activations" }, "The activations"),
        element("div", { class: "scroll" }, element("table", {},
          element("thead", {}, element("tr", {}, ["rank", "value", "image", "position"].map((name) => element("th", { scope: "col" }, name)))),
          element("tbody", {}, where.map(([image, value, place], rank) =>
            element("tr", { "data-rank": rank, onmouseenter: () => light(rank), onmouseleave: () => light(null) },
              element("th", { scope: "row" }, rank + 1), element("td", {}, value),
              element("td", {}, images.get(image) ? element("a", { href: link({ image: images.get(image) }) }, image) : image),
              element("td", {}, place))))))));
    }
    // The neighbouring maps are the most likely next ones.
    for (const other of [sorted[position - 1], sorted[position + 1]]) {
      if (other !== undefined) for (const sheet of Object.values(loaded.get(placeOf(layer))[other].sheets)) new Image().src = sheet.file;
    }
    return {
      title: `${layer.title}, map ${at.map}`,
      path: [[layer.title, up(at)], [`map ${at.map}`, link(at)]],
      before: neighbour(sorted[position - 1], at2),
      after: neighbour(sorted[position + 1], at2),
      content: [
        statistics(layer, map, index),
        element("div", { class: "panels" }, panels),
        line,
        kinds.length === 0 ? null : element("p", { class: "note" }, `Strongest first; projections and patches in the same position belong to the same activation. Grey is zero, and each tile has its own contrast.${map.sheets.control ? " Shuffled weights are the control: what they show comes from the image and the architecture, not from learning." : ""}`),
        ...rest,
      ],
    };
  }

  function placeOf(layer) {
    return layer.script.slice(0, layer.script.lastIndexOf("/"));
  }

  function sentence([image, value, place]) {
    return `${value} in ${image}${place ? `, ${place}` : ""}`;
  }

  // The statistics of a map, each with its rank among all maps of the layer.
  function statistics(layer, map, index) {
    return element("dl", { class: "statistics" }, map.statistics.map(([name, text]) => {
      const key = layer.sort.find((each) => each.name === name);
      const values = key ? key.values.filter((value) => value !== null) : [];
      const low = Math.min(...values);
      const high = Math.max(...values);
      const drawn = key && key.values[index] !== null && high > low;
      return element("div", {}, element("dt", {}, name), element("dd", {}, text),
        drawn ? element("dd", { class: "among" }, spread(key.values, index, low, high)) : null);
    }));
  }

  function spread(values, index, low, high) {
    const at = (value) => 1 + (118 * (value - low)) / (high - low);
    const line = (value, top) => `M${at(value).toFixed(1)} ${top}V12`;
    const better = values.filter((value) => value !== null && value > values[index]).length;
    return svg("svg", { viewBox: "0 0 120 13", role: "img", "aria-label": `rank ${better + 1} of ${values.length} maps` },
      svg("path", { class: "others", d: values.filter((value) => value !== null).map((value) => line(value, 5)).join("") }),
      svg("path", { class: "this", d: line(values[index], 0) }));
  }

  // ---- an image -------------------------------------------------------------------------------

  async function imageView(at) {
    const image = data.images[at.image - 1];
    if (!image) throw new Error(`There is no image ${at.image} in this gallery`);
    const seen = await load(image.script);
    const rebuilt = seen.filter((layer) => layer.reconstruction);
    const wide = room() > 900;
    const picture = (source, alt, most) => {
      const width = fitted(source.width, most, most);
      const made = element("img", { src: source.file, alt, width, height: (width * source.height) / source.width });
      if (width < source.width) made.classList.add("shrunk");
      return made;
    };
    const box = element("span", { class: "box", hidden: true });
    const whole = element("figure", { class: "panel whole" }, element("figcaption", {}, "The image"),
      element("div", { class: "framed" }, picture(image.picture, image.name, Math.min(room(), wide ? 300 : 240)), box));
    function frame(part) {
      const [rows, columns] = image.picture.pixels;
      box.hidden = !part || !part[2];
      if (box.hidden) return;
      const [top, left, bottom, right] = part[2];
      const percent = { top: top / rows, left: left / columns, height: (bottom - top) / rows, width: (right - left) / columns };
      for (const [name, share] of Object.entries(percent)) box.style[name] = `${100 * share}%`;
    }
    const space = wide ? room() - 348 : room();
    const row = Math.max(1, Math.min(rebuilt.length, Math.floor((space + 18) / (132 + 18))));
    const reconstructions = element("div", { class: "reconstructions" }, rebuilt.map((layer) =>
      element("figure", { class: "panel" },
        element("figcaption", {}, element("a", { href: link({ layer: layer.name }) }, layers.get(layer.name).title)),
        picture(layer.reconstruction, `${image.name} as ${layers.get(layer.name).title} reconstructs it`, Math.min(240, (space + 18) / row - 18)),
        facts(layer.facts, "facts small"))));
    const sections = seen.map((layer, n) => {
      const known = layers.get(layer.name);
      const tiles = (kind, numbers, label) => {
        const sheet = layer.sheets[kind];
        if (!sheet) return null;
        const width = fitted(sheet.width, 96, 144);
        return element("ul", { class: "row", role: "list" }, numbers.map((number, index) => {
          const shown = [tile(sheet, index, label(number, index), width), element("span", { class: "number" }, label(number, index))];
          const part = kind === "parts" ? layer.parts[index] : null;
          const framed = { onmouseenter: () => frame(part), onmouseleave: () => frame(null), onfocusin: () => frame(part), onfocusout: () => frame(null) };
          const item = element("li", framed, known.maps.includes(number)
            ? element("a", { href: link({ layer: layer.name, map: number }) }, shown)
            : element("span", {}, shown));
          item.style.width = `${Math.max(width, 76)}px`;
          return item;
        }));
      };
      const parts = layer.sheets.parts ? [
        element("h3", {}, layer.reconstruction ? "Parts: the strongest activations, each projected on its own" : "The strongest activations, each projected on its own"),
        tiles("parts", layer.parts.map(([number]) => number), (number, index) => `map ${number}: ${layer.parts[index][1]}`),
      ] : [];
      const maps = layer.sheets.maps ? [
        element("h3", {}, "The strongest maps; black is zero"),
        tiles("maps", layer.maps, (number) => `map ${number}`),
      ] : [];
      if (!parts.length && !maps.length) return null;
      return element("section", { class: "seen", "aria-labelledby": `seen-${n}` },
        element("h2", { id: `seen-${n}` }, element("a", { href: link({ layer: layer.name }) }, known.title)),
        layer.reconstruction ? null : facts(layer.facts, "facts small"), parts, maps);
    });
    const at2 = (n) => [link({ image: n }), data.images[n - 1].name];
    return {
      title: image.name,
      path: [[image.name, link(at)]],
      before: at.image > 1 ? at2(at.image - 1) : null,
      after: at.image < data.images.length ? at2(at.image + 1) : null,
      content: [element("div", { class: "image" }, whole, element("div", {},
        rebuilt.length ? reconstructions : null,
        element("p", { class: "note" }, rebuilt.length
          ? "A reconstruction is the sum of the projections of all activations of a layer; the parts below are the strongest of these. Grey is zero, and each part has its own contrast."
          : "There are no reconstructions, because the projections of a classifier do not add up to the image. Grey is zero, and each part has its own contrast."),
        sections.filter(Boolean)))],
    };
  }

  // ---- enlarged tiles -------------------------------------------------------------------------

  function enlarge(map, start) {
    const where = map.captions;
    const panels = zoom.querySelector(".panels");
    const kinds = KINDS.filter(([kind]) => map.sheets[kind]);
    const count = Math.max(...kinds.map(([kind]) => map.sheets[kind].count));
    let rank = start;
    function show() {
      document.getElementById("zoomed").textContent = `${rank + 1}. ${where[rank] ? sentence(where[rank]) : ""}`;
      const shown = kinds.filter(([kind]) => rank < map.sheets[kind].count);
      const beside = innerWidth > 640 ? shown.length : 1;
      const most = Math.min((innerWidth - 80) / beside - 12, beside > 1 ? innerHeight - 170 : (innerHeight - 130) / shown.length - 28);
      panels.replaceChildren(...shown.map(([kind, name]) => {
        const sheet = map.sheets[kind];
        return element("figure", { class: "panel" }, element("figcaption", {}, name),
          tile(sheet, rank, name, fitted(sheet.width, 420, Math.max(64, Math.min(most, (most * sheet.width) / sheet.height)))));
      }));
    }
    zoom.onkeydown = (event) => {
      const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (step && rank + step >= 0 && rank + step < count) { rank += step; show(); }
    };
    zoom.onclick = (event) => { if (event.target === zoom) zoom.close(); };
    show();
    zoom.showModal();
  }

  // ---- from one view to the next --------------------------------------------------------------

  let before = null;
  let turn = 0;

  async function show() {
    const at = address();
    const mine = ++turn;
    const last = before;
    const first = last === null;
    const key = document.activeElement ? document.activeElement.dataset.key : undefined;
    if (zoom.open) zoom.close();
    if (last !== null && last.layer === undefined && last.image === undefined) overviewScroll = scrollY;
    if (first || last.layer !== at.layer) found = "";
    let made = null;
    try {
      if (at.layer !== undefined) {
        const layer = layers.get(at.layer);
        if (!layer) throw new Error(`There is no layer ${at.layer} in this gallery`);
        made = at.map === undefined ? layerView(layer, at) : await mapView(layer, at);
      } else if (at.image !== undefined) made = await imageView(at);
    } catch (error) {
      made = { title: "Nothing here", path: [], content: [element("p", { class: "notice" }, error.message)] };
    }
    if (mine !== turn) return; // another view was requested while this one was loading
    before = at;
    overview.hidden = made !== null;
    view.hidden = made === null;
    path(made ? made.path : []);
    document.title = made ? `${made.title} · ${data.title}` : data.title;
    if (!made) {
      view.replaceChildren();
      if (first) return;
      scrollTo(0, overviewScroll);
      const left = link({ layer: last.layer, image: last.layer === undefined ? last.image : undefined });
      const back = [...overview.querySelectorAll("article a, .images a")].find((each) => link(address(each.hash)) === left);
      if (back) back.focus({ preventScroll: true });
      return;
    }
    const side = (name, sign, to) => (to
      ? element("a", { class: name, rel: name, href: to[0], "data-key": name, "aria-label": `${name === "prev" ? "Previous" : "Next"}: ${to[1]}`, title: to[1] }, sign)
      : element("span", { class: name, "aria-hidden": "true" }, sign));
    view.replaceChildren(
      element("div", { class: "head" }, element("h1", { tabindex: -1 }, made.title),
        made.before || made.after ? element("nav", { "aria-label": "Neighbours" }, side("prev", "←", made.before), side("next", "→", made.after)) : null),
      ...made.content.filter(Boolean));
    if (first) return;
    // The focus stays on the element in use; coming back from a map, it moves to the tile of the map.
    const same = key && view.querySelector(`[data-key="${CSS.escape(key)}"]`);
    const from = last.map !== undefined && at.map === undefined && last.layer === at.layer
      ? view.querySelector(`[data-map="${last.map}"]`) : null;
    if (from) {
      view.querySelectorAll(".grid a").forEach((each) => { each.tabIndex = each === from ? 0 : -1; });
      from.focus({ preventScroll: true });
      from.scrollIntoView({ block: "center" });
    } else if (same) same.focus({ preventScroll: true });
    else view.querySelector("h1").focus({ preventScroll: true });
    // Between maps, and between images, the scroll position stays the same.
    const kind = (place) => Object.keys(place).filter((name) => ["layer", "map", "image"].includes(name) && place[name] !== undefined).join();
    if (!from && kind(last) !== kind(at)) scrollTo(0, 0);
  }

  function path(steps) {
    const list = document.querySelector("#path ol");
    const all = [[data.title, "#"], ...steps];
    list.replaceChildren(...all.map(([name, href], n) =>
      element("li", {}, element("a", { href, "aria-current": n === all.length - 1 ? "page" : null }, name))));
  }

  addEventListener("keydown", (event) => {
    if (event.altKey || event.ctrlKey || event.metaKey || event.defaultPrevented || zoom.open) return;
    if (event.target.matches("input, select")) {
      if (event.key === "Escape") event.target.blur();
      return;
    }
    const at = address();
    if (event.key === "Escape" && location.hash.length > 1) location.hash = up(at);
    const name = { ArrowLeft: "prev", ArrowRight: "next" }[event.key];
    if (name && (at.map !== undefined || at.image !== undefined)) {
      const to = view.querySelector(`a.${name}`);
      if (to) {
        event.preventDefault();
        location.hash = to.getAttribute("href");
      }
    }
  });

  document.querySelector(".skip").addEventListener("click", (event) => {
    event.preventDefault(); // the address belongs to the views
    document.getElementById("main").focus();
  });

  // Light or dark like the system, until the user chooses.
  const theme = document.getElementById("theme");
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (document.documentElement.dataset.theme || (dark.matches ? "dark" : "light")) === "dark";
  const label = () => theme.setAttribute("aria-pressed", String(isDark()));
  theme.addEventListener("click", () => {
    document.documentElement.dataset.theme = isDark() ? "light" : "dark";
    try {
      localStorage.setItem("deconvnet-theme", document.documentElement.dataset.theme);
    } catch (error) { /* the choice then lasts as long as the page */ }
    label();
  });
  dark.addEventListener("change", label);
  label();

  let resizing = 0;
  let lastWidth = innerWidth;
  addEventListener("resize", () => {
    if (innerWidth === lastWidth) return; // the bars of a phone come and go
    lastWidth = innerWidth;
    clearTimeout(resizing);
    resizing = setTimeout(show, 150);
  });
  history.scrollRestoration = "manual";
  addEventListener("hashchange", show);
  show();
  return { add };
})();
