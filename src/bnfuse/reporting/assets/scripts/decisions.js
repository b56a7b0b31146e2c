// Every norm with its decision; those that stay grouped by their reasons.

function decided(facts, picture) {
  const decisions = facts.decisions || [];
  if (!decisions.length) return section("decisions", "Decisions", element("p", { class: "none" }, "There is no batch norm."));
  const plan = facts.kind === "plan";
  const link = (id) => picture.details.link(id);
  const normLink = (decision) => {
    const id = (decision.norm_nodes || []).find((node) => picture.network.operators.has(node));
    if (id === undefined) return named(decision.norm);
    return jumping(() => picture.reveal(`n${id}`), named(decision.norm));
  };
  const places = new Map(decisions.map((decision, place) => [decision, place]));
  const refusing = (decision) => (decision.reason?.refused_by || []).map(link).filter(Boolean);
  const spaced = (parts) => parts.flatMap((part, place) => (place ? [", ", part] : [part]));
  const target = (decision) => {
    if (decision.removed) {
      const step = (facts.steps || [])[decision.step];
      const after = decision.step !== null && picture.other ? (decision.after?.into_nodes || []).map((id) => picture.details.link(id, picture.other)).filter(Boolean) : [];
      if (step) return element("span", {}, after.length ? spaced(after) : named(step.subject || "the model"), ` (${step.kind})`);
      const known = (decision.into_nodes || []).map(link).filter(Boolean);
      return element("span", {}, known.length ? spaced(known) : spaced((decision.into || []).map((name) => named(name))));
    }
    const refused = refusing(decision);
    return refused.length ? element("span", {}, "refused by ", spaced(refused)) : "–";
  };
  const reason = (decision) => {
    if (!decision.reason) return "";
    const lines = reasonLines(decision.reason, link).filter(Boolean);
    return element("div", {}, prose(decision.reason.text), lines.length ? element("details", {}, element("summary", {}, "more"), lines) : null);
  };
  const table = sortable(
    "Decisions",
    [
      { title: "Norm", class: "long", value: (decision) => places.get(decision), cell: normLink },
      { title: "Class", class: "short", value: (decision) => decision.class || "", cell: (decision) => named(decision.class || "–") },
      { title: "Channels", numeric: true, value: (decision) => decision.channels ?? null, cell: (decision) => (decision.channels == null ? "–" : count(decision.channels)) },
      { title: "Decision", value: (decision) => (decision.removed ? "removed" : "kept"), cell: (decision) => badge(decision.removed ? "removed" : "kept", decision.removed ? "removed" : "kept") },
      { title: plan ? "Would be taken up by" : "Taken up by", class: "long", value: (decision) => (decision.into || []).join(", "), cell: target },
      { title: "Reason", class: "reason", value: (decision) => decision.reason?.text || "", cell: reason, skip: !decisions.some((decision) => decision.reason) },
    ].filter((column) => !column.skip),
    decisions,
  );
  const state = { text: "", decision: "all", code: "" };
  const shown = element("p", { class: "shown", role: "status" });
  const text = (decision) => [decision.norm, decision.class, ...(decision.into || []), decision.reason?.code, decision.reason?.text].join(" ").toLowerCase();
  const apply = () => {
    const left = table.filter(
      (decision) =>
        (state.decision === "all" || (state.decision === "removed") === Boolean(decision.removed)) &&
        (!state.code || decision.reason?.code === state.code) &&
        text(decision).includes(state.text.trim().toLowerCase()),
    );
    shown.textContent = `${count(left)} of ${counted(decisions.length, "norm")} shown`;
  };
  const kinds = choice("Which norms", [["all", "All"], ["removed", "Removed"], ["kept", "Kept"]], "all", (value) => {
    state.decision = value;
    apply();
  });
  const groups = new Map();
  for (const decision of decisions) {
    if (decision.removed || !decision.reason) continue;
    const { code } = decision.reason;
    if (!groups.has(code)) groups.set(code, []);
    groups.get(code).push(decision);
  }
  const ordered = [...groups].sort(([, one], [, other]) => other.length - one.length);
  const codes = element("select", { "aria-label": "Reason", on: { change: (event) => { state.code = event.target.value; apply(); } } },
    element("option", { value: "" }, "every reason"),
    ordered.map(([code, members]) => element("option", { value: code }, `${visible(code.length > 60 ? `${code.slice(0, 60)}…` : code)} (${count(members.length)})`)),
  );
  const search = element("input", { type: "search", "aria-label": "Filter the norms", placeholder: "Filter by name, layer or reason", on: { input: (event) => { state.text = event.target.value; apply(); } } });
  const controls = element("div", { class: "toolbar" }, kinds, ordered.length ? codes : null, element("div", { class: "finder" }, search));
  const cards = ordered.map(([code, members]) => {
    const first = members[0].reason;
    const texts = alike(members.map((decision) => [decision.reason.text, decision]));
    const only = () => {
      Object.assign(state, { code, decision: "all" });
      codes.value = code;
      kinds.set("all");
      apply();
      controls.scrollIntoView({ block: "start", behavior: calm.matches ? "auto" : "smooth" });
    };
    return element(
      "details",
      { class: "group" },
      element("summary", {}, badge("kept", ""), element("span", { class: "times" }, counted(members.length, "norm")), prose(texts[0][0])),
      first.meaning ? element("p", {}, prose(first.meaning)) : null,
      first.advice ? element("p", {}, element("strong", {}, "What to do: "), prose(first.advice)) : null,
      element("ul", { class: "lines" }, texts.map(([line, norms]) =>
        element("li", {}, texts.length > 1 ? [prose(line), ": "] : null, spaced(norms.slice(0, 12).map(normLink)), norms.length > 12 ? ` and ${count(norms.length - 12)} more` : null))),
      element("p", {}, element("button", { type: "button", on: { click: only } }, "Only these in the table"), " ", element("span", { class: "code" }, named(code))),
    );
  });
  const closed = new Set();
  window.addEventListener("beforeprint", () => {
    for (const card of cards) if (!card.open) closed.add(card);
    for (const card of closed) card.open = true;
  });
  window.addEventListener("afterprint", () => {
    for (const card of closed) card.open = false;
    closed.clear();
  });
  apply();
  return section(
    "decisions",
    "Decisions",
    cards.length ? element("h3", {}, "Why norms stay") : element("p", {}, plan ? "No norm would stay." : "No norm stays."),
    element("div", { class: "groups" }, cards),
    element("h3", {}, "Every norm"),
    controls,
    shown,
    table,
  );
}
