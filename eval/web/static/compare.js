// Side by side: begin a study, answer blind pairs, see win rates.
import { address, api, el, note, segments, select, sig, table, words } from "./core.js";

const share = (value) => `${sig(100 * value, 3)} %`;

export async function compare(fill) {
  const study = address.get("study"), rater = address.get("rater");
  if (study && address.get("results")) return results(fill, study);
  if (study && rater) return pair(fill, study, rater);
  return listed(fill);
}

const again = (fill, changes) => { address.set(changes); compare(fill).catch((error) => fill(el("div", { className: "box bad" }, error.message))); };

async function listed(fill) {
  const { studies, unreadable, questions } = await api("human/studies");
  const name = el("input", { type: "text", value: localStorage.getItem("beeline-rater") ?? "", maxLength: 60, autocomplete: "off" });
  const begin = (study) => () => {
    if (!name.value.trim()) return name.focus();
    localStorage.setItem("beeline-rater", name.value.trim());
    again(fill, { study, rater: name.value.trim(), results: null });
  };
  fill(
    el("p", {}, "Two checkpoints drew the same prompts from the same seeds. You see both pictures without knowing whose they are, and say which one does better. Every answer is kept; nobody answers a pair twice."),
    studies.length ? [
      el("div", { className: "controls" }, el("label", {}, "Your name", name)),
      table([
        { title: "Study", value: (s) => s.name },
        { title: "Compares", value: (s) => s.runs.join(" and "), text: true },
        { title: "Pairs", value: (s) => s.pairs },
        { title: "", value: () => "", show: (s) => el("button", { className: "plain", onclick: begin(s.name) }, "Judge") },
        { title: "", value: () => "", show: (s) => el("button", { className: "plain", onclick: () => again(fill, { study: s.name, results: 1, rater: null }) }, "Results") },
      ], studies),
    ] : note("No study yet."),
    unreadable.map((reason) => el("p", { className: "bad" }, reason)),
    await newStudy(fill, questions),
  );
}

async function newStudy(fill, questions) {
  const { runs } = await api("sheets");
  const drawn = runs.filter((run) => run.kind === "gallery");
  if (drawn.reduce((total, run) => total + run.files.length, 0) < 2) return note("A new study needs two checkpoints with a gallery: the service draws one for each checkpoint that it evaluates.");
  const options = Object.fromEntries(drawn.flatMap((run) => [...run.files].reverse().map((file) => [JSON.stringify([run.name, file.step]), `${run.name} step ${file.step}`])));
  const keys = Object.keys(options), picks = { a: keys[0], b: keys.find((key) => JSON.parse(key)[0] !== JSON.parse(keys[0])[0]) ?? keys[1] };
  const name = el("input", { type: "text", value: `study-${Math.random().toString(36).slice(2, 6)}`, maxLength: 40, pattern: "[a-z0-9][a-z0-9\\-]*", required: true });
  const asked = Object.keys(questions).map((question) => ({ question, box: el("input", { type: "checkbox", checked: true }) }));
  const problem = el("p", { className: "bad" });
  const send = async (event) => {
    event.preventDefault();
    const [a, b] = [picks.a, picks.b].map((key) => JSON.parse(key));
    try {
      await api("human/studies", {}, { name: name.value, run_a: a[0], step_a: a[1], run_b: b[0], step_b: b[1], questions: asked.filter((q) => q.box.checked).map((q) => q.question) });
      again(fill, { study: null });
    } catch (error) { problem.textContent = error.message; }
  };
  return el("details", {}, el("summary", {}, "New study"), el("form", { className: "new", onsubmit: send },
    el("label", {}, "Name", name),
    select(options, picks.a, (key) => (picks.a = key), "First checkpoint"),
    select(options, picks.b, (key) => (picks.b = key), "Second checkpoint"),
    el("div", { className: "controls" }, asked.map(({ question, box }) => el("label", {}, box, words(question)))),
    note("Typography is asked only where a prompt quotes words."),
    el("div", {}, el("button", { className: "main" }, "Begin")), problem));
}

async function pair(fill, study, rater) {
  const told = await api("human/next", { study, rater });
  const back = el("button", { className: "plain", onclick: () => again(fill, { study: null, rater: null }) }, "All studies");
  if (told.item === null) {
    return fill(el("div", { className: "box" }, `Thank you, ${rater}: all ${told.total} pairs are answered.`),
      el("div", { className: "controls" }, el("button", { className: "main", onclick: () => again(fill, { results: 1, rater: null }) }, "Show results"), back));
  }
  const answers = {}, wanted = Object.keys(told.questions), seen = new Set();
  const ready = () => { send.disabled = seen.size < 2 || wanted.some((q) => !answers[q]); };
  const problem = el("p", { className: "bad" });
  const send = el("button", { className: "main", disabled: true, onclick: async () => {
    send.disabled = true;
    try { await api("human/votes", {}, { study, rater, item: told.item, answers }); } catch (error) {
      if (!/already/.test(error.message)) { problem.textContent = error.message; send.disabled = false; return; }
    }
    again(fill, {});
  } }, "Keep and go on");
  // Without both pictures there is nothing to judge.
  const picture = (side) => el("figure", {}, el("img", {
    alt: `${side} picture`, onload: ({ target }) => { target.classList.toggle("pixels", target.naturalWidth < 350); seen.add(side); ready(); },
    onerror: () => { problem.textContent = "A picture of this pair cannot be shown: tell whoever began the study."; },
    src: `/api/human/picture?${new URLSearchParams({ study, rater, item: told.item, side })}`,
  }), el("figcaption", {}, side));
  fill(
    el("p", { className: "note" }, `Pair ${told.done + 1} of ${told.total}`),
    el("p", { className: "prompt" }, told.prompt),
    el("div", { className: "pair" }, picture("left"), picture("right")),
    wanted.map((question) => el("div", { className: "question" }, el("p", {}, told.questions[question]),
      segments({ left: "Left", same: "Same", right: "Right" }, null, (value) => { answers[question] = value; ready(); }, told.questions[question]))),
    el("div", { className: "controls" }, send, back), problem,
  );
}

async function results(fill, study) {
  const told = await api("human/results", { study });
  const side = (s) => `${s.run} step ${s.step}`;
  const known = told.rates.filter((rate) => rate.prompts);
  fill(
    el("p", {}, "How often ", el("b", {}, side(told.a)), " is preferred over ", el("b", {}, side(told.b)), "; a tie counts half."),
    known.length ? table([
      { title: "Question", value: (r) => words(r.question) },
      { title: "Preferred", value: (r) => r.value, show: (r) => el("td", {}, share(r.value), el("small", {}, ` ${share(r.low)} to ${share(r.high)}`)) },
      { title: "Verdict", text: true, value: (r) => (r.low > 0.5 ? "the first is preferred" : r.high < 0.5 ? "the second is preferred" : "no difference shown") },
      { title: "First", value: (r) => r.wins_a }, { title: "Same", value: (r) => r.ties }, { title: "Second", value: (r) => r.wins_b },
      { title: "Prompts", value: (r) => r.prompts }, { title: "Raters", value: (r) => r.raters },
    ], known) : note("No answers yet."),
    note("Intervals are 95 %, over prompts: several answers to one prompt are not independent. They say nothing about raters other than these."),
    el("div", { className: "controls" }, el("button", { className: "plain", onclick: () => again(fill, { study: null, results: null }) }, "All studies")),
  );
}
