// The page of few steps: the report's own page of teachers and students, as the API sends it.
import { api, cell, count, el, note, sig, table, words } from "./core.js";
import { lines } from "./charts.js";

export async function fewSteps(fill, query) {
  const { page } = await api("few_steps", { run: query });
  if (!page) return fill(el("div", { className: "box" }, "None of these runs was measured with few steps: ", el("code", {}, "python -m eval fewstep --runs RUNS")));
  const { found, columns } = page, total = found.lines.length;
  const all = [...new Set(found.lines.flatMap((line) => Object.keys(line.cells).map(Number)))].sort((a, b) => a - b);
  const named = (line) => `${line.label}, guidance ${sig(line.guidance)}`;
  const verdict = (text) => (text.includes(": better") ? "good" : text.includes(": worse") ? "bad" : "");
  const pointsOfLine = (line) => line.x.map((x, i) => ({ x, y: line.y[i], low: line.low[i] ?? null, high: line.high[i] ?? null }));
  const panel = (chart) => ({ title, xlabel, lines: mine, from_zero }, i) => el("div", {}, el("h3", {}, title), lines(
    mine.map((line) => ({ name: line.label, order: line.order, points: pointsOfLine(line) })),
    { x: chart.axis === "t" ? "linear" : "log", y: "linear", xTitle: xlabel, xForm: chart.axis === "steps" ? count : (v) => sig(v, 2), height: 250, whiskers: true, fromZero: from_zero || (chart.axis === "t" ? 1e-9 : false), total, legend: i === 0, label: `${title}: ${chart.alt}` }));
  const tile = (strip, row, steps) => {
    if (!(steps in row.places)) return el("td");
    const [down, across] = row.sheet, part = (place, of) => `${of > 1 ? (100 * place) / (of - 1) : 0}%`;
    const made = el("div", { className: "tile-of-sheet", role: "img", "aria-label": `${strip.prompt}: ${row.label}, ${steps} steps` });
    made.style.backgroundImage = `url("/api/picture?${new URLSearchParams({ run: row.run, file: row.picture, width: 2400 })}")`;
    made.style.backgroundSize = `${100 * across}% ${100 * down}%`;
    made.style.backgroundPosition = `${part(strip.column, across)} ${part(row.places[steps], down)}`;
    return el("td", {}, made);
  };
  const numbers = (shown, bold) => table([
    { title: "Steps", value: ({ steps }) => steps },
    { title: "Run", text: true, value: ({ line }) => named(line) },
    ...found.figures.map((figure) => ({ title: columns[figure], value: ({ line, steps }) => line.cells[steps][figure]?.value, show: ({ line, steps }) => cell(line.cells[steps][figure], 3, bold && (found.best[steps]?.[figure] ?? []).includes(named(line))) })),
  ], all.flatMap((steps) => shown.filter((line) => steps in line.cells).map((line) => ({ line, steps }))), { tall: shown.length * all.length > 30 });
  const flows = found.lines.filter((line) => Object.keys(line.flow).length);
  const seeds = found.members.length > 0;
  fill(
    found.findings.length ? el("details", { open: found.findings.length <= 12 }, el("summary", {}, `Students beside their teachers: ${found.findings.length} findings`), el("ul", {}, found.findings.map((text) => el("li", { className: verdict(text) }, text)))) : null,
    page.strips.map((strip, i) => [
      i ? null : el("h2", {}, "The same noise"),
      el("h3", {}, strip.prompt),
      el("div", { className: "scroll" }, el("table", { className: "tiles-of-sheets" },
        el("thead", {}, el("tr", {}, el("th", {}, "Steps"), all.map((steps) => el("th", {}, `${steps}`)))),
        el("tbody", {}, strip.rows.map((row) => el("tr", {}, el("td", {}, row.label), all.map((steps) => tile(strip, row, steps))))))),
    ]),
    page.charts.map((chart) => [el("h2", {}, chart.alt.replace(/\.$/, "")), el("div", { className: "panels" }, chart.panels.map(panel(chart))), note(chart.caption)]),
    page.paths.length ? [
      el("h2", {}, "Paths from noise to data beside their straight way"),
      el("div", { className: "panels" }, page.paths.map((one) => el("div", {}, el("h3", {}, one.label), lines(
        one.along.map((along, k) => ({ name: `${k + 1}`, order: one.order, points: along.map((x, i) => ({ x, y: one.aside[k][i] })) })),
        { x: "linear", y: "linear", xTitle: "along the way", xForm: (v) => sig(v, 2), height: 200, total, legend: false, label: `Paths of ${one.label}` })))),
      note("Exact paths of some captions: across, how far along the straight way from noise to data; up, how far off it, both in lengths of that way. Dots are equal steps of t."),
    ] : null,
    el("h2", {}, "All figures"),
    numbers(found.lines, true),
    note(`${seeds ? "A row of several seeds is the mean of its runs, with the 95 % interval over seeds (Student's t). Small figures of other rows" : "Small figures"} are 95 % intervals over prompts; of times, the least and the most. Bold: the best at this number of steps and all that its interval cannot tell from it.`),
    seeds ? el("details", {}, el("summary", {}, "The single runs behind the means, with intervals over prompts"), numbers(found.members, false)) : null,
    flows.length ? [
      el("h2", {}, "How straight the flows are"),
      table([
        { title: "Run", value: named }, { title: "What it is", text: true, value: (line) => line.kind },
        ...["straightness", "length", "bend"].map((name) => ({ title: words(name), value: (line) => line.flow[name]?.value, show: (line) => cell(line.flow[name]) })),
      ], flows),
      note("S(Z) for each number of a latent; length and bend of the paths in lengths of the straight way. 0, 1 and 0: straight paths at constant speed."),
    ] : null,
    found.left_out.length ? note(`Not compared, because measured under another protocol: ${[...new Set(found.left_out.map((left) => `${left.metric} of ${left.run}`))].slice(0, 8).join(", ")}${found.left_out.length > 8 ? ` and ${found.left_out.length - 8} more` : ""}.`) : null,
    Object.keys(found.protocols).some((metric) => metric.includes("/world_")) ? note("Scores come from the small world's own judges; they are not the benchmarks of these names.") : null,
  );
}
