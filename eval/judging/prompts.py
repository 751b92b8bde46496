"""Which prompts a metric draws: GenEval's, T2I-CompBench's files, plain files of lines, and the world's own sets.

World sets come for seen and for unseen compositions; every one has a scene that shows it (`render_scene`).
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from eval.judging.geneval_prompts import TASKS, draw_official_metadata, split_json_lines
from eval.judging.metric import Prompt
from infra.errors import UserError

WORLD_PER_TASK = 50  # prompts of a task where no number is asked for: the world has no end
WORLD_SEED = 20251  # of the evaluation's prompts and scenes: never a training seed
TRUTH_SPLIT, REFERENCE_SPLIT = "eval_truth", "eval_reference"
# T2I-CompBench's files under examples/dataset, `<name>_val.txt`.
COMPBENCH_CATEGORIES = ("color", "shape", "texture", "spatial", "3d_spatial", "numeracy", "non_spatial", "complex")
# Categories that the world can show, and the GenEval tasks whose prompts they ask about.
WORLD_CATEGORIES = {
    "color": ("colors", "color_attr"),
    "spatial": ("position",),
    "numeracy": ("counting",),
    "non_spatial": ("two_object",),
    "complex": (),  # color and position in one prompt: drawn below, never combined in training captions
}


def read_lines(path: str | Path) -> list[str]:
    """Prompts of a text file, one per line (official files partly end lines in CRLF), or of a JSONL with `prompt`."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read prompts from {path}: {error}; expected a file of UTF-8 text") from error
    as_json = Path(path).suffix in (".jsonl", ".ndjson")
    lines = [line.strip() for line in (split_json_lines(text) if as_json else text.splitlines()) if line.strip()]
    if as_json:
        try:
            lines = [str(json.loads(line)["prompt"]) for line in lines]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise UserError(f"{path}: expected one JSON object with a prompt per line ({error!r})") from error
    if not lines:
        raise UserError(f"{path} holds no prompts; expected one per line")
    refuse_broken(lines, str(path))
    return lines


def refuse_broken(prompts: Sequence[str], where: str) -> None:
    """UserError for text that is no Unicode: bytes of another encoding on the command line, half a pair in JSON."""
    for number, prompt in enumerate(prompts, start=1):
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"{where}: prompt {number}, {prompt!a}, is not valid UTF-8: write it anew") from error


def list_geneval_prompts(per_task: int | None = None) -> list[Prompt]:
    """The official 553, or the first `per_task` of each task (a partial set: never to be called GenEval's score)."""
    taken: dict[str, int] = {}
    prompts = []
    for record in draw_official_metadata():
        taken[record["tag"]] = taken.get(record["tag"], 0) + 1
        if per_task is None or taken[record["tag"]] <= per_task:
            prompts.append(Prompt(record["prompt"], record["tag"], metadata=record))
    return prompts


def list_compbench_prompts(folder: str | Path, per_task: int | None = None) -> list[Prompt]:
    """T2I-CompBench's validation prompts from the user's copy of examples/dataset, for the categories that have a file.

    Complex prompts carry their kind (spatial, action or both), read from the benchmark's complex_val_*.txt.
    """
    root, prompts = Path(folder), []
    kind = read_complex_kinds(root) if (root / "complex_val.txt").exists() else None
    for category in COMPBENCH_CATEGORIES:
        file = root / f"{category}_val.txt"
        if not file.exists():
            continue
        for line in read_lines(file)[:per_task]:
            metadata: Mapping[str, Any] = {"kind": kind(line)} if category == "complex" and kind else {}
            prompts.append(Prompt(line, category, metadata=metadata))
    if not prompts:
        raise UserError(f"no T2I-CompBench prompt files in {folder}: expected color_val.txt and its siblings")
    return prompts


def read_complex_kinds(folder: str | Path) -> Callable[[str], str]:
    """The kind of a complex prompt (spatial, action, else both) by the benchmark's own lists, asked in its order."""
    files = {kind: Path(folder) / f"complex_val_{kind}.txt" for kind in ("spatial", "action")}
    lists = {kind: {_normalize_line(line) for line in read_lines(file)} for kind, file in files.items()}
    return lambda prompt: next((kind for kind, known in lists.items() if _normalize_line(prompt) in known), "both")


def _normalize_line(prompt: str) -> str:
    return prompt.strip("\n").split(".")[0].lower()


def list_world_geneval_prompts(per_task: int) -> list[Prompt]:
    """`per_task` prompts of each task, for seen and for unseen compositions (single objects are always seen)."""
    from data_pipeline.world.grammar import world_prompts

    return [
        Prompt(record["prompt"], task, seen=seen, metadata=record)
        for seen in (True, False)
        for task in TASKS
        if seen or task != "single_object"
        for record in world_prompts(task, per_task, WORLD_SEED, seen)
    ]


def list_world_compbench_prompts(per_task: int) -> list[Prompt]:
    """The world's T2I-CompBench categories. All but `complex` ask about the very images of world_geneval's prompts."""
    from data_pipeline.world.grammar import world_prompts

    prompts = []
    for seen in (True, False):
        for category, tasks in WORLD_CATEGORIES.items():
            records = [record for task in tasks for record in world_prompts(task, per_task, WORLD_SEED, seen)]
            if category == "complex":
                records = _draw_world_complex(per_task, seen)
            prompts += [Prompt(r["prompt"], category, seen=seen, metadata={**r, "kind": "spatial"}) for r in records]
    return prompts


def _draw_world_complex(per_task: int, seen: bool) -> list[dict[str, Any]]:
    """Positions whose two objects also carry colors; seen when neither pair nor colors are held out of training."""
    from data_pipeline.world.classes import COLORS
    from data_pipeline.world.grammar import is_seen, official_prompt, world_prompts

    rng = np.random.default_rng(WORLD_SEED)
    records = []
    for record in world_prompts("position", per_task, WORLD_SEED + 1, seen):
        while True:
            a, b = rng.choice(len(COLORS), size=2, replace=False)
            first, second = record["include"]
            include = [first | {"color": COLORS[a]}, second | {"color": COLORS[b]}]
            if is_seen(include) is seen:
                break
        records.append({"tag": "position", "include": include, "prompt": official_prompt("position", include)})
    return records


def list_world_caption_prompts(count: int) -> list[Prompt]:
    """Captions of held-out scenes in the words of training captions: what CLIP score and FID draw."""
    from data_pipeline.world.scenes import make_scene

    scenes = (make_scene(WORLD_SEED, index, split=TRUTH_SPLIT) for index in range(count))
    return [
        Prompt(s.caption, "captions", metadata={"tag": s.tag, "include": s.include}, source=str(index))
        for index, s in enumerate(scenes)
    ]


def render_world_references(count: int) -> Iterator[np.ndarray]:
    """Real images of the distribution that the captions describe, other scenes than theirs."""
    from data_pipeline.world.scenes import make_scene

    return (make_scene(WORLD_SEED, index, split=REFERENCE_SPLIT).image for index in range(count))


def render_scene(prompt: Prompt, index: int) -> np.ndarray:
    """A ground-truth scene of a world prompt; `index` chooses among the many that show it."""
    from data_pipeline.world.scenes import make_scene_for

    record = dict(prompt.metadata)
    return make_scene_for(record, WORLD_SEED, index, split=f"{TRUTH_SPLIT}/{prompt.text}").image
