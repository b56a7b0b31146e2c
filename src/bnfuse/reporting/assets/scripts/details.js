// What is known of the box that is selected.

/** A sign with its words, as it stands in tables and lists. */
function badge(mark, text) {
  const drawing = shape("svg", { width: 20, height: 20, viewBox: "-10.5 -10.5 21 21", "aria-hidden": "true" }, sign(mark, 0, 0));
  return element("span", { class: `badge ${mark}` }, drawing, text);
}

/** The lines of a reason beyond its first. */
function reasonLines(reason, link) {
  const refused = (reason.refused_by || []).map(link).filter(Boolean);
  return [
    reason.meaning ? element("p", {}, prose(reason.meaning)) : null,
    reason.advice ? element("p", {}, element("strong", {}, "What to do: "), prose(reason.advice)) : null,
    refused.length ? element("p", {}, element("strong", {}, "Refused by:")) : null,
    refused.length ? element("ul", { class: "plain refused" }, refused.map((one) => element("li", {}, one))) : null,
    (reason.details || []).length ? element("ul", { class: "lines" }, reason.details.map((line) => element("li", {}, prose(line)))) : null,
  ];
}

/** One step in words, as in the table of steps. */
function stepText({ kind, subject, what }) {
  return [`${kind} `, named(subject || "the model"), `: ${what}`];
}

const WAYS = { backward: "into what stands before it", forward: "into what stands after it", both: "into both sides", beside: "into what stands beside it" };

class Details {
  constructor(picture) {
    this.picture = picture;
    this.host = element("aside", { class: "details", "aria-label": "Selected", tabindex: "-1" });
    this.show(null);
  }

  link(id, network = this.picture.network) {
    const item = network.operators.get(id);
    if (!item) return null;
    const text = item.node.kind === "operator" || !item.node.module ? [item.node.operator, item.node.module].filter(Boolean).join(" in ") : item.node.module;
    return jumping(() => this.picture.reveal(item.key), named(text));
  }

  show(item) {
    if (!item) {
      this.host.replaceChildren(element("p", { class: "none" }, "Select a box to see what is known of it."));
      return;
    }
    this.host.replaceChildren(...(item.children ? this.ofGroup(item) : this.ofOperator(item)).filter(Boolean));
  }

  list(pairs) {
    return element("dl", {}, pairs.filter(([, value]) => value !== null && value !== "" && value !== undefined).flatMap(([term, value]) => [element("dt", {}, term), element("dd", {}, value)]));
  }

  ofGroup(group) {
    const { tally } = group;
    const norms = this.norms(group);
    return [
      element("h3", {}, named(group.module || group.kind)),
      this.list([
        ["class", group.kind ? named(group.kind) : null],
        ["operators", count(tally.operators)],
        ["norms", tally.removed || tally.kept ? `${count(tally.removed)} removed, ${count(tally.kept)} kept` : "none"],
        ["changed layers", tally.changed ? count(tally.changed) : null],
      ]),
      norms.length
        ? element(
            "ul",
            { class: "lines" },
            norms.slice(0, 60).map((item) => element("li", {}, badge(group.network.mark(item), ""), this.link(item.id, group.network))),
            norms.length > 60 ? element("li", {}, `and ${count(norms.length - 60)} more`) : null,
          )
        : null,
    ];
  }

  norms(group) {
    return group.children.flatMap((child) => (child.children ? this.norms(child) : child.tally.removed || child.tally.kept ? [child] : []));
  }

  ofOperator(item) {
    const { facts } = this.picture;
    const { node, network } = item;
    const link = (id) => this.link(id, network);
    const before = this.picture.itemIn(this.picture.network, item.key); // which the numbers speak of
    const joined = (ids) => {
      return listed([...new Set(ids)].map(link));
    };
    const listed = (all) => {
      const links = all.filter(Boolean);
      return links.length ? element("ul", { class: "plain" }, links.slice(0, 30).map((one) => element("li", {}, one)), links.length > 30 ? element("li", {}, `and ${count(links.length - 30)} more`) : null) : null;
    };
    const decision = network.decisions[node.decision];
    const absorbed = network.absorbed.get(item.id) || [];
    const error = before && (facts.errors || []).find((one) => one.node === before.id);
    const ranges = before && (facts.ranges || []).find((one) => one.node === before.id);
    const step = decision && (facts.steps || [])[decision.step];
    const elsewhere = decision && decision.removed && this.picture.other && network !== this.picture.other && !(decision.into_nodes || []).length ? decision.after?.into_nodes || [] : [];
    const took = absorbed.map((place) => {
      const here = network.decisions[place].norm_nodes || [];
      const there = this.picture.network.decisions[place];
      return here.length ? here.map(link) : (there.norm_nodes || []).map((id) => this.link(id));
    });
    const extent = (range) => (range ? `${digits(numeric(range.minimum))} … ${digits(numeric(range.maximum))}` : null);
    const change = (pair) => (pair && (pair.before || pair.after) ? `${extent(pair.before) || "–"} → ${extent(pair.after) || "–"}` : null);
    const mark = network.mark(item);
    return [
      element("h3", {}, named(node.label || node.operator)),
      mark ? element("p", {}, badge(mark, { removed: "removed", kept: "kept", changed: "weights changed" }[mark])) : null,
      decision?.removed && (decision.into_nodes || []).length ? element("p", {}, "Taken up by ", ...decision.into_nodes.flatMap((id, place) => (place ? [", ", link(id)] : [link(id)])).filter(Boolean), ".") : null,
      step ? element("p", {}, "Went with a step: ", stepText(step), ".") : null,
      elsewhere.length ? element("p", {}, "Its work is done, after, by ", ...elsewhere.flatMap((id, place) => (place ? [", ", this.link(id, this.picture.other)] : [this.link(id, this.picture.other)])).filter(Boolean), ".") : null,
      decision?.reason ? element("p", { class: "reason" }, prose(decision.reason.text)) : null,
      ...(decision?.reason ? reasonLines(decision.reason, link) : []),
      this.list([
        ["module", node.module ? named(node.module) : null],
        ["class", node.class ? named(node.class) : null],
        ["operator", named(node.operator)],
        ["output", [node.dtype, shapeText(node.shape)].filter(Boolean).join(" ")],
        ["way", WAYS[decision?.direction]],
        ["channels", decision?.channels ? count(decision.channels) : null],
        ["parameters", (node.parameters || []).length ? element("ul", { class: "plain" }, node.parameters.map((name) => element("li", {}, named(name)))) : null],
        ["created", (node.created || []).length ? element("ul", { class: "plain" }, node.created.map((name) => element("li", {}, named(name)))) : null],
        ["took up", absorbed.length ? listed(took.flat()) : null],
        ["difference", error ? `${digits(numeric(error.relative), 2)} relative; rounding ${digits(numeric(error.rounding), 2)}` : null],
        ["weights", change(ranges?.weight)],
        ["activations", change(ranges?.activation)],
        ["reads", joined(network.inputs.get(item.id).map(([from]) => from))],
        ["read by", joined(network.readers.get(item.id).map(([to]) => to))],
      ]),
    ];
  }
}
