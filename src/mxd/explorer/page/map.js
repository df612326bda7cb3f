"use strict";
// The map: a dot for every latent, frequency against what is asked for.
explorer.pages.map = async ({ run, student }) => {
  const { h, number, percent, count, visible, alone, route, latentLink, announce } = explorer.elements;
  const { data } = explorer;
  const [stored, labels] = await Promise.all([data.map(student.name), data.labels(student.name)]);
  const MISSING = 65535, PAD = { left: 54, right: 14, top: 12, bottom: 42 }, ROWS = 14;
  const AXES = {
    specialisation: "Token specialisation: how few tokens it fires on",
    distinctness: "Distinctness: 1 − cosine to the nearest latent",
    label: "Label or probed concept",
  };

  const bytes = (text) => {
    if (Uint8Array.fromBase64) return Uint8Array.fromBase64(text).buffer;
    const letters = atob(text), made = new Uint8Array(letters.length);
    for (let place = 0; place < letters.length; place++) made[place] = letters.charCodeAt(place);
    return made.buffer;
  };
  const rate = new Float32Array(bytes(stored.rate));
  const token = new Int32Array(bytes(stored.token));
  const sixteen = { specialisation: new Uint16Array(bytes(stored.specialisation)), distinctness: new Uint16Array(bytes(stored.distinctness)) };
  const alive = new Int32Array(rate.reduce((sum, share) => sum + (share > 0), 0));
  for (let latent = 0, place = 0; latent < rate.length; latent++) if (rate[latent] > 0) alive[place++] = latent;
  const SMALL = alive.length > 20000;
  const lowest = Math.log10(0.7 / student.num_tokens), span = -lowest + 0.08;
  const labelOf = (latent) => labels.labels[latent]?.label || labels.concepts[latent]?.concept || "";

  const xs = new Float32Array(rate.length), ys = new Float32Array(rate.length);
  let axis = "specialisation", rows = [], found = new Set(), hovered = -1, view = { x: 0, y: 0, zoom: 1 }, size = { width: 0, height: 0 };
  for (const latent of alive) xs[latent] = (Math.log10(rate[latent]) - lowest) / span;

  // The same latent is moved by the same amount each time.
  const jitter = (latent) => ((latent * 2654435761 >>> 0) / 2 ** 32 - 0.5) * 0.7;
  function place() {
    rows = [];
    if (axis === "label") {
      const counts = new Map();
      for (const latent of alive) if (labelOf(latent)) counts.set(labelOf(latent), (counts.get(labelOf(latent)) || 0) + 1);
      const names = [...counts].sort((a, b) => b[1] - a[1]).slice(0, ROWS).map(([name]) => name);
      rows = ["no label", ...(counts.size > names.length ? ["other labels"] : []), ...names.reverse()];
      const row = new Map(rows.map((name, index) => [name, index]));
      for (const latent of alive) {
        const name = labelOf(latent);
        const index = name ? row.get(name) ?? 1 : 0;
        ys[latent] = (index + 0.5 + jitter(latent)) / rows.length;
      }
      return;
    }
    // Below 0: latents of which the number is not known.
    for (const latent of alive) ys[latent] = sixteen[axis][latent] === MISSING ? 0.02 : 0.05 + 0.93 * sixteen[axis][latent] / (MISSING - 1);
  }

  const canvas = h("canvas", { id: "map", tabindex: "0", role: "application", "aria-label": `Map of ${count(alive.length)} latents. Arrow keys go from dot to dot, Enter opens one, plus and minus zoom.` });
  const tip = h("div", { class: "tip", hidden: true });
  const inside = () => ({ width: size.width - PAD.left - PAD.right, height: size.height - PAD.top - PAD.bottom });
  const screenX = (x) => PAD.left + ((x - view.x) * view.zoom) * inside().width;
  const screenY = (y) => size.height - PAD.bottom - ((y - view.y) * view.zoom) * inside().height;

  function draw() {
    const style = getComputedStyle(canvas), context = canvas.getContext("2d"), ratio = devicePixelRatio || 1;
    const colour = (name) => style.getPropertyValue(name).trim();
    if (canvas.width !== Math.round(size.width * ratio) || canvas.height !== Math.round(size.height * ratio)) {
      canvas.width = Math.round(size.width * ratio);
      canvas.height = Math.round(size.height * ratio);
    }
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.clearRect(0, 0, size.width, size.height);
    drawAxes(context, colour);
    context.save();
    context.beginPath();
    context.rect(PAD.left - 6, PAD.top - 6, inside().width + 12, inside().height + 12);
    context.clip();
    const dot = Math.min(7, (SMALL ? 1.6 : alive.length > 3000 ? 2.6 : 4.4) * Math.sqrt(view.zoom));
    const alpha = found.size ? 0.22 : SMALL ? 0.45 : 0.62;
    context.fillStyle = colour("--dot");
    if (SMALL && dot < 4) drawPixels(context, Math.max(1, Math.round(dot * ratio)), alpha, colour("--dot"));
    else {
      context.globalAlpha = alpha;
      for (const latent of alive) {
        const x = screenX(xs[latent]), y = screenY(ys[latent]);
        if (x < 0 || y < 0 || x > size.width || y > size.height) continue;
        context.beginPath();
        context.arc(x, y, dot / 2, 0, 7);
        context.fill();
      }
    }
    context.globalAlpha = 1;
    context.fillStyle = colour("--found");
    for (const latent of found) ring(context, latent, Math.max(dot, 6), false);
    if (axis !== "label") {
      context.fillStyle = colour("--labelled");
      for (const latent of Object.keys(labels.labels)) if (rate[latent] > 0) ring(context, Number(latent), Math.max(dot, 5), false);
    }
    context.strokeStyle = colour("--ink");
    context.lineWidth = 1.5;
    if (hovered >= 0) ring(context, hovered, Math.max(dot, 6) + 5, true);
    context.restore();
  }
  // A hundred thousand dots one by one take longer than a page may: here they are counted pixel by pixel.
  function drawPixels(context, side, alpha, colour) {
    const { width, height } = canvas, ratio = width / size.width, hits = new Uint8Array(width * height);
    const across = inside().width * view.zoom * ratio, up = inside().height * view.zoom * ratio;
    const left = screenX(0) * ratio - side / 2, bottom = screenY(0) * ratio - side / 2;
    for (let n = 0; n < alive.length; n++) {
      const x = Math.round(left + xs[alive[n]] * across), y = Math.round(bottom - ys[alive[n]] * up);
      if (x < 0 || y < 0 || x + side > width || y + side > height) continue;
      for (let row = y; row < y + side; row++) for (let column = x; column < x + side; column++) hits[row * width + column] += hits[row * width + column] < 255;
    }
    const layer = new OffscreenCanvas(width, height), drawn = layer.getContext("2d"), image = drawn.createImageData(width, height);
    const pixels = new Uint32Array(image.data.buffer), shade = packed(colour), shades = new Uint32Array(256);
    for (let count = 1; count < 256; count++) shades[count] = ((Math.round(255 * (1 - (1 - alpha) ** count)) << 24) | shade) >>> 0;
    for (let place = 0; place < hits.length; place++) if (hits[place]) pixels[place] = shades[hits[place]];
    drawn.putImageData(image, 0, 0);
    context.save();
    context.setTransform(1, 0, 0, 1, 0, 0);
    context.drawImage(layer, 0, 0);
    context.restore();
  }
  // "#rrggbb" as image data has it, without alpha.
  const packed = (colour) => parseInt(colour.slice(5, 7), 16) << 16 | parseInt(colour.slice(3, 5), 16) << 8 | parseInt(colour.slice(1, 3), 16);
  function ring(context, latent, width, open) {
    if (!(rate[latent] > 0)) return;
    context.beginPath();
    context.arc(screenX(xs[latent]), screenY(ys[latent]), width / 2, 0, 7);
    if (open) context.stroke(); else context.fill();
  }
  function drawAxes(context, colour) {
    context.font = `12px ${colour("--sans-name") || "sans-serif"}`;
    context.strokeStyle = colour("--grid");
    context.fillStyle = colour("--muted");
    context.lineWidth = 1;
    context.textAlign = "center";
    const narrow = size.width < 520;
    for (let power = Math.ceil(lowest); power <= 0; power++) {
      const x = screenX((power - lowest) / span);
      if (x < PAD.left || x > size.width - PAD.right + 1) continue;
      line(context, x, PAD.top, x, size.height - PAD.bottom);
      context.fillText(percent(10 ** power), x, size.height - PAD.bottom + 18);
    }
    context.fillText("share of the tokens on which it fires", PAD.left + inside().width / 2, size.height - 6);
    context.textAlign = "right";
    const ticks = axis === "label" ? rows.map((name, index) => [(index + 0.5) / rows.length, shorten(name)]) : [0, 0.25, 0.5, 0.75, 1].map((value) => [0.05 + 0.93 * value, number(value)]);
    for (const [value, name] of ticks) {
      const y = screenY(value);
      if (y < PAD.top - 1 || y > size.height - PAD.bottom + 1) continue;
      line(context, PAD.left, y, size.width - PAD.right, y);
      context.fillText(name, PAD.left - 8, y + 4);
    }
    const strip = screenY(0.02);
    if (axis !== "label" && strip <= size.height - PAD.bottom && !narrow) context.fillText("n/a", PAD.left - 8, strip + 4);
  }
  const shorten = (name) => name.length > 15 ? `${name.slice(0, 14)}…` : name;
  function line(context, x1, y1, x2, y2) { context.beginPath(); context.moveTo(x1, y1); context.lineTo(x2, y2); context.stroke(); }

  function nearest(x, y, most = 14) {
    let best = -1, least = most * most;
    for (const latent of alive) {
      const dx = screenX(xs[latent]) - x, dy = screenY(ys[latent]) - y, far = dx * dx + dy * dy;
      if (far < least && (found.size === 0 || far < 16 || found.has(latent))) { least = far; best = latent; }
    }
    return best;
  }
  function hover(latent) {
    if (latent === hovered) return;
    hovered = latent;
    draw();
    tip.hidden = latent < 0;
    if (latent < 0) return;
    const label = labelOf(latent), fires = stored.texts[token[latent]];
    tip.replaceChildren(h("div", {}, h("span", { class: "tag" }, `${latent}`), label ? h("b", {}, ` ${visible(label)}`) : ""),
      h("div", {}, `fires on ${percent(rate[latent])} of the tokens`), fires === undefined ? "" : h("div", {}, "most often on ", alone(fires)));
    const left = screenX(xs[latent]), top = screenY(ys[latent]);
    tip.style.left = `${Math.min(Math.max(left + 14, 4), size.width - Math.min(240, size.width - 10))}px`;
    tip.style.top = `${top > size.height / 2 ? top - tip.offsetHeight - 12 : top + 14}px`;
    announce(tip.textContent);
  }
  const open = (latent) => { if (latent >= 0) location.hash = route("latent", student.name, latent); };

  function zoom(factor, x = PAD.left + inside().width / 2, y = PAD.top + inside().height / 2) {
    const next = Math.min(Math.max(view.zoom * factor, 1), 200);
    const across = (x - PAD.left) / inside().width, up = (size.height - PAD.bottom - y) / inside().height;
    view = { x: view.x + across / view.zoom - across / next, y: view.y + up / view.zoom - up / next, zoom: next };
    settle();
  }
  function settle() {
    const most = 1 - 1 / view.zoom;
    view.x = Math.min(Math.max(view.x, 0), most);
    view.y = Math.min(Math.max(view.y, 0), most);
    draw();
  }

  let dragged = null, moved = false, finger = false;
  const at = (event) => { const box = canvas.getBoundingClientRect(); return [event.clientX - box.left, event.clientY - box.top]; };
  canvas.addEventListener("pointermove", (event) => {
    const [x, y] = at(event);
    if (dragged && event.pointerType === "mouse") {
      view.x = dragged.view.x - (x - dragged.x) / inside().width / view.zoom;
      view.y = dragged.view.y + (y - dragged.y) / inside().height / view.zoom;
      moved ||= Math.abs(x - dragged.x) + Math.abs(y - dragged.y) > 4;
      settle();
    } else if (event.pointerType !== "touch") hover(nearest(x, y));
  });
  canvas.addEventListener("pointerdown", (event) => {
    const [x, y] = at(event);
    dragged = { x, y, view: { ...view } };
    moved = false;
    finger = event.pointerType === "touch";
  });
  const release = () => { dragged = null; };
  addEventListener("pointerup", release);
  addEventListener("pointercancel", release);
  // The click comes when the pointer is up again, so that whether it moved is not kept with the drag.
  canvas.addEventListener("click", (event) => {
    if (moved) return;
    const latent = nearest(...at(event), 20);
    // A finger cannot hover: the first tap shows what is there, the second opens it.
    if (finger && latent !== hovered) hover(latent); else open(latent);
  });
  // A finger leaves with each tap.
  canvas.addEventListener("pointerleave", (event) => { if (event.pointerType !== "touch") hover(-1); });
  canvas.addEventListener("wheel", (event) => {
    if (!event.ctrlKey && document.activeElement !== canvas) return;
    event.preventDefault();
    zoom(Math.exp(-event.deltaY / 300), ...at(event));
  }, { passive: false });
  canvas.addEventListener("blur", () => hover(-1));
  canvas.addEventListener("keydown", (event) => {
    const direction = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    if (direction) { event.preventDefault(); hover(step(...direction)); }
    else if (event.key === "Enter") open(hovered);
    else if (event.key === "+" || event.key === "=") zoom(1.6);
    else if (event.key === "-") zoom(1 / 1.6);
    else if (event.key === "0") { view = { x: 0, y: 0, zoom: 1 }; draw(); }
  });
  // The next dot in a direction: near, and not far to the side.
  function step(dx, dy) {
    const among = found.size ? [...found].filter((latent) => rate[latent] > 0) : alive;
    if (hovered < 0 || !among.length) return among[0] ?? -1;
    const x0 = screenX(xs[hovered]), y0 = screenY(ys[hovered]);
    let best = hovered, least = Infinity;
    for (const latent of among) {
      const x = screenX(xs[latent]) - x0, y = screenY(ys[latent]) - y0, ahead = x * dx + y * dy;
      if (latent === hovered || ahead <= 0) continue;
      const cost = ahead + 3 * Math.abs(x * dy + y * dx);
      if (cost < least) { least = cost; best = latent; }
    }
    return best;
  }

  const results = h("ul", { class: "results" }), heading = h("h2", {}), hint = h("p", { class: "note" });
  const WHY = { number: "has this number", label: "label", note: "note", concept: "probed concept", "fires on": "fires on", promotes: "promotes", context: "fires in" };
  function list(entries) {
    results.replaceChildren(...entries.map(({ latent, why, what }) => h("li", {}, latentLink(student.name, latent, labels),
      h("span", { class: "why" }, WHY[why] || why, " ", ["fires on", "promotes"].includes(why) ? alone(what) : why === "context" ? h("code", { class: "end" }, visible(what.slice(-30)).replaceAll("\n", "⏎")) : ""),
      h("span", { class: "rate" }, percent(rate[latent])))));
  }
  function typical() {
    // Numbers sort faster than pairs: the rate, and in what is below one firing the latent.
    const base = 2 ** 20, keys = Float64Array.from(alive, (latent) => -Math.round(rate[latent] * student.num_tokens) * base + latent).sort();
    const wanted = Math.min(12, keys.length);
    const chosen = Array.from({ length: wanted }, (_, group) => keys[Math.floor((2 * group + 1) * keys.length / (2 * wanted))]).map((key) => key - Math.floor(key / base) * base);
    heading.textContent = "From common to rare";
    hint.textContent = "Chosen by how often they fire alone: of all latents in the order of their rates, cut into equal groups, the middle one of each.";
    list(chosen.map((latent) => ({ latent, why: "fires on", what: stored.texts[token[latent]] ?? "" })));
  }
  let typed = 0, waiting;
  async function search() {
    const turn = ++typed, query = field.value;
    if (!query.trim()) { found = new Set(); typical(); draw(); return; }
    try {
      const entries = await data.search(student.name, query);
      if (turn !== typed) return;
      found = new Set(entries.map((entry) => entry.latent));
      heading.textContent = entries.length ? `${entries.length === 60 ? "The first 60" : entries.length} found` : "Nothing found";
      hint.textContent = entries.length ? "Best matches first: number, label, concept, tokens, then contexts. They are marked in the map." : "Searched were numbers, labels, notes, concepts, the tokens that latents fire on or promote, and the text of their strongest contexts.";
      list(entries);
    } catch (error) { if (turn !== typed) return; heading.textContent = error.message; list([]); }
    announce(heading.textContent);
    draw();
  }
  const field = h("input", { id: "query", type: "search", placeholder: "token, text or label", "aria-label": "Search by token, text, label or number", autocomplete: "off", spellcheck: "false", maxlength: 400,
    oninput: () => { clearTimeout(waiting); waiting = setTimeout(search, 120); } });
  const choice = h("select", { id: "axis", "aria-label": "Vertical axis", onchange: () => { axis = choice.value; PAD.left = axis === "label" ? 118 : 54; place(); draw(); } },
    Object.entries(AXES).map(([value, name]) => h("option", { value }, name)));

  const element = h("div", {},
    h("div", { class: "head" }, h("h1", {}, `${run.kinds[student.kind]}, layer ${student.layer}`),
      h("p", { class: "lede" }, `${count(alive.length)} of ${count(rate.length)} latents fired on ${count(student.num_tokens)} tokens, ${number(student.l0)} on each. Every dot is one.`)),
    h("div", { class: "tools" }, h("label", { class: "field" }, h("span", {}, "Search"), field), h("label", { class: "field" }, h("span", {}, "Up"), choice),
      h("div", { class: "zoom", role: "group", "aria-label": "Zoom" }, h("button", { type: "button", title: "Zoom in", "aria-label": "Zoom in", onclick: () => zoom(1.6) }, "+"), h("button", { type: "button", title: "Zoom out", "aria-label": "Zoom out", onclick: () => zoom(1 / 1.6) }, "−"), h("button", { type: "button", onclick: () => { view = { x: 0, y: 0, zoom: 1 }; draw(); } }, "All"))),
    h("div", { class: "overview" }, h("div", { class: "canvas" }, canvas, tip), h("section", { class: "found", "aria-live": "polite" }, heading, hint, results)));

  const fit = () => {
    const box = canvas.parentElement.getBoundingClientRect();
    if (!box.width || (box.width === size.width && box.height === size.height)) return;
    size = { width: box.width, height: box.height };
    draw();
  };
  const watcher = new ResizeObserver(fit), dark = matchMedia("(prefers-color-scheme: dark)");
  dark.addEventListener("change", draw);
  return {
    element, title: `Map of ${student.name}`,
    ready: () => { place(); typical(); fit(); watcher.observe(canvas.parentElement); document.documentElement.dataset.drawn = `${alive.length}`; },
    leave: () => { watcher.disconnect(); dark.removeEventListener("change", draw); removeEventListener("pointerup", release); removeEventListener("pointercancel", release); },
  };
};
