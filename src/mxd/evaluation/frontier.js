(() => {
  "use strict";
  const data = JSON.parse(document.getElementById("frontier-data").textContent);
  const root = document.getElementById("frontier-interactive");
  const SVG = "http://www.w3.org/2000/svg";
  const SIZE = { width: 460, height: 300, left: 58, right: 14, top: 12, bottom: 40 };
  const SHAPES = {
    o: "M-5,0a5,5 0 1,0 10,0a5,5 0 1,0 -10,0Z", s: "M-4.5,-4.5H4.5V4.5H-4.5Z", D: "M0,-6L6,0L0,6L-6,0Z",
    "^": "M0,-6L5.5,4.5H-5.5Z", v: "M0,6L5.5,-4.5H-5.5Z", p: "M0,-6L5.7,-1.9L3.5,4.9H-3.5L-5.7,-1.9Z", P: "M-2,-6H2V-2H6V2H2V6H-2V2H-6V-2H-2Z",
    X: "M-5,-3L-3,-5L0,-2L3,-5L5,-3L2,0L5,3L3,5L0,2L-3,5L-5,3L-2,0Z",
  };
  const DASHES = ["none", "6 4", "2 3", "8 3 2 3"];
  const styles = Object.fromEntries(data.kinds.map((kind) => [kind.id, kind]));
  const hidden = new Set();
  let metric = data.metrics[0].id;

  const element = (name, attributes = {}, ...children) => {
    const made = document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    made.append(...children);
    return made;
  };
  const drawn = (parent, name, attributes, text) => {
    const made = document.createElementNS(SVG, name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    if (text !== undefined) made.textContent = text;
    parent.append(made);
    return made;
  };
  const number = (value) => Number(value.toPrecision(3)).toString().replace("-", "−");
  const colour = (kind) => `var(--kind-${kind}, ${styles[kind].colour})`;
  const metricName = () => data.metrics.find((entry) => entry.id === metric).name;

  // By what the points span, as in the picture, save that one across 0 stays linear. Intervals far beyond are cut.
  function scaleOf(values, intervals) {
    const least = Math.min(...values), most = Math.max(...values);
    const logarithmic = least > 0 && most > 10 * least;
    const forward = logarithmic ? Math.log10 : (value) => value;
    const fromZero = !logarithmic && metric !== "loss_recovered" && least >= 0;
    let low = forward(fromZero ? 0 : least), high = forward(most);
    const span = high - low || Math.abs(high) || 1;
    const farthest = [low - span / 2, high + span / 2];
    for (const [lower, upper] of intervals) {
      low = Math.min(low, Math.max(logarithmic && lower <= 0 ? -Infinity : forward(lower), farthest[0]));
      high = Math.max(high, Math.min(forward(upper), farthest[1]));
    }
    low = fromZero ? 0 : low - 0.08 * span;
    high += 0.08 * span;
    const place = (value) => {
      const share = logarithmic && value <= 0 ? 0 : (forward(value) - low) / (high - low);
      const inside = SIZE.height - SIZE.top - SIZE.bottom;
      return SIZE.height - SIZE.bottom - Math.min(Math.max(share, 0), 1) * inside;
    };
    return { place, ticks: logarithmic ? decades(low, high) : steps(low, high) };
  }
  function decades(low, high) {
    const factors = high - low < 2.3 ? [1, 2, 5] : [1];
    const found = [];
    for (let power = Math.floor(low); power <= high; power++)
      for (const factor of factors) {
        const value = Number(`${factor}e${power}`);
        if (Math.log10(value) >= low && Math.log10(value) <= high) found.push(value);
      }
    return found;
  }
  function steps(low, high) {
    const rough = (high - low) / 5, power = 10 ** Math.floor(Math.log10(rough));
    const size = [1, 2, 5, 10].map((factor) => factor * power).find((step) => step >= rough);
    const found = [];
    for (let place = Math.ceil(low / size); place * size <= high; place++) found.push(place * size);
    return found;
  }

  function describe(point) {
    const { mean, each, interval, over } = point.values[metric];
    const lines = [`${point.name}, ${point.sparsity}`, `${metricName()}: ${number(mean)}`];
    if (interval) lines.push(`95 % interval ${over}: ${number(interval[0])} to ${number(interval[1])}`);
    if (each.length > 1) lines.push(`each seed: ${each.map(number).join(", ")}`);
    return [...lines, point.facts.join(" · "), point.students.join(", ")];
  }

  function panel(layer) {
    const points = layer.points.filter((point) => !hidden.has(point.kind) && point.values[metric]);
    const title = data.layers.length > 1 ? `${layer.name}: ${metricName()}` : metricName();
    const figure = element("figure", {}, element("figcaption", {}, title));
    if (!points.length) {
      figure.append(element("p", { class: "note" }, "Nothing to show: not measured, or hidden."));
      return figure;
    }
    const svg = drawn(figure, "svg", { viewBox: `0 0 ${SIZE.width} ${SIZE.height}`, role: "group", "aria-label": title });
    const values = points.flatMap((point) => point.values[metric].each);
    const scale = scaleOf(values, points.map((point) => point.values[metric].interval).filter(Boolean));
    const places = layer.points.map((point) => point.active);
    const first = Math.log2(Math.min(...places)), octaves = Math.log2(Math.max(...places)) - first;
    const inside = SIZE.width - SIZE.left - SIZE.right - 40;
    const across = (place) => SIZE.left + 20 + (octaves ? (Math.log2(place) - first) / octaves : 0.5) * inside;
    axes(svg, scale, layer, across);
    const names = [...new Set(layer.points.map((point) => point.series))];
    names.forEach((name, order) => {
      const members = points.filter((point) => point.series === name).sort((a, b) => a.active - b.active);
      if (members.length) series(svg, members, scale, (place) => across(place) + 4 * (order - (names.length - 1) / 2), dash(layer, name));
    });
    return figure;
  }
  function dash(layer, name) {
    const kind = layer.points.find((point) => point.series === name).kind;
    const siblings = [...new Set(layer.points.filter((point) => point.kind === kind).map((point) => point.series))];
    return DASHES[siblings.indexOf(name) % DASHES.length];
  }
  function axes(svg, scale, layer, across) {
    const bottom = SIZE.height - SIZE.bottom;
    for (const tick of scale.ticks) {
      const y = scale.place(tick);
      drawn(svg, "line", { x1: SIZE.left, x2: SIZE.width - SIZE.right, y1: y, y2: y, class: "grid" });
      drawn(svg, "text", { x: SIZE.left - 6, y: y + 4, "text-anchor": "end" }, number(tick));
    }
    drawn(svg, "line", { x1: SIZE.left, x2: SIZE.width - SIZE.right, y1: bottom, y2: bottom, class: "axis" });
    for (const k of layer.ticks) drawn(svg, "text", { x: across(k), y: bottom + 17, "text-anchor": "middle" }, k);
    const middle = (SIZE.left + SIZE.width - SIZE.right) / 2;
    drawn(svg, "text", { x: middle, y: SIZE.height - 5, "text-anchor": "middle" }, layer.axis);
  }
  function series(svg, members, scale, across, dashes) {
    const kind = members[0].kind;
    const group = drawn(svg, "g", { style: `--kind:${colour(kind)}` });
    const path = members.map((point) => `${across(point.active)},${scale.place(point.values[metric].mean)}`).join(" ");
    drawn(group, "polyline", { points: path, class: "line", "stroke-dasharray": dashes });
    for (const point of members) {
      const { mean, each, interval } = point.values[metric], x = across(point.active);
      if (interval) drawn(group, "line", { x1: x, x2: x, y1: scale.place(interval[0]), y2: scale.place(interval[1]), class: "interval" });
      if (each.length > 1) for (const value of each) drawn(group, "circle", { cx: x, cy: scale.place(value), r: 1.8, class: "seed" });
      const lines = describe(point), at = `translate(${x},${scale.place(mean)})`;
      const mark = drawn(group, "g", { transform: at, class: "mark", tabindex: "0", role: "img", "aria-label": lines.join("; ") });
      drawn(mark, "circle", { r: 11, class: "target" });
      drawn(mark, "path", { d: SHAPES[styles[kind].marker] });
      for (const event of ["pointerenter", "focus"]) mark.addEventListener(event, () => show(mark, lines));
      for (const event of ["pointerleave", "blur"]) mark.addEventListener(event, () => { tip.hidden = true; });
    }
  }

  const tip = element("div", { class: "tip", role: "tooltip" });
  tip.hidden = true;
  function show(mark, lines) {
    const [head, ...rest] = lines;
    tip.replaceChildren(element("strong", {}, head), ...rest.map((line) => element("div", {}, line)));
    tip.hidden = false;
    const box = mark.getBoundingClientRect(), around = root.getBoundingClientRect();
    const left = Math.min(box.left - around.left + 24, around.width - tip.offsetWidth);
    tip.style.left = `${Math.max(left, 0)}px`;
    tip.style.top = `${box.bottom - around.top + 4}px`;
  }

  const panels = element("div", { class: "panels" });
  const redraw = () => { tip.hidden = true; panels.replaceChildren(...data.layers.map(panel)); };
  const metrics = element("fieldset", {}, element("legend", {}, "Metric"));
  for (const { id, name } of data.metrics) {
    const input = element("input", { type: "radio", name: "frontier-metric", value: id });
    input.checked = id === metric;
    input.addEventListener("change", () => { metric = id; redraw(); });
    metrics.append(element("label", {}, input, ` ${name}`));
  }
  const kinds = element("fieldset", {}, element("legend", {}, "Kinds"));
  for (const { id, name, marker } of data.kinds) {
    const input = element("input", { type: "checkbox", value: id });
    input.checked = true;
    input.addEventListener("change", () => { hidden[input.checked ? "delete" : "add"](id); redraw(); });
    const swatch = element("span", { "aria-hidden": "true", style: `--kind:${colour(id)}` });
    const glyph = drawn(swatch, "svg", { viewBox: "-7 -7 14 14", width: 12, height: 12, class: "mark" });
    drawn(glyph, "path", { d: SHAPES[marker] });
    kinds.append(element("label", {}, input, " ", swatch, ` ${name}`));
  }
  root.append(metrics, kinds, panels, tip);
  redraw();
  root.hidden = false;
  document.getElementById("frontier-static").hidden = true;
})();
