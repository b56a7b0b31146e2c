// The recorded run as a tree of module calls, and what is seen of it while some of them are open.
//
// The operators of one module call stand together in the order of the run, so the tree is cut from that order: a module
// that runs at three places is three groups. As groups are stretches of the run, closing any of them leaves the picture
// without circles.

const MOST_CHILDREN = 120; // more in one group are cut into stretches, to be opened one by one
const FIRST_VIEW = 44; // as many boxes as one takes in at first sight
const AFTER = "after:"; // what keys of a network of its own begin with

class Network {
  /**
   * graph: its operators, edges and modules; decisions: of its norms.
   * prefix: what its keys begin with, so that those of two networks differ.
   */
  constructor(facts, graph = facts.graph || {}, decisions = facts.decisions || [], prefix = "") {
    this.prefix = prefix;
    this.decisions = decisions;
    this.edges = graph.edges || [];
    this.modules = new Map((graph.modules || []).map((module) => [module.name, module]));
    this.operators = new Map();
    this.groups = new Map();
    this.inputs = new Map();
    this.readers = new Map();
    for (const node of graph.nodes || []) {
      this.operators.set(node.id, { key: `${prefix}n${node.id}`, network: this, node, id: node.id, parent: null, children: null });
      this.inputs.set(node.id, []);
      this.readers.set(node.id, []);
    }
    this.edges = this.edges.filter(([from, to]) => this.operators.has(from) && this.operators.has(to));
    for (const [from, to, text] of this.edges) {
      this.inputs.get(to).push([from, text]);
      this.readers.get(from).push([to, text]);
    }
    this.absorbed = new Map(); // layer: the decisions whose norms it took up
    this.decisions.forEach((decision, place) => {
      for (const id of decision.into_nodes || []) {
        if (!this.absorbed.has(id)) this.absorbed.set(id, []);
        this.absorbed.get(id).push(place);
      }
    });
    this.root = this.grown(facts.model || "model");
  }

  /** The names of the modules around a node, outermost first, without the root. */
  way(name) {
    const names = [];
    for (let at = name; at && !names.includes(at); at = this.modules.get(at)?.parent) names.unshift(at);
    return names;
  }

  group(module, kind) {
    const made = { key: `${this.prefix}g${this.groups.size}`, network: this, module, kind, parent: null, children: [], stretch: null };
    this.groups.set(made.key, made);
    return made;
  }

  grown(model) {
    const root = this.group("", model);
    let open = [root];
    const later = [];
    for (const item of this.operators.values()) {
      const { kind, module } = item.node;
      if (kind === "constant" && this.readers.get(item.id).length) {
        later.push(item);
        continue;
      }
      if (kind === "input" || kind === "output") {
        root.children.push(item);
        continue;
      }
      const way = this.way(module);
      let depth = 0;
      while (depth < way.length && depth + 1 < open.length && open[depth + 1].module === way[depth]) depth += 1;
      open = open.slice(0, depth + 1);
      for (const name of way.slice(depth)) {
        const inner = this.group(name, this.modules.get(name)?.class || "");
        open[open.length - 1].children.push(inner);
        open.push(inner);
      }
      open[open.length - 1].children.push(item);
    }
    this.tidy(root);
    this.settle(root);
    for (const item of later) {
      // A constant stands with its first reader.
      const home = this.operators.get(this.readers.get(item.id)[0][0]).parent || root;
      home.children.splice(0, 0, item);
      item.parent = home;
    }
    this.reckon(root);
    return root;
  }

  /** Drop groups that hold a single thing, and cut up those that hold too many. */
  tidy(group) {
    group.children = group.children.map((child) => {
      if (!child.children) return child;
      this.tidy(child);
      if (child.children.length > 1) return child;
      this.groups.delete(child.key);
      return child.children[0];
    });
    while (group.children.length > MOST_CHILDREN) {
      const size = Math.ceil(Math.sqrt(group.children.length));
      const parts = [];
      for (let start = 0; start < group.children.length; start += size) {
        const part = this.group(group.module, group.kind);
        part.stretch = parts.length + 1;
        part.children = group.children.slice(start, start + size);
        parts.push(part);
      }
      group.children = parts;
    }
  }

  settle(group) {
    for (const child of group.children) {
      child.parent = group;
      if (child.children) this.settle(child);
    }
  }

  /** How many operators, norms and changed layers a group holds. */
  reckon(item) {
    const none = { operators: 0, removed: 0, kept: 0, changed: 0 };
    if (!item.children) {
      const { node } = item;
      const norm = typeof node.decision === "number";
      const gone = norm && this.decisions[node.decision]?.removed;
      // A network of its own after is drawn without what is removed, so that is not counted either.
      item.tally = { operators: this.prefix && node.removed ? 0 : 1, removed: Number(norm && gone), kept: Number(norm && !gone), changed: Number(Boolean(node.changed) && !norm) };
    } else {
      item.tally = none;
      for (const child of item.children) {
        const inner = this.reckon(child);
        for (const name of Object.keys(none)) none[name] += inner[name];
      }
    }
    return item.tally;
  }

  /** An operator or a group by its key. */
  item(key) {
    const own = `${this.prefix}n`;
    return key.startsWith(own) ? this.operators.get(Number(key.slice(own.length))) : this.groups.get(key);
  }

  /** What an item is called: its module below the group in which it stands. */
  name(item) {
    const module = item.children ? item.module : item.node.module;
    const short = below(module || "", item.parent?.module || "");
    return item.stretch ? `part ${item.stretch}` : short;
  }

  /** What a norm's decision makes of an operator: "removed", "kept", "changed" or "". */
  mark(item) {
    const { tally } = item;
    if (item.children) return "";
    return tally.removed ? "removed" : tally.kept ? "kept" : tally.changed ? "changed" : "";
  }

  /** Groups to open at first: level by level, as long as the boxes can be taken in. */
  firstView() {
    const open = new Set();
    let level = [this.root];
    let shown = 1;
    while (level.length) {
      const more = level.reduce((sum, group) => sum + group.children.length - 1, 0);
      if (open.size && shown + more > FIRST_VIEW) break;
      for (const group of level) open.add(group.key);
      shown += more;
      level = level.flatMap((group) => group.children.filter((child) => child.children));
    }
    return open;
  }

  /** The box in which an operator is seen: its own, or the outermost closed group around it. */
  seenAs(item, open) {
    let seen = item;
    for (let at = item.parent; at; at = at.parent) if (!open.has(at.key)) seen = at;
    return seen;
  }

  /** The operator whose value an operator hands on: past those that no longer run. */
  source(id) {
    const passed = new Set();
    let at = id;
    while (this.operators.get(at).node.removed && this.inputs.get(at).length && !passed.has(at)) {
      passed.add(at);
      at = this.inputs.get(at)[0][0];
    }
    return at;
  }

  /**
   * What is seen while some groups are open.
   *
   * which: "before" or "after"; after, the operators that no longer run are passed by.
   * Returns `boxes` (a map of keys to items), `tree` (item, and children where it is open), `edges` (a map of "from>to"
   * to its two keys and its texts) and `seen` (a map of operators to keys).
   */
  view(which, open) {
    const after = which === "after";
    const boxes = new Map();
    const seen = new Map();
    const visit = (item) => {
      if (!item.children) {
        if (after && item.node.removed) return null;
        boxes.set(item.key, item);
        return { item };
      }
      if (!open.has(item.key)) {
        if (after && !this.runs(item)) return null;
        boxes.set(item.key, item);
        return { item };
      }
      const children = item.children.map(visit).filter(Boolean);
      if (!children.length) return null;
      if (item !== this.root) boxes.set(item.key, item);
      return { item, children };
    };
    const tree = visit(this.root) || { item: this.root, children: [] };
    for (const item of this.operators.values()) {
      const box = this.seenAs(item, open);
      if (boxes.has(box.key)) seen.set(item.id, box.key);
    }
    const edges = new Map();
    for (const [from, to, text] of this.edges) {
      if (after && this.operators.get(to).node.removed) continue;
      const start = seen.get(after ? this.source(from) : from);
      const end = seen.get(to);
      if (!start || !end || start === end) continue;
      const key = `${start}>${end}`;
      if (!edges.has(key)) edges.set(key, { key, from: start, to: end, texts: new Set() });
      if (text) edges.get(key).texts.add(text);
    }
    return { which, boxes, tree, edges, seen };
  }

  /** How many operators run. */
  count(which) {
    return [...this.operators.values()].filter(({ node }) => which === "before" || !node.removed).length;
  }

  runs(group) {
    return group.children.some((child) => (child.children ? this.runs(child) : !child.node.removed));
  }

  /** The edges of a shortest way between two operators, wherever the data flows; empty if there is none. */
  between(start, end) {
    const from = new Map([[start, null]]);
    let front = [start];
    while (front.length && !from.has(end)) {
      const next = [];
      for (const at of front) {
        for (const [neighbour] of [...this.readers.get(at), ...this.inputs.get(at)]) {
          if (from.has(neighbour)) continue;
          from.set(neighbour, at);
          next.push(neighbour);
        }
      }
      front = next;
    }
    const edges = [];
    for (let at = end; from.get(at) !== null && from.has(at); at = from.get(at)) {
      const back = from.get(at);
      edges.push(this.readers.get(back).some(([reader]) => reader === at) ? [back, at] : [at, back]);
    }
    return edges;
  }
}

/** The network after fusing where it is another one than that before without what was removed; null if it is not. */
function networkAfter(facts) {
  if (!facts.graph_after) return null;
  const decisions = (facts.decisions || []).map((decision) => {
    const { refused_by: refusing, ...places } = decision.after || { norm_nodes: [], into_nodes: [], path: [] };
    return { ...decision, ...places, reason: decision.reason && { ...decision.reason, refused_by: refusing || [] } };
  });
  return new Network(facts, facts.graph_after, decisions, AFTER);
}

/** What an item of one of two networks is in the other: a map of keys to keys, both ways. */
function twinsOf(before, after) {
  const twins = new Map();
  const pair = (one, other) => {
    if (twins.has(one.key) || twins.has(other.key)) return;
    twins.set(one.key, other.key);
    twins.set(other.key, one.key);
  };
  for (const item of after.operators.values()) {
    const twin = before.operators.get(item.node.before);
    if (!twin) continue;
    pair(item, twin);
    // Around both stand the same modules, as long as they are called the same.
    let [inner, outer] = [item.parent, twin.parent];
    while (inner && outer && inner.module === outer.module && inner.stretch === outer.stretch) {
      pair(inner, outer);
      [inner, outer] = [inner.parent, outer.parent];
    }
  }
  const placed = new Map();
  for (const group of before.groups.values()) if (!placed.has(group.module)) placed.set(group.module, group);
  for (const group of after.groups.values()) if (placed.has(group.module)) pair(group, placed.get(group.module));
  pair(before.root, after.root);
  return twins;
}
