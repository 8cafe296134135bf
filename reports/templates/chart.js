// The chart: rows are chosen here, Vega-Lite draws them. `given` is what reports/chart.py tells.
(() => {
  const given = JSON.parse(document.getElementById("chart-data").textContent);
  const by = name => document.getElementById(`chart-${name}`);
  const fields = ["variant", "task", "seed", "cell", "train_flops", "params", "seconds"];
  const cells = given.cells.map(row => Object.fromEntries(row.map((value, i) => [fields[i], value])));
  const rows = given.points.map(([cell, rule, threshold, flops, score]) => ({
    ...cells[cell], rule: given.rules[rule], flops, score,
    threshold: rule === 1 ? `after cycle ${threshold}` : rule && threshold === null ? "none leaves" : threshold,
  }));
  const look = name => {
    const i = given.variants.indexOf(name);
    return [given.colours[i % given.colours.length], given.shapes[i % given.shapes.length]];
  };
  const option = (select, value, text) => by(select).append(new Option(text ?? value, value));
  given.tasks.forEach(task => option("task", task.label));
  given.rules.slice(1).forEach(rule => option("rule", rule, rule === "fixed cycles" ? "all after cycle 1, 2, ..." : rule));
  option("rule", "full depth", "none: full depth alone");
  Object.entries(given.axes).forEach(([axis, title]) => option("axis", axis, title));
  by("rule").value = given.rule;
  const boxes = (place, values, mark) => values.forEach(value => {
    const label = document.createElement("label"), box = document.createElement("input");
    box.type = "checkbox"; box.checked = true; box.value = value;
    label.append(box);
    if (mark) {
      const sign = document.createElement("i");
      sign.style.background = look(value)[0];
      label.append(sign);
    }
    label.append(`${value}`);
    by(place).append(label);
  });
  boxes("variants", given.variants, true);
  boxes("seeds", given.seeds);
  const ticked = place => new Set([...by(place).querySelectorAll("input:checked")].map(box => box.value));

  const specification = (values, task, axis, width) => {
    const quality = { field: "score", type: "quantitative", title: `test ${task.metric}${task.up ? "" : " (axis inverted)"}`,
      scale: { zero: false, reverse: !task.up } };
    const cost = { field: axis, type: "quantitative", title: given.axes[axis], scale: { type: "log", nice: false, padding: 14 },
      axis: { format: "~s", tickCount: width < 500 ? 4 : 8, labelOverlap: true } };
    const names = given.variants.filter(name => values.some(row => row.variant === name));
    const told = [["variant"], ["task"], ["seed"], ["rule"], ["threshold"], [axis, given.axes[axis]], ["score", `test ${task.metric}`], ["cell"]];
    const tooltip = told.map(([field, title]) => ({ field, title: title ?? field, type: "nominal" }));
    const full = { filter: "datum.rule === 'full depth'" }, early = { filter: "datum.rule !== 'full depth'" };
    const color = { field: "variant", type: "nominal", legend: null, scale: { domain: names, range: names.map(name => look(name)[0]) } };
    const shape = { field: "variant", type: "nominal", legend: null, scale: { domain: names, range: names.map(name => look(name)[1]) } };
    const layer = [
      { transform: [early], mark: { type: "line", strokeWidth: 1, opacity: 0.45 },
        encoding: { x: cost, y: quality, color, detail: { field: "cell" }, order: { field: axis, type: "quantitative" } } },
      { transform: [early], mark: { type: "point", size: 22, opacity: 0.8 }, encoding: { x: cost, y: quality, color, shape, tooltip } },
      { transform: [full], mark: { type: "point", filled: true, size: 55, opacity: 0.55 }, encoding: { x: cost, y: quality, color, shape, tooltip } },
      { transform: [full, { aggregate: [{ op: "mean", field: "score", as: "score" }, { op: "mean", field: axis, as: axis }, { op: "count", as: "seeds" }],
          groupby: ["variant"] }],
        mark: { type: "point", filled: false, strokeWidth: 2.2, size: 190 },
        encoding: { x: cost, y: quality, color, shape, tooltip: [
          { field: "variant" }, { field: "seeds", title: "mean of seeds" }, { field: axis, title: given.axes[axis], format: ".4s" },
          { field: "score", title: `mean test ${task.metric}`, format: ".4f" }] } },
    ];
    const scores = values.map(row => row.score), spread = Math.max(...scores) - Math.min(...scores) || 1;
    const near = task.levels.filter(([, level]) => level > Math.min(...scores) - spread && level < Math.max(...scores) + spread);
    if (near.length) layer.push({ data: { values: near.map(([name, level]) => ({ name: `${name} ${+level.toPrecision(3)}`, score: level })) },
      layer: [{ mark: { type: "rule", strokeDash: [2, 3], color: "#777" }, encoding: { y: quality } },
        { mark: { type: "text", align: "left", baseline: "bottom", dx: 3, color: "#555" }, encoding: { y: quality, x: { value: 0 }, text: { field: "name" } } }] });
    return { $schema: "https://vega.github.io/schema/vega-lite/v6.json", width: "container", height: width < 500 ? 320 : 420,
      autosize: { type: "fit", contains: "padding" }, background: null, data: { values }, layer,
      config: { font: "system-ui, sans-serif", axis: { labelFontSize: 12, titleFontSize: 12, gridColor: "#e4e4e4" }, view: { stroke: "#999" } } };
  };

  let drawn = Promise.resolve();
  const draw = () => {
    const task = given.tasks.find(one => one.label === by("task").value), axis = by("axis").value;
    const variants = ticked("variants"), seeds = ticked("seeds");
    by("rule").disabled = axis !== "flops"; // a threshold changes nothing but the executed FLOPs
    const rule = axis === "flops" ? by("rule").value : "full depth";
    const values = rows.filter(row => row.task === task.label && row.score !== null && variants.has(row.variant)
      && seeds.has(`${row.seed}`) && (row.rule === rule || row.rule === "full depth"));
    const width = by("view").clientWidth;
    by("shown").textContent = `${values.length} points shown`;
    drawn = drawn.then(() => vegaEmbed(by("view"), specification(values, task, axis, width), {
      renderer: "svg", actions: { export: true, source: false, compiled: false, editor: false }, downloadFileName: "accuracy_against_cost" }));
  };
  by("controls").addEventListener("change", draw);
  let before = by("view").clientWidth;
  window.addEventListener("resize", () => { if (by("view").clientWidth !== before) { before = by("view").clientWidth; draw(); } });
  draw();
})();
