// The report is put together here.

function themed() {
  const button = document.getElementById("theme");
  const order = ["system", "light", "dark"];
  let at = 0;
  const apply = () => {
    const theme = order[at];
    if (theme === "system") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = theme;
    button.textContent = `Theme: ${theme}`;
  };
  button.addEventListener("click", () => {
    at = (at + 1) % order.length;
    apply();
  });
  apply();
}

function networked(facts) {
  const network = new Network(facts);
  const other = networkAfter(facts);
  const picture = new Picture(facts, network, other);
  const nodes = network.operators.size;
  const made = section(
    "network",
    "The network",
    element("p", {}, `${counted(nodes, "operator")} of ${(facts.calls || [])[0] ? "the call " : "the first call"}`, (facts.calls || [])[0] ? named(facts.calls[0]) : null, ". A module is one box until it is opened."),
    other ? element("p", {}, `After, the network has another structure (${counted(other.count("after"), "operator")}): hover over a norm to see where it went in both pictures.`) : null,
    nodes ? picture.host : element("p", { class: "none" }, "Nothing was recorded."),
  );
  return { made, picture };
}

/** Let the browser show what is there before more is made. */
function pause(milliseconds) {
  return new Promise((resolve) => {
    setTimeout(resolve, milliseconds);
  });
}

async function drawn() {
  themed();
  const facts = JSON.parse(document.getElementById("facts").textContent);
  const report = document.getElementById("report");
  const { made, picture } = networked(facts);
  report.append(summarised(facts), made);
  let state = "ready";
  const shown = picture.network.operators.size ? picture.show() : Promise.resolve();
  const seen = shown.then(
    () => performance.mark("picture"),
    () => { state = "failed"; },
  );
  // The picture is waited for; the rest lies below it, and comes when it is there, or takes long.
  await Promise.race([seen, pause(1000)]);
  for (const part of [decided, erring, ranging]) {
    report.append(part(facts, picture));
    await pause(0);
  }
  await seen;
  document.documentElement.dataset.state = state;
}

drawn();
