// From one view to the next: addresses, the keyboard, search, and light or dark.
"use strict";

{
  const { data, layers, views, element, address, link, mapName } = gallery;
  const view = document.getElementById("view");
  const overview = document.getElementById("overview");
  const zoom = document.getElementById("zoom");
  let before = null;
  let turn = 0;
  let overviewScroll = 0;

  function made(at) {
    if (at.layer !== undefined) {
      const layer = layers.get(at.layer);
      if (!layer) throw new Error(`There is no layer ${at.layer} in this gallery`);
      return at.map === undefined ? views.layer(layer, at) : views.map(layer, at);
    }
    if (at.image !== undefined) return at.repaint === undefined ? views.image(at) : views.repaint(at);
    if (at.photo !== undefined) return views.photo(at);
    return null;
  }

  function up(at) {
    if (at.map !== undefined) return link({ ...at, map: undefined });
    if (at.repaint !== undefined) return link({ image: at.image });
    return "#";
  }

  async function show() {
    const at = address();
    const mine = ++turn;
    const last = before;
    const first = last === null;
    const key = document.activeElement ? document.activeElement.dataset.key : undefined;
    if (zoom.open) zoom.close();
    if (last !== null && kind(last) === "") overviewScroll = scrollY;
    let shown = null;
    try {
      shown = await made(at);
    } catch (error) {
      shown = { title: "Nothing here", path: [], content: [element("p", { class: "notice" }, error.message)] };
    }
    if (mine !== turn) return; // another view was requested while this one was loading
    before = at;
    overview.hidden = shown !== null;
    view.hidden = shown === null;
    path(shown ? shown.path : []);
    document.title = shown ? `${shown.title} · ${data.title}` : data.title;
    if (!shown) {
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
      element("div", { class: "head" }, element("h1", { tabindex: -1 }, shown.title),
        shown.before || shown.after ? element("nav", { "aria-label": "Neighbours" }, side("prev", "←", shown.before), side("next", "→", shown.after)) : null),
      ...shown.content.filter(Boolean));
    if (first) return;
    if (last.map !== undefined && last.layer === at.layer && shown.reveal) shown.reveal(last.map);
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
    if (!from && kind(last) !== kind(at)) scrollTo(0, 0);
  }

  function kind(at) {
    return ["layer", "map", "image", "photo", "repaint"].filter((name) => at[name] !== undefined).join();
  }

  function path(steps) {
    const list = document.querySelector("#path ol");
    const all = [[data.title, "#"], ...steps];
    list.replaceChildren(...all.map(([name, href], n) =>
      element("li", {}, element("a", { href, "aria-current": n === all.length - 1 ? "page" : null }, name))));
  }

  // ---- search -----------------------------------------------------------------------------------

  const search = document.getElementById("search");
  const results = document.getElementById("results");
  const MOST = 12;

  // Every layer, map, label and image whose text has all words; numbers must be those of maps.
  function find(text) {
    const words = text.toLowerCase().split(/\s+/).filter((word) => word && word !== gallery.words.map);
    if (!words.length) return [];
    const fits = (name) => words.every((word) => name.toLowerCase().includes(word));
    const found = data.layers.filter((layer) => fits(layer.title)).map((layer) => [link({ layer: layer.name }), layer.title]);
    for (const layer of data.layers) {
      const title = layer.title.toLowerCase();
      layer.maps.forEach((map, index) => {
        const label = (layer.labels[index] || "").toLowerCase();
        const named = words.some((word) => word === String(map) || (label && label.includes(word)));
        if (named && words.every((word) => word === String(map) || label.includes(word) || title.includes(word))) {
          found.push([link({ layer: layer.name, map }), `${layer.title}, ${mapName(layer, index)}`]);
        }
      });
    }
    data.images.forEach((image, n) => { if (fits(image.name)) found.push([link({ image: n + 1 }), `${image.name} in all layers`]); });
    (data.photographs ? data.photographs.images : []).forEach(([name], n) => { if (fits(name)) found.push([link({ photo: n }), name]); });
    return found;
  }

  function list() {
    const found = find(search.value);
    results.hidden = !search.value.trim();
    results.replaceChildren(...found.slice(0, MOST).map(([href, name]) => element("li", {}, element("a", { href }, name))),
      ...(found.length > MOST ? [element("li", { class: "note" }, `and ${found.length - MOST} more`)] : []),
      ...(found.length ? [] : [element("li", { class: "note" }, "Nothing has this name or number.")]));
  }

  function close() {
    results.hidden = true;
    search.value = "";
  }

  search.addEventListener("input", list);
  search.form.addEventListener("submit", (event) => {
    event.preventDefault();
    const first = results.querySelector("a");
    if (first) { location.hash = first.getAttribute("href"); close(); }
  });
  results.addEventListener("click", (event) => { if (event.target.closest("a")) close(); });
  search.form.addEventListener("keydown", (event) => {
    const stops = [search, ...results.querySelectorAll("a")];
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (step) {
      event.preventDefault();
      (stops[stops.indexOf(document.activeElement) + step] || search).focus();
    } else if (event.key === "Escape") { close(); search.blur(); event.stopPropagation(); }
  });
  document.addEventListener("click", (event) => { if (!search.form.contains(event.target)) results.hidden = true; });

  // ---- keyboard ---------------------------------------------------------------------------------

  addEventListener("keydown", (event) => {
    if (event.altKey || event.ctrlKey || event.metaKey || event.defaultPrevented || zoom.open) return;
    if (event.target.matches("input, select")) {
      if (event.key === "Escape") event.target.blur();
      return;
    }
    const at = address();
    if (event.key === "/") { event.preventDefault(); search.focus(); }
    if (event.key === "Escape" && location.hash.length > 1) location.hash = up(at);
    const name = { ArrowLeft: "prev", ArrowRight: "next" }[event.key];
    if (name && kind(at) !== "layer") {
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

  history.scrollRestoration = "manual";
  addEventListener("hashchange", show);
  show();
}
