// Draws the charts of a report out of the JSON in the page, and answers its controls.
"use strict";
(() => {
  document.documentElement.classList.add("scripted");
  const data = JSON.parse(document.getElementById("data").textContent);
  const state = { ...data.state, logX: false, logY: false, choice: 0, hidden: new Set() };
  const views = new Map();
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const style = () => (dark.matches ? "dark" : "light");
  const HOVERED_ROWS = 6000; // the nearest of more points is not found while a pointer moves
  const UNITS = [["s", 1], ["min", 60], ["h", 3600], ["days", 86400]];

  // --- what is drawn of a curve: as train/charts/thinning.py does it for pictures --------------

  function smoothed(values, share) {
    if (share * values.length < 1) return values;
    const keep = Math.exp(-1 / (share * values.length));
    let total = 0, weight = 0;
    return values.map((value) => {
      if (value === null) return null;
      total = keep * total + (1 - keep) * value;
      weight = keep * weight + 1 - keep;
      return Number((total / weight).toPrecision(6));
    });
  }

  function line(curve, axis, share) {
    const places = data.axes[curve.axes][axis];
    if (curve.size === 1) return smoothed(curve.means, share).map((y, i) => [places[i], y]);
    const middle = (i) => (places[i] + places[i + 1]) / 2;
    if (share > 0) return smoothed(curve.means, share).map((y, i) => [middle(i), y]);
    return curve.firsts.flatMap((y, i) => [[places[i], y], [middle(i), curve.seconds[i]]]);
  }

  // --- the data and the spec of a chart --------------------------------------------------------

  function timeUnit() {
    const ends = data.charts.flatMap((c) => c.curves).map((c) => data.axes[c.axes].times.at(-1));
    const longest = Math.max(0, ...ends);
    return UNITS.findLast(([, seconds]) => longest >= 2 * seconds) ?? UNITS[0];
  }

  function xAxis() {
    if (state.x === "steps") return { title: "step", factor: 1, format: "~s" };
    if (state.x === "tokens") return { title: "tokens", factor: 1, format: "~s" };
    const [unit, seconds] = timeUnit();
    return { title: `time since the first step (${unit})`, factor: 1 / seconds, format: "~r" };
  }

  function rows(chart, share) {
    const x = xAxis(), choice = data.choices[state.choice];
    const positive = (value, isLog) => (isLog && !(value > 0) ? null : value);
    return chart.curves.filter((curve) => !state.hidden.has(curve.run)).flatMap((curve) => {
      const colour = choice ? choice.values[curve.run] : curve.name;
      return line(curve, state.x, share).map(([at, y]) => ({
        x: positive(at * x.factor, state.logX),
        y: y === null ? null : positive(y, state.logY),
        curve: curve.name,
        colour,
      })).filter((row) => row.x !== null);
    });
  }

  function marks() {
    const x = xAxis(), shown = { restart: [], checkpoint: [], "not finite": [], spike: [] };
    if (!state.marks) return shown;
    data.runs.forEach((run, number) => {
      for (const mark of state.hidden.has(number) ? [] : run.marks) {
        const at = (state.x === "times" ? mark.times - run.begun : mark[state.x]) * x.factor;
        const text = data.runs.length > 1 ? `${run.label}: ${mark.text}` : mark.text;
        if (!state.logX || at > 0) shown[mark.kind].push({ x: at, text });
      }
    });
    return shown;
  }

  function hasLegend(chart) {
    // The colours of runs are told once, and in the tables.
    return data.runs.length === 1 ? chart.curves.length > 1 : chart === data.charts[0];
  }

  function specOf(chart, datasets) {
    const spec = structuredClone(chart.specs[style()]);
    const x = xAxis(), choice = data.choices[state.choice];
    const few = datasets.curves.length <= 40 * chart.curves.length && data.runs.length <= 6;
    const isNarrow = document.getElementById(`chart-${chart.name}`).clientWidth < 600;
    spec.layer = spec.layer.filter((layer) => datasets[layer.data.name].length > 0);
    for (const layer of spec.layer) {
      const { x: atX, y: atY, color, tooltip } = layer.encoding;
      if (layer.data.name === "points") {
        const [before, now] = [atX.title, x.title].map((title) => JSON.stringify(title));
        tooltip.value.expr = tooltip.value.expr.replace(before, () => now);
      }
      atX.title = x.title;
      if (atX.axis) Object.assign(atX.axis, { format: x.format });
      if (atX.scale) atX.scale = state.logX ? { type: "log", nice: false } : atX.scale;
      if (atY && atY.scale) atY.scale = state.logY ? { type: "log" } : atY.scale;
      if (color && choice) layer.encoding.color = { ...choice.encodings[style()] };
      const encoded = layer.encoding.color;
      if (encoded && !hasLegend(chart)) encoded.legend = null;
      else if (encoded && isNarrow) encoded.legend = { ...encoded.legend, columns: 1 };
      if (layer.data.name === "curves" && few) layer.mark.point = { size: 22 };
    }
    return { ...spec, datasets, width: "container", height: 240,
      autosize: { type: "fit", contains: "padding" } };
  }

  async function show(name, spec) {
    const place = document.getElementById(`chart-${name}`);
    views.get(name)?.finalize();
    const config = data.styles[style()].config;
    const made = await vegaEmbed(place, spec, {
      renderer: "canvas", // an element for each of many points would be slow
      config, actions: { export: true, source: false, compiled: false, editor: false },
      tooltip: { theme: style() }, downloadFileName: name,
    });
    views.set(name, made);
    place.dataset.drawn = "yes";
    return made.view;
  }

  function showNothing(name) {
    views.get(name)?.finalize();
    views.delete(name);
    const text = Object.assign(document.createElement("p"), { className: "soft" });
    text.textContent = "Nothing of this can be shown so.";
    const place = document.getElementById(`chart-${name}`);
    place.replaceChildren(text);
    place.dataset.drawn = "yes";
  }

  async function draw(chart) {
    const share = chart.smooth ? data.smoothing[state.smoothing] : 0;
    const curves = rows(chart, share);
    if (!curves.some((row) => row.y !== null)) return showNothing(chart.name);
    swatches(await show(chart.name, specOf(chart, {
      curves,
      raw: share > 0 && data.runs.length <= 6 ? rows(chart, 0) : [],
      points: curves.length <= HOVERED_ROWS ? curves.filter((row) => row.y !== null) : [],
      ...marks(),
    })));
  }

  function drawOfSweep(chart) {
    const wide = document.getElementById(`chart-${chart.name}`).clientWidth;
    const width = chart.width && wide < chart.width ? chart.width : "container";
    return show(chart.name, { ...chart.specs[style()], width, height: chart.height,
      autosize: { type: "fit", contains: "padding" } });
  }

  // --- only what is near the window is drawn, and drawn again ----------------------------------

  const drawers = new Map([
    ...data.charts.map((chart) => [chart.name, () => draw(chart)]),
    ...data.sweepCharts.map((chart) => [chart.name, () => drawOfSweep(chart)]),
  ]);
  const ofCurves = new Set(data.charts.map((chart) => chart.name));
  const near = new Set(), stale = new Set(drawers.keys());
  let working = Promise.resolve();

  function refresh() {
    working = working.then(async () => {
      for (const name of [...stale].filter((each) => near.has(each))) {
        stale.delete(name);
        await drawers.get(name)();
        await new Promise((next) => setTimeout(next)); // the page answers between two charts
      }
    });
  }

  function outdated(names) {
    for (const name of names) stale.add(name);
    refresh();
  }

  const watcher = new IntersectionObserver((entries) => {
    for (const { target, isIntersecting } of entries) {
      const name = target.id.slice("chart-".length);
      if (isIntersecting) near.add(name); else near.delete(name);
    }
    refresh();
  }, { rootMargin: "600px" });
  for (const name of drawers.keys()) watcher.observe(document.getElementById(`chart-${name}`));
  dark.addEventListener("change", () => outdated(drawers.keys()));

  // --- controls --------------------------------------------------------------------------------

  function swatches(view) {
    const choice = data.choices[state.choice];
    if (!choice) return;
    const colour = view.scale("color"); // the very one of the curves
    for (const box of document.querySelectorAll("input[data-run]")) {
      const value = choice.values[Number(box.dataset.run)];
      box.style.accentColor = value === null ? "#8b949e" : colour(value);
    }
  }

  function listen(id, event, change) {
    document.getElementById(id)?.addEventListener(event, (what) => {
      change(what.target);
      outdated(ofCurves);
    });
  }

  function tellSmoothing() {
    const output = document.getElementById("smoothing-told");
    const share = data.smoothing[state.smoothing];
    if (output) output.textContent = share ? `${share * 100} % of a curve` : "off";
  }

  listen("x", "change", (select) => { state.x = select.value; });
  listen("log-x", "change", (box) => { state.logX = box.checked; });
  listen("log-y", "change", (box) => { state.logY = box.checked; });
  listen("marks", "change", (box) => { state.marks = box.checked; });
  listen("colour", "change", (select) => { state.choice = Number(select.value); });
  listen("smoothing", "input", (slider) => {
    state.smoothing = Number(slider.value);
    tellSmoothing();
  });

  const boxes = [...document.querySelectorAll("input[data-run]")];
  function choose(changed) {
    for (const box of changed) {
      if (box.checked) state.hidden.delete(Number(box.dataset.run));
      else state.hidden.add(Number(box.dataset.run));
    }
    outdated(ofCurves);
  }
  for (const box of boxes) box.addEventListener("change", () => choose([box]));
  for (const button of document.querySelectorAll("button[data-choose]")) {
    button.addEventListener("click", () => {
      const own = [...button.closest("section").querySelectorAll("input[data-run]")];
      for (const box of own) box.checked = button.dataset.choose === "all";
      choose(own);
    });
  }

  // --- tables and commands ---------------------------------------------------------------------

  function sort(button) {
    const head = button.closest("th"), table = button.closest("table");
    const column = [...head.parentElement.children].indexOf(head);
    const down = head.getAttribute("aria-sort") === "ascending";
    for (const other of head.parentElement.children) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const body = table.tBodies[0];
    const key = (row) => row.cells[column].dataset.value ?? row.cells[column].textContent;
    const compare = (a, b) => {
      const [x, y] = [key(a), key(b)];
      if (x === "" || y === "") return (x === "") - (y === ""); // what is not known comes last
      const [n, m] = [Number(x), Number(y)];
      const order = Number.isNaN(n) || Number.isNaN(m)
        ? x.localeCompare(y, undefined, { numeric: true }) : n - m;
      return down ? -order : order;
    };
    body.append(...[...body.rows].sort(compare));
  }
  for (const button of document.querySelectorAll("th button")) {
    button.addEventListener("click", () => sort(button));
  }

  async function copy(button) {
    const code = document.getElementById(button.dataset.copies);
    try {
      await navigator.clipboard.writeText(code.textContent);
    } catch { // a page in a file may have no clipboard
      getSelection().selectAllChildren(code);
      document.execCommand("copy");
    }
    button.textContent = "Copied";
    setTimeout(() => { button.textContent = "Copy"; }, 2000);
  }
  for (const button of document.querySelectorAll("button[data-copies]")) {
    button.addEventListener("click", () => copy(button));
  }

  tellSmoothing();
  window.report = { data, state, views, smoothed, line, get working() { return working; } };
})();
