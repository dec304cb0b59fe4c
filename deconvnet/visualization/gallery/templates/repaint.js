// The view that repaints a reconstruction from single activations, each of which can be left out.
// With the switches fixed, a reconstruction is the sum of the projections of its activations.
"use strict";

{
  const { data, words, layers, element, number, place, link, load } = gallery;
  const GROUP = 12;
  // The least width of the curves of a recording, four times their height.
  const CURVE = 480;

  // Values from integers in base64, little endian as on all machines that run browsers.
  function decoded({ data: text, factor }, kind) {
    const bytes = Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
    return Float32Array.from(new kind(bytes.buffer), (value) => value * factor);
  }

  gallery.views.repaint = async (at) => {
    const image = data.images[at.image - 1];
    if (!image) throw new Error(`There is no ${words.image} ${at.image} in this gallery`);
    const layer = (await load(image.script)).find((each) => each.name === at.repaint);
    if (!layer || !layer.repainting) throw new Error(`${image.name} has no reconstruction by ${at.repaint} to repaint`);
    const stored = await load(layer.repainting);
    const [planes, height, width] = stored.size;
    const [original, rest] = [decoded(stored.image, Int8Array), decoded(stored.rest, Int16Array)];
    const alone = stored.parts.map((part) => ({ ...part, count: 1, tile: decoded(part, Int8Array), on: true }));
    // Groups of weaker activations, each a picture of the whole image.
    const groups = stored.groups.map((group) => ({ ...group, count: group.last - group.first + 1, box: [0, 0, height, width], tile: decoded(group, Int8Array), on: true }));
    const parts = [...alone, ...groups];
    const listed = parts.reduce((sum, part) => sum + part.count, 0);
    let withRest = true;
    // Where the slider switches each part on: a group takes more of its way than a single activation.
    const steps = parts.map((part, n) => n + 1 + (part.first ? GROUP * (n + 1 - alone.length) : 0));
    const all = (steps[steps.length - 1] || 0) + (stored.total > listed ? GROUP : 0);

    // ---- mathematics ----

    function sum() {
      const result = withRest ? Float32Array.from(rest) : new Float32Array(rest.length);
      for (const { on, tile, box: [top, left, bottom, right] } of parts) {
        if (!on) continue;
        for (let c = 0, n = 0; c < planes; c++) {
          for (let row = top; row < bottom; row++) {
            for (let at2 = (c * height + row) * width + left, end = at2 + right - left; at2 < end;) result[at2++] += tile[n++];
          }
        }
      }
      return result;
    }

    function decibels(estimate) {
      const mean = original.reduce((total, value) => total + value, 0) / original.length;
      let [signal, noise] = [0, 0];
      for (let n = 0; n < original.length; n++) {
        signal += (original[n] - mean) ** 2;
        noise += (original[n] - estimate[n]) ** 2;
      }
      return 10 * Math.log10(signal / noise);
    }

    // ---- pictures ----

    // A colour of a pixel; 1 is white, -1 is black.
    function shade(values, color, n, step, white) {
      let value = 0;
      for (let c = 0; c < planes; c++) value += stored.rgb[color][c] * values[c * step + n];
      return value / white;
    }

    function paint(canvas, values, size, white, thickness = 1.5) {
      const [rows, columns] = size;
      if (height === 1) return plot(canvas, values, columns, white, thickness);
      Object.assign(canvas, { width: columns, height: rows });
      const context = canvas.getContext("2d");
      const pixels = context.createImageData(columns, rows);
      const step = rows * columns;
      for (let n = 0; n < step; n++) {
        for (let color = 0; color < 3; color++) pixels.data[4 * n + color] = 127.5 * (1 + shade(values, color, n, step, white));
        pixels.data[4 * n + 3] = 255;
      }
      context.putImageData(pixels, 0, 0);
    }

    // A recording as curves, black where those of all colours meet.
    function plot(canvas, values, columns, white, thickness) {
      const wide = columns * Math.max(1, Math.ceil(CURVE / columns));
      Object.assign(canvas, { width: wide, height: CURVE / 4 });
      const context = canvas.getContext("2d");
      context.fillStyle = "white";
      context.fillRect(0, 0, canvas.width, canvas.height);
      context.globalCompositeOperation = "multiply";
      const at = (value) => (canvas.height * (1 - Math.max(-1, Math.min(1, value)) * 0.97)) / 2;
      context.fillStyle = "#ccc";
      context.fillRect(0, at(0), canvas.width, 1);
      for (const [color, ink] of ["#f00", "#0f0", "#00f"].entries()) {
        context.strokeStyle = ink;
        context.lineWidth = (thickness * wide) / CURVE;
        context.beginPath();
        for (let n = 0; n < columns; n++) context.lineTo(((n + 0.5) * wide) / columns, at(shade(values, color, n, columns, white)));
        context.stroke();
      }
    }

    const canvas = element("canvas", { role: "img", "aria-label": `The repainted ${words.image}` });
    const reference = element("canvas", { role: "img", "aria-label": `The preprocessed ${words.image}` });
    paint(reference, original, [height, width], stored.white);
    const error = element("output", { class: "error", "aria-live": "polite" });
    const used = element("output", {});
    const slider = element("input", { type: "range", min: 0, max: all, value: all, "data-key": "strongest", "aria-label": "How many of the strongest activations",
      oninput: () => {
        const reached = Number(slider.value);
        withRest = remaining.checked = reached >= all;
        choose((part, n) => steps[n] <= reached);
      } });
    const remaining = element("input", { type: "checkbox", checked: true, "data-key": "rest", onchange: () => { withRest = remaining.checked; update(); } });
    const box = element("span", { class: "box", hidden: true });

    const line = element("p", { class: "note" }, "Point at an activation to see where it paints.");

    function outline(part) {
      box.hidden = !part;
      if (!part) return;
      if (part.first) line.replaceChildren(`Activations ${part.first.toLocaleString("en")} to ${part.last.toLocaleString("en")}, in the order of their strength, together.`);
      else line.replaceChildren(`${number(part.value)} of `, element("a", { href: link({ layer: at.repaint, map: part.map }) }, `${words.map} ${part.map}`), ` of ${layers.get(at.repaint).title}, in ${place(part)}.`);
      const [top, left, bottom, right] = part.box;
      const percent = { top: top / height, left: left / width, height: (bottom - top) / height, width: (right - left) / width };
      for (const [name, share] of Object.entries(percent)) box.style[name] = `${100 * share}%`;
    }

    const buttons = parts.map((part, n) => {
      const small = element("canvas", {});
      const size = [part.box[2] - part.box[0], part.box[3] - part.box[1]];
      paint(small, part.tile, size, Math.max(...part.tile.map(Math.abs), 1e-12), 6);
      const name = part.first ? `${part.first}–${part.last}` : `${words.map} ${part.map}`;
      const label = part.first ? `Activations ${name}, together` : `Activation ${n + 1}, ${name}: ${number(part.value)}`;
      return element("button", { type: "button", class: "part", "aria-pressed": "true", tabindex: n ? -1 : 0, title: label, "aria-label": label,
        onclick: () => { part.on = !part.on; update(); }, onmouseenter: () => outline(part), onmouseleave: () => outline(null), onfocus: () => outline(part), onblur: () => outline(null) },
      element("span", { class: height === 1 ? "thumb curve" : "thumb" }, small), element("span", { class: "number" }, name));
    });

    function choose(rule) {
      parts.forEach((part, n) => { part.on = rule(part, n); });
      update();
    }

    function update() {
      const painted = sum();
      paint(canvas, painted, [height, width], stored.white);
      const snr = decibels(painted);
      error.textContent = Number.isFinite(snr) ? `${number(snr)} dB` : "exact";
      const count = parts.reduce((sum_, part) => sum_ + (part.on ? part.count : 0), withRest ? stored.total - listed : 0);
      used.textContent = `${count.toLocaleString("en")} of ${stored.total.toLocaleString("en")} activations`;
      buttons.forEach((button, n) => button.setAttribute("aria-pressed", String(parts[n].on)));
    }

    // A click on the picture switches the activation that paints most there.
    canvas.addEventListener("click", (event) => {
      const shown = canvas.getBoundingClientRect();
      const [row, column] = [Math.floor(((event.clientY - shown.top) * height) / shown.height), Math.floor(((event.clientX - shown.left) * width) / shown.width)];
      let [best, most] = [null, 0];
      for (const part of alone) {
        const [top, left, bottom, right] = part.box;
        if (row < top || row >= bottom || column < left || column >= right) continue;
        const value = Math.abs(part.tile[(row - top) * (right - left) + column - left]);
        if (value > most) [best, most] = [part, value];
      }
      if (best) { best.on = !best.on; outline(best); update(); }
    });

    const list = element("div", { class: "parts", role: "group", "aria-label": "Activations, strongest first" }, buttons);
    list.addEventListener("keydown", gallery.moveInGrid);
    const others = image.repaintings.filter((name) => name !== at.repaint);
    const beside = (n) => (data.images[n - 1] && data.images[n - 1].repaintings.includes(at.repaint) ? [link({ image: n, repaint: at.repaint }), data.images[n - 1].name] : null);
    update();
    return {
      title: `Repaint ${image.name} with ${layers.get(at.repaint).title}`,
      path: [[image.name, link({ image: at.image })], [`repaint with ${layers.get(at.repaint).title}`, link(at)]],
      before: beside(at.image - 1),
      after: beside(at.image + 1),
      content: [
        element("p", { class: "note" }, `The reconstruction is the sum of what ${stored.total.toLocaleString("en")} activations paint, each on its own. Switch the ${alone.length} strongest on and off, below or with a click on the picture${groups.length ? "; weaker ones follow in groups" : ""}.`,
          others.length ? [" The same with ", others.map((name, n) => [n ? ", " : "", element("a", { href: link({ image: at.image, repaint: name }) }, layers.get(name).title)]), "."] : null),
        element("div", { class: "repaint" },
          element("figure", { class: "panel" }, element("div", { class: "framed" }, canvas, box), element("figcaption", {}, "Repainted")),
          element("figure", { class: "panel" }, reference, element("figcaption", {}, `The ${words.image} as the network sees it`)),
          element("form", { class: "controls", "aria-label": "Activations", onsubmit: (event) => event.preventDefault() },
            element("p", { class: "readout" }, "Signal to noise ", error),
            element("label", {}, "The strongest", slider, used),
            stored.total > listed ? element("label", { class: "check" }, remaining, `the ${(stored.total - listed).toLocaleString("en")} weakest activations`) : null,
            element("div", { class: "tools" },
              element("button", { type: "button", "data-key": "all", onclick: () => { withRest = remaining.checked = true; slider.value = all; choose(() => true); } }, "All"),
              element("button", { type: "button", "data-key": "none", onclick: () => { withRest = remaining.checked = false; slider.value = 0; choose(() => false); } }, "None"),
              element("button", { type: "button", "data-key": "invert", onclick: () => { withRest = remaining.checked = !withRest; choose((part) => !part.on); } }, "Invert")),
            line)),
        list,
      ],
    };
  };
}
