// Places for boxes and ways for edges, found by ELK in a worker.

const LABEL_FONT = "600 12px system-ui, sans-serif";
const NAME_FONT = "11px ui-monospace, Menlo, Consolas, monospace";
const MOST_TEXT = 216;
const HEADER = 34;

const pen = document.createElement("canvas").getContext("2d");

function textWidth(text, font) {
  if (!pen) return text.length * 7;
  pen.font = font;
  return pen.measureText(text).width;
}

/** A text cut in its middle so that it fits, since names differ at both ends. */
function fitted(text, font, most) {
  const clean = visible(text).replace(/\s/g, " ");
  if (clean.length < 400 && textWidth(clean, font) <= most) return clean;
  const letters = Array.from(clean.length > 400 ? `${clean.slice(0, 200)}${clean.slice(-200)}` : clean);
  let [least, limit] = [0, letters.length];
  const cut = (size) => `${letters.slice(0, Math.ceil(size / 2)).join("")}…${letters.slice(letters.length - Math.floor(size / 2)).join("")}`;
  while (least < limit) {
    const middle = Math.ceil((least + limit) / 2);
    if (textWidth(cut(middle), font) <= most) least = middle;
    else limit = middle - 1;
  }
  return cut(least);
}

/** The texts of a box and its size; found once for each item. */
function boxOf(network, item) {
  if (item.box) return item.box;
  const name = network.name(item);
  let title;
  let note;
  if (item.children) {
    title = name || item.kind;
    note = `${item.kind && name ? `${item.kind} · ` : ""}${counted(item.tally.operators, "operator")}`;
  } else {
    title = item.node.label || item.node.operator;
    note = shapeText(item.node.shape);
  }
  const icons = item.children
    ? ["removed", "kept", "changed"].filter((mark) => item.tally[mark]).map((mark) => [mark, item.tally[mark]])
    : network.mark(item) ? [[network.mark(item), null]] : [];
  const iconWidth = icons.reduce((sum, [, number]) => sum + 20 + (number === null ? 0 : textWidth(String(number), NAME_FONT) + 8), 0);
  const left = item.children ? 28 : 10;
  const titleFits = fitted(title, LABEL_FONT, MOST_TEXT);
  let noteFits = fitted(note, NAME_FONT, MOST_TEXT);
  if (!item.children && name) {
    // The name is cut, not the shape; it stands between signs that keep its direction to itself.
    const rest = noteFits ? ` · ${noteFits}` : "";
    noteFits = `\u2068${fitted(name, NAME_FONT, Math.max(60, MOST_TEXT - textWidth(rest, NAME_FONT)))}\u2069${rest}`;
  }
  const texts = Math.max(textWidth(titleFits, LABEL_FONT), textWidth(noteFits, NAME_FONT));
  item.box = {
    title: titleFits,
    note: noteFits,
    icons,
    iconWidth,
    left,
    width: Math.ceil(Math.max(72, left + texts + (icons.length ? iconWidth + 8 : 0) + 12)),
    headerWidth: Math.ceil(left + textWidth(titleFits, LABEL_FONT) + textWidth(noteFits, NAME_FONT) + iconWidth + 34),
    height: noteFits ? 42 : 28,
  };
  return item.box;
}

const LAYOUT = {
  "elk.algorithm": "layered",
  "elk.direction": "DOWN",
  "elk.edgeRouting": "ORTHOGONAL",
  "elk.hierarchyHandling": "INCLUDE_CHILDREN",
  "elk.json.shapeCoords": "ROOT",
  "elk.json.edgeCoords": "ROOT",
  "elk.layered.mergeEdges": "true",
  "elk.layered.nodePlacement.strategy": "BRANDES_KOEPF",
  "elk.layered.nodePlacement.bk.fixedAlignment": "BALANCED",
  "elk.layered.spacing.nodeNodeBetweenLayers": "26",
  "elk.layered.spacing.edgeNodeBetweenLayers": "12",
  "elk.layered.spacing.edgeEdgeBetweenLayers": "8",
  "elk.spacing.nodeNode": "22",
  "elk.spacing.edgeNode": "14",
  "elk.spacing.edgeEdge": "9",
  "elk.padding": "[top=16,left=16,bottom=16,right=16]",
};

/** Above so many boxes and edges, crossings are looked for with less patience: seconds become tenths of a second. */
const PATIENCE = 260;
const HASTE = {
  "elk.layered.thoroughness": "1",
  "elk.layered.crossingMinimization.greedySwitch.type": "OFF",
  "elk.layered.crossingMinimization.greedySwitchHierarchical.type": "OFF",
};

class Layouts {
  constructor() {
    this.known = new Map();
    this.waiting = new Map();
    this.asked = 0;
    this.worker = null;
  }

  /** Start the worker from the library that travels in the page. */
  async start() {
    const packed = Uint8Array.from(atob(document.getElementById("layout-library").textContent), (letter) => letter.charCodeAt(0));
    const unpacked = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
    const address = URL.createObjectURL(new Blob([await new Response(unpacked).arrayBuffer()], { type: "text/javascript" }));
    this.worker = await this.threaded(address).catch(() => this.unthreaded(address));
    URL.revokeObjectURL(address);
  }

  threaded(address) {
    return new Promise((resolve, reject) => {
      const worker = new Worker(address);
      worker.onerror = (event) => reject(new Error(event.message || "the worker did not start"));
      worker.onmessage = (event) => {
        if (event.data.id === -1) resolve(worker);
        else this.answer(event.data);
      };
      worker.postMessage({ id: -1, cmd: "register", algorithms: ["layered"] });
    });
  }

  /** Where a browser allows no worker from a file, the same library answers in the page itself. */
  unthreaded(address) {
    return new Promise((resolve, reject) => {
      window.exports = {};
      window.module = { exports: window.exports };
      const script = element("script", { src: address });
      script.onerror = () => reject(new Error("the layout library did not load"));
      script.onload = () => {
        const { Worker: InPage } = window.module.exports;
        delete window.module;
        delete window.exports;
        const worker = new InPage();
        worker.onmessage = (event) => this.answer(event.data);
        worker.postMessage({ id: -1, cmd: "register", algorithms: ["layered"] });
        resolve(worker);
      };
      document.head.append(script);
    });
  }

  answer({ id, error, data }) {
    const promise = this.waiting.get(id);
    if (!promise) return;
    this.waiting.delete(id);
    if (error) promise.reject(new Error(String(error.message || error.type || "no layout was found")));
    else promise.resolve(data);
  }

  /** Give up what is being laid out. */
  stop() {
    this.worker?.terminate?.();
    this.started = null;
    for (const { reject } of this.waiting.values()) reject(new Error("it was stopped"));
    this.waiting.clear();
  }

  ask(graph, hasty) {
    this.started = this.started || this.start();
    return this.started.then(
      () =>
        new Promise((resolve, reject) => {
          const id = (this.asked += 1);
          this.waiting.set(id, { resolve, reject });
          this.worker.postMessage({ id, cmd: "layout", graph, layoutOptions: hasty ? { ...LAYOUT, ...HASTE } : LAYOUT, options: {} });
        }),
    );
  }

  /** The places in a view: a map of boxes, a map of edges to their points, and the whole size. */
  async of(view) {
    const key = `${view.which} ${[...view.boxes.keys()].join(" ")}`;
    if (!this.known.has(key)) {
      const found = this.ask(this.described(view), view.boxes.size + view.edges.size > PATIENCE).then(placed);
      this.known.set(key, found);
      found.catch(() => this.known.delete(key));
    }
    return this.known.get(key);
  }

  described(view) {
    const describe = ({ item, children }) => {
      const { width, height, headerWidth } = boxOf(item.network, item);
      if (!children) return { id: item.key, width, height };
      return {
        id: item.key,
        children: children.map(describe),
        layoutOptions: {
          "elk.padding": `[top=${HEADER + 14},left=14,bottom=14,right=14]`,
          // ELK lays out to the right and turns the result, these two excepted: height stands before width here.
          "elk.nodeSize.constraints": "MINIMUM_SIZE",
          "elk.nodeSize.minimum": `(${HEADER},${headerWidth})`,
          "elk.contentAlignment": "V_CENTER",
        },
      };
    };
    return {
      id: "root",
      children: view.tree.children.map(describe),
      edges: [...view.edges.values()].map(({ key, from, to }) => ({ id: key, sources: [from], targets: [to] })),
    };
  }
}

function placed(root) {
  const boxes = new Map();
  const collect = (item) => {
    for (const child of item.children || []) {
      boxes.set(child.id, { x: child.x, y: child.y, width: child.width, height: child.height });
      collect(child);
    }
  };
  collect(root);
  const edges = new Map();
  for (const edge of root.edges || []) {
    const [part] = edge.sections || [];
    if (part) edges.set(edge.id, [part.startPoint, ...(part.bendPoints || []), part.endPoint]);
  }
  return { boxes, edges, width: root.width || 1, height: root.height || 1 };
}

/** A path through points whose corners are rounded. */
function rounded(points, radius = 6) {
  let path = `M${points[0].x},${points[0].y}`;
  for (let place = 1; place < points.length - 1; place += 1) {
    const [before, at, after] = [points[place - 1], points[place], points[place + 1]];
    const one = Math.min(radius, Math.hypot(at.x - before.x, at.y - before.y) / 2);
    const other = Math.min(radius, Math.hypot(after.x - at.x, after.y - at.y) / 2);
    const toward = (from, to, length) => {
      const whole = Math.hypot(to.x - from.x, to.y - from.y) || 1;
      return `${from.x + ((to.x - from.x) * length) / whole},${from.y + ((to.y - from.y) * length) / whole}`;
    };
    path += `L${toward(at, before, one)}Q${at.x},${at.y} ${toward(at, after, other)}`;
  }
  const last = points[points.length - 1];
  return `${path}L${last.x},${last.y}`;
}
