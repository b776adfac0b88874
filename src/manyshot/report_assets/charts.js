"use strict";

// One function per kind of chart: data, series and theme in, an ECharts option out. Text is only ever text.

function base(theme) {
  return {
    animation: false,
    backgroundColor: "transparent",
    textStyle: { fontFamily: theme.font, color: theme.text },
    aria: { enabled: false },
  };
}

// A tooltip as DOM nodes: names come from recipes and data, so they are never markup.
function tip(title, rows) {
  const box = document.createElement("div");
  const head = box.appendChild(document.createElement("strong"));
  head.textContent = title;
  head.dir = "auto";
  for (const [name, value, colour] of rows) {
    const row = box.appendChild(document.createElement("div"));
    row.style.cssText = "display:flex;gap:1.25em;justify-content:space-between;align-items:baseline";
    const label = row.appendChild(document.createElement("span"));
    if (colour) {
      const dot = label.appendChild(document.createElement("span"));
      dot.style.cssText = `display:inline-block;width:.6em;height:.6em;border-radius:50%;margin-right:.5em;background:${colour}`;
    }
    label.appendChild(document.createTextNode(name));
    label.dir = "auto";
    const number = row.appendChild(document.createElement("span"));
    number.textContent = value;
    number.style.cssText = "font-variant-numeric:tabular-nums;font-weight:600";
  }
  return box;
}

function tooltip(theme, more) {
  return {
    confine: true,
    backgroundColor: theme.surface,
    borderColor: theme.line,
    textStyle: { color: theme.text, fontSize: 13, fontFamily: theme.font },
    extraCssText: "max-width:22rem;white-space:normal;box-shadow:0 4px 18px rgba(0,0,0,.18)",
    ...more,
  };
}

function valueAxis(theme, name, more) {
  return {
    type: "value",
    scale: true,
    name,
    nameLocation: "middle",
    nameTextStyle: { color: theme.muted, fontSize: 12 },
    axisLabel: { color: theme.muted, fontSize: 12, formatter: (value) => written(value, 3).replace(/(\.\d*?)0+$/, "$1").replace(/\.$/, "") },
    splitLine: { lineStyle: { color: theme.line } },
    ...more,
  };
}

function categoryAxis(theme, names, name, more) {
  return {
    type: "category",
    data: names,
    name,
    nameLocation: "middle",
    nameGap: 26,
    nameTextStyle: { color: theme.muted, fontSize: 12 },
    axisLabel: { color: theme.muted, fontSize: 12 },
    axisLine: { lineStyle: { color: theme.muted } },
    axisTick: { show: false },
    ...more,
  };
}

function shortened(text, most) {
  const letters = Array.from(text);
  return letters.length > most ? `${letters.slice(0, most - 1).join("")}…` : text;
}

// Width of a text as the charts write it.
const ruler = document.createElement("canvas").getContext("2d");
function widthOf(texts, theme, size = 12) {
  ruler.font = `${size}px ${theme.font}`;
  return Math.ceil(Math.max(0, ...texts.map((text) => ruler.measureText(text).width)));
}

const charts = {
  radar(data, series, theme, width) {
    const narrow = width < 480;
    const crowded = series.some((one) => one.role === "other");
    const rings = Math.max(1, Math.ceil(data.top * 4 - 1e-9));
    return {
      height: Math.min(480, Math.max(260, width * (narrow ? 0.95 : 0.74))),
      option: {
        tooltip: tooltip(theme, {
          formatter: (one) => tip(one.name, data.axes.map((axis, i) => [axis, written(one.value[i])])),
        }),
        radar: {
          indicator: data.axes.map((name, i) => ({
            name: shortened(name, narrow ? 11 : 20),
            max: rings / 4,
            min: 0,
            axisLabel: { show: i === 0 && !narrow, color: theme.muted, fontSize: 11, showMinLabel: false, formatter: (value) => written(value, 2) },
          })),
          radius: narrow ? "55%" : "74%",
          splitNumber: rings,
          axisName: { color: theme.text, fontSize: 12 },
          splitArea: { show: false },
          splitLine: { lineStyle: { color: theme.line } },
          axisLine: { lineStyle: { color: theme.line } },
        },
        series: series.map((one) => ({
          type: "radar",
          name: one.name,
          symbol: one.look.symbol,
          symbolSize: 7,
          itemStyle: { color: one.look.colour },
          lineStyle: { color: one.look.colour, width: one.look.width, type: one.look.dash },
          areaStyle: one.role === "merged" && !crowded ? { color: one.look.colour, opacity: 0.12 } : undefined,
          data: [{ name: one.name, value: data.values[one.name] }],
        })),
      },
    };
  },

  lines(data, series, theme, width) {
    const level = new Set(data.level || []);
    return {
      height: width < 360 ? 180 : 270,
      option: {
        grid: { left: 8, right: 14, top: 12, bottom: 26, containLabel: true },
        tooltip: tooltip(theme, { trigger: "axis", formatter: (found) => overAxis(found, data) }),
        xAxis: categoryAxis(theme, data.x, data.axis, { boundaryGap: false }),
        yAxis: valueAxis(theme, "", { splitNumber: width < 360 ? 4 : 5 }),
        series: series.map((one) => ({
          type: "line",
          name: one.name,
          data: data.values[one.name],
          connectNulls: false,
          showSymbol: !level.has(one.name),
          symbol: one.look.symbol,
          symbolSize: 7,
          z: one.role === "merged" ? 5 : 2,
          itemStyle: { color: one.look.colour },
          lineStyle: {
            color: one.look.colour,
            width: level.has(one.name) ? 1.5 : one.look.width,
            type: level.has(one.name) && one.look.dash === "solid" ? [7, 4] : one.look.dash,
          },
        })),
      },
    };
  },

  stack(data, series, theme, width) {
    return {
      height: 300,
      option: {
        grid: { left: 8, right: 10, top: 12, bottom: 26, containLabel: true },
        tooltip: tooltip(theme, { trigger: "axis", axisPointer: { type: "shadow" }, formatter: (found) => overAxis(found, data) }),
        xAxis: categoryAxis(theme, data.x, data.axis),
        yAxis: valueAxis(theme, "", { scale: false, max: data.top }),
        series: series.map((one) => ({
          type: "bar",
          stack: "all",
          name: one.name,
          data: data.values[one.name],
          barMaxWidth: 64,
          itemStyle: { color: one.look.colour, decal: decalOf(one.look, theme), borderColor: theme.surface, borderWidth: 1 },
        })),
      },
    };
  },

  heat(data, series, theme, width) {
    const values = data.cells.map((cell) => cell[2]).filter((value) => value !== null);
    const far = Math.max(...values.map(Math.abs));
    const cosine = data.scale === "cosine";
    const step = far > 2 ? 0.5 : 0.05;
    const signed = Math.min(...values) < 0; // then 0 is in the middle, and white
    let [low, high] = signed ? [-far, far] : [Math.floor(Math.min(...values) / step) * step, Math.ceil(Math.max(...values) / step) * step];
    if (low === high) [low, high] = [Math.max(0, low - step), high + step];
    const colours = scaleOf(signed, theme);
    const most = width < 360 ? 11 : width < 560 ? 16 : 22;
    const side = 16 + widthOf(data.y.map((name) => shortened(name, most)), theme);
    const cell = Math.min(cosine ? 110 : 96, (width - side - 10) / data.x.length);
    const rowHeight = cosine ? Math.max(18, Math.min(44, cell * 0.6)) : data.y.length > 40 ? 13 : 18;
    const labelled = cell >= 36 && data.x.length <= 12;
    const turned = cosine && cell < 8 * Math.max(...data.x.map((name) => Math.min(name.length, 12)));
    return {
      height: data.y.length * rowHeight + (turned ? 150 : 92),
      option: {
        grid: { left: side, width: cell * data.x.length, top: 8, bottom: turned ? 130 : 74 },
        tooltip: tooltip(theme, {
          formatter: (one) => {
            const [x, y, value] = one.value;
            return cosine ? tip(`${data.y[y]}, ${data.x[x]}`, [["cosine", written(value)]])
              : tip(`${data.side} ${data.y[y]}`, [[`${data.axis} ${data.x[x]}`, written(value)]]);
          },
        }),
        xAxis: categoryAxis(theme, data.x, data.axis, {
          splitArea: { show: false },
          axisLine: { show: false },
          axisLabel: { color: theme.muted, fontSize: 12, rotate: turned ? 60 : 0, interval: data.x.length > 20 ? "auto" : 0, formatter: (name) => shortened(name, 12) },
        }),
        yAxis: categoryAxis(theme, data.y, "", {
          inverse: true,
          axisLine: { show: false },
          axisLabel: { color: theme.muted, fontSize: rowHeight < 16 ? 10 : 12, interval: data.y.length > 40 ? "auto" : 0, formatter: (name) => shortened(name, most) },
        }),
        visualMap: {
          min: low,
          max: high,
          orient: "horizontal",
          left: side - 4,
          bottom: 0,
          itemWidth: 12,
          itemHeight: Math.min(220, width * 0.45),
          text: [written(high, 2), written(low, 2)],
          textStyle: { color: theme.muted },
          inRange: { color: colours },
          calculable: false,
          hoverLink: false,
        },
        series: [{
          type: "heatmap",
          name: data.scale,
          data: data.cells.filter((one) => one[2] !== null).map((one) => ({
            value: one,
            label: { show: labelled, color: textOn((one[2] - low) / (high - low), colours), fontSize: rowHeight < 16 ? 10 : 12, formatter: written(one[2], 2) },
          })),
          itemStyle: { borderColor: theme.surface, borderWidth: cell < 16 ? 0 : 1 },
          emphasis: { itemStyle: { borderColor: theme.text } },
        }],
      },
    };
  },

  points(data, series, theme, width) {
    const step = data.together ? 0 : 15;
    const band = data.together ? 22 : series.length * step + 16;
    const most = width < 480 ? 12 : 26;
    const side = 14 + widthOf(data.rows.map((name) => shortened(name, most)), theme);
    return {
      height: data.rows.length * band + 64,
      option: {
        grid: { left: side, right: 16, top: 8, bottom: 56 },
        tooltip: tooltip(theme, { formatter: (one) => tip(data.rows[one.value[1]], [[one.seriesName, pointText(one.value), one.color]]) }),
        xAxis: valueAxis(theme, data.axis, { scale: false, min: 0, nameGap: 28 }),
        yAxis: categoryAxis(theme, data.rows, "", {
          inverse: true,
          axisLabel: { color: theme.text, fontSize: 12, formatter: (name) => shortened(name, most) },
          splitLine: { show: true, lineStyle: { color: theme.line } },
        }),
        series: series.map((one, place) => ({
          type: "custom",
          name: one.name,
          color: one.look.colour,
          data: data.rows.map((_, row) => {
            const found = data.values[one.name][row];
            return found ? [found[0], row, found[1], found[2]] : null;
          }).filter((found) => found !== null),
          encode: { x: [0, 2, 3], y: 1 },
          renderItem: (params, api) => errorBar(api, one.look, (place - (series.length - 1) / 2) * step),
        })),
      },
    };
  },

  bars(data, series, theme, width) {
    const band = series.length * 16 + 12;
    const side = 14 + widthOf(data.rows, theme);
    return {
      height: data.rows.length * band + 64,
      option: {
        grid: { left: side, right: 56, top: 8, bottom: 56 },
        tooltip: tooltip(theme, { trigger: "axis", axisPointer: { type: "shadow" }, formatter: (found) => overAxis(found, { axis: "", digits: 1 }) }),
        xAxis: valueAxis(theme, data.axis, { scale: false, nameGap: 28, splitNumber: width < 480 ? 3 : 5 }),
        yAxis: categoryAxis(theme, data.rows, "", { inverse: true, axisLabel: { color: theme.text, fontSize: 12 } }),
        series: series.map((one) => ({
          type: "bar",
          name: one.name,
          data: data.values[one.name],
          barMaxWidth: 14,
          itemStyle: { color: one.look.colour, borderRadius: [0, 3, 3, 0], decal: decalOf(one.look, theme) },
          label: { show: true, position: "right", color: theme.muted, fontSize: 12, formatter: (found) => written(found.value, 0) },
        })),
      },
    };
  },
};

function decalOf(found, theme) {
  return found.decal ? { ...found.decal, color: theme.dark ? "rgba(0,0,0,.35)" : "rgba(255,255,255,.45)" } : undefined;
}

function overAxis(found, data) {
  const shown = found.filter((one) => one.value !== null && one.value !== undefined);
  const title = `${data.axis} ${found[0].axisValue}`.trim();
  return tip(title, shown.map((one) => [one.seriesName, written(one.value, data.digits), one.color]));
}

function pointText([value, , low, high]) {
  return low === high ? written(value) : `${written(value)} (${written(low)} … ${written(high)})`;
}

// A marker, with a bar from low to high where they differ.
function errorBar(api, found, shift) {
  const [x, y] = api.coord([api.value(0), api.value(1)]);
  const [low] = api.coord([api.value(2), api.value(1)]);
  const [high] = api.coord([api.value(3), api.value(1)]);
  const stroke = { stroke: found.colour, lineWidth: 1.5 };
  const line = (x1, y1, x2, y2) => ({ type: "line", shape: { x1, y1, x2, y2 }, style: stroke });
  const at = y + shift;
  const bar = low === high ? [] : [line(low, at, high, at), line(low, at - 3, low, at + 3), line(high, at - 3, high, at + 3)];
  const marks = {
    circle: { type: "circle", shape: { cx: x, cy: at, r: 5 } },
    rect: { type: "rect", shape: { x: x - 4.5, y: at - 4.5, width: 9, height: 9 } },
    triangle: { type: "polygon", shape: { points: [[x, at - 6], [x + 5.5, at + 4.5], [x - 5.5, at + 4.5]] } },
    diamond: { type: "polygon", shape: { points: [[x, at - 6], [x + 6, at], [x, at + 6], [x - 6, at]] } },
  };
  const empty = found.symbol.startsWith("empty");
  const style = empty ? { fill: "none", stroke: found.colour, lineWidth: 1.8 } : { fill: found.colour };
  return { type: "group", children: [...bar, { ...marks[found.symbol.replace("empty", "").toLowerCase()], style }] };
}
