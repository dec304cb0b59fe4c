// The view of a layer: a wall of tiles, one for each map, to sort and to search.
"use strict";

{
  const { data, words, Words, KINDS, element, tile, facts, number, mapName, link, controlStrip } = gallery;
  const SIZES = [64, 280];
  // Tiles that are listed at a time.
  const BATCH = 240;
  let size = innerWidth < 500 ? 104 : 128;
  let found = "";
  let foundIn = null;

  // The indices of the maps of a layer, sorted: "density" or, reversed, "-density".
  gallery.order = (layer, sort) => {
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
  };

  // Whether a map fits the words: its number, its label, or an image among its examples.
  function matcher(layer, text) {
    const words = text.toLowerCase().split(/\s+/).filter(Boolean);
    const place = data.layers.indexOf(layer);
    const images = new Map();
    if (words.some((word) => !/^\d+$/.test(word))) {
      for (const [name, , , maps] of data.photographs ? data.photographs.images : []) {
        for (const [at, map] of maps) if (at === place) images.set(map, `${images.get(map) || ""} ${name.toLowerCase()}`);
      }
    }
    return (index) => words.every((word) => (/^\d+$/.test(word) && String(layer.maps[index]).startsWith(word))
      || (layer.labels[index] || "").toLowerCase().includes(word)
      || (!/^\d+$/.test(word) && (images.get(layer.maps[index]) || "").includes(word)));
  }

  gallery.views.layer = (layer, at) => {
    const kinds = [...layer.methods, "patches", "filters"].filter((kind) => layer.sheets[kind]);
    const chosen = kinds.filter((kind) => at.show.includes(kind));
    const usual = layer.shown.filter((kind) => kinds.includes(kind));
    const shown = chosen.length ? chosen : usual.length ? usual : kinds.slice(0, 1);
    const grid = element("ul", { class: "grid", role: "list", "aria-label": `${Words.maps} of ${layer.title}` });
    const count = element("output", { "aria-live": "polite" });
    if (foundIn !== layer) [found, foundIn] = ["", layer];

    const sorted = gallery.order(layer, at.sort);
    const key = layer.sort.find((each) => each.name === (at.sort || "").replace(/^-/, ""));
    // Made when it is first listed: thousands at once take seconds.
    const items = new Map();
    function item(index) {
      if (!items.has(index)) items.set(index, made(index));
      return items.get(index);
    }
    function made(index) {
      const value = key && key.values[index] !== null ? ` · ${number(key.values[index])}` : "";
      const name = layer.labels[index] ? `${layer.maps[index]} ${layer.labels[index]}` : layer.maps[index];
      return element("li", {}, element("a",
        { href: link({ ...at, map: layer.maps[index] }), tabindex: -1, "data-map": layer.maps[index], "aria-label": `${mapName(layer, index)}${value}` },
        element("span", { class: "tiles" }, shown.map((kind) => tile(layer.sheets[kind], index, `${words.map} ${layer.maps[index]}, ${KINDS[kind][1]}`))),
        element("span", { class: "number" }, `${name}${value}`)));
    }

    let listed = [];
    function fill() {
      listed = sorted.filter(matcher(layer, found));
      grid.replaceChildren();
      more(BATCH);
      const first = grid.querySelector("a");
      if (first) first.tabIndex = 0;
      count.textContent = listed.length === layer.maps.length ? "" : `${listed.length} of ${layer.maps.length}`;
      watch();
    }

    // List further tiles, up to this number, before the end of the grid comes into view.
    function more(most) {
      const from = grid.childElementCount;
      grid.append(...listed.slice(from, most).map(item));
    }
    const end = element("div", { "aria-hidden": "true" });
    const watcher = new IntersectionObserver((entries) => {
      if (grid.childElementCount === listed.length || !entries.some((entry) => entry.isIntersecting)) return;
      more(grid.childElementCount + BATCH);
      watch();
    }, { rootMargin: "1200px" });
    // It reports changes only, so it looks anew whenever the grid has changed.
    function watch() {
      watcher.unobserve(end);
      watcher.observe(end);
    }

    function resize() {
      grid.style.setProperty("--cell", `${(shown.length > 2 ? 0.86 : 1) * size * shown.length + 3 * (shown.length - 1)}px`);
      watch();
    }

    const names = ["number", ...layer.sort.map((each) => each.name)];
    const backwards = (at.sort || "").startsWith("-");
    const current = backwards ? at.sort.slice(1) : at.sort || "number";
    const go = (sort) => location.replace(link({ ...at, sort: sort === "number" ? undefined : sort }));
    const open = (event) => {
      event.preventDefault();
      const first = grid.querySelector("a");
      if (first) location.hash = first.getAttribute("href");
    };
    const tools = element("form", { class: "tools", "aria-label": `Choice and order of the ${words.maps}`, onsubmit: open },
      kinds.length > 1 ? element("fieldset", {}, element("legend", {}, "Show"), kinds.map((kind) => {
        const on = shown.includes(kind);
        return element("button", {
          type: "button", "aria-pressed": String(on), "data-key": `show-${kind}`, disabled: on && shown.length === 1, title: (KINDS[kind] || [])[2],
          onclick: () => location.replace(link({ ...at, show: kinds.filter((other) => (other === kind ? !on : shown.includes(other))) })),
        }, (KINDS[kind] || [kind])[0]);
      })) : null,
      element("label", {}, "Sort by ", element("select", { "data-key": "sort", onchange: (event) => go(event.target.value) },
        names.map((name) => element("option", { value: name, selected: name === current }, name)))),
      element("button", { type: "button", "data-key": "turn", "aria-pressed": String(backwards), "aria-label": "Reverse the order",
        title: "Reverse the order", onclick: () => go(backwards ? current : `-${current}`) }, "⇅"),
      element("label", {}, "Find ", element("input", { type: "search", value: found, placeholder: `number or ${words.image}`,
        "data-key": "find", oninput: (event) => { found = event.target.value; fill(); } })),
      element("label", {}, "Size ", element("input", { type: "range", min: SIZES[0], max: SIZES[1], value: size,
        "data-key": "size", oninput: (event) => { size = Number(event.target.value); resize(); } })),
      count);

    fill();
    resize();
    grid.addEventListener("keydown", gallery.moveInGrid);
    const place = data.layers.indexOf(layer);
    const beside = (other) => other && [link({ layer: other.name }), other.title];
    return {
      title: layer.title,
      reveal: (map) => more(listed.indexOf(layer.maps.indexOf(map)) + 1),
      path: [[layer.title, link({ ...at, map: undefined })]],
      before: beside(data.layers[place - 1]),
      after: beside(data.layers[place + 1]),
      content: [
        facts(layer.facts, "facts"),
        ...layer.notes.map((note) => element("p", { class: "note mark" }, note)),
        tools,
        element("p", { class: "note" }, `The strongest activation of each ${words.map}. ${shown.map((kind) => (KINDS[kind] || [])[2] || "").join(" ")} Grey is zero, and each tile has its own contrast.`),
        grid,
        end,
        controlStrip(layer, 18),
        element("p", { class: "note" }, "All of this as data: ", element("a", { href: layer.json }, layer.json), "."),
      ],
    };
  };

  // Arrow keys move the focus in a grid of links; Tab reaches one of them at a time.
  gallery.moveInGrid = (event) => {
    const links = [...event.currentTarget.querySelectorAll("a, button")];
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
  };
}
