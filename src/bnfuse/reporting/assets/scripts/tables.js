// Tables whose columns sort; more rows than anyone reads at once are drawn on demand.

const ROWS_AT_ONCE = 150;

/**
 * A table.
 *
 * columns: objects with `title`, `value(row)` to sort by, `cell(row)` for what is shown (by default the value), and
 * `numeric` for columns that are aligned right.
 */
function sortable(caption, columns, rows, sortedBy = null) {
  let shown = rows;
  let order = sortedBy;
  let descending = false;
  let most = ROWS_AT_ONCE;
  const heads = columns.map((column, place) =>
    element(
      "th",
      { scope: "col", class: column.numeric ? "number" : column.class, "aria-sort": "none" },
      element("button", { type: "button", on: { click: () => sort(place) } }, column.title, element("span", { class: "direction", "aria-hidden": "true" })),
    ),
  );
  const body = element("tbody");
  const more = element("button", { type: "button", class: "more", on: { click: () => { most = Infinity; draw(); } } });
  const table = element("table", {}, element("caption", { class: "unseen" }, caption), element("thead", {}, element("tr", {}, heads)), body);
  const whole = element("div", { class: "table" }, table, more);

  function sort(place) {
    descending = order === place ? !descending : false;
    order = place;
    draw();
    say(`Sorted by ${columns[place].title}, ${descending ? "descending" : "ascending"}`);
  }

  function compare(one, other) {
    const [a, b] = [columns[order].value(one), columns[order].value(other)];
    if (a === b) return 0;
    if (a === null || a === undefined || Number.isNaN(a)) return 1;
    if (b === null || b === undefined || Number.isNaN(b)) return -1;
    const way = typeof a === "string" ? a.localeCompare(b, "en", { numeric: true }) : a - b;
    return descending ? -way : way;
  }

  function draw() {
    const sorted = order === null ? shown : [...shown].sort(compare);
    heads.forEach((head, place) => head.setAttribute("aria-sort", place === order ? (descending ? "descending" : "ascending") : "none"));
    body.replaceChildren(
      ...sorted.slice(0, most).map((row) =>
        element(
          "tr",
          {},
          columns.map((column) => element("td", { class: column.numeric ? "number" : column.class }, column.cell ? column.cell(row) : String(column.value(row) ?? "–"))),
        ),
      ),
    );
    if (!sorted.length) body.append(element("tr", {}, element("td", { colspan: columns.length, class: "none" }, "Nothing matches.")));
    more.hidden = sorted.length <= most;
    more.textContent = `Show all ${count(sorted.length)} rows`;
  }

  whole.filter = (keep) => {
    shown = rows.filter(keep);
    draw();
    return shown.length;
  };
  let held = most;
  window.addEventListener("beforeprint", () => {
    [held, most] = [most, Infinity];
    draw();
  });
  window.addEventListener("afterprint", () => {
    most = held;
    draw();
  });
  draw();
  return whole;
}
