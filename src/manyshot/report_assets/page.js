"use strict";

// Draws every figure of the page: its legend, its charts, again when width, colours or the legend change.

const report = JSON.parse(document.getElementById("report-data").textContent);
const SVG = "http://www.w3.org/2000/svg";

function svg(name, attributes, parent) {
  const node = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  return parent ? parent.appendChild(node) : node;
}

// the patterns of theme.js, by place
const HATCHES = [
  [],
  [[6, 8, 14, 0], [11, 12, 20, 3]],
  [[8, 3, 10, 3], [15, 3, 17, 3], [11, 9, 13, 9]],
  [[6, 3, 15, 12], [12, 0, 20, 8]],
  [[6, 4, 20, 4], [6, 8, 20, 8]],
];

// What a line or an area looks like, as a small picture in the legend.
function sample(found, area) {
  const root = svg("svg", { width: 26, height: 12, viewBox: "0 0 26 12", "aria-hidden": "true" });
  if (area) {
    svg("rect", { x: 6, y: 0, width: 14, height: 12, rx: 3, fill: found.colour }, root);
    const strokes = { stroke: "#fff", "stroke-width": 1.2, "stroke-opacity": 0.75 };
    for (const [x1, y1, x2, y2] of HATCHES[DECALS.indexOf(found.decal)] || []) svg("line", { x1, y1, x2, y2, ...strokes }, root);
    return root;
  }
  const dash = Array.isArray(found.dash) ? found.dash.join(" ") : "none";
  svg("line", { x1: 0, y1: 6, x2: 26, y2: 6, stroke: found.colour, "stroke-width": 2, "stroke-dasharray": dash }, root);
  const empty = found.symbol.startsWith("empty");
  const drawn = empty ? { fill: "none", stroke: found.colour, "stroke-width": 1.6 } : { fill: found.colour };
  const shapes = {
    circle: ["circle", { cx: 13, cy: 6, r: 4 }],
    rect: ["rect", { x: 9.5, y: 2.5, width: 7, height: 7 }],
    triangle: ["polygon", { points: "13,1 18,10 8,10" }],
    diamond: ["polygon", { points: "13,1 18,6 13,11 8,6" }],
  };
  const [name, shape] = shapes[found.symbol.replace("empty", "").toLowerCase()];
  svg(name, { ...shape, ...drawn }, root);
  return root;
}

// A chart is drawn when it comes into sight, so that a page of many opens at once.
const [seen, resized] = [new Map(), new Map()];
const onSight = new IntersectionObserver((entries) => {
  for (const { target, isIntersecting } of entries) {
    if (!isIntersecting) continue;
    onSight.unobserve(target);
    seen.get(target)();
  }
}, { rootMargin: "800px" });
const onResize = new ResizeObserver((entries) => entries.forEach(({ target }) => resized.get(target)()));

class Figure {
  constructor(given) {
    this.given = given;
    this.hidden = new Set(given.series.filter((one) => !one.shown).map((one) => one.name));
    this.legend = document.getElementById(`${given.id}-legend`);
    this.area = given.charts.some((chart) => chart.kind === "stack" || chart.kind === "bars");
    this.charts = given.charts.map((chart) => ({ ...chart, node: document.getElementById(chart.id), width: 0 }));
    for (const chart of this.charts) {
      seen.set(chart.node, () => this.draw(chart));
      resized.set(chart.node, () => chart.node.clientWidth !== chart.width && (chart.drawn ? this.draw(chart) : this.measure(chart)));
      onSight.observe(chart.node);
      onResize.observe(chart.node);
    }
    this.paint();
  }

  // what has been drawn anew, in the colours of now
  paint() {
    this.theme = readTheme();
    this.series = this.given.series.map((one) => ({ ...one, look: look(one, this.theme) }));
    this.drawLegend();
    for (const chart of this.charts) chart.drawn ? this.draw(chart) : this.measure(chart);
  }

  // the room that a chart takes, and what is in it
  measure(chart) {
    const width = chart.node.clientWidth;
    if (!width) return null; // not shown: drawn when it is
    const shown = this.series.filter((one) => !this.hidden.has(one.name) && (!chart.data.values || chart.data.values[one.name]));
    const { height, option } = charts[chart.kind](chart.data, shown, this.theme, width);
    chart.node.style.height = `${height}px`;
    return { width, height, option };
  }

  draw(chart) {
    const found = this.measure(chart);
    if (!found) return;
    const { width, height, option } = found;
    chart.width = width;
    chart.drawn ??= echarts.init(chart.node, null, { renderer: "svg", width, height });
    chart.drawn.resize({ width, height });
    chart.drawn.setOption({ ...base(this.theme), ...option }, { notMerge: true });
    chart.drawn.getZr().flush();
  }

  drawLegend() {
    if (!this.legend) return;
    const focused = [...this.legend.children].indexOf(document.activeElement);
    this.legend.replaceChildren(...this.series.map((one) => this.entry(one)));
    if (focused >= 0) this.legend.children[focused].focus();
  }

  entry(one) {
    const button = document.createElement("button");
    button.type = "button";
    button.setAttribute("aria-pressed", String(!this.hidden.has(one.name)));
    button.appendChild(sample(one.look, this.area));
    const name = button.appendChild(document.createElement("span"));
    name.textContent = one.name;
    name.dir = "auto";
    button.addEventListener("click", () => {
      if (!this.hidden.delete(one.name)) this.hidden.add(one.name);
      this.drawLegend();
      for (const chart of this.charts) if (chart.drawn) this.draw(chart);
    });
    return button;
  }
}

const figures = report.figures.map((given) => new Figure(given));

// Figures with one chart per round show the round that is chosen.
for (const select of document.querySelectorAll("select[data-switch]")) {
  select.addEventListener("change", () => {
    const panels = document.getElementById(select.dataset.switch).querySelectorAll(".panel");
    panels.forEach((panel, i) => { panel.hidden = i !== select.selectedIndex; });
  });
}

const repaint = () => figures.forEach((figure) => figure.paint());
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", repaint);
addEventListener("beforeprint", () => {
  document.documentElement.classList.add("printed");
  repaint();
  seen.forEach((draw) => draw());
});
addEventListener("afterprint", () => { document.documentElement.classList.remove("printed"); repaint(); });
document.documentElement.dataset.drawn = "yes";
