// The view of a map: its examples with their photographs, what else activates it, and its relatives.
"use strict";

{
  const { data, words, Words, layers, KINDS, element, svg, tile, photograph, heat, wholePhotograph, pixelsOf, fullTile, placed, frame, number, place, sentence, mapName, link, mapTile, controlStrip } = gallery;
  const zoom = document.getElementById("zoom");

  gallery.views.map = async (layer, at) => {
    const index = layer.maps.indexOf(at.map);
    if (index < 0) throw new Error(`${layer.title} has no ${words.map} ${at.map} in this gallery`);
    const features = await gallery.features(layer, index);
    const map = features.at(index);
    const sorted = gallery.order(layer, at.sort);
    const position = sorted.indexOf(index);
    const beside = (other) => (other === undefined ? null : [link({ ...at, map: layer.maps[other] }), `${words.map} ${layer.maps[other]}`]);
    const user = data.layers[data.layers.indexOf(layer) + 1];
    const above = user ? await gallery.allFeatures(user) : null;
    // The neighbouring maps are the most likely next ones.
    for (const other of [sorted[position - 1], sorted[position + 1]]) {
      const near = other === undefined ? undefined : features.at(other);
      if (near) for (const sheet of Object.values(near.sheets)) new Image().src = sheet.file;
    }
    return {
      title: layer.title === words.maps ? `${Words.map} ${at.map}` : `${layer.title}, ${words.map} ${at.map}`,
      path: [[layer.title, link({ ...at, map: undefined })], [`${words.map} ${at.map}`, link(at)]],
      before: beside(sorted[position - 1]),
      after: beside(sorted[position + 1]),
      content: [
        map.label ? element("p", { class: "lead" }, map.label) : null,
        examples(layer, map),
        ...layer.notes.map((note) => element("p", { class: "note mark" }, note)),
        element("div", { class: "sections" },
          activity(layer, map, index),
          relatives(features.similar_are === "filters" ? `${Words.maps} with a similar filter` : `${Words.maps} that look like it`, "similar", layer, map.similar, (value) => `cosine ${number(value)}`,
            `Cosine of the ${features.similar_are === "filters" ? "filters" : `strongest ${layer.methods.includes("guided") ? "guided backpropagations" : "projections"}`}, at the shift that makes it largest.`),
          relatives(`${Words.maps} that are active with it`, "coactive", layer, map.coactive, (value) => `correlation ${number(value)}`,
            `Correlation of the strongest activations over the ${words.images} surveyed.`)),
        element("div", { class: "sections" }, spectrum(map), sources(features, map), users(layer, map, above, user), evolution(map)),
        controlStrip(layer, 9),
        citation(layer, at),
      ],
    };
  };

  // A section that takes the whole width if it has more than a few things to show.
  function section(id, title, ...content) {
    const many = content.some((each) => each && each.children && each.children.length > 4 && each.matches("ol, ul") && !each.matches(".few"));
    return element("section", { "aria-labelledby": id, class: many ? "wide" : null }, element("h2", { id }, title), ...content);
  }

  // ---- examples -------------------------------------------------------------------------------

  // A column for each example: its projections, the patch, the photograph, and where it comes from.
  function examples(layer, map) {
    const kinds = [...layer.methods, "patches"].filter((kind) => map.sheets[kind]);
    if (!kinds.length) return element("p", { class: "notice" }, `This ${words.map} is never active on these ${words.images}, so there is nothing to project.`);
    const count = Math.max(...kinds.map((kind) => map.sheets[kind].count));
    const isFound = map.examples.some((example) => photograph(example));
    const isHot = map.examples.some((example) => example.heat);
    const names = [...kinds.map((kind) => (KINDS[kind] || [kind, kind])[1]), ...(isFound ? [`${words.photograph}${isHot ? ", lit where it is active" : ""}`] : [])];
    const columns = [...Array(count).keys()].map((rank) => {
      const example = map.examples[rank];
      const said = example ? `: ${sentence(example)}` : "";
      const tiles = kinds.map((kind) => tile(map.sheets[kind], rank, `${(KINDS[kind] || [kind, kind])[1]} ${rank + 1}${said}`));
      const photo = example && photograph(example);
      const marks = example ? [example.value < 0 ? "−" : null, example.border ? "border" : null].filter(Boolean) : [];
      return element("li", {}, element("button", { type: "button", class: "plain", "data-key": `example-${rank}`, "data-rank": rank, "aria-label": `Enlarge example ${rank + 1}${said}`, tabindex: rank ? -1 : 0, onclick: () => enlarge(layer, map, kinds, rank) }, tiles,
        photo ? element("span", { class: "photo" }, photo) : null,
        example ? element("span", { class: "number" },
          element("b", {}, number(example.value)), marks.map((mark) => element("i", { class: "badge" }, mark)),
          element("span", { class: "name", title: example.image }, example.image)) : null));
    });
    const list = element("ol", { class: "examples", role: "list", "aria-label": "The strongest activations" }, columns);
    list.addEventListener("keydown", gallery.moveInGrid);
    const negative = map.examples.some((example) => example.value < 0);
    const border = map.examples.some((example) => example.border);
    return element("section", { "aria-label": "The strongest activations" },
      element("p", { class: "note" }, `The ${count === 1 ? "strongest activation" : `${count} strongest activations, one in each ${words.image}`}. From top to bottom: ${names.join(", ")}. Grey is zero, and each tile has its own contrast. Click one to enlarge it.`,
        negative ? element("span", {}, " ", element("i", { class: "badge" }, "−"), " marks negative activations; their projections are shown with the sign reversed, so that a feature always looks the same.") : null,
        border ? element("span", {}, " ", element("i", { class: "badge" }, "border"), ` marks units whose receptive field reaches beyond the ${words.image}.`) : null),
      list,
      element("details", { class: "methods" }, element("summary", {}, "What these pictures are"),
        element("dl", {}, kinds.map((kind) => [element("dt", {}, (KINDS[kind] || [kind])[0]), element("dd", {}, (KINDS[kind] || ["", "", ""])[2])]))));
  }

  // The examples of a map one at a time, in full size: projections and patch next to the photograph,
  // or in their place on it.
  function enlarge(layer, map, kinds, start) {
    const panels = zoom.querySelector(".panels");
    const over = document.getElementById("over");
    const count = Math.max(...kinds.map((kind) => map.sheets[kind].count));
    let rank = start;
    function show() {
      const example = map.examples[rank];
      document.getElementById("zoomed").textContent = `${rank + 1} of ${count}${example ? `: ${sentence(example)}` : ""}`;
      const photo = example && wholePhotograph(example);
      const covered = photo && example.window && covers(example.window, pixelsOf(example));
      over.hidden = !(photo && example.window) || covered || isSignal(example);
      const onPhoto = !over.hidden && over.getAttribute("aria-pressed") === "true";
      const panel = (name, ...content) => element("figure", { class: "panel" }, content, element("figcaption", {}, name));
      const shown = kinds.filter((kind) => rank < map.sheets[kind].count && !((onPhoto || covered) && kind === "patches"));
      panels.replaceChildren(
        ...shown.map((kind) => panel(kind === "patches" ? `${Words.image} patch` : (KINDS[kind] || [kind])[0], picture(map.sheets[kind], kind, rank, example, onPhoto))),
        ...(photo ? [panel([example.image, " ", element("a", { href: link({ photo: example.photograph }), onclick: () => zoom.close() }, `more of this ${words.image}`)],
          element("span", { class: "framed" }, photo, frame(example.window || example.box, pixelsOf(example))))] : []),
        ...(photo && example.heat ? [panel("where it is active; white is its strongest activation", element("span", { class: "framed hot" }, wholePhotograph(example), heat(example)))] : []));
      panels.style.setProperty("--panels", panels.children.length);
      // A portrait is narrower, so that all of it can be seen.
      for (const each of panels.querySelectorAll(".panel > span")) {
        const [width, height] = (each.firstElementChild && each.classList.contains("framed") ? each.firstElementChild : each).style.aspectRatio.split(" / ").map(Number);
        each.style.maxWidth = `calc(${width / height} * 76vh)`;
      }
    }
    over.onclick = () => {
      over.setAttribute("aria-pressed", String(over.getAttribute("aria-pressed") !== "true"));
      show();
    };
    const go = (step) => {
      if (rank + step >= 0 && rank + step < count) { rank += step; show(); }
    };
    zoom.onkeydown = (event) => {
      if (event.key === "p" && !over.hidden) over.click();
      go({ ArrowLeft: -1, ArrowRight: 1 }[event.key] || 0);
    };
    zoom.onclick = (event) => {
      if (event.target === zoom) zoom.close();
      const step = event.target.dataset && Number(event.target.dataset.step);
      if (step) go(step);
    };
    show();
    zoom.showModal();
  }

  // Whether a tile shows the whole photograph.
  function covers([top, left, bottom, right], [rows, columns]) {
    return top <= 0 && left <= 0 && bottom >= rows && right >= columns;
  }

  // Whether its photograph has a single row, which is drawn as a curve.
  function isSignal(example) {
    return pixelsOf(example)[0] === 1;
  }

  function picture(sheet, kind, rank, example, onPhoto) {
    const label = (KINDS[kind] || [kind, kind])[1];
    const photo = example && example.window && wholePhotograph(example);
    if (onPhoto) return placed(fullTile(sheet, rank, label), example.window, pixelsOf(example), photo);
    if (kind !== "patches" || !photo || isSignal(example)) return fullTile(sheet, rank, label);
    // The patch is cut out of the photograph, which has more pixels than its tile.
    const [top, left, bottom, right] = example.window;
    const [rows, columns] = pixelsOf(example);
    photo.setAttribute("aria-label", label);
    return placed(photo, [-top, -left, rows - top, columns - left], [bottom - top, right - left]);
  }

  // ---- activity -------------------------------------------------------------------------------

  // The statistics of a map, each with its place among all maps of the layer, and its histogram.
  function activity(layer, map, index) {
    const table = map.statistics.map(([name, value]) => {
      const key = layer.sort.find((each) => each.name === name);
      const values = key ? key.values.filter((each) => each !== null) : [];
      const [low, high] = [Math.min(...values), Math.max(...values)];
      const drawn = key && key.values[index] !== null && high > low;
      return element("div", {}, element("dt", {}, name), element("dd", {}, number(value)),
        drawn ? element("dd", { class: "among" }, spread(key.values, index, low, high)) : null);
    });
    const filters = layer.sheets.filters;
    const filtered = filters && !(filters.empty || []).includes(index);
    return section("activity", "How active it is",
      element("div", { class: "activity" },
        filtered ? element("figure", { class: "filter" }, tile(filters, index, `filter of ${words.map} ${map.map}`), element("figcaption", {}, "its filter")) : null,
        element("dl", { class: "statistics" }, table)),
      map.histogram && map.histogram.counts.length ? histogram(map.histogram) : null);
  }

  function spread(values, index, low, high) {
    const at = (value) => 1 + (118 * (value - low)) / (high - low);
    const line = (value, top) => `M${at(value).toFixed(1)} ${top}V12`;
    const better = values.filter((value) => value !== null && value > values[index]).length;
    const count = values.filter((value) => value !== null).length;
    return svg("svg", { viewBox: "0 0 120 13", role: "img", "aria-label": `rank ${better + 1} of ${count} ${words.maps}` },
      svg("path", { class: "others", d: values.filter((value) => value !== null).map((value) => line(value, 5)).join("") }),
      svg("path", { class: "this", d: line(values[index], 0) }));
  }

  function histogram({ counts, edges, silent }) {
    const total = counts.reduce((sum, count) => sum + count, silent);
    const most = Math.max(1, ...counts);
    const [width, height] = [480, 120];
    const step = width / counts.length;
    const bars = counts.map((count, n) => {
      const high = (height * count) / most;
      const bar = svg("rect", { class: "bar", x: (n * step + 0.5).toFixed(2), y: (height - high).toFixed(2), width: (step - 1).toFixed(2), height: high.toFixed(2) });
      bar.append(svg("title", {}, `${number(edges[n])} to ${number(edges[n + 1])}: ${count} ${words.images}`));
      return bar;
    });
    return element("figure", { class: "histogram" },
      svg("svg", { viewBox: `0 0 ${width} ${height + 1}`, preserveAspectRatio: "none", role: "img", "aria-label": `Histogram of the strongest activation in each of ${total} ${words.images}` }, ...bars,
        svg("path", { class: "axis", d: `M0 ${height + 0.5}H${width}` })),
      element("div", { class: "ends" }, element("span", {}, number(edges[0])), element("span", {}, number(edges[edges.length - 1]))),
      element("figcaption", {}, `The strongest activation in each of ${total} ${words.images}${silent ? `; in ${silent} of them it is never active` : ""}.`));
  }

  // Examples at all levels of activation: the strongest alone mislead about what a map does.
  function spectrum(map) {
    if (!map.spectrum.length) return null;
    return section("spectrum", "Weaker activations",
      element("p", { class: "note" }, `The strongest activations alone can mislead. These ${words.images} lie further down: each is stronger than the given share of the ${words.images} on which the ${words.map} is active at all.`),
      element("ol", { class: "examples", role: "list" }, map.spectrum.map((example, n) => {
        const photo = photograph(example);
        return element("li", {}, tile(map.sheets.spectrum, n, `${words.image} patch: ${sentence(example)}`),
          photo ? element("a", { class: "photo", href: link({ photo: example.photograph }) }, photo) : null,
          element("span", { class: "number" }, element("b", {}, `${Math.round(100 * example.share)}%`), ` ${number(example.value)}`, example.border ? element("i", { class: "badge" }, "border") : null, element("span", { class: "name", title: example.image }, example.image)));
      })));
  }

  // ---- relatives ------------------------------------------------------------------------------

  function relatives(title, id, layer, pairs, text, note) {
    if (!pairs.length) return null;
    return section(id, title, element("ul", { class: "row few", role: "list" }, pairs.map(([map, value]) =>
      element("li", {}, mapTile(layer, map, `${words.map} ${map}`), element("span", { class: "number" }, text(value))))), element("p", { class: "note" }, note));
  }

  // Weights are norms of filters in a deconvolutional network, else shares of the activation.
  function weight(features, source) {
    return features.sources_are === "weights" ? `weight ${number(source.weight)}` : `${number(100 * source.weight)}%`;
  }

  function sources(features, map) {
    const below = layers.get(features.below);
    if (!map.sources.length || !below) return null;
    const pictured = map.sheets.sources;
    const note = features.sources_are === "weights"
      ? `The ${words.maps} of ${below.title} with the largest weights${pictured ? ", and what each of them adds to the strongest projection above; all on one scale" : ""}.`
      : `The ${words.maps} of ${below.title} that contribute most to its strongest activation, as shares of it (gradient times activation). Other ${words.maps} and biases make up for the rest and may be negative.`;
    const title = ({ maps }) => (maps.length > 1 ? `${words.maps} ${maps[0]}–${maps[maps.length - 1]}` : `${words.map} ${maps[0]}`);
    const shown = ({ maps }) => maps.find((each) => below.maps.includes(each));
    const items = map.sources.map((source, n) => (shown(source) === undefined && !pictured ? null : element("li", {}, pictured
      ? element("span", { class: "pair" }, mapTile(below, shown(source) ?? source.maps[0], title(source)),
        element("span", { class: "card" }, tile(pictured, n, `what ${title(source)} adds`), element("span", { class: "number" }, "adds this")))
      : mapTile(below, shown(source), title(source)), element("span", { class: "number" }, weight(features, source)))));
    // Maps that this gallery does not show.
    const others = pictured ? [] : map.sources.filter((source) => shown(source) === undefined);
    return section("sources", "What it is made of", element("p", { class: "note" }, note),
      items.some(Boolean) ? element("ul", { class: `row${pictured ? " pairs" : ""}`, role: "list" }, items) : null,
      others.length ? element("ul", { class: "chips", role: "list", title: "not shown in this gallery" }, others.map((source) => element("li", {}, `${title(source)} ${weight(features, source)}`))) : null);
  }

  function users(layer, map, above, user) {
    if (!above || above.below !== layer.name) return null;
    const found = above.maps.map((each) => [each.map, each.sources.find((source) => source.maps.includes(map.map))])
      .filter(([, source]) => source).sort((a, b) => b[1].weight - a[1].weight).slice(0, 18);
    if (!found.length) return null;
    return section("users", `Where ${user.title} uses it`,
      element("p", { class: "note" }, above.sources_are === "weights" ? `${Words.maps} of ${user.title} that have this ${words.map} among their largest weights.`
        : `${Words.maps} of ${user.title} to whose strongest activation this ${words.map} is among those that contribute most.`),
      element("ul", { class: "row", role: "list" }, found.map(([other, source]) =>
        element("li", {}, mapTile(user, other, `${words.map} ${other}`), element("span", { class: "number" }, weight(above, source))))));
  }

  function evolution(map) {
    const sheet = map.sheets.evolution;
    if (!sheet) return null;
    return section("evolution", "During training",
      element("ol", { class: "row", role: "list" }, map.epochs.map((epoch, n) =>
        element("li", {}, tile(sheet, n, `epoch ${epoch}`), element("span", { class: "number" }, `epoch ${epoch}`)))),
      element("p", { class: "note" }, `Each tile is the strongest activation after that epoch; its ${words.image} may differ from that of the tile before.`));
  }

  function citation(layer, at) {
    const address = `${location.href.replace(/#.*/, "")}${link({ layer: layer.name, map: at.map })}`;
    const button = element("button", { type: "button", onclick: async () => {
      try {
        await navigator.clipboard.writeText(address);
        button.textContent = "Copied";
      } catch (error) {
        getSelection().selectAllChildren(shown); // a page opened as a file may not write there
      }
    } }, "Copy");
    const shown = element("code", {}, link({ layer: layer.name, map: at.map }));
    return element("p", { class: "note cite" }, `To cite this ${words.map}: this page and `, shown, " ", button, ". Its data: ", element("a", { href: layer.json }, layer.json), `, ${words.map} ${at.map}.`);
  }
}
