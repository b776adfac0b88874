"use strict";

// Colours by Okabe and Ito, told apart by people who see few; dash and marker say the same without colour.
const TASK_COLOURS = ["#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#f0e442", "#5b6068"];
const OTHER_COLOURS = ["#cc79a7", "#e69f00", "#56b4e9", "#009e73", "#5b6068", "#d55e00", "#0072b2"];
const DASHES = ["solid", [7, 4], [2, 3], [9, 3, 2, 3]];
const SYMBOLS = ["circle", "triangle", "rect", "diamond", "emptyCircle", "emptyTriangle", "emptyRect", "emptyDiamond"];
const DECALS = [
  null,
  { symbol: "line", dashArrayX: [1, 0], dashArrayY: [2, 5], rotation: -Math.PI / 4 },
  { symbol: "circle", symbolSize: 0.6, dashArrayX: [[6, 6], [0, 6, 6, 0]], dashArrayY: [6, 0] },
  { symbol: "line", dashArrayX: [1, 0], dashArrayY: [2, 5], rotation: Math.PI / 4 },
  { symbol: "line", dashArrayX: [1, 0], dashArrayY: [3, 4], rotation: 0 },
];

function readTheme() {
  const style = getComputedStyle(document.documentElement);
  const named = (name) => style.getPropertyValue(`--${name}`).trim();
  return {
    dark: named("scheme") === "dark",
    text: named("text"),
    muted: named("muted"),
    line: named("line"),
    surface: named("surface"),
    raised: named("raised"),
    accent: named("accent"),
    font: getComputedStyle(document.body).fontFamily,
  };
}

// What a series looks like: colour, dash, marker, and for areas a pattern.
function look(series, theme) {
  const grey = theme.dark ? "#9aa1ab" : "#6a7079";
  const roles = {
    merged: { colour: theme.accent, dash: "solid", symbol: "circle", width: 2.5 },
    post_hoc: { colour: theme.dark ? "#f08a3c" : "#d55e00", dash: [7, 4], symbol: "triangle", width: 2 },
    experts: { colour: theme.dark ? "#3cc39a" : "#009e73", dash: [2, 3], symbol: "diamond", width: 2 },
    pretrained: { colour: grey, dash: [9, 3, 2, 3], symbol: "rect", width: 2 },
  };
  if (roles[series.role]) return { ...roles[series.role], decal: null };
  const colours = series.role === "task" ? TASK_COLOURS : OTHER_COLOURS;
  const round = Math.floor(series.place / colours.length);
  let colour = colours[series.place % colours.length];
  if (theme.dark && colour === "#5b6068") colour = "#c3c8cf";
  if (theme.dark && colour === "#0072b2") colour = "#3d9bdb";
  return {
    colour,
    dash: DASHES[round % DASHES.length],
    symbol: SYMBOLS[(series.place + (series.role === "other" ? 1 : 0)) % SYMBOLS.length],
    width: 2,
    decal: DECALS[(series.place % colours.length === 0 ? 0 : (series.place % 2) * 1) + round] || null,
  };
}

function mix(from, to, share) {
  const parts = (hex) => [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));
  const [a, b] = [parts(from), parts(to)];
  return a.map((value, i) => Math.round(value + (b[i] - value) * share));
}

// The colours of a heat map, low to high, and the colour of text that can be read on them.
function scaleOf(signed, theme) {
  const low = theme.dark ? "#20262c" : "#eef3f7";
  if (signed) return [theme.dark ? "#f08a3c" : "#c65500", low, theme.dark ? "#62b6ec" : "#0067a3"];
  return [low, theme.dark ? "#62b6ec" : "#0067a3"];
}

function textOn(share, colours) {
  const place = share * (colours.length - 1);
  const i = Math.min(Math.floor(place), colours.length - 2);
  const [r, g, b] = mix(colours[i], colours[i + 1], place - i);
  return (r * 299 + g * 587 + b * 114) / 1000 > 140 ? "#14171a" : "#ffffff";
}

function written(value, digits = 3) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  const size = Math.abs(value);
  const text = size >= 1e5 ? value.toExponential(2) : value.toFixed(size >= 1000 ? 0 : digits);
  return text.replace("-", "−");
}
