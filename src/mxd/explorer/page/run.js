"use strict";
// The run as a whole: its students, its frontier and how they learnt.
explorer.pages.run = async ({ run }) => {
  const { h, s, number, percent, count, route } = explorer.elements;
  const { lines } = explorer.charts;
  const DASHES = ["", "6 4", "2 3", "8 3 2 3"];
  const compact = (value) => value >= 1e6 ? `${number(value / 1e6)}M` : value >= 1e3 ? `${number(value / 1e3)}k` : `${value}`;
  const kindOf = (name) => Object.keys(run.kinds).filter((kind) => name.startsWith(kind)).sort((a, b) => b.length - a.length)[0] ?? "";

  function legend(series) {
    return h("ul", { class: "legend" }, series.map((entry) => h("li", { class: `kind-${entry.kind}` }, s("svg", { class: "swatch", viewBox: "0 0 24 8", "aria-hidden": "true" }, s("line", { x1: 0, x2: 24, y1: 4, y2: 4, "stroke-dasharray": entry.dash || null })), entry.name)));
  }
  function frontier(layer) {
    const names = [...new Set(layer.points.map((point) => point.series))];
    const panels = run.frontier.metrics.map((metric) => {
      const series = names.map((name, place) => {
        const own = layer.points.filter((point) => point.series === name);
        const same = names.filter((other) => layer.points.find((point) => point.series === other).kind === own[0].kind);
        return { name: own[0].name, kind: own[0].kind, dash: DASHES[same.indexOf(name) % DASHES.length], points: own.flatMap((point) => {
          const value = point.values[metric.id];
          return value && value.mean !== null ? [{ x: point.active, y: value.mean, low: value.interval?.[0], high: value.interval?.[1], title: `${point.name}, ${point.sparsity}: ${number(value.mean)}` }] : [];
        }).sort((a, b) => a.x - b.x) };
      });
      const values = series.flatMap((entry) => entry.points.map((point) => point.y));
      const log = values.length > 0 && Math.min(...values) > 0 && Math.max(...values) > 10 * Math.min(...values);
      return { series, figure: h("figure", {}, h("figcaption", {}, metric.name), lines(series, { label: `${metric.name} against K`, x: layer.axis, y: "", logX: true, logY: log, ticks: layer.ticks })) };
    });
    return h("section", {}, h("h2", {}, run.frontier.layers.length > 1 ? `Frontier, ${layer.name.toLowerCase()}` : "Frontier"), legend(panels[0].series), h("div", { class: "panels" }, panels.map((panel) => panel.figure)));
  }
  function curves() {
    if (!run.curves.length) return null;
    const layers = [...new Set(run.curves.map((curve) => curve.student.split("/")[0]))];
    const series = run.curves.map((curve) => {
      const name = curve.student.split("/").pop(), kind = kindOf(name);
      const place = run.curves.filter((other) => kindOf(other.student.split("/").pop()) === kind).indexOf(curve);
      return { name: curve.student, kind, dash: DASHES[place % DASHES.length], points: curve.tokens.map((x, index) => ({ x, y: curve.fvu[index] })) };
    });
    return h("section", {}, h("h2", {}, "Training"), h("p", { class: "note" }, "Fraction of variance unexplained of the batches, against tokens seen."), layers.map((layer) => {
      const own = series.filter((entry) => entry.name.split("/")[0] === layer || layers.length === 1);
      return h("div", { class: "panels" }, h("figure", {}, legend(own), lines(own, { label: "Fraction of variance unexplained against tokens", x: "tokens seen", y: "fvu", logY: true, tickX: compact, dots: false })));
    }));
  }
  const students = h("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Students" }, h("table", {},
    h("thead", {}, h("tr", {}, ["Student", "Latents", "K", "l0", "Never fired", "Parameters"].map((name) => h("th", { scope: "col" }, name)))),
    h("tbody", {}, run.students.map((student) => h("tr", {}, h("th", { scope: "row" }, h("a", { href: route("map", student.name) }, student.name)),
      [count(student.num_latents), `${student.k}`, number(student.l0), percent(student.dead_fraction), compact(student.parameters)].map((text) => h("td", {}, text)))))));
  const facts = h("dl", { class: "facts" }, [["Model", run.model], ["Text", run.text], ["Tokens read", count(run.num_tokens)], ["Context", `${run.context} tokens`], ["Tokens trained", run.tokens_trained === null ? "–" : count(run.tokens_trained)], ["Collected", `${run.date}, in ${number(run.seconds)} s`]]
    .map(([term, text]) => h("div", {}, h("dt", {}, term), h("dd", {}, text))));
  return {
    element: h("div", {}, h("div", { class: "head" }, h("h1", {}, run.run), facts), h("section", {}, h("h2", {}, "Sparse layers"), students),
      run.frontier ? run.frontier.layers.map(frontier) : h("p", { class: "note" }, "The run had not been evaluated when this was collected; mxd evaluate, then mxd explore --recollect."), curves()),
    title: "The run",
  };
};
