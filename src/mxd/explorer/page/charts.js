"use strict";
// Small pictures as SVG, coloured by the style sheet.
explorer.charts = (() => {
  const { h, s, number, count } = explorer.elements;

  // Bars from left to right; `name(place)` says what a bar is.
  function bars(values, { label, name, low = "", high = "", height = 96 }) {
    const width = 320, most = Math.max(1, ...values), step = width / values.length;
    const picture = s("svg", { viewBox: `0 0 ${width} ${height}`, class: "bars", role: "img", "aria-label": label, preserveAspectRatio: "none" });
    values.forEach((value, place) => {
      const size = value ? Math.max(1.5, value / most * (height - 4)) : 0;
      const bar = s("rect", { x: place * step + 0.75, y: height - size, width: step - 1.5, height: size, rx: 1 });
      const column = s("g", {}, s("rect", { class: "ground", x: place * step, y: 0, width: step, height }), bar, s("title", {}, `${name(place)}: ${count(value)}`));
      picture.append(column);
    });
    return h("div", { class: "chart" }, picture, h("div", { class: "ends" }, h("span", {}, low), h("span", {}, high)));
  }

  const decades = (low, high) => {
    const factors = Math.log10(high / low) < 2 ? [1, 2, 5] : [1], found = [];
    for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++)
      for (const factor of factors) { const value = Number(`${factor}e${power}`); if (value >= low && value <= high) found.push(value); }
    return found;
  };
  function steps(low, high) {
    if (high <= low) return [low];
    const rough = (high - low) / 4, power = 10 ** Math.floor(Math.log10(rough));
    const size = [1, 2, 5, 10].map((factor) => factor * power).find((value) => value >= rough), found = [];
    for (let place = Math.ceil(low / size - 1e-9); place * size <= high * (1 + 1e-9); place++) found.push(place * size);
    return found;
  }
  // Lines with points: series of {name, kind, dash, points: [{x, y, low, high, title}]}.
  function lines(series, { label, x, y, logX = false, logY = false, tickX = number, dots = true, ticks }) {
    const size = { width: 460, height: 280, left: 60, right: 16, top: 12, bottom: 42 };
    const points = series.flatMap((entry) => entry.points);
    if (!points.length) return h("p", { class: "note" }, "Nothing to show.");
    const shown = points.flatMap((point) => [point.y, point.low, point.high]).filter((value) => Number.isFinite(value) && (!logY || value > 0));
    const scale = (values, log, from, to) => {
      let low = Math.min(...values), high = Math.max(...values);
      if (log) { low /= 1.12; high *= 1.12; } else { if (low > 0) low = 0; if (high <= low) high = low + 1; high += 0.04 * (high - low); }
      const forward = log ? Math.log : (value) => value;
      return { low, high, at: (value) => from + (forward(Math.min(Math.max(value, low), high)) - forward(low)) / (forward(high) - forward(low)) * (to - from) };
    };
    const across = scale(points.map((point) => point.x), logX, size.left, size.width - size.right);
    const up = scale(shown, logY, size.height - size.bottom, size.top);
    const picture = s("svg", { viewBox: `0 0 ${size.width} ${size.height}`, class: "lines", role: "img", "aria-label": label });
    for (const value of logY ? decades(up.low, up.high) : steps(up.low, up.high))
      picture.append(s("line", { class: "grid", x1: size.left, x2: size.width - size.right, y1: up.at(value), y2: up.at(value) }),
        s("text", { x: size.left - 8, y: up.at(value) + 4, "text-anchor": "end" }, number(value)));
    for (const value of ticks || (logX ? decades(across.low, across.high) : steps(across.low, across.high)))
      picture.append(s("text", { x: across.at(value), y: size.height - size.bottom + 18, "text-anchor": "middle" }, tickX(value)));
    picture.append(s("text", { class: "axis", x: (size.left + size.width - size.right) / 2, y: size.height - 6, "text-anchor": "middle" }, x),
      s("text", { class: "axis", x: 0, y: 0, transform: `translate(12 ${(size.top + size.height - size.bottom) / 2}) rotate(-90)`, "text-anchor": "middle" }, y));
    for (const entry of series) {
      const group = s("g", { class: `series kind-${entry.kind}` });
      const path = entry.points.map((point, place) => `${place ? "L" : "M"}${across.at(point.x).toFixed(1)},${up.at(point.y).toFixed(1)}`).join("");
      group.append(s("path", { d: path, "stroke-dasharray": entry.dash || null, opacity: entry.opacity ?? null }));
      for (const point of dots ? entry.points : []) {
        if (Number.isFinite(point.low)) group.append(s("line", { x1: across.at(point.x), x2: across.at(point.x), y1: up.at(point.low), y2: up.at(point.high) }));
        group.append(s("circle", { cx: across.at(point.x), cy: up.at(point.y), r: 4 }, s("title", {}, point.title)));
      }
      picture.append(group);
    }
    return picture;
  }
  return { bars, lines };
})();
