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
  const picture = new Picture(facts, network);
  const nodes = network.operators.size;
  const made = section(
    "network",
    "The network",
    element("p", {}, `${counted(nodes, "operator")} of ${(facts.calls || [])[0] ? "the call " : "the first call"}`, (facts.calls || [])[0] ? named(facts.calls[0]) : null, ". A module is one box until it is opened."),
    nodes ? picture.host : element("p", { class: "none" }, "Nothing was recorded."),
  );
  return { made, picture };
}

function drawn() {
  themed();
  const facts = JSON.parse(document.getElementById("facts").textContent);
  const { made, picture } = networked(facts);
  const report = document.getElementById("report");
  report.append(summarised(facts), made, decided(facts, picture), erring(facts, picture), ranging(facts, picture));
  const ready = (state) => {
    performance.mark("drawn");
    document.documentElement.dataset.state = state;
  };
  if (!picture.network.operators.size) {
    ready("ready");
    return;
  }
  picture.show().then(
    () => ready("ready"),
    () => ready("failed"),
  );
}

drawn();
