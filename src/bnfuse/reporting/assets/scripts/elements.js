// Elements are made here and nowhere else: texts go in as text nodes, so that no name of a model is read as HTML.

const SVG = "http://www.w3.org/2000/svg";

function filled(made, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name === "on") {
      for (const [event, listener] of Object.entries(value)) made.addEventListener(event, listener);
    } else {
      made.setAttribute(name, value === true ? "" : String(value));
    }
  }
  made.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return made;
}

/** An HTML element; attributes that are null or false are left out, `on` holds listeners. */
function element(name, attributes = {}, ...children) {
  return filled(document.createElement(name), attributes, children);
}

/** An SVG element. */
function shape(name, attributes = {}, ...children) {
  return filled(document.createElementNS(SVG, name), attributes, children);
}

/** A text in which signs that cannot be seen, or that turn the direction of others, are written as their numbers. */
function visible(text) {
  return String(text).replace(
    /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff]/g,
    (sign) => `\\u${sign.charCodeAt(0).toString(16).padStart(4, "0")}`,
  );
}

/** A name from the model: kept apart from the direction of the text around it, broken where it must be. */
function named(text, attributes = {}) {
  return element("bdi", { class: "name", ...attributes }, visible(text));
}

/** A sentence, with code where it stands between backticks. */
function prose(text) {
  const parts = visible(text).split("`");
  if (parts.length % 2 === 0) return element("bdi", { class: "prose" }, visible(text));
  return element("bdi", { class: "prose" }, parts.map((part, place) => (place % 2 ? element("code", {}, part) : part)));
}

/** A link to a place in this page, which `does` brings into sight. */
function jumping(does, ...children) {
  const follow = (event) => {
    event.preventDefault();
    does();
  };
  return element("a", { href: "#network", class: "link", on: { click: follow } }, ...children);
}

/** A section of the report with its heading. */
function section(id, heading, ...children) {
  return element("section", { id, "aria-labelledby": `${id}-heading` }, element("h2", { id: `${id}-heading` }, heading), ...children);
}

/** A row of buttons of which one is pressed. */
function choice(label, options, chosen, choose) {
  const buttons = options.map(([value, text]) =>
    element("button", { type: "button", "data-value": value, "aria-pressed": String(value === chosen) }, text),
  );
  const group = element("div", { class: "choice", role: "group", "aria-label": label }, buttons);
  group.set = (value) => {
    for (const button of buttons) button.setAttribute("aria-pressed", String(button.dataset.value === value));
  };
  for (const button of buttons) {
    button.addEventListener("click", () => {
      group.set(button.dataset.value);
      choose(button.dataset.value);
    });
  }
  return group;
}

const tooltip = document.getElementById("tooltip");

/** Show lines above a place on the screen; or to the left of it or below, where they hide nothing that belongs to it. */
function showTip(lines, box, aside = false) {
  tooltip.replaceChildren(...lines.map((line) => element("div", {}, visible(line))));
  tooltip.hidden = false;
  const { width, height } = tooltip.getBoundingClientRect();
  const within = (value, most) => Math.min(Math.max(8, value), most - 8);
  const beside = aside && box.left - width - 14 > 8;
  const above = box.top - height - 8;
  tooltip.style.left = `${beside ? box.left - width - 14 : within(box.left + box.width / 2 - width / 2, window.innerWidth - width)}px`;
  tooltip.style.top = `${beside ? within(box.top + box.height / 2 - height / 2, window.innerHeight - height) : above > 8 && !aside ? above : within(box.bottom + 8, window.innerHeight - height)}px`;
}

function hideTip() {
  tooltip.hidden = true;
}

window.addEventListener("scroll", hideTip, { passive: true });

/** Say something to whoever listens rather than looks. */
function say(text) {
  document.getElementById("status").textContent = text;
}

const calm = window.matchMedia("(prefers-reduced-motion: reduce)");
