"use strict";
// The frame around the pages: which one is shown, the bar, and the keys.
(() => {
  const { h, route, percent, count } = explorer.elements;
  const { data, pages } = explorer;
  const NAMES = { map: "Map", text: "Text", steer: "Steer", run: "Run" };
  const main = document.getElementById("main");
  let leave = null, shown = 0;

  function place(run) {
    const [page = "", layer, id, ...rest] = location.hash.replace(/^#\/?/, "").split("/").map((part) => {
      try { return decodeURIComponent(part); } catch { return part; }
    });
    const student = layer !== undefined && id !== undefined ? `${layer}/${id}` : run.students[0].name;
    return { page: page || "map", student, rest };
  }

  // What a page will ask for is asked for at once, before the run is there to draw it with.
  function warm() {
    const [page, layer, id, latents = ""] = location.hash.replace(/^#\/?/, "").split("/");
    if (!data.live || !Object.hasOwn(pages, page) || id === undefined) return;
    const student = `${layer}/${id}`.split("/").map(decodeURIComponent).join("/");
    const numbers = ["latent", "steer"].includes(page) ? decodeURIComponent(latents).split(",").filter((part) => /^\d+$/.test(part)) : [];
    const asked = [page === "run" ? null : data.labels(student), page === "map" ? data.map(student) : null, ...numbers.map((number) => data.latent(student, Number(number)))];
    // Whoever needs it is told what went wrong.
    asked.forEach((answer) => answer?.catch(() => {}));
  }

  function drawBar(run, at) {
    const here = at.page === "latent" ? "map" : at.page;
    const links = Object.entries(NAMES).filter(([page]) => data.live || !["text", "steer"].includes(page)).map(([page, name]) =>
      h("a", { href: route(page, at.student), "aria-current": page === here ? "page" : null }, name));
    const choice = h("select", { id: "student", "aria-label": "Sparse layer", onchange: () => { location.hash = route(here, choice.value); } },
      run.students.map((student) => h("option", { value: student.name, selected: student.name === at.student }, `${run.kinds[student.kind]} · layer ${student.layer} · K ${student.k}${name(student)}`)));
    document.getElementById("bar").replaceChildren(h("div", { class: "inner" },
      h("a", { class: "brand", href: route("map", at.student) }, h("b", {}, "mxd"), h("span", {}, run.run)),
      h("nav", { "aria-label": "Pages" }, links), choice));
  }
  // What an id says beside kind and K.
  const name = (student) => student.id.replace(student.kind, "").replace(`-k${student.k}`, "").replaceAll("-", " ");

  async function show() {
    const turn = ++shown;
    leave?.();
    leave = null;
    let title = "mxd explorer";
    try {
      warm();
      const run = await data.run();
      const at = place(run);
      const student = run.students.find((entry) => entry.name === at.student);
      if (!student) throw new Error(`This run has no student ${at.student}.`);
      const page = Object.hasOwn(pages, at.page) && pages[at.page];
      if (!page) throw new Error(`There is no page ${at.page}.`);
      const made = await page({ run, student, rest: at.rest });
      if (turn !== shown) { made.leave?.(); return; }
      drawBar(run, at);
      main.replaceChildren(made.element);
      leave = made.leave || null;
      made.ready?.();
      title = `${made.title} · mxd explorer`;
      document.getElementById("foot").replaceChildren(h("p", {},
        `${run.model} · ${run.text}, ${count(run.num_tokens)} tokens · ${student.name}: ${percent(student.dead_fraction)} of the latents never fired · collected on ${run.date} by mxd ${run.version}`));
    } catch (error) {
      if (turn !== shown) return;
      main.replaceChildren(h("section", { class: "error" }, h("h1", {}, "This cannot be shown"), h("p", {}, error.message), h("p", {}, h("a", { href: "#/" }, "To the map"))));
    }
    document.title = title;
    document.documentElement.dataset.shown = location.hash || "#/";
    if (turn > 1) { main.focus({ preventScroll: true }); scrollTo(0, 0); }
  }

  document.body.append(h("div", { id: "said", class: "unseen", "aria-live": "polite" }));
  addEventListener("hashchange", show);
  addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.target.matches("input, textarea, select")) return;
    if (event.key === "/" && document.getElementById("query")) { event.preventDefault(); document.getElementById("query").focus(); }
    const link = document.querySelector(`[data-key="${{ j: "next", k: "previous", m: "map" }[event.key]}"]`);
    if (link) link.click();
  });
  show();
})();
