// The views of an image of the explorer, and of any other image that is an example of some map.
"use strict";

{
  const { data, words, Words, layers, element, tile, photograph, frame, facts, link, mapTile, load } = gallery;

  gallery.views.image = async (at) => {
    const image = data.images[at.image - 1];
    if (!image) throw new Error(`There is no ${words.image} ${at.image} in this gallery`);
    const seen = await load(image.script);
    const rebuilt = seen.filter((layer) => layer.reconstruction);
    const picture = (source, alt) => element("img", { src: source.file, alt, width: source.width, height: source.height });
    const framed = element("div", { class: "framed" }, picture(image.picture, image.name));
    function show(part) {
      framed.querySelectorAll(".box").forEach((box) => box.remove());
      const box = part && frame(part[2], image.picture.pixels);
      if (box) framed.append(box);
    }
    const reconstructions = rebuilt.map((layer) => element("figure", { class: "panel" },
      picture(layer.reconstruction, `${image.name} as ${layers.get(layer.name).title} reconstructs it`),
      element("figcaption", {}, element("a", { href: link({ layer: layer.name }) }, layers.get(layer.name).title),
        ` ${layer.facts.map(([name, value]) => `${name} ${value}`).join(", ")}`,
        layer.repainting ? element("a", { class: "action", href: link({ image: at.image, repaint: layer.name }) }, "Repaint it") : null)));
    const sections = seen.map((layer, n) => {
      const known = layers.get(layer.name);
      const tiles = (kind, numbers, label) => {
        const sheet = layer.sheets[kind];
        return element("ul", { class: "row", role: "list" }, numbers.map((map, index) => {
          const shown = [tile(sheet, index, label(map, index)), element("span", { class: "number" }, label(map, index))];
          const part = kind === "parts" ? layer.parts[index] : null;
          const events = { onmouseenter: () => show(part), onmouseleave: () => show(null), onfocusin: () => show(part), onfocusout: () => show(null) };
          return element("li", events, known.maps.includes(map)
            ? element("a", { class: "card", href: link({ layer: layer.name, map }) }, shown)
            : element("span", { class: "card" }, shown));
        }));
      };
      const parts = layer.sheets.parts ? [
        element("h3", {}, layer.reconstruction ? "Parts: the strongest activations, each projected on its own" : "The strongest activations, each projected on its own"),
        tiles("parts", layer.parts.map(([map]) => map), (map, index) => `${words.map} ${map}: ${layer.parts[index][1]}`),
      ] : [];
      const maps = layer.sheets.maps ? [
        element("h3", {}, `The strongest ${words.maps}; black is zero`),
        tiles("maps", layer.maps, (map) => `${words.map} ${map}`),
      ] : [];
      if (!parts.length && !maps.length) return null;
      return element("section", { class: "seen", "aria-labelledby": `seen-${n}` },
        element("h2", { id: `seen-${n}` }, element("a", { href: link({ layer: layer.name }) }, known.title)),
        layer.reconstruction ? null : facts(layer.facts, "facts small"), parts, maps);
    });
    const beside = (n) => (data.images[n - 1] ? [link({ image: n }), data.images[n - 1].name] : null);
    return {
      title: image.name,
      path: [[image.name, link(at)]],
      before: beside(at.image - 1),
      after: beside(at.image + 1),
      content: [element("div", { class: "image" },
        element("figure", { class: "panel whole" }, framed, element("figcaption", {}, `The ${words.image}. Point at a part to see where it lies.`)),
        element("div", {},
          rebuilt.length ? element("div", { class: "reconstructions" }, reconstructions) : null,
          element("p", { class: "note" }, rebuilt.length
            ? "A reconstruction is the sum of the projections of all activations of a layer; the parts below are the strongest of these. Grey is zero, and each part has its own contrast."
            : `There are no reconstructions, because the projections of a classifier do not add up to the ${words.image}. Grey is zero, and each part has its own contrast.`),
          sections.filter(Boolean))),
        exampleOf(image.photograph)],
    };
  };

  gallery.views.photo = async (at) => {
    const found = data.photographs && data.photographs.images[at.photo];
    if (!found) throw new Error(`There is no ${words.photograph} ${at.photo} in this gallery`);
    const explored = data.images.findIndex((image) => image.photograph === at.photo);
    const count = data.photographs.images.length;
    const beside = (n) => (n >= 0 && n < count ? [link({ photo: n }), data.photographs.images[n][0]] : null);
    return {
      title: found[0],
      path: [[found[0], link(at)]],
      before: beside(at.photo - 1),
      after: beside(at.photo + 1),
      content: [element("div", { class: "image" },
        element("figure", { class: "panel whole" }, photograph({ photograph: at.photo }),
          element("figcaption", {}, `${found[1].filter((side, axis) => axis || side > 1).join("×")} ${words.pixels}`, explored >= 0
            ? element("a", { class: "action", href: link({ image: explored + 1 }) }, "What each layer makes of it") : null)),
        exampleOf(at.photo) || element("p", { class: "note" }, `No ${words.map} shown here has it among its examples.`))],
    };
  };

  // The maps that have a photograph among their examples.
  function exampleOf(number) {
    const found = number !== undefined && data.photographs && data.photographs.images[number];
    if (!found || !found[3].length) return null;
    return element("section", { "aria-labelledby": "example-of" },
      element("h2", { id: "example-of" }, `${Words.maps} that have it among their examples`),
      data.layers.map((layer, n) => {
        const maps = [...new Set(found[3].filter(([at]) => at === n).map(([, map]) => map))];
        return maps.length ? [element("h3", {}, layer.title),
          element("ul", { class: "row few", role: "list" }, maps.map((map) => element("li", {}, mapTile(layer, map))))] : null;
      }));
  }
}
