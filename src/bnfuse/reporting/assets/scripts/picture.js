// The section with the network: two panes, what both share, and the tools above them.

const HINT = "Drag to pan; scroll with Ctrl or pinch to zoom. With the keyboard: arrows follow the data, Enter opens a module, + − 0 zoom, / finds.";
const MOST_BOXES = 300; // opened at once; more can be opened one by one

class Picture {
  constructor(facts, network, other = null) {
    this.facts = facts;
    this.network = network;
    this.other = other; // the network after where it is another one
    this.twins = other ? twinsOf(network, other) : new Map();
    this.layouts = new Layouts();
    this.open = network.firstView();
    if (other) for (const key of other.firstView()) this.open.add(key);
    this.mode = "before";
    this.chosen = null;
    this.lit = null;
    this.large = false;
    this.panes = { before: new Pane("before", this), after: new Pane("after", this) };
    this.details = new Details(this);
    this.build();
  }

  build() {
    const tool = (text, label, does) => element("button", { type: "button", title: label, "aria-label": label, on: { click: does } }, text);
    this.modes = choice("Which network", [["before", "Before"], ["after", "After"], ["both", "Side by side"]], "before", (mode) => this.setMode(mode));
    this.finder = element("input", {
      type: "search",
      id: "find",
      placeholder: "Find a module, operator or parameter",
      "aria-label": "Find in the network",
      role: "combobox",
      "aria-expanded": "false",
      "aria-controls": "found",
      "aria-autocomplete": "list",
      autocomplete: "off",
      spellcheck: "false",
    });
    this.list = element("ul", { id: "found", role: "listbox", "aria-label": "Found", hidden: true });
    this.enlarge = tool("⤢", "Fill the window", () => this.setLarge(!this.large));
    const zooms = element(
      "div",
      { class: "tools", role: "group", "aria-label": "Zoom" },
      tool("−", "Zoom out", () => this.each((pane) => pane.zoom(0.8), true)),
      tool("+", "Zoom in", () => this.each((pane) => pane.zoom(1.25), true)),
      tool("Fit", "Show the whole network", () => this.each((pane) => pane.fit())),
      this.enlarge,
    );
    const depth = element(
      "div",
      { class: "tools", role: "group", "aria-label": "Modules" },
      tool("Expand", "Open every module that is seen, by one level", () => this.deepen(1)),
      tool("Collapse", "Close the innermost modules", () => this.deepen(-1)),
    );
    this.hint = element("p", { class: "hint" }, HINT);
    this.frame = element("div", { class: "panes", "data-mode": "before" }, this.panes.before.host, this.panes.after.host);
    this.host = element(
      "div",
      { class: "picture" },
      element("div", { class: "toolbar" }, this.modes, depth, zooms, element("div", { class: "finder" }, this.finder, this.list)),
      this.legend(),
      element("div", { class: "stagebox" }, this.frame, this.details.host),
      this.hint,
    );
    this.listen();
  }

  legend() {
    const entry = (mark, text) => element("li", {}, shape("svg", { width: 24, height: 24, viewBox: "-12 -12 24 24", "aria-hidden": "true" }, sign(mark, 0, 0)), text);
    const line = (kind, text) =>
      element("li", {}, shape("svg", { width: 30, height: 12, viewBox: "0 0 30 12", "aria-hidden": "true" }, shape("path", { class: kind, d: "M1,6H29" })), text);
    return element(
      "ul",
      { class: "legend", "aria-label": "Legend" },
      entry("removed", "norm, removed"),
      entry("kept", "norm, kept"),
      entry("changed", "layer with changed weights"),
      line("wire", "data"),
      line("arrow lit", "from a norm to the layer that took it up"),
    );
  }

  /** What a key stands for, in whichever network. */
  item(key) {
    return this.network.item(key) || this.other?.item(key);
  }

  /** The same thing in a network; null if it holds no such thing. */
  itemIn(network, key) {
    return network.item(key) || network.item(this.twins.get(key) || "") || null;
  }

  /** The box in which something is seen in a pane: its own, its twin's, or that which it is handed on to; null if none. */
  keyIn(pane, key) {
    if (pane.view.boxes.has(key)) return key;
    const item = this.itemIn(pane.network, key);
    if (!item) return null;
    if (pane.view.boxes.has(item.key)) return item.key;
    return item.children ? null : pane.view.seen.get(pane.network.source(item.id)) || null;
  }

  /** Open or close a module, and its twin. */
  setOpen(key, open) {
    for (const one of [key, this.twins.get(key)]) {
      const group = one && this.item(one);
      if (!group?.children) continue;
      if (open) this.open.add(one);
      else this.close(group);
    }
  }

  shown() {
    return this.mode === "both" ? [this.panes.before, this.panes.after] : [this.panes[this.mode]];
  }

  /** Do something in what is seen; only in the first pane where the other one follows. */
  each(does, first = false) {
    for (const pane of first ? this.shown().slice(0, 1) : this.shown()) does(pane);
  }

  async show() {
    const draws = await Promise.all(this.shown().map((pane) => pane.prepared()));
    for (const draw of draws) draw();
    this.drawn = new Set(this.open);
    this.marked();
  }

  /** Show what is open now; if that is given up, what was seen before. */
  async reshow() {
    try {
      await this.show();
      return true;
    } catch (error) {
      if (!this.drawn) throw error;
      this.open = new Set(this.drawn);
      say(`The picture stays as it was: ${error.message}`);
      await this.show();
      return false;
    }
  }

  async setMode(mode) {
    const last = this.panes[this.mode === "both" ? "before" : this.mode];
    const seen = last.middle();
    const { scale } = last.at;
    this.mode = mode;
    this.frame.dataset.mode = mode;
    this.modes.set(mode);
    await this.reshow();
    for (const pane of this.shown()) if (pane !== last || mode === "both") this.lead(pane, seen, scale);
    say(mode === "both" ? "Before and after, side by side" : `The network ${mode}`);
  }

  setLarge(large) {
    this.large = large;
    this.host.classList.toggle("large", large);
    this.enlarge.setAttribute("aria-pressed", String(large));
    this.each((pane) => pane.layout && pane.place());
  }

  /** Let the other pane show what this one shows. */
  follow(pane) {
    if (this.mode !== "both" || this.following) return;
    const other = pane === this.panes.before ? this.panes.after : this.panes.before;
    this.following = true;
    this.lead(other, pane.middle(), pane.at.scale);
    this.following = false;
  }

  /** Put a box at the same place of a pane at which it was seen in the other. */
  lead(pane, seen, scale) {
    if (!seen || !pane.layout) return;
    const key = this.keyIn(pane, seen.key);
    const box = key && pane.layout.boxes.get(key);
    if (!box) return;
    const { width, height } = pane.size();
    pane.look({ scale, x: seen.left * width - (box.x + box.width / 2) * scale, y: seen.top * height - (box.y + box.height / 2) * scale }, false);
  }

  // Open and close

  async toggle(key, pane = this.shown()[0]) {
    const group = this.item(key);
    const opening = !this.open.has(key);
    this.setOpen(key, opening);
    const before = this.onScreen(pane, key);
    const done = await this.reshow();
    this.keep(pane, key, before);
    if (done) say(`${group.module || group.kind} ${opening ? "opened" : "closed"}`);
  }

  close(group) {
    this.open.delete(group.key);
    for (const child of group.children) if (child.children) this.close(child);
  }

  /** Where the head of a box stands on the screen. */
  onScreen(pane, key) {
    const box = pane.layout?.boxes.get(key);
    return box && { x: (box.x + box.width / 2) * pane.at.scale + pane.at.x, y: box.y * pane.at.scale + pane.at.y };
  }

  /** Hold a box where it was while the rest makes room. */
  keep(pane, key, before) {
    const now = this.onScreen(pane, key);
    if (before && now) pane.pan(before.x - now.x, before.y - now.y);
  }

  async deepen(way) {
    let cut = false;
    const level = (group) => {
      let depth = 0;
      for (let at = group.parent; at; at = at.parent) depth += 1;
      return depth;
    };
    if (way > 0) {
      // In reading order, as long as the picture can still be taken in.
      const { view } = this.shown()[0];
      let boxes = view.boxes.size;
      for (const key of this.shown()[0].inOrder()) {
        const group = this.item(key);
        if (!group.children || this.open.has(key)) continue;
        boxes += group.children.length;
        if (boxes > MOST_BOXES) {
          cut = true;
          break;
        }
        this.setOpen(key, true);
      }
    } else {
      const opened = [...this.open].map((key) => this.item(key)).filter((group) => group.parent);
      const deepest = Math.max(0, ...opened.map(level));
      for (const group of opened) if (level(group) === deepest) this.open.delete(group.key);
    }
    const pane = this.shown()[0];
    const seen = pane.middle();
    const { scale } = pane.at;
    if (!(await this.reshow())) return;
    const item = seen && this.itemIn(pane.network, seen.key);
    const key = item && (pane.view.boxes.has(item.key) ? item.key : this.visible(item, pane));
    if (key) this.lead(pane, { ...seen, key }, scale);
    this.follow(pane);
    this.hint.textContent = cut ? `With all modules of this level there would be more than ${MOST_BOXES} boxes; open the others one by one.` : HINT;
    say(`${counted(pane.view.boxes.size, "box", "boxes")} are shown. ${cut ? this.hint.textContent : ""}`);
  }

  visible(item, pane) {
    for (let at = item; at; at = at.parent) if (pane.view.boxes.has(at.key)) return at.key;
    return null;
  }

  /** Show an operator or a group: open what holds it, bring it to the middle, select it. */
  async reveal(key, { focus = true } = {}) {
    const item = this.item(key);
    if (!item) return;
    if (this.mode !== "both" && item.network !== this.panes[this.mode].network) {
      await this.setMode(item.network === this.other ? "after" : "before");
    } else if (!item.children && item.node.removed && this.mode === "after") {
      await this.setMode("before");
    }
    for (let at = item.parent; at; at = at.parent) this.setOpen(at.key, true);
    this.choose(key);
    if (!(await this.reshow())) return;
    const pane = this.shown().find((one) => one.network === item.network) || this.shown()[0];
    pane.center(key);
    if (focus) {
      this.host.scrollIntoView({ block: "start", behavior: calm.matches ? "auto" : "smooth" });
      pane.focus(key);
    }
  }

  // Select and highlight

  choose(key) {
    this.chosen = key;
    this.each((pane) => pane.choose(key));
    this.details.show(key && this.item(key));
  }

  /** What belongs to a box: for a norm its path to the layers that took it up, or to the operator that refused. */
  light(key) {
    this.lit = key;
    this.each((pane) => pane.light(this.belongings(key, pane.network)));
  }

  belongings(key, network) {
    if (!key) return null;
    const item = this.itemIn(network, key);
    if (!item) return this.handedOn(this.item(key), network);
    return this.around(item, network);
  }

  /** Of something that another network lacks: the layers there that took up the norms, or the norms they took up. */
  handedOn(item, network) {
    const lit = { keys: [], nodes: [], edges: [], decisions: [], refusing: [] };
    if (item.children) return lit;
    lit.decisions = typeof item.node.decision === "number" ? [item.node.decision] : item.network.absorbed.get(item.id) || [];
    for (const place of lit.decisions) {
      const decision = network.decisions[place];
      lit.nodes.push(...(decision.norm_nodes || []), ...(decision.into_nodes || []));
    }
    return lit;
  }

  around(item, network) {
    const { key } = item;
    const lit = { keys: [key], nodes: [], edges: [], decisions: [], refusing: [] };
    if (item.children) {
      for (const pane of this.shown()) {
        for (const edge of pane.view?.edges.values() || []) if (edge.from === key || edge.to === key) lit.keys.push(edge.from, edge.to);
      }
      for (const [from, to] of network.edges) {
        if (this.inside(network.operators.get(from), item) !== this.inside(network.operators.get(to), item)) lit.edges.push([from, to]);
      }
      for (let at = item.parent; at; at = at.parent) lit.keys.push(at.key);
      const within = (group) => {
        for (const child of group.children) {
          lit.keys.push(child.key);
          if (child.children) within(child);
        }
      };
      within(item);
      return lit;
    }
    for (let at = item.parent; at; at = at.parent) lit.keys.push(at.key);
    const norm = network.decisions[item.node.decision];
    lit.decisions = norm ? [item.node.decision] : network.absorbed.get(item.id) || [];
    for (const place of lit.decisions) {
      const decision = network.decisions[place];
      lit.nodes.push(...(decision.norm_nodes || []), ...(decision.into_nodes || []));
      lit.edges.push(...(decision.path || []));
      for (const refused of decision.reason?.refused_by || []) {
        if (!network.operators.has(refused)) continue;
        lit.refusing.push(refused);
        lit.nodes.push(refused);
        lit.edges.push(...network.between(decision.norm_nodes?.[0] ?? item.id, refused));
      }
    }
    if (!lit.decisions.length) {
      lit.edges.push(...network.inputs.get(item.id).map(([from]) => [from, item.id]));
      lit.edges.push(...network.readers.get(item.id).map(([to]) => [item.id, to]));
    }
    for (const [from, to] of lit.edges) lit.nodes.push(from, to);
    return lit;
  }

  inside(item, group) {
    for (let at = item.parent; at; at = at.parent) if (at === group) return true;
    return false;
  }

  // Find

  matches(text) {
    const wanted = text.trim().toLowerCase();
    if (!wanted) return [];
    // What both networks hold is found in the one before.
    const both = [this.network, ...(this.other ? [this.other] : [])].map((network) => this.matchesIn(network, wanted));
    return [...both[0], ...(both[1] || []).filter((item) => !this.twins.has(item.key))];
  }

  matchesIn(network, wanted) {
    const found = [];
    for (const group of network.groups.values()) {
      if (group !== network.root && !group.stretch && `${group.module} ${group.kind}`.toLowerCase().includes(wanted)) found.push(group);
    }
    for (const item of network.operators.values()) {
      const { module, operator, label, parameters, kind } = item.node;
      if (`${module} ${operator} ${label} ${kind} ${item.node.class || ""} ${(parameters || []).join(" ")}`.toLowerCase().includes(wanted)) found.push(item);
    }
    return found;
  }

  marked() {
    const keys = new Set();
    for (const item of this.sought || []) {
      keys.add(item.key);
      if (this.twins.has(item.key)) keys.add(this.twins.get(item.key));
    }
    this.each((pane) => pane.found(keys));
  }

  listen() {
    const { finder, list } = this;
    let at = -1;
    const close = () => {
      list.hidden = true;
      finder.setAttribute("aria-expanded", "false");
      finder.removeAttribute("aria-activedescendant");
      at = -1;
    };
    const go = (item) => {
      close();
      this.reveal(item.key);
    };
    const point = (place) => {
      const options = [...list.querySelectorAll("[role=option]")];
      if (!options.length) return;
      at = (place + options.length) % options.length;
      options.forEach((option, number) => option.setAttribute("aria-selected", String(number === at)));
      options[at].scrollIntoView({ block: "nearest" });
      finder.setAttribute("aria-activedescendant", options[at].id);
    };
    const search = () => {
      this.sought = this.matches(finder.value);
      const shown = this.sought.slice(0, 50);
      list.replaceChildren(
        ...shown.map((item, place) =>
          element(
            "li",
            { role: "option", id: `found-${place}`, "aria-selected": "false", on: { pointerdown: (event) => { event.preventDefault(); go(item); } } },
            element("span", { class: "what" }, item.children ? item.kind || "module" : item.node.label || item.node.operator),
            named((item.children ? item.module : item.node.module) || "–"),
          ),
        ),
      );
      if (!finder.value.trim()) {
        close();
      } else {
        const rest = this.sought.length - shown.length;
        if (rest > 0) list.append(element("li", { class: "rest" }, `and ${count(rest)} more`));
        if (!this.sought.length) list.append(element("li", { class: "rest" }, "Nothing found."));
        list.hidden = false;
        finder.setAttribute("aria-expanded", "true");
        at = -1;
        say(`${count(this.sought.length)} found`);
      }
      this.marked();
    };
    finder.addEventListener("input", search);
    finder.addEventListener("focus", () => { if (finder.value.trim()) search(); });
    finder.addEventListener("blur", close);
    finder.addEventListener("keydown", (event) => {
      if (event.key === "ArrowDown") point(at + 1);
      else if (event.key === "ArrowUp") point(at - 1);
      else if (event.key === "Enter" && this.sought?.length) go(this.sought[Math.max(0, at)]);
      else if (event.key === "Escape") {
        finder.value = "";
        search();
      } else return;
      event.preventDefault();
    });
    document.addEventListener("keydown", (event) => {
      if (event.target.closest("input, select, textarea")) return;
      if (event.key === "/") {
        event.preventDefault();
        finder.focus();
      } else if (event.key === "Escape" && this.large) {
        this.setLarge(false);
      }
    });
    new ResizeObserver(() => this.each((pane) => pane.layout && pane.place())).observe(this.frame);
    const views = new Map();
    window.addEventListener("beforeprint", () => {
      // On paper the whole network is seen, as large as the page allows.
      this.light(null);
      this.each((pane) => {
        if (!pane.layout) return;
        views.set(pane, pane.at);
        pane.drawing.setAttribute("viewBox", `-8 -8 ${pane.layout.width + 16} ${pane.layout.height + 16}`);
        pane.at = { x: 0, y: 0, scale: 1 };
        pane.place();
      });
    });
    window.addEventListener("afterprint", () => {
      for (const [pane, before] of views) {
        pane.drawing.removeAttribute("viewBox");
        pane.look(before, false);
      }
      views.clear();
    });
  }
}
