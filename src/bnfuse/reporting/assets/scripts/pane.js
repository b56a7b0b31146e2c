// One drawing of the network: boxes, edges, arrows; pan, zoom, keys.

const MARKS = {
  removed: { letter: "R", words: "batch norm, removed" },
  kept: { letter: "K", words: "batch norm, kept" },
  changed: { letter: "W", words: "weights changed" },
  good: { letter: "✓", words: "equal" },
  bad: { letter: "!", words: "different" },
};
const SCALES = [0.05, 3];
const MOST_MOVING = 300;

/** The sign of a mark: a letter in a circle (removed), a diamond (kept) or a square (changed), so that it needs no colour. */
function sign(mark, x, y) {
  const outline = {
    removed: () => shape("circle", { r: 8 }),
    kept: () => shape("path", { d: "M0,-10L10,0L0,10L-10,0Z" }),
    changed: () => shape("rect", { x: -7.5, y: -7.5, width: 15, height: 15, rx: 2 }),
    good: () => shape("circle", { r: 8 }),
    bad: () => shape("path", { d: "M0,-10L10,8H-10Z" }),
  }[mark]();
  return shape("g", { class: `sign ${mark}`, transform: `translate(${x},${y})` }, outline, shape("text", { y: 3.5, "text-anchor": "middle" }, MARKS[mark].letter));
}

let panes = 0;

class Pane {
  constructor(which, picture) {
    this.which = which;
    this.picture = picture;
    this.network = (which === "after" && picture.other) || picture.network;
    this.view = null;
    this.layout = null;
    this.at = { x: 0, y: 0, scale: 1 };
    this.places = new Map(); // key: the element of its box
    this.backs = new Map(); // key: the background of an open group
    this.wires = new Map(); // "from>to": the element of its edge
    this.current = null; // the key that the tabulator key reaches
    this.turn = 0;
    const id = (panes += 1);
    const arrow = (name) =>
      shape(
        "marker",
        { id: `${name}${id}`, viewBox: "0 0 8 8", refX: 7, refY: 4, markerWidth: 8, markerHeight: 8, markerUnits: "userSpaceOnUse", orient: "auto-start-reverse", class: name },
        shape("path", { d: "M0,0.5L8,4L0,7.5Z" }),
      );
    this.heads = { flow: `url(#flow${id})`, lit: `url(#lit${id})`, taken: `url(#taken${id})` };
    this.layers = Object.fromEntries(["backs", "wires", "arrows", "boxes"].map((name) => [name, shape("g", { class: name })]));
    this.stage = shape("g", { class: "stage" }, Object.values(this.layers));
    const title = which === "before" ? "before" : "after";
    this.drawing = shape(
      "svg",
      { class: "drawing", role: "group", "aria-label": `The network ${title}. Arrow keys move, Enter opens a module or selects.` },
      shape("defs", {}, arrow("flow"), arrow("lit"), arrow("taken")),
      this.stage,
    );
    this.map = shape("svg", { class: "map", "aria-hidden": "true" });
    this.note = element("p", { class: "waiting" });
    this.host = element(
      "div",
      { class: "pane", "data-which": which },
      element("h3", { class: "which" }, which === "before" ? "Before" : "After"),
      this.drawing,
      this.map,
      this.note,
    );
    this.listen();
  }

  // What is drawn

  /** Lay out what is seen now; gives what draws it, so that two panes change together. */
  async prepared() {
    const turn = (this.turn += 1);
    const view = this.network.view(this.which, this.picture.open);
    const stop = element("button", { type: "button", hidden: true, on: { click: () => this.picture.layouts.stop() } }, "Stop");
    this.note.replaceChildren(`Laying out ${counted(view.boxes.size, "box", "boxes")}… `, stop);
    this.note.hidden = false;
    const patience = setTimeout(() => { stop.hidden = false; }, 1500);
    let layout;
    try {
      layout = await this.picture.layouts.of(view);
    } catch (error) {
      if (turn === this.turn) this.note.textContent = `The picture could not be laid out: ${error.message}`;
      throw error;
    } finally {
      clearTimeout(patience);
    }
    return () => {
      if (turn !== this.turn) return; // something else is to be seen by now
      this.note.hidden = true;
      const first = this.layout === null;
      this.view = view;
      this.layout = layout;
      this.draw();
      if (first) this.open();
      this.place();
    };
  }

  draw() {
    const held = document.activeElement?.closest?.("[data-key]");
    const holding = held && this.drawing.contains(held) ? held.dataset.key : null;
    this.drawing.classList.toggle("moving", !calm.matches && this.view.boxes.size <= MOST_MOVING);
    for (const [key, place] of this.places) {
      if (!this.view.boxes.has(key)) {
        place.remove();
        this.places.delete(key);
      }
    }
    const ordered = [...this.view.boxes.values()].sort((one, other) => this.order(one) - this.order(other));
    for (const item of ordered) this.box(item);
    // In reading order; what stands there already is not touched, since moving an element takes its focus.
    let next = this.layers.boxes.firstChild;
    for (const { key } of ordered) {
      const place = this.places.get(key);
      if (place === next) next = next.nextSibling;
      else this.layers.boxes.insertBefore(place, next);
    }
    for (const [key, back] of this.backs) {
      if (!this.view.boxes.has(key) || !this.picture.open.has(key)) {
        back.remove();
        this.backs.delete(key);
      }
    }
    this.wires.clear();
    this.layers.wires.replaceChildren(
      ...[...this.view.edges.values()].filter(({ key }) => this.layout.edges.has(key)).map((edge) => {
        const wire = shape("path", { class: "wire", d: rounded(this.layout.edges.get(edge.key)), "marker-end": this.heads.flow });
        this.wires.set(edge.key, wire);
        return wire;
      }),
    );
    this.arrows();
    this.drawMap();
    if (!this.current || !this.places.has(this.current)) this.current = ordered.length ? this.inOrder()[0] : null;
    for (const [key, place] of this.places) place.setAttribute("tabindex", key === this.current ? "0" : "-1");
    if (holding && !this.drawing.contains(document.activeElement) && this.current) {
      this.places.get(this.places.has(holding) ? holding : this.current).focus({ preventScroll: true });
    }
    this.light(this.picture.belongings(this.picture.lit, this.network));
    this.choose(this.picture.chosen);
  }

  order(item) {
    const { x, y } = this.layout.boxes.get(item.key);
    return y * 1e5 + x;
  }

  /** The keys as one reads: from the top, from the left. */
  inOrder() {
    return [...this.view.boxes.values()].sort((one, other) => this.order(one) - this.order(other)).map(({ key }) => key);
  }

  box(item) {
    const { x, y, width, height } = this.layout.boxes.get(item.key);
    const open = this.picture.open.has(item.key);
    const texts = boxOf(this.network, item);
    const mark = this.markOf(item);
    const version = `${open} ${width}`;
    let place = this.places.get(item.key);
    if (!place) {
      place = shape("g", { "data-key": item.key, role: "button" });
      this.places.set(item.key, place);
      place.style.transform = `translate(${x}px,${y}px)`;
    }
    place.style.transform = `translate(${x}px,${y}px)`;
    if (open) {
      let back = this.backs.get(item.key);
      if (!back) {
        let depth = 0;
        for (let at = item.parent; at; at = at.parent) depth += 1;
        back = shape("rect", { class: `back depth${depth % 2}`, rx: 8 });
        this.backs.set(item.key, back);
      }
      this.layers.backs.append(back);
      for (const [name, value] of Object.entries({ x, y, width, height })) back.setAttribute(name, value);
    }
    if (place.dataset.version === version) return;
    place.dataset.version = version;
    const kind = item.children ? (open ? "group open" : "group closed") : `kind-${item.node.kind}`;
    place.setAttribute("class", `box ${kind} ${mark}`);
    place.setAttribute("aria-label", this.described(item));
    if (item.children) place.setAttribute("aria-expanded", String(open));
    const parts = [];
    const tall = open ? HEADER : height;
    if (open) {
      parts.push(shape("rect", { class: "body", width, height: tall, rx: 8 }));
    } else {
      if (item.children) parts.push(shape("rect", { class: "behind", x: 3, y: 3, width, height, rx: 6 }));
      parts.push(shape("rect", { class: "body", width, height, rx: item.children ? 6 : item.node.kind === "input" || item.node.kind === "output" ? 14 : 4 }));
    }
    if (item.children) {
      const turn = open ? "M-4,-2L0,2.5L4,-2" : "M-2,-4L2.5,0L-2,4";
      parts.push(
        shape(
          "g",
          { class: "chevron", "data-toggle": true, transform: `translate(15,${tall / 2})` },
          shape("rect", { x: -14, y: -tall / 2, width: 27, height: tall, class: "target" }),
          shape("path", { d: turn }),
        ),
      );
    }
    if (open) {
      const title = shape("text", { class: "title", x: texts.left, y: 21 }, texts.title);
      const note = shape("text", { class: "note", x: texts.left + textWidth(texts.title, LABEL_FONT) + 8, y: 21 }, texts.note);
      parts.push(title, note);
    } else {
      parts.push(shape("text", { class: "title", x: texts.left, y: texts.note ? 18 : height / 2 + 4 }, texts.title));
      if (texts.note) parts.push(shape("text", { class: "note", x: texts.left, y: 33 }, texts.note));
    }
    let right = width - 10;
    const icons = this.which === "after" ? texts.icons.filter(([name]) => name !== "removed") : [...texts.icons];
    for (const [name, number] of icons.reverse()) {
      if (number !== null) {
        right -= textWidth(String(number), NAME_FONT);
        parts.push(shape("text", { class: "note number", x: right, y: tall / 2 + 4 }, String(number)));
        right -= 4;
      }
      parts.push(sign(name, right - 9, tall / 2));
      right -= 24;
    }
    place.replaceChildren(...parts);
  }

  markOf(item) {
    return this.network.mark(item);
  }

  /** An item in words, for whoever does not see the box. */
  described(item) {
    const { tally } = item;
    if (item.children) {
      const parts = [`module ${item.module || "the whole"}`, item.kind, counted(tally.operators, "operator")];
      for (const [mark, words] of this.which === "after" ? [["kept", "kept"]] : [["removed", "removed"], ["kept", "kept"]]) if (tally[mark]) parts.push(`${counted(tally[mark], "norm")} ${words}`);
      if (tally.changed) parts.push(`${counted(tally.changed, "layer")} with changed weights`);
      return parts.filter(Boolean).join(", ");
    }
    const mark = this.markOf(item);
    return [item.node.label || item.node.operator, item.node.module, shapeText(item.node.shape), mark && MARKS[mark].words].filter(Boolean).join(", ");
  }

  /** Arrows from norms to the layers that took them up; only before, as the norms are gone after. */
  arrows() {
    const pairs = new Map();
    if (this.which === "before") {
      this.network.decisions.forEach((decision, place) => {
        for (const norm of decision.norm_nodes || []) {
          for (const layer of decision.into_nodes || []) {
            const [from, to] = [this.view.seen.get(norm), this.view.seen.get(layer)];
            if (!from || !to || from === to) continue;
            const key = `${from}>${to}`;
            if (!pairs.has(key)) pairs.set(key, { from, to, decisions: [] });
            pairs.get(key).decisions.push(place);
          }
        }
      });
    }
    this.layers.arrows.replaceChildren(
      ...[...pairs.values()].map(({ from, to, decisions }) =>
        shape("path", { class: "arrow", "data-decisions": ` ${decisions.join(" ")} `, d: this.bow(from, to), "marker-end": this.heads.taken }),
      ),
    );
  }

  /** A bow beside two boxes, or between them where they stand side by side. */
  bow(from, to) {
    const [a, b] = [this.layout.boxes.get(from), this.layout.boxes.get(to)];
    const tall = (key, box) => (this.picture.open.has(key) ? HEADER : box.height);
    const [y1, y2] = [a.y + tall(from, a) / 2, b.y + tall(to, b) / 2];
    const apart = a.x > b.x + b.width || b.x > a.x + a.width;
    if (apart) {
      const way = a.x > b.x ? -1 : 1;
      const [x1, x2] = way > 0 ? [a.x + a.width, b.x] : [a.x, b.x + b.width];
      const bend = Math.max(24, Math.abs(x2 - x1) / 2) * way;
      return `M${x1},${y1}C${x1 + bend},${y1} ${x2 - bend},${y2} ${x2},${y2}`;
    }
    const [x1, x2] = [a.x + a.width, b.x + b.width];
    const out = Math.max(x1, x2) + 16 + Math.min(60, Math.abs(y2 - y1) * 0.12);
    return `M${x1},${y1}C${out},${y1} ${out},${y2} ${x2 + 1},${y2}`;
  }

  // What is highlighted

  /** Show one thing and what belongs to it, the rest faint; null shows all alike. */
  light(lit) {
    const on = Boolean(lit);
    this.drawing.classList.toggle("lighting", on);
    const boxes = new Set();
    const wires = new Set();
    if (on) {
      for (const key of lit.keys) if (this.view?.boxes.has(key)) boxes.add(key);
      for (const id of lit.nodes) if (this.view?.seen.has(id)) boxes.add(this.view.seen.get(id));
      for (const [from, to] of lit.edges) {
        const start = this.view?.seen.get(this.which === "after" ? this.network.source(from) : from);
        const end = this.view?.seen.get(to);
        if (start && end && start !== end) wires.add(`${start}>${end}`);
      }
    }
    const refusing = new Set(on ? lit.refusing.map((id) => this.view?.seen.get(id)) : []);
    for (const [key, place] of this.places) {
      place.classList.toggle("lit", boxes.has(key));
      place.classList.toggle("refusing", refusing.has(key));
    }
    for (const [key, wire] of this.wires) {
      wire.classList.toggle("lit", wires.has(key));
      wire.setAttribute("marker-end", wires.has(key) ? this.heads.lit : this.heads.flow);
    }
    for (const arrow of this.layers.arrows.children) {
      arrow.classList.toggle("lit", on && lit.decisions.some((place) => arrow.dataset.decisions.includes(` ${place} `)));
    }
  }

  choose(key) {
    const item = key && this.picture.itemIn(this.network, key);
    const shown = item && this.view ? (this.view.boxes.has(item.key) ? item.key : this.view.seen.get(item.id)) : null;
    for (const [name, place] of this.places) {
      place.classList.toggle("chosen", name === shown);
      if (name === shown) place.setAttribute("aria-current", "true");
      else place.removeAttribute("aria-current");
    }
    for (const mark of this.map.querySelectorAll(".chosen")) mark.classList.remove("chosen");
    if (shown) this.map.querySelector(`[data-for="${shown}"]`)?.classList.add("chosen");
  }

  found(keys) {
    for (const [name, place] of this.places) place.classList.toggle("found", keys.has(name));
  }

  // Where one looks

  size() {
    return { width: this.drawing.clientWidth || 600, height: this.drawing.clientHeight || 400 };
  }

  place() {
    const { x, y, scale } = this.at;
    this.stage.setAttribute("transform", `translate(${x},${y}) scale(${scale})`);
    this.drawing.classList.toggle("far", scale < 0.42);
    this.placeFrame();
  }

  /** Go to a place; the other pane follows. */
  look(at, follow = true) {
    this.at = { ...at, scale: Math.min(SCALES[1], Math.max(SCALES[0], at.scale)) };
    this.place();
    if (follow) this.picture.follow(this);
  }

  zoom(factor, x = this.size().width / 2, y = this.size().height / 2) {
    const scale = Math.min(SCALES[1], Math.max(SCALES[0], this.at.scale * factor));
    const grown = scale / this.at.scale;
    this.look({ x: x - (x - this.at.x) * grown, y: y - (y - this.at.y) * grown, scale });
  }

  pan(x, y) {
    this.look({ ...this.at, x: this.at.x + x, y: this.at.y + y });
  }

  /** Show all of it. */
  fit() {
    if (!this.layout) return;
    const { width, height } = this.size();
    const scale = Math.min(1.25, (width - 24) / this.layout.width, (height - 24) / this.layout.height);
    this.look({ scale, x: (width - this.layout.width * scale) / 2, y: (height - this.layout.height * scale) / 2 });
  }

  /** The first look: all of it if that can be read, else its beginning. */
  open() {
    const { width, height } = this.size();
    const whole = Math.min(1, (width - 24) / this.layout.width, (height - 24) / this.layout.height);
    if (whole >= 0.6) return this.fit();
    const scale = Math.max(0.5, Math.min(1, (width - 24) / this.layout.width));
    const first = this.layout.boxes.get(this.inOrder()[0]);
    const middle = this.layout.width * scale <= width ? this.layout.width / 2 : first.x + first.width / 2;
    return this.look({ scale, x: width / 2 - middle * scale, y: 12 });
  }

  /** Bring a box into the middle. */
  center(key, scale = Math.max(0.7, this.at.scale)) {
    const box = this.layout?.boxes.get(key);
    if (!box) return;
    const { width, height } = this.size();
    const tall = this.picture.open.has(key) ? Math.min(box.height, (height * 0.7) / scale) : box.height;
    this.look({ scale, x: width / 2 - (box.x + box.width / 2) * scale, y: height / 2 - (box.y + tall / 2) * scale });
  }

  /** Bring a box into sight if it is not, as little as that takes. */
  reach(key) {
    const box = this.layout.boxes.get(key);
    const { width, height } = this.size();
    const { x, y, scale } = this.at;
    const tall = this.picture.open.has(key) ? HEADER : box.height;
    const shift = (start, length, most) => (start < 16 ? 16 - start : start + length > most - 16 ? Math.max(16 - start, most - 16 - start - length) : 0);
    const across = shift(box.x * scale + x, box.width * scale, width);
    const down = shift(box.y * scale + y, tall * scale, height);
    if (across || down) this.pan(across, down);
  }

  /** The box nearest to the middle, and where it stands. */
  middle() {
    if (!this.layout) return null;
    const { width, height } = this.size();
    const { x, y, scale } = this.at;
    let best = null;
    for (const key of this.view.boxes.keys()) {
      if (this.picture.open.has(key)) continue;
      const box = this.layout.boxes.get(key);
      const [left, top] = [(box.x + box.width / 2) * scale + x, (box.y + box.height / 2) * scale + y];
      const far = Math.hypot(left - width / 2, top - height / 2);
      if (!best || far < best.far) best = { key, far, left: left / width, top: top / height };
    }
    return best;
  }

  drawMap() {
    const { width, height } = this.layout;
    const most = { width: 120, height: 170 };
    const scale = Math.min(most.width / width, most.height / height);
    const size = { width: Math.max(14, width * scale), height: Math.max(14, height * scale) };
    this.mapScale = scale;
    this.map.setAttribute("width", size.width);
    this.map.setAttribute("height", size.height);
    this.map.setAttribute("viewBox", `0 0 ${size.width} ${size.height}`);
    const marks = [];
    for (const item of this.view.boxes.values()) {
      if (this.picture.open.has(item.key)) continue;
      const box = this.layout.boxes.get(item.key);
      const mark = item.children ? (item.tally.kept ? "kept" : item.tally.removed ? "removed" : "") : this.markOf(item);
      marks.push(
        shape("rect", {
          class: `spot ${mark}`,
          "data-for": item.key,
          x: box.x * scale,
          y: box.y * scale,
          width: Math.max(1.5, box.width * scale),
          height: Math.max(1.5, box.height * scale),
        }),
      );
    }
    this.frame = shape("rect", { class: "frame" });
    this.map.replaceChildren(...marks, this.frame);
  }

  placeFrame() {
    if (!this.frame) return;
    const { width, height } = this.size();
    const { x, y, scale } = this.at;
    const limit = { width: this.layout.width * this.mapScale, height: this.layout.height * this.mapScale };
    const cut = (value, most) => Math.min(Math.max(0, value), most);
    const [left, right] = [cut((-x / scale) * this.mapScale, limit.width), cut(((width - x) / scale) * this.mapScale, limit.width)];
    const [top, bottom] = [cut((-y / scale) * this.mapScale, limit.height), cut(((height - y) / scale) * this.mapScale, limit.height)];
    for (const [name, value] of Object.entries({ x: left, y: top, width: Math.max(2, right - left), height: Math.max(2, bottom - top) })) this.frame.setAttribute(name, value);
    this.map.classList.toggle("needless", left <= 0 && top <= 0 && right >= limit.width && bottom >= limit.height);
  }

  // What one does

  keyOf(target) {
    return target.closest?.("[data-key]")?.dataset.key || null;
  }

  /** The box that has the focus: it is lit while the pointer is on none. */
  resting() {
    const at = document.activeElement;
    return at && this.drawing.contains(at) ? this.keyOf(at) : null;
  }

  focus(key) {
    if (!this.places.has(key)) return;
    this.places.get(this.current)?.setAttribute("tabindex", "-1");
    this.current = key;
    const place = this.places.get(key);
    place.setAttribute("tabindex", "0");
    place.focus({ preventScroll: true });
  }

  listen() {
    const { drawing } = this;
    const pointers = new Map();
    let moved = 0;
    drawing.addEventListener("pointerdown", (event) => {
      if (event.button) return;
      pointers.set(event.pointerId, event);
      moved = 0;
    });
    drawing.addEventListener("pointermove", (event) => {
      if (!pointers.has(event.pointerId)) return;
      const last = pointers.get(event.pointerId);
      const others = [...pointers.values()].filter(({ pointerId }) => pointerId !== event.pointerId);
      pointers.set(event.pointerId, event);
      const [x, y] = [event.clientX - last.clientX, event.clientY - last.clientY];
      moved += Math.abs(x) + Math.abs(y);
      if (others.length) {
        const apart = (one) => Math.hypot(one.clientX - others[0].clientX, one.clientY - others[0].clientY) || 1;
        const frame = drawing.getBoundingClientRect();
        this.zoom(apart(event) / apart(last), (event.clientX + others[0].clientX) / 2 - frame.left, (event.clientY + others[0].clientY) / 2 - frame.top);
      } else if (moved > 3) {
        drawing.setPointerCapture(event.pointerId);
        drawing.classList.add("dragging");
        this.pan(x, y);
      }
    });
    for (const name of ["pointerup", "pointercancel"]) {
      drawing.addEventListener(name, (event) => {
        pointers.delete(event.pointerId);
        drawing.classList.remove("dragging");
      });
    }
    drawing.addEventListener("click", (event) => {
      const key = this.keyOf(event.target);
      if (moved > 3) return;
      if (!key) {
        this.picture.choose(null);
        return;
      }
      this.focus(key);
      if (event.target.closest("[data-toggle]")) this.picture.toggle(key, this);
      else this.picture.choose(key);
    });
    drawing.addEventListener("dblclick", (event) => {
      const key = this.keyOf(event.target);
      if (key && !event.target.closest("[data-toggle]") && this.network.item(key).children) this.picture.toggle(key, this);
    });
    drawing.addEventListener("pointerover", (event) => {
      const key = this.keyOf(event.target);
      if (pointers.size) return;
      this.picture.light(key || this.resting());
      if (key) showTip(this.tip(this.network.item(key)), this.places.get(key).getBoundingClientRect(), true);
      else hideTip();
    });
    drawing.addEventListener("pointerleave", () => {
      hideTip();
      this.picture.light(this.resting());
    });
    drawing.addEventListener("focusin", (event) => {
      const key = this.keyOf(event.target);
      if (!key) return;
      this.focus(key);
      this.picture.light(key);
      if (event.target.matches(":focus-visible")) this.reach(key);
    });
    drawing.addEventListener("focusout", (event) => {
      if (!drawing.contains(event.relatedTarget)) this.picture.light(null);
    });
    drawing.addEventListener(
      "wheel",
      (event) => {
        const inside = this.picture.large || drawing.contains(document.activeElement) || this.picture.chosen;
        if (!event.ctrlKey && !event.metaKey && !inside) return;
        event.preventDefault();
        const frame = drawing.getBoundingClientRect();
        const step = event.deltaMode === 1 ? 30 : 1;
        if (event.ctrlKey || event.metaKey) this.zoom(Math.exp((-event.deltaY * step) / 300), event.clientX - frame.left, event.clientY - frame.top);
        else this.pan(-event.deltaX * step, -event.deltaY * step);
      },
      { passive: false },
    );
    drawing.addEventListener("keydown", (event) => this.pressed(event));
    const jump = (event) => {
      const frame = this.map.getBoundingClientRect();
      const { width, height } = this.size();
      const [x, y] = [(event.clientX - frame.left) / this.mapScale, (event.clientY - frame.top) / this.mapScale];
      this.look({ ...this.at, x: width / 2 - x * this.at.scale, y: height / 2 - y * this.at.scale });
    };
    this.map.addEventListener("pointerdown", (event) => {
      this.map.setPointerCapture(event.pointerId);
      jump(event);
    });
    this.map.addEventListener("pointermove", (event) => {
      if (event.buttons) jump(event);
    });
  }

  pressed(event) {
    const key = this.keyOf(event.target);
    if (!key || event.altKey || event.ctrlKey || event.metaKey) return;
    const order = this.inOrder();
    const here = order.indexOf(key);
    const along = (end, start) => [...this.view.edges.values()].filter((edge) => edge[end] === key).map((edge) => edge[start]);
    const { width, height } = this.size();
    const does = {
      ArrowDown: () => this.focus(along("from", "to")[0] || order[here + 1]),
      ArrowUp: () => this.focus(along("to", "from")[0] || order[here - 1]),
      ArrowRight: () => this.focus(order[here + 1]),
      ArrowLeft: () => this.focus(order[here - 1]),
      Home: () => this.focus(order[0]),
      End: () => this.focus(order[order.length - 1]),
      Enter: () => (this.network.item(key).children ? this.picture.toggle(key, this) : this.picture.choose(key)),
      " ": () => this.picture.choose(key),
      PageDown: () => this.pan(0, -height / 2),
      PageUp: () => this.pan(0, height / 2),
      "+": () => this.zoom(1.25, width / 2, height / 2),
      "=": () => this.zoom(1.25, width / 2, height / 2),
      "-": () => this.zoom(0.8, width / 2, height / 2),
      0: () => this.fit(),
    }[event.key];
    if (!does) return;
    event.preventDefault();
    does();
  }

  /** What is said beside a box. */
  tip(item) {
    const lines = [];
    if (item.children) {
      lines.push(item.module || "the whole network", `${item.kind}, ${counted(item.tally.operators, "operator")}`);
      if (item.tally.removed || item.tally.kept) lines.push(`${counted(item.tally.removed, "norm")} removed, ${item.tally.kept} kept`);
      return lines;
    }
    lines.push(item.node.label || item.node.operator);
    if (item.node.module) lines.push(`${item.node.module}${item.node.class ? ` (${item.node.class})` : ""}`);
    if (item.node.shape) lines.push(`${item.node.dtype || ""} ${shapeText(item.node.shape)}`.trim());
    const decision = this.network.decisions[item.node.decision];
    const step = decision && (this.picture.facts.steps || [])[decision.step];
    if (step) lines.push(`removed: went with a step, ${step.kind} ${step.subject}`);
    else if (decision) lines.push(decision.removed ? `removed: taken up by ${(decision.into || []).join(", ")}` : `kept: ${decision.reason?.text || "no reason given"}`);
    const absorbed = this.network.absorbed.get(item.id);
    if (absorbed) lines.push(`took up ${absorbed.map((place) => this.network.decisions[place].norm).join(", ")}`);
    return lines.map((line) => (line.length > 300 ? `${line.slice(0, 300)}…` : line));
  }
}
