// Plots along the run: one place for each layer, in the order in which the layers ran.

const PAPER = 600; // the width that a sheet of paper leaves, in pixels
const MOST_STEP = 84;
const PLOT = { height: 260, top: 26, bottom: 18, left: 64 };

/** Ticks at powers of ten, no more than eight. */
function decades(least, most) {
  const step = Math.max(1, Math.ceil((most - least) / 8));
  const ticks = [];
  for (let power = Math.ceil(least); power <= Math.floor(most); power += step) ticks.push(power);
  return ticks;
}

function powerText(power) {
  return power === 0 ? "1" : power === 1 ? "10" : `1e${power}`;
}

/**
 * The frame of a plot: an axis that stays, and a drawing that scrolls if it is wide.
 *
 * layers: what stands along the run, with `module`; ticks: pairs of a height in pixels and a text; draw(place): the
 * marks at a place, given its middle.
 */
function alongTheRun({ label, layers, ticks, height = PLOT.height, least, marks, behind = () => [], lines, jump }) {
  const host = element("div", { class: "plot", role: "group", "aria-label": label });
  const axis = shape("svg", { class: "axis", width: PLOT.left, height, "aria-hidden": "true" }, ticks.map(([y, text]) => shape("text", { x: PLOT.left - 8, y: y + 4, "text-anchor": "end" }, text)));
  const sheet = shape("svg", { class: "sheet", height, role: "group", "aria-label": `${label}; arrow keys go from layer to layer` });
  const scroll = element("div", { class: "scroll" }, sheet);
  host.append(axis, scroll);
  let places = [];
  const pointed = (place) => {
    places.forEach((one, number) => one.setAttribute("tabindex", number === place ? "0" : "-1"));
    places[place].focus({ preventScroll: true });
    const box = places[place].getBoundingClientRect();
    const view = scroll.getBoundingClientRect();
    if (box.left < view.left) scroll.scrollLeft -= view.left - box.left + 40;
    if (box.right > view.right) scroll.scrollLeft += box.right - view.right + 40;
    showTip(lines(layers[place]), places[place].getBoundingClientRect());
  };
  let printed = false;
  const draw = () => {
    const room = printed ? PAPER : (scroll.clientWidth || 800) - 2;
    const step = Math.max(printed ? 0 : least, Math.min(MOST_STEP, room / layers.length));
    const width = Math.max(room, step * layers.length);
    sheet.setAttribute("width", width);
    sheet.setAttribute("viewBox", `0 0 ${width} ${height}`);
    const middle = (place) => (place + 0.5) * step;
    const parts = ticks.map(([y]) => shape("line", { class: "grid", x1: 0, x2: width, y1: y, y2: y }));
    parts.push(...bands(layers, step, height));
    parts.push(...behind(middle, step));
    places = layers.map((layer, place) =>
      shape(
        "g",
        { class: "place", tabindex: place ? "-1" : "0", role: jump ? "button" : "img", "data-place": place, "aria-label": lines(layer).join(", ") },
        shape("rect", { class: "target", x: middle(place) - step / 2, y: PLOT.top, width: step, height: height - PLOT.top - PLOT.bottom }),
        marks(layer, middle(place), step),
      ),
    );
    sheet.replaceChildren(...parts, ...places);
  };
  const at = (event) => {
    const found = event.target.closest("[data-place]");
    return found ? Number(found.dataset.place) : null;
  };
  sheet.addEventListener("pointerover", (event) => {
    const place = at(event);
    if (place === null) hideTip();
    else showTip(lines(layers[place]), places[place].getBoundingClientRect());
  });
  sheet.addEventListener("pointerleave", hideTip);
  sheet.addEventListener("focusin", (event) => {
    const place = at(event);
    if (place !== null) showTip(lines(layers[place]), places[place].getBoundingClientRect());
  });
  sheet.addEventListener("focusout", hideTip);
  sheet.addEventListener("click", (event) => {
    const place = at(event);
    if (place !== null && jump) jump(layers[place]);
  });
  sheet.addEventListener("keydown", (event) => {
    const place = at(event);
    if (place === null) return;
    const does = {
      ArrowRight: () => pointed(Math.min(layers.length - 1, place + 1)),
      ArrowLeft: () => pointed(Math.max(0, place - 1)),
      Home: () => pointed(0),
      End: () => pointed(layers.length - 1),
      Enter: () => jump?.(layers[place]),
      Escape: hideTip,
    }[event.key];
    if (!does) return;
    event.preventDefault();
    does();
  });
  let last = 0;
  new ResizeObserver(() => {
    if (scroll.clientWidth && scroll.clientWidth !== last) {
      last = scroll.clientWidth;
      draw();
    }
  }).observe(scroll);
  draw();
  for (const [event, starts] of [["beforeprint", true], ["afterprint", false]]) {
    window.addEventListener(event, () => {
      printed = starts;
      if (host.isConnected) draw();
    });
  }
  return host;
}

/** Stretches of layers of one part of the network, with its name where there is room. */
function bands(layers, step, height) {
  const names = layers.map(({ module }) => String(module ?? ""));
  const depth = stretches(names, 1).length > 3 ? 1 : 2;
  return stretches(names, depth).flatMap(({ name, start, end }, place) => {
    const [x, width] = [start * step, (end - start) * step];
    const parts = [];
    if (place % 2) parts.push(shape("rect", { class: "band", x, y: PLOT.top, width, height: height - PLOT.top - PLOT.bottom }));
    const text = fitted(name, NAME_FONT, width - 8);
    if (width > 26 && text.length > 2) parts.push(shape("text", { class: "part", x: x + 4, y: PLOT.top - 9 }, text));
    return parts;
  });
}

function stretches(names, depth) {
  const found = [];
  names.forEach((name, place) => {
    const part = name.split(".").slice(0, depth).join(".");
    const last = found[found.length - 1];
    if (last && last.name === part) last.end = place + 1;
    else found.push({ name: part, start: place, end: place + 1 });
  });
  return found;
}

const jumper = (picture) => (layer) => {
  if (picture.network.operators.has(layer.node)) picture.reveal(`n${layer.node}`);
};

/** A legend entry: a mark and its words. */
function key(drawn, text) {
  return element("li", {}, shape("svg", { width: 24, height: 14, viewBox: "-12 -7 24 14", "aria-hidden": "true" }, drawn), text);
}

function numbers(heading, make) {
  const details = element("details", { class: "words" }, element("summary", {}, heading));
  details.addEventListener("toggle", () => {
    if (details.open && details.childElementCount === 1) details.append(make());
  });
  return details;
}

const ABOVE = 4; // so many times the rounding level is worth a look

function erring(facts, picture) {
  const layers = (facts.errors || []).map((one) => ({ ...one, relative: numeric(one.relative), rounding: numeric(one.rounding) }));
  const explained = element(
    "p",
    {},
    "At each layer, the difference between the activation of the original and that of the fused network, after undoing the units, relative to the activation; and what rounding alone would explain.",
  );
  const missing = facts.left_out ? `${counted(facts.left_out, "layer")} of the original ${facts.left_out === 1 ? "has" : "have"} no counterpart in the new structure, and ${facts.left_out === 1 ? "is" : "are"} left out.` : "";
  if (!layers.length) return section("errors", "Where error arises", element("p", { class: "none" }, facts.kind === "plan" ? "Nothing was fused yet, so nothing was measured." : missing || "Not measured."));
  const sizes = layers.flatMap(({ relative, rounding }) => [relative, rounding]).filter((value) => value > 0 && Number.isFinite(value)).map(Math.log10);
  const [least, most] = sizes.length ? [Math.floor(Math.min(...sizes) - 0.1), Math.ceil(Math.max(...sizes) + 0.1)] : [-8, -5];
  const floor = PLOT.height - PLOT.bottom - 10;
  const ground = floor - 22;
  const y = (value) => (value === 0 ? floor : !Number.isFinite(value) ? PLOT.top + 8 : ground - ((Math.log10(value) - least) / (most - least)) * (ground - PLOT.top - 12));
  const loud = ({ relative, rounding }) => relative !== null && (!Number.isFinite(relative) || (rounding > 0 && relative > ABOVE * rounding));
  const dot = (x, at) => shape("circle", { class: "measured", cx: x, cy: at, r: 3.2 });
  const zero = (x, at) => shape("circle", { class: "measured hollow", cx: x, cy: at, r: 3 });
  const peak = (x, at) => shape("path", { class: "loud", d: `M${x},${at - 5}L${x + 5},${at + 4}H${x - 5}Z` });
  const plot = alongTheRun({
    label: "Difference and rounding at each layer",
    least: 4,
    layers,
    ticks: [...decades(least, most).map((power) => [y(10 ** power), powerText(power)]), [floor, "0"]],
    behind: (middle, step) => {
      const known = layers.map(({ rounding }, place) => [rounding, middle(place)]).filter(([rounding]) => rounding > 0);
      return known.map(([rounding, x]) => shape("line", { class: "rounding", x1: x - step / 2 + 0.5, x2: x + step / 2 - 0.5, y1: y(rounding), y2: y(rounding) }));
    },
    marks: (layer, x) => (layer.relative === null ? [] : layer.relative === 0 ? zero(x, floor) : loud(layer) ? peak(x, y(layer.relative)) : dot(x, y(layer.relative))),
    lines: (layer) => [
      layer.module || "–",
      layer.relative === null ? "not measured" : layer.relative === 0 ? "the same bits" : `difference ${digits(layer.relative, 2)}`,
      layer.rounding === null ? "no rounding level" : `rounding ${digits(layer.rounding, 2)}${layer.relative > 0 && layer.rounding > 0 ? ` (${digits(layer.relative / layer.rounding, 2)}×)` : ""}`,
    ],
    jump: jumper(picture),
  });
  const over = layers.filter(loud).length;
  return section(
    "errors",
    "Where error arises",
    explained,
    missing ? element("p", {}, missing) : null,
    element(
      "ul",
      { class: "legend" },
      key(dot(0, 0), "measured"),
      key(peak(0, 0), `more than ${ABOVE} times the rounding level (${counted(over, "layer")})`),
      key(zero(0, 0), "no difference at all"),
      key(shape("line", { class: "rounding", x1: -9, x2: 9, y1: 0, y2: 0 }), "rounding level"),
      element("li", {}, `${counted(layers.length, "layer")} in the order of the run`),
    ),
    plot,
    numbers("The numbers as a table", () =>
      sortable(
        "Difference and rounding at each layer",
        [
          { title: "Layer", value: (layer) => layers.indexOf(layer), cell: (layer) => named(layer.module || "–") },
          { title: "Difference", numeric: true, value: (layer) => layer.relative, cell: (layer) => digits(layer.relative) },
          { title: "Rounding", numeric: true, value: (layer) => layer.rounding, cell: (layer) => digits(layer.rounding) },
          { title: "Times", numeric: true, value: (layer) => (layer.rounding > 0 ? layer.relative / layer.rounding : null), cell: (layer) => (layer.rounding > 0 ? digits(layer.relative / layer.rounding, 2) : "–") },
        ],
        layers,
      ),
    ),
  );
}

const RANGE_STEP = 18; // so that two boxes beside each other can be told apart; the plot scrolls
const QUANTILES = ["minimum", "q01", "q25", "median", "q75", "q99", "maximum"];

function range(raw) {
  return raw ? Object.fromEntries([...QUANTILES, "channel_spread"].map((name) => [name, numeric(raw[name])])) : null;
}

function ranging(facts, picture) {
  const all = (facts.ranges || []).map((one) => ({
    module: one.module,
    node: one.node,
    weight: { before: range(one.weight?.before), after: range(one.weight?.after) },
    activation: { before: range(one.activation?.before), after: range(one.activation?.after) },
  }));
  if (!all.length) return section("ranges", "Ranges of weights and activations", element("p", { class: "none" }, "Not measured."));
  const sheet = element("div");
  const state = { what: "weight", scale: "symlog" };
  const draw = () => sheet.replaceChildren(...rangesOf(all.filter((layer) => layer[state.what].before || layer[state.what].after), state, picture));
  const whats = choice("What", [["weight", "Weights"], ["activation", "Activations"]], state.what, (what) => {
    state.what = what;
    draw();
  });
  const scales = choice("Scale", [["symlog", "Logarithmic"], ["linear", "Linear"]], state.scale, (scale) => {
    state.scale = scale;
    draw();
  });
  draw();
  return section(
    "ranges",
    "Ranges of weights and activations",
    element("p", {}, "What a quantiser will see at each layer, before and after: all values, 98 % of them, half of them, and the median; below, how much the widest channel exceeds the usual one (the largest value of a channel over the median of those)."),
    element("div", { class: "toolbar" }, whats, scales),
    sheet,
  );
}

function boxMark(one, x, half, y, when) {
  if (!one || QUANTILES.some((name) => one[name] === null)) return [];
  const bar = (low, high, width, name) => shape("rect", { class: `${name} ${when}`, x: x - width / 2, y: y(one[high]), width, height: Math.max(1, y(one[low]) - y(one[high])) });
  return [
    bar("minimum", "maximum", 1, "whole"),
    bar("q01", "q99", Math.max(2, half * 0.45), "most"),
    bar("q25", "q75", Math.max(3, half * 0.8), "half"),
    shape("line", { class: `median ${when}`, x1: x - half * 0.4, x2: x + half * 0.4, y1: y(one.median), y2: y(one.median) }),
  ];
}

function rangesOf(layers, { what, scale }, picture) {
  if (!layers.length) return [element("p", { class: "none" }, "Not measured.")];
  const both = (layer) => [layer[what].before, layer[what].after].filter(Boolean);
  const values = layers.flatMap(both).flatMap((one) => QUANTILES.map((name) => one[name])).filter((value) => Number.isFinite(value));
  const typical = layers.flatMap(both).map((one) => Math.max(Math.abs(one.q25), Math.abs(one.q75))).filter((value) => value > 0 && Number.isFinite(value)).sort((a, b) => a - b);
  const unit = typical.length ? 10 ** Math.floor(Math.log10(typical[Math.floor(typical.length / 2)])) : 1;
  const bend = scale === "linear" ? (value) => value : (value) => Math.sign(value) * Math.log10(1 + Math.abs(value) / unit);
  const [least, most] = [Math.min(0, ...values.map(bend)), Math.max(0, ...values.map(bend))];
  const height = 320;
  const ground = height - PLOT.bottom;
  const y = (value) => {
    const at = Number.isNaN(value) ? 0 : value === Infinity ? most : value === -Infinity ? least : bend(value);
    return ground - 6 - ((at - least) / (most - least || 1)) * (ground - PLOT.top - 12);
  };
  const ticks = scale === "linear" ? evenly(least, most).map((value) => [y(value), digits(value)]) : symmetric(unit, values).map((value) => [y(value), digits(value)]);
  const spreads = layers.flatMap(both).map((one) => one.channel_spread).filter((value) => value > 0 && Number.isFinite(value));
  const lines = (layer) => [
    layer.module || "–",
    ...["before", "after"].flatMap((when) => {
      const one = layer[what][when];
      return one
        ? [
            `${when}: ${digits(one.minimum)} … ${digits(one.maximum)}; 98 %: ${digits(one.q01)} … ${digits(one.q99)}; half: ${digits(one.q25)} … ${digits(one.q75)}; median ${digits(one.median)}`,
            `${when}: widest channel ${digits(one.channel_spread)} times the usual`,
          ]
        : [`${when}: not measured`];
    }),
  ];
  const jump = jumper(picture);
  const plot = alongTheRun({
    label: `Ranges of ${what}s at each layer, before and after`,
    least: RANGE_STEP,
    layers,
    ticks,
    height,
    marks: (layer, x, step) => {
      const half = step / 2 - 1;
      return [...boxMark(layer[what].before, x - step / 4, half, y, "before"), ...boxMark(layer[what].after, x + step / 4, half, y, "after")];
    },
    lines,
    jump,
  });
  const parts = [
    element(
      "ul",
      { class: "legend" },
      ...["before", "after"].map((when) => key(boxSample(when), `${when} (${when === "before" ? "left, hollow" : "right, filled"})`)),
      element("li", {}, `${counted(layers.length, "layer")} in the order of the run`),
    ),
    plot,
  ];
  if (spreads.length) {
    const [low, high] = [Math.log10(Math.min(1, ...spreads)), Math.max(0.5, Math.log10(Math.max(...spreads)) + 0.05)];
    const tall = 150;
    const place = (value) => tall - PLOT.bottom - 4 - ((Math.log10(value) - low) / (high - low)) * (tall - PLOT.bottom - PLOT.top - 10);
    const wanted = [1, 2, 5, 10, 20, 50, 100, 1e3, 1e4, 1e5, 1e6].filter((value) => Math.log10(value) <= high);
    parts.push(
      element("h3", {}, "Widest channel over the usual one"),
      alongTheRun({
        label: `Spread of the channels of ${what}s, before and after`,
        least: RANGE_STEP,
        layers,
        ticks: wanted.filter((value, number) => wanted.length < 7 || number % 3 === 0 || value >= 1e3).map((value) => [place(value), `${digits(value)}×`]),
        height: tall,
        marks: (layer, x) => {
          const [before, after] = ["before", "after"].map((when) => layer[what][when]?.channel_spread).map((value) => (value > 0 && Number.isFinite(value) ? place(value) : null));
          return [
            before !== null && after !== null ? shape("line", { class: "link", x1: x, x2: x, y1: before, y2: after }) : null,
            before === null ? null : shape("circle", { class: "spread before", cx: x, cy: before, r: 3.2 }),
            after === null ? null : shape("circle", { class: "spread after", cx: x, cy: after, r: 3.2 }),
          ].filter(Boolean);
        },
        lines,
        jump,
      }),
    );
  }
  parts.push(
    numbers("The numbers as a table", () =>
      sortable(
        `Ranges of ${what}s`,
        [
          { title: "Layer", value: (layer) => layers.indexOf(layer), cell: (layer) => named(layer.module || "–") },
          ...["before", "after"].flatMap((when) =>
            [["minimum", "min"], ["maximum", "max"], ["channel_spread", "spread"]].map(([name, title]) => ({
              title: `${title} ${when}`,
              numeric: true,
              value: (layer) => layer[what][when]?.[name] ?? null,
              cell: (layer) => digits(layer[what][when]?.[name] ?? null),
            })),
          ),
        ],
        layers,
      ),
    ),
  );
  return parts;
}

function boxSample(when) {
  return shape("g", {}, shape("rect", { class: `whole ${when}`, x: -0.5, y: -7, width: 1, height: 14 }), shape("rect", { class: `half ${when}`, x: -4, y: -4, width: 8, height: 8 }), shape("line", { class: `median ${when}`, x1: -4, x2: 4, y1: 0, y2: 0 }));
}

function evenly(least, most) {
  const rough = (most - least || 1) / 6;
  const size = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((times) => times * size).find((one) => one >= rough);
  const ticks = [];
  for (let value = Math.ceil(least / step) * step; value <= most; value += step) ticks.push(Math.abs(value) < step / 1e6 ? 0 : value);
  return ticks;
}

/** Zero, and powers of ten to both sides as far as the values go. */
function symmetric(unit, values) {
  const side = (most) => {
    const ticks = [];
    const powers = Math.floor(Math.log10(most / unit));
    const step = Math.max(1, Math.ceil(powers / 4));
    for (let power = 0; power <= powers; power += step) ticks.push(unit * 10 ** power);
    return ticks;
  };
  const high = Math.max(0, ...values);
  const low = Math.max(0, ...values.map((value) => -value));
  return [...(low >= unit ? side(low).map((value) => -value) : []), 0, ...(high >= unit ? side(high) : [])];
}
