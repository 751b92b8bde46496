// The pages: each asks the API and lays out what it answers. A page is drawn again when the store has something new.
import { address, api, bytes, cell, chooser, chosen, count, duration, el, keepChoiceInMenu, note, power, range, segments, select, sig, steady, table, words } from "./core.js";
import { dots, lines } from "./charts.js";
import { compare } from "./compare.js";
import { fewSteps } from "./few_steps.js";

const MOST_DOTS = 8;
const content = document.getElementById("content");
const fill = (...children) => content.replaceChildren(...children.flat(Infinity).filter(Boolean));
const names = (runs) => runs.map((run) => run.name);
// Names that differ in their last word are never cut off; they break after a slash.
const broken = (name) => name.split("/").map((part, i) => (i ? ["/", el("wbr"), part] : part));
const whole = (name) => el("td", { className: "text" }, broken(name));
const runLink = (name) => el("a", { href: `/run?${new URLSearchParams({ name })}` }, broken(name));
const nothing = (text) => el("div", { className: "box" }, text);

// Asks for chosen runs by name, or for all of them with one short address.
async function pickedRuns() {
  const { runs, metric } = await api("runs");
  const picked = chosen(runs);
  chooser(runs, draw);
  return { runs, picked, metric, query: picked.length === runs.length ? [] : names(picked) };
}

async function overview() {
  const { runs, metric } = await api("runs");
  if (!runs.length) return fill(nothing("No runs yet. A run shows up here as soon as it writes its recipe or its first result."));
  const headlines = [...new Set(runs.flatMap((run) => Object.keys(run.scores)))];
  const best = Math.min(...runs.filter((run) => run.loss).map((run) => run.loss.value));
  const sum = (field) => runs.reduce((total, run) => total + run[field], 0);
  const tiles = [
    [runs.length, runs.length === 1 ? "run" : "runs"],
    [`${sum("evaluated")} of ${sum("checkpoints")}`, "checkpoints evaluated"],
    [Number.isFinite(best) ? sig(best, 4) : "\u2013", `lowest ${metric ?? "validation loss"}`],
    [sum("failed") + sum("problems"), "failures and unreadable files", "/failures"],
  ];
  const progress = (run) => {
    if (!run.planned_images) return count(run.images);
    const share = Math.min(1, run.images / run.planned_images), bar = el("i");
    bar.style.width = `${100 * share}%`;
    return el("td", { title: `${count(run.images)} of ${count(run.planned_images)} images` }, `${count(run.images)} `, el("span", { className: "progress" }, bar));
  };
  const columns = [
    { title: "Run", value: (run) => run.name, show: (run) => runLink(run.name) },
    { title: "Depth", value: (run) => run.depth },
    { title: "Parameters", value: (run) => run.parameters, show: (run) => count(run.parameters) },
    { title: "Images", value: (run) => run.images, show: progress },
    { title: "Evaluated", value: (run) => run.evaluated, show: (run) => el("td", {}, `${run.evaluated}/${run.checkpoints}`, run.running ? el("small", {}, " running") : null, run.failed ? el("a", { className: "bad", href: "/failures" }, ` ${run.failed} failed`) : null) },
    { title: words(metric ?? "loss"), value: (run) => run.loss?.value, show: (run) => cell(run.loss, 4) },
    ...headlines.map((name) => ({ title: words(name), value: (run) => run.scores[name]?.value, show: (run) => cell(run.scores[name]) })),
    { title: "Images/s", value: (run) => run.cost.images_per_second, show: (run) => sig(run.cost.images_per_second) },
    { title: "Time", value: (run) => run.cost.seconds, show: (run) => duration(run.cost.seconds) },
    { title: "Last row", value: (run) => run.last, show: (run) => run.last.slice(0, 16).replace("T", " ") },
  ];
  const recipes = await api("recipes");
  const recipeColumns = [
    { title: "Run", value: (i) => recipes.runs[i], show: (i) => runLink(recipes.runs[i]) },
    ...recipes.differences.map(({ field, values }) => ({ title: field, value: (i) => values[i], show: (i) => values[i].length > 40 ? `${values[i].slice(0, 40)}\u2026` : values[i] })),
  ];
  const worldly = headlines.some((name) => name.startsWith("world_"));
  fill(
    el("div", { className: "tiles" }, tiles.map(([value, text, href]) => el(href && value ? "a" : "div", { className: "tile", href: value ? href : null }, el("b", {}, `${value}`), el("span", {}, text)))),
    table(columns, runs, { tall: runs.length > 25 }),
    worldly ? note("Names that begin with world are scores by the small world's own judges. They are not GenEval or T2I-CompBench, and no published figure may stand beside them.") : null,
    note("Last value of each run; small figures are 95 % intervals over prompts (a loss: over samples). Compare runs at equal images only."),
    el("h2", {}, "Recipes"),
    recipes.differences.length ? [note(`Fields that differ; ${recipes.same} are the same in all runs${recipes.more ? `, ${recipes.more} more differ and are left out here` : ""}.`), table(recipeColumns, [...recipes.runs.keys()], { tall: recipes.runs.length > 25 })]
      : note(runs.length > 1 ? "All recipes are the same." : "One run: open it for its recipe."),
  );
}

function leftOut(found) {
  const runs = Object.keys(found.left_out);
  return runs.length ? note(`Not shown, because measured under another protocol and not comparable: ${runs.slice(0, 8).join(", ")}${runs.length > 8 ? ` and ${runs.length - 8} more` : ""}.`) : null;
}

const pointsOf = (run, factor = 1) => run.images
  .map((images, i) => ({ x: images * factor, y: run.value[i], low: run.low[i], high: run.high[i] }))
  .filter((point) => point.x > 0 && point.y !== null);

async function losses() {
  const { picked, metric, query } = await pickedRuns();
  if (!metric) return fill(nothing("No run has a validation loss yet."));
  const levels = (await api("levels", { run: query }));
  const options = { [metric]: "mean over noise levels", ...Object.fromEntries(Object.entries(levels.levels).map(([t, name]) => [name, `noise level t = ${t}`])), train_loss: "training loss" };
  const shown = address.get("metric", metric) in options ? address.get("metric", metric) : metric;
  const axis = address.get("axis", "images"), scale = address.get("scale", "log");
  const found = await api("series", { metric: shown, run: query, points: picked.length > 40 ? 120 : 300 });
  const compute = axis === "compute";
  const drawn = found.runs.filter((run) => !compute || run.flops_per_image)
    .map((run) => ({ name: run.name, points: pointsOf(run, compute ? run.flops_per_image : 1) })).filter((line) => line.points.length);
  const unknown = compute ? found.runs.filter((run) => !run.flops_per_image) : [];
  const pick = (name) => (value) => { address.set({ [name]: value }); draw(); };
  fill(
    el("div", { className: "controls" },
      segments({ images: "Images", compute: "Compute" }, axis, pick("axis"), "horizontal axis"),
      segments({ log: "Log", linear: "Linear" }, scale, pick("scale"), "axes"),
      select(options, shown, pick("metric"), "Loss")),
    drawn.length ? lines(drawn, {
      x: scale, y: scale, xTitle: compute ? "training FLOPs" : "images seen", xForm: compute ? power : count, yTitle: options[shown], height: 440,
      label: `${shown} of ${drawn.length} runs against ${compute ? "training FLOPs" : "images seen"}`,
    }) : nothing(`The chosen runs have no ${shown}.`),
    leftOut(found),
    unknown.length ? note(`Without FLOPs in plan.json: ${names(unknown).join(", ")}.`) : null,
    levels.runs.length ? [
      el("h2", {}, "Loss per noise level"),
      note("At each run's last checkpoint. t = 0 is data, t = 1 is noise; the mean leaves out t = 1. Runs are comparable at equal images."),
      lines(levels.runs.map((run) => ({ name: `${run.name} (${count(run.images)})`, points: run.t.map((t, i) => ({ x: t, y: run.value[i] })) })), {
        x: "linear", y: "linear", xTitle: "noise level t", xForm: (t) => sig(t), xRange: [0, 1], yTitle: "loss", height: 340, label: `Loss per noise level of ${levels.runs.length} runs`,
      }),
    ] : null,
  );
}

async function scores() {
  const { query } = await pickedRuns();
  const { families, loss } = await api("metrics");
  const known = Object.keys(families);
  if (!known.length) return fill(nothing("No scores yet: the service judges each checkpoint that a run exports (weights/step_*/ema.safetensors)."));
  const family = known.includes(address.get("family")) ? address.get("family") : known[0];
  const found = await api("scores", { family, run: query });
  const splits = [...new Set(found.lines.map((line) => line.split))];
  const split = splits.includes(address.get("split")) ? address.get("split") : splits[0];
  const mine = found.lines.filter((line) => line.split === split);
  const tasks = mine.map((line) => words(line.task));
  const runNames = [...new Set(mine.flatMap((line) => Object.keys(line.runs)))];
  const values = mine.flatMap((line) => Object.values(line.runs).flatMap((point) => [point.value, point.high ?? point.value, point.low ?? point.value]));
  const seriesOf = (name) => ({ name, points: mine.map((line, row) => ({ row, ...(line.runs[name] ?? { value: null }) })).filter((p) => p.value !== null) });
  const pick = (name) => (value) => { address.set({ [name]: value }); draw(); };
  const task = mine.find((line) => line.metric === address.get("task")) ?? mine[0];
  const over = task ? await api("series", { metric: task.metric, run: query }) : { runs: [] };
  const curves = over.runs.map((run) => ({ name: run.name, points: pointsOf(run) })).filter((line) => line.points.length);
  const { lines: trust } = family.startsWith("world_") ? await api("calibration") : { lines: [] };
  const columns = [
    { title: "Run", value: (name) => name, show: (name) => runLink(name) },
    { title: "Images", value: (name) => mine.find((line) => line.runs[name])?.runs[name].images, show: (name) => count(mine.find((line) => line.runs[name])?.runs[name].images) },
    ...mine.map((line) => ({ title: words(line.task), value: (name) => line.runs[name]?.value, show: (name) => cell(line.runs[name], 3, line.best.includes(name)) })),
  ];
  const published = Object.entries(found.published).filter((_, i, all) => i === 0 || i === all.length - 1)
    .map(([name, scores]) => ({ name, points: mine.map((line, row) => ({ row, value: scores[line.task] })).filter((p) => p.value !== undefined) }));
  const unit = values.every((v) => v >= 0 && v <= 1);
  fill(
    el("div", { className: "controls" },
      select(Object.fromEntries(known.map((name) => [name, words(name)])), family, pick("family"), "Score"),
      splits.length > 1 ? segments(Object.fromEntries(splits.map((s) => [s, { seen: "Seen compositions", unseen: "Unseen" }[s] ?? s])), split, pick("split"), "compositions") : null),
    found.world ? note("Scores by the small world's own judges on its own prompts: not GenEval or T2I-CompBench. Unseen compositions never occurred in training captions.") : null,
    runNames.length ? [
      tasks.length > 1 ? dots(tasks, runNames.slice(0, MOST_DOTS).map(seriesOf), { unit, shared: published, label: `${family} per task with 95 % intervals` }) : null,
      runNames.length > MOST_DOTS && tasks.length > 1 ? note(`The chart has the first ${MOST_DOTS} runs; the table has all ${runNames.length}.`) : null,
      published.length ? note("Hollow: SD3's own models (Table 5 of the paper, 512 px, before DPO; other data and far more compute).") : null,
      table(columns, runNames, { tall: runNames.length > 25 }),
      note("Last value of each run; intervals are 95 %, over prompts. Bold: the best and all that its interval cannot tell from it, at equal images."),
      leftOut({ left_out: Object.assign({}, ...mine.map((line) => line.left_out)) }),
    ] : nothing(`The chosen runs have no ${words(family)}.`),
    curves.length ? [
      el("h2", {}, "Over the checkpoints"),
      el("div", { className: "controls" }, mine.length > 1 ? select(Object.fromEntries(mine.map((line) => [line.metric, words(line.task)])), task.metric, pick("task"), "Task") : null),
      lines(curves, { x: "log", y: "linear", xTitle: "images seen", yTitle: words(task.metric), whiskers: true, fromZero: unit, label: `${task.metric} against images seen` }),
    ] : null,
    trust.length ? [
      el("h2", {}, "Can the judges be believed?"),
      table([
        { title: "Score", text: true, value: (line) => line.metric, show: (line) => whole(line.metric) },
        ...["ground_truth", "shuffled", "noise"].map((control) => ({ title: words(control), value: (line) => line[control]?.value, show: (line) => line[control] ? el("td", {}, steady(line[control].value, 3), range(line[control])) : "" })),
        { title: "Verdict", text: true, value: (line) => line.verdict ?? "" },
      ], trust),
    ] : null,
  );
}

async function samples() {
  const { picked, query } = await pickedRuns();
  const { runs } = await api("sheets", { run: query });
  if (!runs.length) return fill(nothing("The chosen runs have no sample pictures yet."));
  const most = Number(address.get("columns", "6"));
  const evenly = (files) => files.length <= most ? files : [...new Set(Array.from({ length: most }, (_, i) => Math.round((i * (files.length - 1)) / (most - 1))))].map((i) => files[i]);
  const shown = runs.slice(0, 12);
  const told = await Promise.all(shown.map((run) => api("prompts", { run: run.name }).catch(() => ({ prompts: [] }))));
  const prompts = told.map((one) => one.prompts);
  const common = prompts[0]?.length && prompts.every((list) => JSON.stringify(list) === JSON.stringify(prompts[0]));
  const list = (items) => el("details", { open: innerWidth >= 700 }, el("summary", {}, `${items.length} prompts, row by row`), el("ol", { className: "prompts" }, items.map((text) => el("li", {}, text))));
  fill(
    el("div", { className: "controls" }, segments({ 3: "3", 6: "6", 100: "All" }, `${most}`, (value) => { address.set({ columns: value }); draw(); }, "checkpoints per run"), el("span", { className: "note" }, "checkpoints per run, side by side at the same prompts and seeds")),
    common ? list(prompts[0]) : null,
    shown.map((run, i) => [
      el("h2", {}, runLink(run.name)),
      !common && prompts[i].length ? list(prompts[i]) : null,
      el("div", { className: "strip", tabIndex: 0 }, evenly(run.files).map((file) => {
        const image = el("img", { loading: "lazy", decoding: "async", alt: `${run.name} at ${file.step === null ? file.file : `step ${file.step}`}`, src: `/api/picture?${new URLSearchParams({ run: run.name, file: file.file, width: 640 })}` });
        const { columns } = told[i], rows = Math.ceil(prompts[i].length / columns);
        image.addEventListener("pointermove", ({ offsetX: x, offsetY: y }) => {
          if (columns) image.title = prompts[i][Math.floor((y / image.clientHeight) * rows) * columns + Math.floor((x / image.clientWidth) * columns)] ?? "";
        });
        image.addEventListener("load", () => { if (image.naturalWidth < 500) image.classList.add("pixels"); });
        image.addEventListener("error", () => image.replaceWith(note("this picture cannot be read")));
        const whole = `/api/picture?${new URLSearchParams({ run: run.name, file: file.file, width: 2400 })}`;
        return el("figure", {}, el("a", { href: whole, target: "_blank" }, image), el("figcaption", {}, file.images ? `${count(file.images)} images` : file.step === null ? file.file : `step ${file.step}`));
      })),
    ]),
    runs.length > shown.length ? note(`${runs.length - shown.length} more of the ${picked.length} chosen runs have pictures; choose fewer to see them.`) : null,
  );
}

const few_steps = async () => fewSteps(fill, (await pickedRuns()).query);

async function scaling() {
  const { query } = await pickedRuns();
  const told = await api("scaling", { run: query });
  if (told.state === "fitting") {
    if (!content.querySelector(".fitting")) fill(nothing(el("span", { className: "fitting" }, `Fitting the laws to ${told.runs.length} runs\u2026`)));
    return void setTimeout(draw, 700);
  }
  const law = told.scaling, predictions = told.predictions ?? [];
  const shown = (found, digits = 3) => found ? el("td", {}, sig(found.value, digits), found.low === undefined ? null : el("small", {}, ` ${sig(found.low, digits)}\u2013${sig(found.high, digits)}`)) : "";
  const laws = Object.entries(law.laws ?? {});
  const ahead = law.next_rung, back = law.held_out;
  const at = told.runs.map((run) => ({ name: run.name, dots: true, points: [{ x: run.parameters, y: run.loss }] }));
  if (ahead) at.push({ name: ahead.depth ? `depth ${ahead.depth}, predicted` : "predicted", dots: true, accent: true, points: [{ x: ahead.parameters, y: ahead.loss.value, low: ahead.loss.low, high: ahead.loss.high }] });
  const series = await api("series", { metric: told.metric ?? "val_loss/sd3", run: query });
  const curves = series.runs.filter((run) => run.flops_per_image).map((run) => ({ name: run.name, points: pointsOf(run, run.flops_per_image) })).filter((line) => line.points.length);
  if (told.frontier) curves.push({ name: "fitted L(C)", dashed: true, accent: true, points: told.frontier.compute.map((c, i) => ({ x: c, y: told.frontier.value[i] })) });
  fill(
    law.reason ? nothing(`No law is fitted: ${law.reason}. With so little, a curve through the points would say more about the fitter than about the models.`) : null,
    !law.reason && told.band ? [
      el("h2", {}, `Loss against size at ${count(law.images)} images`),
      lines([...at, { name: "L(N)", dashed: true, accent: true, points: told.band.parameters.map((n, i) => ({ x: n, y: told.band.value[i] })) }], {
        x: "log", y: "log", xTitle: "parameters", yTitle: told.metric, band: { x: told.band.parameters, low: told.band.low, high: told.band.high }, whiskers: true,
        label: `${told.metric} against parameters with the fitted law and its 95 % band`,
      }),
    ] : null,
    curves.length ? [
      el("h2", {}, "Loss against compute"),
      lines(curves, { x: "log", y: "log", xTitle: "training FLOPs", xForm: power, yTitle: told.metric ?? "loss", label: "Validation loss against training FLOPs, one line per run" }),
    ] : null,
    laws.length ? [
      el("h2", {}, "Laws"),
      table([
        { title: "Law", value: ([name]) => name },
        { title: "Floor E", value: ([, l]) => l.floor.value, show: ([, l]) => shown(l.floor) },
        { title: "Exponents", value: ([, l]) => l.exponents[0].value, show: ([, l]) => el("td", {}, l.exponents.map((e, i) => [i ? "; " : "", sig(e.value), el("small", {}, ` ${sig(e.low, 2)}\u2013${sig(e.high, 2)}`)])) },
        { title: "Scatter between runs", value: ([, l]) => l.scatter_between_runs, show: ([, l]) => `${sig(100 * l.scatter_between_runs, 2)} %` },
      ], laws),
      note(`On the compute-optimal frontier of L(N,D), size grows as compute to the power ${sig(law.size_exponent?.value, 2)} (${sig(law.size_exponent?.low, 2)} to ${sig(law.size_exponent?.high, 2)}) and images as compute to the power ${sig(law.images_exponent?.value, 2)}. Intervals are 95 %, runs resampled.`),
    ] : null,
    ahead || back || predictions.length ? [
      el("h2", {}, "Predictions"),
      table([
        { title: "Prediction", text: true, value: (p) => p.title },
        { title: "Predicted", value: (p) => p.loss.value, show: (p) => shown(p.loss, 4) },
        { title: "Measured", value: (p) => p.actual, show: (p) => p.actual === null || p.actual === undefined ? el("small", {}, p.reason || "not trained") : sig(p.actual, 4) },
        { title: "Verdict", text: true, value: (p) => p.verdict },
      ], [
        ...predictions.map((p) => ({ ...p, title: `depth ${p.depth}, ${count(p.parameters)}, committed ${p.created.slice(0, 16).replace("T", " ")}`, verdict: p.inside === null ? "" : `${p.inside ? "inside" : "outside"} the interval${p.first === false ? ", but the run had begun before" : ""}` })),
        ...(ahead ? [{ ...ahead, title: `next rung${ahead.depth ? `, depth ${ahead.depth}` : ""} (not committed)`, verdict: "" }] : []),
        ...(back ? [{ ...back, title: `largest run held out${back.depth ? `, depth ${back.depth}` : ""}`, verdict: `${back.inside ? "inside" : "outside"} the interval` }] : []),
      ]),
      note(el("code", {}, "python -m eval predict --runs RUNS"), " commits a prediction before the depth is trained; it is graded here afterwards."),
    ] : null,
    note("N counts all parameters; C is exact training FLOPs per image times images. A law needs four sizes and a decade of compute. Choose the runs of one ladder above."),
  );
}

async function plans() {
  const { query } = await pickedRuns();
  const { runs } = await api("plans", { run: query });
  const rows = runs.flatMap((run) => run.lines.map((line) => ({ run, ...line })));
  if (!rows.length) return fill(nothing("No run has a plan.json yet."));
  const form = (name, value) => value === null || value === undefined ? "" : /seconds$/.test(name) ? duration(value) : /bytes/.test(name) ? bytes(value) : /FLOPs/.test(name) ? power(value) : count(value);
  fill(
    table([
      { title: "Run", value: (row) => row.run.name, show: (row) => runLink(row.run.name) },
      { title: "What", value: (row) => words(row.name.replace("bytes_per_rank/", "bytes per rank: ").replace("cost/", "")), text: true },
      { title: "Planned", value: (row) => row.planned, show: (row) => form(row.name, row.planned) },
      { title: "Measured", value: (row) => row.measured, show: (row) => form(row.name, row.measured) },
      { title: "Measured / planned", value: (row) => row.ratio, show: (row) => row.ratio === null ? "" : `${sig(100 * row.ratio)} %` },
    ], rows, { tall: rows.length > 30 }),
    el("h2", {}, "Cost so far"),
    table([
      { title: "Run", value: (run) => run.name, show: (run) => runLink(run.name) },
      { title: "Parameters", value: (run) => run.parameters, show: (run) => count(run.parameters) },
      { title: "Images", value: (run) => run.cost.images, show: (run) => count(run.cost.images) },
      { title: "Done", value: (run) => run.progress, show: (run) => run.progress === null ? "" : `${sig(100 * run.progress)} %` },
      { title: "Time", value: (run) => run.cost.seconds, show: (run) => duration(run.cost.seconds) },
      { title: "Images/s", value: (run) => run.cost.images_per_second, show: (run) => sig(run.cost.images_per_second) },
      { title: "FLOPs", value: (run) => run.cost.flops, show: (run) => power(run.cost.flops) },
      { title: "FLOPs/s", value: (run) => run.cost.flops_per_second, show: (run) => power(run.cost.flops_per_second) },
      { title: "Of peak", value: (run) => run.cost.efficiency, show: (run) => run.cost.efficiency === null ? "" : `${sig(100 * run.cost.efficiency)} %` },
    ], runs, { tall: runs.length > 30 }),
    note("Planned figures are in plan.json, which a run writes before its first step. The share of peak needs the device's peak there."),
  );
}

async function failures() {
  const { evaluations, unreadable, problem } = await api("failures");
  fill(
    problem ? el("div", { className: "box bad" }, problem) : null,
    el("h2", {}, "Evaluations"),
    evaluations.length ? table([
      { title: "Run", value: (f) => f.run, show: (f) => runLink(f.run) },
      { title: "Step", value: (f) => f.step },
      { title: "Reason", value: (f) => f.reason, text: true },
      { title: "Attempts", value: (f) => f.attempts },
      { title: "When", value: (f) => f.at, show: (f) => f.at.slice(0, 16).replace("T", " ") },
    ], evaluations) : note("Every evaluation so far ended well."),
    evaluations.length ? note("Failed checkpoints are not tried again by themselves: start the service with --retry once the reason is gone.") : null,
    el("h2", {}, "Files that could not be read"),
    unreadable.length ? table([
      { title: "Run", value: (f) => f.run, show: (f) => f.run ? runLink(f.run) : "all runs" },
      { title: "Reason", value: (f) => f.reason, text: true },
    ], unreadable) : note("None."),
  );
}

async function run() {
  const name = address.get("name", "");
  const found = await api("run", { name });
  document.querySelector("h1").textContent = name;
  document.title = `${name} - beeline`;
  const facts = [["depth", found.depth], ["parameters", count(found.parameters)], ["images seen", count(found.images)], ["training time", duration(found.cost.seconds)]].filter(([, value]) => value);
  const state = { done: "evaluated", failed: "failed", running: "being evaluated", new: "not evaluated" };
  const here = `run=${encodeURIComponent(name)}`;
  fill(
    el("div", { className: "tiles" }, facts.map(([text, value]) => el("div", { className: "tile" }, el("b", {}, `${value}`), el("span", {}, text)))),
    el("p", {}, ["losses", "scores", "samples", "plans"].flatMap((page, i) => [i ? " \u00b7 " : "", el("a", { href: `/${page}?${here}` }, page)])),
    found.problems.map((text) => el("p", { className: "bad" }, text)),
    el("h2", {}, "Checkpoints"),
    found.checkpoints.length ? table([
      { title: "Step", value: (c) => c.step }, { title: "State", value: (c) => state[c.state], text: true },
    ], found.checkpoints, { tall: found.checkpoints.length > 12 }) : note("None exported yet (weights/step_*/ema.safetensors)."),
    el("h2", {}, "Last numbers"),
    table([
      { title: "Metric", text: true, value: ([metric]) => metric, show: ([metric]) => whole(metric) },
      { title: "Value", value: ([, point]) => point.value, show: ([, point]) => cell(point, 4) },
      { title: "Images", value: ([, point]) => point.images, show: ([, point]) => count(point.images) },
      { title: "Samples", value: ([, point]) => point.count, show: ([, point]) => count(point.count) },
    ], Object.entries(found.numbers), { tall: true }),
    el("h2", {}, "Recipe"),
    table([{ title: "Field", value: ([field]) => field }, { title: "Value", text: true, value: ([, value]) => value }], Object.entries(found.recipe), { tall: true }),
    note(`Recipe ${found.recipe_hash || "unknown"}; written by code ${found.code_versions.join(", ") || "unknown"}.`),
  );
}

const PAGES = { overview, losses, scores, samples, few_steps, scaling, plans, failures, run, human: () => compare(fill) };
const page = PAGES[document.body.dataset.page];
let drawing = null, again = false;

async function draw() {
  if (drawing) { again = true; return drawing; }
  drawing = (async () => {
    do {
      again = false;
      try { await page(); } catch (error) { fill(el("div", { className: "box bad" }, error.message)); console.warn(error); }
    } while (again);
  })();
  await drawing;
  drawing = null;
  await new Promise((next) => requestAnimationFrame(() => requestAnimationFrame(next))); // the charts draw in a frame
  document.body.dataset.drawnAt ??= `${performance.now()}`;
  document.body.dataset.drawn = `${Number(document.body.dataset.drawn ?? 0) + 1}`;
}

let generation = null;
async function watch() {
  const place = document.getElementById("status");
  try {
    const told = await api("status");
    const parts = told.problem ? [told.problem] : [];
    if (told.reading) parts.push(`reading run ${told.reading[0] + 1} of ${told.reading[1]}`);
    else if (!told.generation) parts.push("looking at the store");
    const [one, ...others] = told.working;
    if (one) parts.push(`evaluating ${one.run} step ${one.step}${others.length ? ` and ${others.length} more` : ""} (${duration(told.time - told.since)})`);
    if (told.elsewhere) parts.push(`${told.elsewhere} being evaluated by another service`);
    if (told.waiting) parts.push(`${told.waiting} waiting`);
    if (!parts.length) parts.push(!told.evaluates ? "evaluates nothing (--no-evaluate)" : told.checkpoints ? "nothing left to evaluate" : "no checkpoint yet");
    if (told.failed) parts.push(`${told.failed} failed`);
    place.textContent = parts.join(" \u00b7 ");
    place.className = told.problem ? "trouble" : "";
    if (generation !== told.generation) {
      const first = generation === null;
      generation = told.generation;
      if (!first && document.body.dataset.page !== "human") await draw();
    }
  } catch {
    place.textContent = "the service does not answer";
    place.className = "trouble";
  }
  setTimeout(watch, generation ? 5000 : 1000);
}

keepChoiceInMenu();
draw();
watch();
