"""T2I-CompBench by itself: folders of samples from any model, stored evidence, 3-in-1 from official answer files."""

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from eval.drawing.pictures import read_pictures, refuse_unreadable, write_picture
from eval.judging.judges import Judges, build_judges
from eval.judging.metric import Clusters, JudgedImage, Prompt
from eval.judging.official import OfficialPaths, PositionRules
from eval.judging.prompts import COMPBENCH_CATEGORIES, read_complex_kinds, read_lines
from eval.metrics.compbench.evidence import ATTRIBUTES, Evidence, answer, gather
from eval.metrics.compbench.files import (
    ANSWER_FILES,
    BLIP,
    BOXES_2D,
    CLIP,
    MERGED,
    SampleFile,
    read_answers,
    read_samples,
    write_answers,
)
from eval.metrics.compbench.networks import list_object_names, load_detector
from eval.metrics.compbench.rules import three_in_one
from eval.metrics.compbench.stored import PromptLookup, StoredEvidence, format_stored, read_stored
from infra.errors import UserError
from infra.log import Progress

BATCH = 16
IMAGES_PER_PROMPT = 10
Category = Literal["color", "shape", "texture", "spatial", "3d_spatial", "numeracy", "non_spatial", "complex"]


def judge(
    stored: Path,
    *,
    out: Path | None = None,
    dataset: Path | None = None,
    spacy: str = "en_core_web_sm",
    rules: PositionRules = "official",
    images_per_prompt: int = IMAGES_PER_PROMPT,
    allow_partial: bool = False,
) -> None:
    """Score stored detections, depths and answers; no network runs.

    Each line is a JSON object of one image: filename (`<prompt>_<6 digits>.png`) and category, then what the category
    asks for: detections [[label, x1, y1, x2, y2, score], ...] past the detector's threshold (UniDet: 0.5) in its order,
    in UniDet's frame (or in pixels, with "size": [height, width]); probabilities [P(yes) of each noun chunk]; cosine;
    depth (path of an 8-bit picture).
    Optional, else read from the prompt by spaCy: objects [a, b], counted [[names], [numbers]], locality, kind.

    Args:
        stored: the JSONL file; categories may be mixed
        out: write the official answer lists here, OUT/<category>/annotation_.../vqa_result.json
        dataset: your copy of T2I-CompBench's examples/dataset: its prompts must all be there
        spacy: spaCy model that reads prompts, by name or path
        rules: official keeps the benchmark's slips of position; repaired mends them
        images_per_prompt: images that every prompt of --dataset must have
        allow_partial: score an incomplete set and say how many images are missing
    """
    given = OfficialPaths(spacy=spacy, compbench=None if dataset is None else str(dataset))
    judges = build_judges("official", given)
    kinds = read_complex_kinds(dataset) if dataset and (dataset / "complex_val.txt").exists() else None
    found = list(read_stored(stored, PromptLookup(judges.reader, lambda: list_object_names(judges), kinds)))
    if not found:
        raise UserError(f"{stored} holds no images; expected one JSON object per line")
    for category in _list_categories(found):
        of_category = [item for item in found if item.evidence.category == category]
        _check(category, of_category, dataset, images_per_prompt, allow_partial, give="--dataset")
        _finish(category, of_category, rules, out)


def score(
    samples: Path,
    category: Category,
    *,
    out: Path,
    judges: Literal["official", "world"] = "official",
    official: OfficialPaths = OfficialPaths(),  # noqa: B008 - frozen
    images_per_prompt: int = IMAGES_PER_PROMPT,
    allow_partial: bool = False,
    device: str = "auto",
) -> None:
    """Judge a folder of samples in the official layout, one category at a time.

    Args:
        samples: folder with `<prompt>_<6 digits>.png`
        category: which formula, and which prompt file of --official.compbench must be complete
        out: the official answer lists and stored.jsonl (for `compbench judge`) go here, under OUT/<category>/
        judges: official (needs local checkpoints), or world
        official: local checkpoints
        images_per_prompt: images that every prompt must have
        allow_partial: score an incomplete or partly unreadable set and say how many images are missing
        device: where the judges compute: auto (a GPU where there is one), cpu, cuda or cuda:N
    """
    files = read_samples(samples)
    chosen = build_judges(judges, replace(official, device=device))
    kinds = read_complex_kinds(Path(official.compbench)) if category == "complex" and official.compbench else None
    if category == "complex" and kinds is None:
        raise UserError("complex prompts need --official.compbench DIR, whose lists tell their kinds")
    if category == "3d_spatial" and (chosen.of_world or official.depth is None):
        raise UserError("3d_spatial needs a depth network: give --official.depth PATH")
    dataset = None if official.compbench is None else Path(official.compbench)
    _check(category, files, dataset, images_per_prompt, allow_partial, give="--official.compbench")
    folder = out / category
    found: list[StoredEvidence] = []
    lines: list[str] = []
    unreadable: list[str] = []
    with Progress(len(files), "images", desc=category) as progress:
        for start in range(0, len(files), BATCH):
            part, images = read_pictures(files[start : start + BATCH], unreadable)
            metadata = [{"kind": kinds(file.prompt)} if kinds else {} for file in part]
            prompts = [Prompt(file.prompt, category, metadata=m) for file, m in zip(part, metadata)]
            asked = [JudgedImage(prompt, 0, image) for prompt, image in zip(prompts, images)]
            for file, evidence in zip(part, gather(chosen, category, asked) if asked else []):
                found.append(StoredEvidence(file.prompt, file.number, evidence))
                lines.append(_keep(file, evidence, folder))
            progress.update(min(BATCH, len(files) - start))
    refuse_unreadable(unreadable, len(files), allow_partial)
    from infra import storage

    storage.write_bytes(str(folder / "stored.jsonl"), "".join(f"{line}\n" for line in lines).encode())
    _finish(category, found, official.compbench_rules, out, judges=chosen)


def merge(folder: Path, dataset: Path, *, images_per_prompt: int = IMAGES_PER_PROMPT) -> None:
    """3-in-1 from the official answer files of complex prompts (BLIP, 2D-spatial, CLIP), as 3_in_1.py merges them.

    Args:
        folder: holds annotation_blip, labels/annotation_obj_detection_2d, annotation_clip; gets annotation_3_in_1
        dataset: your copy of examples/dataset: complex_val.txt in the order of the images, and the lists of kinds
        images_per_prompt: images of each prompt, one after another
    """
    prompts, kind = read_lines(dataset / "complex_val.txt"), read_complex_kinds(dataset)
    parts = [read_answers(folder / name) for name in (BLIP, BOXES_2D, CLIP)]
    wanted = len(prompts) * images_per_prompt
    if any(len(part) != wanted for part in parts):
        raise UserError(
            f"{folder}: {', '.join(str(len(part)) for part in parts)} answers (BLIP, 2D, CLIP); "
            f"expected {wanted} each: {len(prompts)} prompts of {images_per_prompt} images"
        )
    values, answers = Clusters(), []
    for index, (attribute, spatial, action) in enumerate(zip(*parts)):
        prompt = index // images_per_prompt
        merged = three_in_one(kind(prompts[prompt]), attribute=attribute, spatial=spatial, action=action)
        answers.append(merged)
        values.add("complex", prompt, merged)
    write_answers(folder / MERGED, answers)
    _print("complex", values, "")


def _keep(file: SampleFile, evidence: Evidence, folder: Path) -> str:
    """The stored line; a depth map becomes a picture beside it (already in UniDet's frame)."""
    depth = None
    if evidence.depth_HW is not None:
        depth = f"depth/{file.number:06d}.png"
        write_picture(folder / depth, (evidence.depth_HW * 255).round().astype("uint8"))
    return format_stored(file.path.name, file.prompt, number=file.number, evidence=evidence, depth=depth)


def _list_categories(found: Sequence[StoredEvidence]) -> list[str]:
    present = {item.evidence.category for item in found}
    return [category for category in COMPBENCH_CATEGORIES if category in present]


def _check(
    category: str,
    found: Sequence[StoredEvidence | SampleFile],
    dataset: Path | None,
    images_per_prompt: int,
    allow_partial: bool,
    *,
    give: str,
) -> None:
    """Refuse a set that is not the category's whole prompt file, each prompt with all its images.

    Without the user's copy of the prompts nobody can tell: a line says so, and which option to `give`.
    """
    if images_per_prompt < 1:
        raise UserError("--images-per-prompt must be 1 or more")
    times = Counter(item.number for item in found)
    if twice := [number for number, count in times.items() if count > 1]:
        raise UserError(f"{category}: two images carry one number, e.g. {twice[0]:06d}; remove the repeated ones")
    if dataset is None:
        print(f"{category}: completeness is not checked, which takes the prompts: {give} DIR", file=sys.stderr)
        return
    wanted = {_normalize_prompt(prompt) for prompt in read_lines(dataset / f"{category}_val.txt")}
    counts: dict[str, int] = dict.fromkeys(wanted, 0)
    strange = sorted({item.prompt for item in found if _normalize_prompt(item.prompt) not in wanted})
    for item in found:
        if _normalize_prompt(item.prompt) in wanted:
            counts[_normalize_prompt(item.prompt)] += 1
    missing = sum(max(images_per_prompt - count, 0) for count in counts.values())
    if strange and not allow_partial:
        raise UserError(f"{category}: {len(strange)} prompts are not of its file, e.g. {strange[0]!r}; --allow-partial")
    if missing and not allow_partial:
        raise UserError(
            f"{category}: incomplete set: {missing} of {len(wanted) * images_per_prompt} images are missing; generate "
            "them, or pass --allow-partial for a score of what is there"
        )
    if missing:
        total = len(wanted) * images_per_prompt
        print(f"{category}: partial set: {missing} of {total} images are missing", file=sys.stderr)
    if strange:
        print(
            f"{category}: outside the set: {len(strange)} prompts are not of its file, e.g. {strange[0]!r}, and are "
            "scored with the rest",
            file=sys.stderr,
        )


def _normalize_prompt(prompt: str) -> str:
    """A prompt as a file name carries it: the official samples drop nothing but trailing blanks."""
    return prompt.strip().lower()


def _finish(
    category: str, found: list[StoredEvidence], rules: PositionRules, out: Path | None, judges: Judges | None = None
) -> None:
    """Answers in the order of the images' numbers, their official file, and the printed mean with its interval."""
    ordered = sorted(found, key=lambda item: item.number)
    values, prompts = Clusters(), {prompt: i for i, prompt in enumerate(dict.fromkeys(item.prompt for item in ordered))}
    answers = [answer(item.evidence, rules) for item in ordered]
    for item, value in zip(ordered, answers):
        values.add(category, prompts[item.prompt], value)
    if out is not None:
        ids = [item.number for item in ordered]
        write_answers(out / category / ANSWER_FILES[category], answers, as_text=category in ATTRIBUTES, ids=ids)
        if category == "complex":
            _write_parts(ordered, rules, out / category, ids)
    boxes = judges is not None and any(item.evidence.seen for item in found)
    judged_by = load_detector(judges).name if judges and boxes else ""
    _print(f"{judges.prefix if judges else ''}{category}", values, judged_by)


def _write_parts(ordered: Sequence[StoredEvidence], rules: PositionRules, folder: Path, ids: Sequence[int]) -> None:
    """The three official answer files that complex is merged from (0 where a prompt's kind asks for no answer)."""
    parts = [item.evidence for item in ordered]
    write_answers(folder / BLIP, [answer(replace(e, category="color")) for e in parts], as_text=True, ids=ids)
    write_answers(folder / BOXES_2D, [answer(replace(e, category="spatial"), rules) for e in parts], ids=ids)
    write_answers(folder / CLIP, [e.cosine for e in parts], ids=ids)


def _print(name: str, values: Clusters, judged_by: str) -> None:
    interval = values.interval()
    between = "interval unknown" if interval is None else f"{interval[0]:.4f}, {interval[1]:.4f}"
    detector = f"  ({judged_by})" if judged_by else ""
    print(f"{name:<12} {values.mean():.4f}  [{between}]  {values.count()} images{detector}")
