// Charts over Chart.js: lines and dots with intervals, log axes with round ticks, colors by size that follow light and dark.
/* global Chart */
import { count, el, sig } from "./core.js";

const style = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const MARKS = ["circle", "rect", "rectRot", "triangle", "rectRounded"];
const live = new Set();
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { for (const redraw of live) redraw(); });

// One ramp along the sizes, mixed in linear light: the largest run has the most contrast to the page.
export function ramp(total) {
  const stops = ["--ramp0", "--ramp1", "--ramp2"].map((name) => style(name).match(/\w\w/g).map((hex) => (parseInt(hex, 16) / 255) ** 2.2));
  return Array.from({ length: total }, (_, i) => {
    const at = total > 1 ? (2 * i) / (total - 1) : 2, k = Math.min(Math.floor(at), 1);
    return `rgb(${stops[k].map((low, c) => Math.round(255 * (low + (at - k) * (stops[k + 1][c] - low)) ** (1 / 2.2))).join(",")})`;
  });
}

function logTicks(low, high, most) {
  const decades = [];
  for (let d = Math.floor(Math.log10(low)) - 1; d <= Math.ceil(Math.log10(high)) + 1; d++) decades.push(d);
  for (const mantissas of [[1], [1, 3], [1, 2, 5], [1, 1.5, 2, 3, 5, 7]]) {
    const ticks = decades.flatMap((d) => mantissas.map((m) => m * 10 ** d)).filter((t) => t >= low * 0.999 && t <= high * 1.001);
    if (ticks.length > most) return ticks.filter((_, i) => i % Math.ceil(ticks.length / most) === 0);
    if (ticks.length >= 3) return ticks;
  }
  const step = [1, 2, 2.5, 5, 10].map((m) => m * 10 ** Math.floor(Math.log10((high - low) / most))).find((s) => (high - low) / s <= most);
  return Array.from({ length: most + 2 }, (_, i) => (Math.ceil(low / step) + i) * step).filter((t) => t <= high);
}

function axis(kind, title, form, most) {
  const made = {
    type: kind === "log" ? "logarithmic" : "linear", title: { display: Boolean(title), text: title, color: style("--muted") },
    grid: { color: style("--grid"), tickColor: "transparent" }, border: { color: style("--muted") },
    ticks: { color: style("--muted"), maxRotation: 0, autoSkipPadding: 12, maxTicksLimit: most + 2, callback: (v) => form(v) },
  };
  if (kind === "log") made.afterBuildTicks = (scale) => { scale.ticks = logTicks(scale.min, scale.max, most).map((value) => ({ value })); };
  return made;
}

// 95 % intervals as thin lines through their points: along y, or along x where the dots lie in rows.
const intervals = {
  id: "intervals",
  beforeDatasetDraw(chart, { index, meta }) {
    const set = chart.data.datasets[index];
    if (!set.whiskers || meta.hidden) return;
    const { ctx, scales, chartArea: box } = chart;
    ctx.save();
    ctx.beginPath(); ctx.rect(box.left, box.top, box.width, box.height); ctx.clip();
    ctx.strokeStyle = set.borderColor; ctx.globalAlpha = 0.55; ctx.lineWidth = 1.5;
    ctx.beginPath();
    for (const point of set.data) {
      if (point.low === null || point.low === undefined) continue;
      const rows = set.whiskers === "x";
      const [a, b] = [point.low, point.high].map((v) => (rows ? scales.x : scales.y).getPixelForValue(v));
      const c = (rows ? scales.y : scales.x).getPixelForValue(rows ? point.y : point.x);
      rows ? (ctx.moveTo(a, c), ctx.lineTo(b, c)) : (ctx.moveTo(c, a), ctx.lineTo(c, b));
    }
    ctx.stroke();
    ctx.restore();
  },
};

function show(describe, { height, label, legend = true }) {
  const canvas = el("canvas", { role: "img", "aria-label": label });
  const holder = el("div", { className: "chart" }, canvas), keys = el("div", { className: "legend" });
  holder.style.height = `${height}px`;
  const figure = el("figure", {}, legend ? keys : null, holder);
  let chart = null;
  const draw = () => {
    if (chart && !figure.isConnected) { live.delete(draw); chart.destroy(); return; }
    chart?.destroy();
    const made = describe();
    chart = new Chart(canvas, made);
    const named = made.data.datasets.map((set, i) => ({ set, i })).filter(({ set }) => !set.quiet);
    keys.replaceChildren(...(named.length > 1 && named.length <= 40 ? named : []).map(({ set, i }) => {
      const swatch = el("i", { className: "swatch" });
      swatch.style.background = set.borderColor;
      return el("button", { type: "button", "aria-pressed": "true", onclick: (event) => {
        const on = !chart.isDatasetVisible(i);
        chart.setDatasetVisibility(i, on); chart.update("none");
        event.currentTarget.setAttribute("aria-pressed", `${on}`);
      } }, swatch, set.label);
    }));
    if (named.length > 40) keys.replaceChildren(el("span", { className: "note" }, `${named.length} runs, colored by size; point at a line for its name`));
  };
  live.add(draw);
  queueMicrotask(() => requestAnimationFrame(draw));
  return figure;
}

const base = (scales, tooltip, plugins = [intervals]) => ({
  plugins,
  options: {
    animation: false, responsive: true, maintainAspectRatio: false, parsing: false, normalized: true, locale: "en",
    interaction: { mode: "nearest", axis: "xy", intersect: false }, scales,
    font: { family: "system-ui, 'DejaVu Sans', sans-serif" },
    plugins: {
      legend: { display: false },
      tooltip: { callbacks: tooltip, backgroundColor: style("--ink"), titleColor: style("--page"), bodyColor: style("--page"), displayColors: false, padding: 8 },
    },
  },
});

const interval = (point) => (point.low === null || point.low === undefined ? "" : ` (${sig(point.low)} to ${sig(point.high)})`);

// `fromZero`: the least top of the y axis, true for shares. series: [{name, points: [{x, y, low, high}], order, dashed, quiet}]; `order` of `total`: color and mark, where a chart lacks some lines of others
export function lines(series, { x, y, xTitle, yTitle, xForm = count, label, height = 380, band = null, whiskers = false, xRange = null, fromZero = false, total = series.length, legend = true }) {
  return show(() => {
    const colors = ramp(total), crowded = series.length > 40;
    const datasets = series.map((line, i) => ({
      type: "line", label: line.name, data: line.points, borderColor: line.accent ? style("--accent") : colors[line.order ?? i], backgroundColor: line.accent ? style("--accent") : colors[line.order ?? i],
      borderWidth: line.dashed ? 1.4 : crowded ? 1 : 2, borderDash: line.dashed ? [5, 3] : [], pointStyle: MARKS[(line.order ?? i) % MARKS.length],
      pointRadius: line.dashed ? 0 : line.points.length > 40 || crowded ? 0 : line.points.length === 1 ? 5 : 3, pointHitRadius: 6, whiskers: whiskers && series.length <= 12 && line.points.length <= 40 ? "y" : null,
      quiet: line.quiet, showLine: !line.dots, fill: false, clip: 6,
    }));
    if (band) datasets.push(...[["low", false], ["high", "-1"]].map(([end, fill]) => ({
      type: "line", label: "", quiet: true, data: band.x.map((v, i) => ({ x: v, y: band[end][i] })), borderWidth: 0, pointRadius: 0, pointHitRadius: 0,
      fill, backgroundColor: `${style("--accent")}29`, borderColor: "transparent",
    })));
    const tooltip = {
      title: (items) => items[0]?.dataset.label ?? "",
      label: (item) => `${sig(item.raw.y, 4)}${interval(item.raw)} at ${xForm(item.raw.x)} ${xTitle}`,
    };
    const scales = { x: axis(x, xTitle, xForm, innerWidth < 700 ? 5 : 8), y: axis(y, yTitle, (v) => sig(v), 6) };
    if (xRange) [scales.x.min, scales.x.max] = xRange;
    const places = series.flatMap((line) => line.points).map((point) => point.x);
    if (whiskers && x === "log" && !xRange) [scales.x.min, scales.x.max] = [0.94 * Math.min(...places), 1.06 * Math.max(...places)]; // off the frame
    const ends = datasets.filter((set) => set.whiskers).flatMap((set) => set.data).filter((point) => point.high !== null && point.high !== undefined);
    if (ends.length) Object.assign(scales.y, { suggestedMin: Math.min(...ends.map((p) => p.low)), suggestedMax: Math.max(...ends.map((p) => p.high)) });
    if (fromZero) Object.assign(scales.y, { min: 0, suggestedMax: Math.max(fromZero === true ? 0.1 : fromZero, scales.y.suggestedMax ?? 0) });
    return { ...base(scales, tooltip), data: { datasets } };
  }, { height: innerWidth < 700 ? Math.min(height, 300) : height, label, legend });
}

// rows: task names; series: [{name, points: [{row, value, low, high}]}]
export function dots(rows, series, { label, unit = true, shared = [] }) {
  const step = 20 + 7 * series.length;
  return show(() => {
    const colors = ramp(series.length);
    const shift = (i) => (series.length > 1 ? (i / (series.length - 1) - 0.5) * 0.62 : 0);
    const datasets = [...series.map((one, i) => ({
      type: "scatter", label: one.name, borderColor: colors[i], backgroundColor: colors[i], pointStyle: MARKS[i % MARKS.length], pointRadius: 4, whiskers: "x", clip: 6,
      data: one.points.map((p) => ({ x: p.value, y: p.row + shift(i), low: p.low, high: p.high, row: p.row })),
    })), ...shared.map((one) => ({
      type: "scatter", label: one.name, borderColor: style("--accent"), backgroundColor: "transparent", pointStyle: "rectRot", pointRadius: 5, borderWidth: 1.5,
      data: one.points.map((p) => ({ x: p.value, y: p.row, row: p.row })),
    }))];
    const x = axis("linear", "", (v) => sig(v), 6), y = axis("linear", "", (v) => rows[v] ?? "", rows.length);
    if (unit) Object.assign(x, { min: 0, max: 1 });
    Object.assign(y, { min: -0.5, max: rows.length - 0.5, reverse: true });
    Object.assign(y.ticks, { stepSize: 1, autoSkip: false, maxTicksLimit: rows.length + 2, color: style("--ink") });
    y.afterBuildTicks = (scale) => { scale.ticks = rows.map((_, value) => ({ value })); };
    y.grid = { display: false };
    const tooltip = { title: (items) => items[0]?.dataset.label ?? "", label: (item) => `${rows[item.raw.row]}: ${sig(item.raw.x)}${interval(item.raw)}` };
    return { ...base({ x, y }, tooltip), data: { datasets } };
  }, { height: 50 + step * rows.length, label });
}

