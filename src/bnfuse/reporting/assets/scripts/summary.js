// The first section: what was gained, whether anything changed, what was taken for granted.

function tile(heading, figure, note, mark = "") {
  return element("div", { class: `tile ${mark}` }, element("div", { class: "heading" }, heading), element("div", { class: "figure" }, figure), note ? element("div", { class: "note" }, note) : null);
}

function normsTile(summary, plan) {
  const { norms, removed } = summary;
  const share = norms ? removed / norms : 0;
  const bar = shape(
    "svg",
    { class: "share", viewBox: "0 0 100 8", preserveAspectRatio: "none", "aria-hidden": "true" },
    shape("rect", { class: "rest", width: 100, height: 8 }),
    shape("rect", { class: "done", width: 100 * share, height: 8 }),
  );
  const made = tile(plan ? "Batch norms that would go" : "Batch norms removed", `${count(removed)} of ${count(norms)}`, norms === removed ? "none stays" : norms - removed === 1 ? "1 stays, for the reason below" : `${count(norms - removed)} stay, for the reasons below`);
  made.insertBefore(bar, made.lastChild);
  return made;
}

function differenceTile(difference) {
  const { equal } = difference;
  const largest = numeric(difference.largest);
  const rounding = numeric(difference.rounding);
  const relative = numeric(difference.relative);
  const figure = largest === 0 ? "identical" : equal ? "equal" : "different";
  const parts = [`largest difference ${digits(largest, 2)}`];
  if (relative !== null) parts.push(`relative ${digits(relative, 2)}`);
  if (relative > 0 && rounding > 0) parts.push(`${digits(relative / rounding, 2)} times what rounding alone makes`);
  return tile("Outputs, before and after", [badge(equal ? "good" : "bad", ""), figure], parts.join(", "), equal ? "" : "bad");
}

/** How far the quartiles of the calls are apart, of the model whose calls differ more; 0 if that is not known. */
function spreadOf(row) {
  return Math.max(0, ...[row.quartiles?.before, row.quartiles?.after].map((pair) => (pair ? numeric(pair[1]) - numeric(pair[0]) : 0)));
}

/** Whether a change is smaller than the calls differ among themselves. */
function unclear(row) {
  return Math.abs(numeric(row.after) - numeric(row.before)) < spreadOf(row);
}

function changeTile(row, plan) {
  const [before, after] = [numeric(row.before), numeric(row.after)];
  if (after !== null && unclear(row)) {
    return tile(row.name[0].toUpperCase() + row.name.slice(1), "no clear change", `${quantity(before, row.unit)} → ${quantity(after, row.unit)}; the calls of one model differ by ${quantity(spreadOf(row), row.unit)}`);
  }
  const figure = after === null ? quantity(before, row.unit) : before ? percentage((after - before) / before) : difference(before, after, row.unit);
  const note = after === null ? (plan ? "before; nothing was fused yet" : "before; not measured after") : `${quantity(before, row.unit)} → ${quantity(after, row.unit)}`;
  return tile(row.name[0].toUpperCase() + row.name.slice(1), after === before ? "unchanged" : figure, note);
}

function quartiles(pair, unit) {
  return pair ? element("div", { class: "fine" }, `quartiles ${quantity(numeric(pair[0]), unit)}, ${quantity(numeric(pair[1]), unit)}`) : null;
}

const FIRST_STEPS = 8;

/** What changed in the structure, at which price; and what was asked for and stays. */
function restructured(facts) {
  const steps = facts.steps || [];
  const unchanged = facts.unchanged || [];
  if (!steps.length && !unchanged.length) return null;
  const price = ({ parameters }) => (parameters ? `${parameters < 0 ? "−" : "+"}${counted(Math.abs(parameters), "parameter")}` : "no more parameters");
  const listed = (some) => element("ul", { class: "lines" }, some.map((step) => element("li", {}, stepText(step), ` (${price(step)})`)));
  return element(
    "div",
    { class: "steps" },
    element("h3", {}, facts.kind === "plan" ? "What would change in the structure" : "What changed in the structure"),
    steps.length ? listed(steps.slice(0, FIRST_STEPS)) : element("p", { class: "none" }, "Nothing."),
    steps.length > FIRST_STEPS
      ? element("details", { class: "words" }, element("summary", {}, `and ${counted(steps.length - FIRST_STEPS, "step")} more; all together ${price({ parameters: steps.reduce((sum, { parameters }) => sum + parameters, 0) })}`), listed(steps.slice(FIRST_STEPS)))
      : null,
    unchanged.length
      ? element(
          "details",
          { class: "words" },
          element("summary", {}, `What was asked for and stays (${count(unchanged.length)})`),
          element("ul", { class: "lines" }, unchanged.map(({ kind, subject, reason }) => element("li", {}, `no ${kind} of `, named(subject || "the model"), ": ", prose(reason)))),
        )
      : null,
  );
}

function summarised(facts) {
  const summary = facts.summary || {};
  const plan = facts.kind === "plan";
  const rows = summary.rows || [];
  const tiles = [];
  if (typeof summary.norms === "number") tiles.push(normsTile(summary, plan));
  if (summary.difference) tiles.push(differenceTile(summary.difference));
  for (const wanted of [/latency|time/i, /multiply/i, /bytes|size|parameters/i]) {
    const row = rows.find(({ name, before }) => wanted.test(name) && before !== null && before !== undefined);
    if (row && tiles.length < 5) tiles.push(changeTile(row, plan));
  }
  const cells = (row) => {
    const [before, after] = [numeric(row.before), numeric(row.after)];
    return [
      element("td", { class: "number", title: before === null ? null : String(before) }, quantity(before, row.unit), quartiles(row.quartiles?.before, row.unit)),
      element("td", { class: "number", title: after === null ? null : String(after) }, quantity(after, row.unit), quartiles(row.quartiles?.after, row.unit)),
      element("td", { class: "number" }, before === null || after === null ? "–" : difference(before, after, row.unit), unclear(row) ? element("div", { class: "fine" }, "within the spread of the calls") : null),
    ];
  };
  const table = rows.length
    ? element(
        "div",
        { class: "table" },
        element(
          "table",
          { class: "holdings" },
          element("caption", { class: "unseen" }, "Before and after"),
          element("thead", {}, element("tr", {}, [element("td", {}), ...["before", plan ? "after (predicted)" : "after", "difference"].map((text) => element("th", { scope: "col", class: "number" }, text))])),
          element("tbody", {}, rows.map((row) => element("tr", {}, element("th", { scope: "row" }, named(row.name)), ...cells(row)))),
        ),
      )
    : null;
  const lines = (heading, texts, shown) =>
    (texts || []).length ? [element("h3", {}, heading), element("ul", { class: "lines" }, texts.map((text) => element("li", {}, shown(text))))] : [];
  const words = summary.difference?.text
    ? element("details", { class: "words" }, element("summary", {}, "The comparison in full"), element("pre", { tabindex: "0", "aria-label": "The comparison in full" }, named(summary.difference.text)))
    : null;
  const about = [
    facts.spec ? named(facts.spec) : null,
    plan ? `planned by bnfuse ${facts.bnfuse ?? ""}; nothing was fused yet` : `fused by bnfuse ${facts.bnfuse ?? ""}`,
    facts.machine ? named(facts.machine) : null,
  ].filter(Boolean);
  const made = section(
    "summary",
    named(facts.model || "model"),
    element("p", { class: "about" }, about.flatMap((part, place) => (place ? [" · ", part] : [part]))),
    summary.warning ? element("p", { class: "warning", role: "note" }, element("strong", {}, "Mind: "), prose(summary.warning)) : null,
    element("div", { class: "tiles" }, tiles),
    element(
      "div",
      { class: "columns" },
      element("div", {}, table, words, restructured(facts)),
      element("div", {}, lines("Recorded calls", facts.calls, named), lines("Inputs", facts.inputs, named), lines("Assumed", summary.assumed, prose), lines("Not seen", summary.unseen, prose)),
    ),
  );
  made.querySelector("h2").replaceWith(element("h1", { id: "summary-heading" }, named(facts.model || "model")));
  return made;
}
