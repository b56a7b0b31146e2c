// Numbers and names as people read them.

/** A number that JSON may hold as a word ("NaN", "Infinity"); null if there is none. */
function numeric(value) {
  return value === null || value === undefined ? null : Number(value);
}

function count(value) {
  return Number(value).toLocaleString("en-US");
}

/** "1 norm", "2 norms". */
function counted(number, one, many = `${one}s`) {
  return `${count(number)} ${number === 1 ? one : many}`;
}

/** Three digits, with an exponent where the number is very small or very large. */
function digits(value, places = 3) {
  if (value === null) return "–";
  if (!Number.isFinite(value)) return String(value);
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size < 1e-3 || size >= 1e6) return value.toExponential(places - 1).replace("e+", "e").replace("-", value < 0 ? "−" : "-");
  return Number(value.toPrecision(places)).toLocaleString("en-US", { maximumFractionDigits: 8 }).replace("-", "−");
}

const STEPS = {
  bytes: [[1e9, "GB"], [1e6, "MB"], [1e3, "kB"], [1, "bytes"]],
  s: [[1, "s"], [1e-3, "ms"], [1e-6, "µs"]],
  "multiply-adds": [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"], [1, ""]],
};

/** A measured value with its unit, scaled so that it has few digits. */
function quantity(value, unit) {
  if (value === null) return "not measured";
  if (!Number.isFinite(value)) return String(value);
  const steps = Object.hasOwn(STEPS, unit) ? STEPS[unit] : null;
  if (!steps) return unit ? `${count(value)} ${unit}` : count(value);
  const [size, name] = steps.find(([least]) => Math.abs(value) >= least) || steps[steps.length - 1];
  const scaled = value / size;
  const text = size === 1 && unit !== "s" ? count(value) : scaled.toLocaleString("en-US", { minimumSignificantDigits: 4, maximumSignificantDigits: 4 });
  return `${text} ${name}`.trim();
}

/** The sign and the size of a difference, "no change" if there is none. */
function difference(before, after, unit) {
  const change = after - before;
  if (!Number.isFinite(change)) return "–";
  if (change === 0) return "no change";
  const percent = before ? ` (${percentage(change / before)})` : "";
  return `${change < 0 ? "−" : "+"}${quantity(Math.abs(change), unit)}${percent}`;
}

/** A signed share in per cent: "−1.1 %". */
function percentage(share) {
  const size = Math.abs(share * 100);
  const text = size >= 10 || size === 0 ? size.toFixed(0) : size >= 0.01 ? size.toPrecision(2) : "<0.01";
  return `${share < 0 ? "−" : "+"}${text} %`;
}

function shapeText(shape) {
  return Array.isArray(shape) ? (shape.length ? shape.join("×") : "scalar") : "";
}

/** The last part of a name below another one: "conv1" for "layer.conv1" below "layer". */
function below(name, above) {
  return above && name.startsWith(`${above}.`) ? name.slice(above.length + 1) : name === above ? "" : name;
}

/** Texts that differ in nothing but numbers, as one with "*" where the numbers differ; with what they stand for. */
function alike(pairs) {
  const groups = new Map();
  for (const [text, value] of pairs) {
    const key = text.replace(/\d+/g, "*");
    if (!groups.has(key)) groups.set(key, []);
    groups.get(key).push([text, value]);
  }
  return [...groups].map(([, members]) => {
    const parts = members[0][0].split(/\d+/);
    const columns = members.map(([text]) => text.match(/\d+/g) || []);
    const text = parts.reduce((sum, part, place) => {
      const found = columns[0][place - 1];
      return sum + (columns.every((numbers) => numbers[place - 1] === found) ? found : "*") + part;
    });
    return [text, members.map(([, value]) => value)];
  });
}
