"use strict";
// Elements, numbers and tokens. Text from models and corpora only ever becomes text nodes.
explorer.elements = (() => {
  const SVG = "http://www.w3.org/2000/svg";
  const fill = (made, attributes, children) => {
    for (const [key, value] of Object.entries(attributes)) {
      if (value === undefined || value === null || value === false) continue;
      if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
      else if (key.startsWith("--")) made.style.setProperty(key, value);
      else made.setAttribute(key, value === true ? "" : value);
    }
    made.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
    return made;
  };
  const h = (name, attributes = {}, ...children) => fill(document.createElement(name), attributes, children);
  const s = (name, attributes = {}, ...children) => fill(document.createElementNS(SVG, name), attributes, children);

  // Not toLocaleString, which takes tens of milliseconds to find out what it needs to know of a language.
  const number = (value, digits = 3) =>
    value === null || value === undefined ? "–" : String(Number(Number(value).toPrecision(digits))).replace("-", "−").replace("e−", "e-");
  const count = (value) => String(Math.round(value)).replace(/\B(?=(\d{3})+$)/g, ",");
  const percent = (share) => {
    if (share === null || share === undefined) return "–";
    const value = 100 * share, size = Math.abs(value);
    return `${(size >= 10 || size === 0 ? value.toFixed(0) : size >= 1 ? value.toFixed(1) : Number(value.toPrecision(2)).toString()).replace("-", "−")} %`;
  };
  // Control characters have no look of their own; Unicode has a picture of each. Those that turn the direction of what
  // follows would show a text that is not there.
  const visible = (text) => text.replace(/[\u0000-\u0008\u000b-\u001f\u007f]/g, (c) => c === "\u007f" ? "␡" : String.fromCharCode(0x2400 + c.charCodeAt(0)))
    .replace(/[\u0080-\u009f\u200e\u200f\u202a-\u202e\u2066-\u2069]/g, (c) => `‹${c.charCodeAt(0).toString(16).toUpperCase().padStart(4, "0")}›`);

  // A token in running text: its line breaks are kept, and shown.
  function running(text) {
    const parts = [];
    visible(text.replaceAll("\r\n", "\n")).split("\n").forEach((line, place) => {
      if (place) parts.push(h("i", { "aria-hidden": "true" }, "⏎"), "\n");
      if (line) parts.push(line);
    });
    return parts;
  }
  // A token alone, in a list: white space is made visible.
  const alone = (text) => h("code", { class: "token", title: JSON.stringify(text) },
    visible(text).replaceAll("\r", "␍").replaceAll("\n", "⏎").replaceAll("\t", "⇥").replaceAll(" ", "␣") || "∅");

  const route = (page, student, ...rest) =>
    `#/${[page, ...student.split("/"), ...rest].map(encodeURIComponent).join("/")}`;
  // A latent's name with its label, as a link to its page.
  function latentLink(student, latent, labels) {
    const label = labels?.labels[latent]?.label, concept = labels?.concepts[latent]?.concept;
    return h("a", { class: "latent-link", href: route("latent", student, latent) },
      h("span", { class: "tag" }, `${latent}`), label ? h("b", {}, visible(label)) : concept ? h("span", { class: "concept" }, visible(concept)) : null);
  }
  const announce = (text) => { document.getElementById("said").textContent = text; };
  return { h, s, number, count, percent, visible, running, alone, route, latentLink, announce };
})();
