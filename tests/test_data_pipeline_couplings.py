"""Couplings: the teacher's own latents, noise and text that are not stored, shards once each, growth, refusals."""
# Shapes: B batch, C latent channels, H and W latent height and width.

import itertools
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from data_pipeline.__main__ import main
from data_pipeline.checkpoints import resolve
from data_pipeline.couplings.command import CoupleOptions, couple
from data_pipeline.couplings.teacher import count_forwards
from data_pipeline.formats.couplings import PromptOrder, cut_shards, parse_key
from data_pipeline.formats.schema import read_dataset_info
from data_pipeline.inspection.verify import verify_dataset
from data_pipeline.loading.collate import DrawSettings
from data_pipeline.loading.loader import open_dataset
from data_pipeline.packing.synthetic import write_synthetic
from data_pipeline.plans import WORLD_TEXT, read_vae_meta
from infra.codec import to_json
from infra.errors import UserError
from model.backbones.mmdit import MMDiTConfig
from model.diffusion.sampler import solve
from model.encoders.networks import load_text_encoders
from model.encoders.text import TextCond
from model.files.weights import load_model, save_weights
from model.seeding import keyed_normal

CONFIG = MMDiTConfig(depth=1, in_channels=4, context_width=48, pooled_width=32)


def write_teacher(path: Path, info, *, config=CONFIG, scale: float = 1.0, **meta) -> str:
    """Weights with nothing at zero; `scale` multiplies what the network says."""
    model = config.build()
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
        for parameter in model.final.linear.parameters():
            parameter *= scale
    told = {
        "kind": "ema", "backbone": "mmdit", "config": config.to_json(), "formulation": "rf/lognorm(0.00,1.00)",
        "shift": 1.5, "text_spec": to_json(info.text_spec), "vae": to_json(info.vae), "resolution": info.resolution,
    }  # fmt: skip
    return str(save_weights(path, model.state_dict(), told | meta))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("couplings")
    write_synthetic(str(path / "prompts"), num_samples=30, val_samples=4, latent_shape=(4, 8, 8),
                    buckets=("32x32", "48x32"), shard_rows=8, synthetic_share=0.7)  # fmt: skip
    write_teacher(path / "teacher.safetensors", read_dataset_info(str(path / "prompts")))
    (path / "prompts.txt").write_text("a dog\na cat\na boat\n")
    return path


def options(folder: Path, out: Path, **changes) -> CoupleOptions:
    return CoupleOptions(
        **{
            "teacher": str(folder / "teacher.safetensors"), "prompts": str(folder / "prompts"), "out": str(out),
            "count": 40, "steps": 3, "workers": 0, "batch": 8, "shard_rows": 6, "val_every": 5, "precision": "fp32",
        }
        | changes
    )  # fmt: skip


@pytest.fixture(scope="module")
def coupled(folder) -> str:
    couple(options(folder, folder / "coupled"))
    return str(folder / "coupled")


def read_all(uri: str, split: str = "train"):
    """Batches of whole buckets, without dropout."""
    dataset = open_dataset(uri, split=split)
    return [dataset.read(list(numbers)) for numbers in dataset.bucket_ranges.values()]


def latents_by_key(uri: str) -> dict[str, torch.Tensor]:
    """Of the training split; shards are ordered by content, so other latents come in another order."""
    return {key: latent for batch in read_all(uri) for key, latent in zip(batch.keys, batch.latent_BCHW)}


def test_a_latent_is_what_an_independent_heun_makes_of_the_noise(folder, coupled):
    """Guided, with the shifted grid, written once more from the formulas."""
    model, _ = load_model(folder / "teacher.safetensors")
    latents = open_dataset(coupled).vae
    ramp = torch.linspace(1, 0, 4, dtype=torch.float64)
    grid = (1.5 * ramp / (1 + 0.5 * ramp)).tolist()
    for batch in read_all(coupled):
        text, x = batch.text.to(dtype=torch.float32), batch.noise_BCHW.clone()

        def velocity(x, t, text=text):
            with torch.no_grad():
                with_text, without = (model(x, torch.full((len(x),), t), c) for c in (text, text.zeros_like()))
            return without + 1.5 * (with_text - without)

        for start, end in itertools.pairwise(grid):
            first = velocity(x, start)
            second = velocity(x + (end - start) * first, end)
            x = x + (end - start) * (first + second) / 2
        assert x.std() > 0.1
        # Stored raw in fp16: what is left is its rounding, at values of a few units.
        torch.testing.assert_close(batch.latent_BCHW, latents.normalise(latents.denormalise(x).half().float()),
                                   atol=4e-3, rtol=2e-3)  # fmt: skip


def test_noise_is_drawn_from_seed_and_index_and_not_stored(coupled):
    for batch in read_all(coupled):
        index = [parse_key(key) for key in batch.keys]
        assert torch.equal(batch.noise_BCHW, keyed_normal(0, index, "coupling noise", batch.latent_BCHW.shape[1:]))
    dataset = open_dataset(coupled)
    for shard, bucket in enumerate(dataset.index.buckets):
        channels, height, width = dataset.latent_shape(bucket)
        assert set(dataset._reader.table(shard).size_R.tolist()) == {2 * channels * height * width}


def test_text_is_that_of_the_prompt_to_the_bit(folder, coupled):
    """Found without the code under test: by the number of the prompt that each sample's JSON names."""
    prompts = open_dataset(str(folder / "prompts"))
    numbers = prompts_of(coupled)
    for batch in read_all(coupled):
        for b, key in enumerate(batch.keys):
            number = numbers[key]
            for caption in ("original", "synthetic"):
                alone = prompts.read([number], caption=caption)
                if alone.captions == [batch.captions[b]]:
                    break
            else:
                raise AssertionError(f"{key}: {batch.captions[b]!r} is no caption of prompt {number}")
            assert torch.equal(alone.text.context_BLD[0], batch.text.context_BLD[b])
            assert torch.equal(alone.text.pooled_BP[0], batch.text.pooled_BP[b])
            assert torch.equal(alone.text.mask_BL[0], batch.text.mask_BL[b])
    captions = {name for table in tables(coupled) for name, words in table.captions.items() if any(words)}
    assert captions == {"original", "synthetic"}


def tables(uri: str):
    dataset = open_dataset(uri)
    return [dataset._reader.table(shard) for shard in range(len(dataset.index.tars))]


def prompts_of(uri: str) -> dict[str, int]:
    """key -> number of its prompt, as plain tar readers see it."""
    import tarfile

    found = {}
    for path in Path(uri).glob("*/32/*/*.tar"):
        with tarfile.open(path) as tar:
            for member in tar:
                if member.name.endswith(".json"):
                    found[member.name.removesuffix(".json")] = json.load(tar.extractfile(member))["prompt"]
    return found


def test_held_out_prompts_are_in_no_training_coupling_and_every_coupling_is_there_once(coupled):
    keys = {split: [key for batch in read_all(coupled, split) for key in batch.keys] for split in ("train", "val")}
    assert sorted(parse_key(key) for key in keys["train"] + keys["val"]) == list(range(40))
    prompts = prompts_of(coupled)
    sides = {split: {prompts[key] for key in found} for split, found in keys.items()}
    assert not sides["train"] & sides["val"]
    assert len(sides["val"]) == 6  # of 30 prompts one in five
    assert verify_dataset(coupled).problems == []


def test_ranks_and_micro_batches_see_the_same_noise_and_dropout_is_keyed_by_position(coupled):
    def lane(rank, world, micro=None):
        batches = open_dataset(coupled).batches(seed=3, global_batch=8, rank=rank, world_size=world, micro_batch=micro)
        found = [next(batches) for _ in range(8 // world // (micro or 8 // world))]
        batches.close()
        return found

    [whole] = lane(0, 1)
    for parts in ([*lane(0, 2), *lane(1, 2)], lane(0, 1, 2)):
        assert torch.equal(torch.cat([part.noise_BCHW for part in parts]), whole.noise_BCHW)
        assert torch.equal(torch.cat([part.text.context_BLD for part in parts]), whole.text.context_BLD)
    dropped = (whole.text.pooled_BP == 0).all(1)
    assert 0 < dropped.sum() < 8


def test_the_same_command_makes_what_is_missing_alone(folder, coupled, tmp_path):
    """After a kill: one shard never begun, one whose tar is gone, no dataset.json."""
    shutil.copytree(coupled, tmp_path / "torn")
    info, out = read_dataset_info(coupled), tmp_path / "torn"
    proofs = sorted((out / "proofs").rglob("*.json"))
    assert len(proofs) >= 6
    proofs[0].unlink()
    (out / json.loads(proofs[1].read_text())["entry"]["tar"]).unlink()
    (out / "dataset.json").unlink()
    past = 1_000_000_000
    for path in proofs[2:]:
        os.utime(path, (past, past))
    couple(options(folder, out))
    assert read_dataset_info(str(out)).fingerprint == info.fingerprint
    assert all(path.stat().st_mtime == past for path in proofs[2:])
    assert verify_dataset(str(out)).problems == []


def test_more_couplings_leave_full_shards_as_they_are(folder, coupled, tmp_path):
    shutil.copytree(coupled, tmp_path / "more")
    couple(options(folder, tmp_path / "more", count=64))
    before, after = (read_dataset_info(uri) for uri in (coupled, str(tmp_path / "more")))
    assert after.couplings == replace(before.couplings, count=64)
    tars = [set(open_dataset(uri).index.tars) for uri in (coupled, str(tmp_path / "more"))]
    full = {tar for tar, table in zip(open_dataset(coupled).index.tars, tables(coupled)) if len(table) == 6}
    assert len(full) >= 3
    assert full <= tars[1]
    more = [batch for split in ("train", "val") for batch in read_all(str(tmp_path / "more"), split)]
    keys = [key for batch in more for key in batch.keys]
    assert sorted(map(parse_key, keys)) == list(range(64))


def test_workers_on_ray_make_the_same_data_set(folder, coupled, tmp_path, ray_cluster):
    couple(options(folder, tmp_path / "ray", workers=2))
    assert read_dataset_info(str(tmp_path / "ray")).fingerprint == read_dataset_info(coupled).fingerprint


def test_prompts_that_grew_since_are_read_as_they_were(folder, coupled, tmp_path):
    shutil.copytree(folder, tmp_path / "all")
    root = tmp_path / "all" / "prompts"
    path = tmp_path / "all" / "coupled" / "dataset.json"
    told = json.loads(path.read_text())
    told["couplings"]["prompts"] = str(root)
    path.write_text(json.dumps(told))
    before = read_all(str(path.parent))
    write_synthetic(str(root), num_samples=50, val_samples=4, latent_shape=(4, 8, 8), buckets=("32x32", "48x32"),
                    shard_rows=8, synthetic_share=0.7)  # fmt: skip
    for one, other in zip(before, read_all(str(path.parent))):
        assert torch.equal(one.text.context_BLD, other.text.context_BLD)
    shutil.move(root, tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"text of these couplings is not at .*--prompts"):
        open_dataset(str(path.parent))


def test_prompts_that_moved_are_found_again_by_the_same_command(folder, coupled, tmp_path):
    shutil.copytree(coupled, tmp_path / "coupled")
    shutil.copytree(folder / "prompts", tmp_path / "moved")
    couple(options(folder, tmp_path / "coupled", prompts=str(tmp_path / "moved")))
    made = read_dataset_info(str(tmp_path / "coupled"))
    assert made.couplings.prompts == str(tmp_path / "moved")
    assert made.fingerprint == read_dataset_info(coupled).fingerprint


def test_latents_that_diverge_are_set_aside_and_counted(folder, tmp_path):
    """A network so loud that some latents leave fp16: half of the couplings, by the size that each has."""
    info = read_dataset_info(str(folder / "prompts"))
    quiet = tmp_path / "quiet"
    couple(options(folder, quiet, solver="euler", steps=1, guidance=1.0))
    drawn = [batch for split in ("train", "val") for batch in read_all(str(quiet), split)]
    size = torch.cat([(batch.noise_BCHW - batch.latent_BCHW).flatten(1).abs().amax(1) for batch in drawn])
    scale = 65504 * info.vae.scale / float(size.median())
    write_teacher(tmp_path / "loud.safetensors", info, scale=scale)
    asked = options(folder, tmp_path / "loud", teacher=str(tmp_path / "loud.safetensors"), solver="euler", steps=1,
                    guidance=1.0)  # fmt: skip
    couple(asked)
    made = read_dataset_info(asked.out)
    assert 10 <= made.counts["not_finite"] <= 30
    assert made.counts["ok"] + made.counts["not_finite"] == 40
    assert sum(split.num_samples for split in made.splits.values()) == made.counts["ok"]
    assert all(torch.isfinite(batch.latent_BCHW).all() for batch in read_all(asked.out))
    assert verify_dataset(asked.out).problems == []
    write_teacher(tmp_path / "mad.safetensors", info, scale=1e30)
    with pytest.raises(UserError, match=r"diverged on 40 couplings.*--steps"):
        couple(replace(asked, teacher=str(tmp_path / "mad.safetensors"), out=str(tmp_path / "mad")))


def test_solver_rk_agrees_with_many_small_steps(folder, tmp_path):
    couple(options(folder, tmp_path / "rk", solver="rk", count=10, tolerance=1e-6))
    couple(options(folder, tmp_path / "heun", steps=100, count=10))
    adaptive, fixed = (latents_by_key(str(tmp_path / name)) for name in ("rk", "heun"))
    for key, latent_CHW in adaptive.items():
        torch.testing.assert_close(latent_CHW, fixed[key], atol=4e-3, rtol=2e-3)


def test_bf16_touches_the_network_alone(folder, coupled, tmp_path):
    """The state stays fp32: latents that all lay on bf16's grid would show a solver in bf16."""
    couple(options(folder, tmp_path / "half", precision="bf16"))
    half, whole = latents_by_key(str(tmp_path / "half")), latents_by_key(coupled)
    for key, latent_CHW in half.items():
        error = ((latent_CHW - whole[key]).norm() / whole[key].norm()).item()
        assert 1e-5 < error < 0.05
        raw = open_dataset(coupled).vae.denormalise(latent_CHW)
        assert not torch.allclose(raw, raw.bfloat16().float(), rtol=1e-5, atol=0)


@pytest.fixture(scope="module")
def of_file(tmp_path_factory) -> CoupleOptions:
    """Prompts of a file, through the world's text encoders, guided away from the empty prompt."""
    path = tmp_path_factory.mktemp("file")
    write_synthetic(str(path / "like"), num_samples=2, val_samples=1, text_spec=WORLD_TEXT)
    info = replace(read_dataset_info(str(path / "like")), vae=read_vae_meta("world:vae"))
    config = MMDiTConfig(depth=1, in_channels=8, context_width=384, pooled_width=128)
    write_teacher(path / "teacher.safetensors", info, config=config)
    lines = ["a photo of a red apple", "a photo of a dog", "two kites", "a photo of a dog", "", "a boat"]
    (path / "prompts.txt").write_text("\n".join(lines))
    (path / "prompts.jsonl").write_text("\n".join(json.dumps({"prompt": line}) for line in lines if line))
    asked = options(path, path / "coupled", prompts=str(path / "prompts.txt"), count=8, val_every=4,
                    unconditional="empty_prompt", solver="euler")  # fmt: skip
    couple(asked)
    return asked


def test_prompts_of_a_file_are_encoded_once_and_referred_to(of_file):
    made = read_dataset_info(of_file.out)
    [batch] = read_all(of_file.out)
    assert set(batch.captions) < {"a photo of a red apple", "a photo of a dog", "two kites", "a boat"}
    prompts = open_dataset(f"{of_file.out}/{made.couplings.prompts}")
    assert prompts.num_samples == 4  # each once
    assert verify_dataset(prompts.uri).problems == verify_dataset(of_file.out).problems == []
    encoded = load_text_encoders(WORLD_TEXT, resolve).condition(batch.captions)
    torch.testing.assert_close(batch.text.context_BLD.float(), encoded.context_BLD, atol=2e-3, rtol=2e-3)
    assert torch.equal(batch.text.mask_BL, encoded.mask_BL)


def test_json_lines_say_the_same_prompts(of_file, tmp_path):
    asked = replace(of_file, prompts=of_file.prompts.replace(".txt", ".jsonl"), out=str(tmp_path / "json"))
    couple(asked)
    assert read_dataset_info(asked.out).fingerprint == read_dataset_info(of_file.out).fingerprint


def test_the_estimate_starts_nothing(folder, tmp_path, capsys):
    couple(options(folder, tmp_path / "none", estimate=True, count=1000))
    said = capsys.readouterr().out
    assert "1,000 couplings of 30 prompts" in said
    assert "12 passes each, 12,000 in all" in said  # 3 Heun steps, both branches
    assert "hours" in said
    couple(options(folder, tmp_path / "none", estimate=True, count=8, prompts=str(folder / "prompts.txt")))
    assert "8 couplings of 3 prompts" in capsys.readouterr().out
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("solver", "guidance", "formulation", "expected"),
    [("euler", 1.0, "rf", 3), ("euler", 2.0, "rf", 6), ("heun", 1.0, "rf", 6), ("heun", 4.0, "edm(0.00,1.20)", 10),
     ("rk", 1.0, "rf", None)],
)  # fmt: skip
def test_forwards_are_those_that_the_sampler_makes(solver, guidance, formulation, expected):
    found = count_forwards(solver, 3, guidance=guidance, formulation=formulation)
    assert found == expected
    if expected is None:
        return
    seen = []

    def network(x, t_B, text):
        seen.append(len(x))
        return x

    text = TextCond(torch.zeros(1, 1, 1), torch.zeros(1, 1))
    solve(network, torch.ones(1, 1, 2, 2), text, text, steps=3, guidance=guidance, solver=solver,
          formulation=formulation)  # fmt: skip
    assert sum(seen) == expected


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"count": 0}, "--count 0: expected at least 1"),
        ({"count": 4}, "none would be; give more"),
        ({"steps": 0}, "--steps 0"),
        ({"val_every": 1}, "--val-every 1: expected at least 2"),
        ({"guidance": float("nan")}, "--guidance nan"),
        ({"shift": 0.0}, "shift is 0.0"),
        ({"original_captions": 1.5}, "--original-captions 1.5"),
        ({"prompts": "/nowhere"}, "neither a dataset nor a file"),
        ({"teacher": "/nowhere.safetensors"}, "nowhere"),
        ({"split": "test"}, "no split 'test'"),
    ],
)
def test_what_cannot_work_is_refused_before_any_work(folder, tmp_path, changes, says):
    with pytest.raises(UserError, match=says):
        couple(options(folder, tmp_path / "out", **changes))
    assert not (tmp_path / "out" / "dataset.json").exists()


@pytest.mark.parametrize(("text", "says"), [("\n  \n", "holds no prompt"), (b"\xff\xfe", "no text in UTF-8")])
def test_files_without_prompts_are_refused(folder, tmp_path, text, says):
    path = tmp_path / "prompts.txt"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=says):
        couple(options(folder, tmp_path / "out", prompts=str(path)))
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a dog"}\n{"text": "a cat"}\n')
    with pytest.raises(UserError, match="line 2: no prompt"):
        couple(options(folder, tmp_path / "out", prompts=str(path)))


def test_other_couplings_in_the_same_place_are_refused(folder, coupled, tmp_path):
    for changes, says in (
        ({"guidance": 4.0}, "guidance: 1.5 -> 4.0"), ({"shift": 1.0}, "shift: 1.5 -> 1.0"),
        ({"solver": "euler"}, "solver: heun -> euler"), ({"count": 39}, "give at least as many"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=says):
            couple(options(folder, Path(coupled), **changes))
    info = read_dataset_info(str(folder / "prompts"))
    other = write_teacher(tmp_path / "other.safetensors", info, scale=2.0)
    with pytest.raises(UserError, match="teacher: "):
        couple(options(folder, Path(coupled), teacher=other))
    with pytest.raises(UserError, match="holds a data set that is no couplings"):
        couple(options(folder, folder / "prompts"))
    with pytest.raises(UserError, match="holds couplings: give the dataset"):
        couple(options(folder, tmp_path / "out", prompts=coupled))


def test_a_teacher_of_another_text_is_refused(folder, tmp_path):
    info = read_dataset_info(str(folder / "prompts"))
    padded = replace(info, text_spec=replace(info.text_spec, layout="padded"))
    other = write_teacher(tmp_path / "padded.safetensors", padded)
    with pytest.raises(UserError, match="text of another layout or other encoders"):
        couple(options(folder, tmp_path / "out", teacher=other))


def test_any_formulation_teaches(folder, tmp_path):
    """EDM's noise is the same unit noise: its couplings are read like any others."""
    info = read_dataset_info(str(folder / "prompts"))
    other = write_teacher(tmp_path / "edm.safetensors", info, formulation="edm(0.00,1.20)")
    couple(options(folder, tmp_path / "edm", teacher=other, count=10))
    assert all(torch.isfinite(batch.latent_BCHW).all() for batch in read_all(str(tmp_path / "edm")))


def test_the_command_line(folder, tmp_path, monkeypatch, capsys):
    words = ["couple", "--teacher", str(folder / "teacher.safetensors"), "--prompts", str(folder / "prompts"), "--out",
             str(tmp_path / "out"), "--count", "10", "--steps", "1", "--workers", "0", "--val-every", "5"]  # fmt: skip
    monkeypatch.setattr("sys.argv", ["data_pipeline", *words])
    main()
    assert "train 8, val 2 (10 ok)" in capsys.readouterr().out


def test_shards_depend_on_nothing_but_the_order(coupled):
    order = PromptOrder(read_dataset_info(coupled).couplings, 7)
    few, many = (list(cut_shards(order, count, np.full(count, "32x32"), shard_rows=4)) for count in (20, 50))
    full = {shard.id for shard in few if len(shard.index_I) == 4}
    assert full <= {shard.id for shard in many}
    assert sorted(np.concatenate([shard.index_I for shard in many]).tolist()) == list(range(50))
    assert sorted(order.prompts_of(np.arange(7)).tolist()) == list(range(7))


def test_draws_that_choose_captions_leave_latents_alone(coupled):
    """A run's own caption weights do not apply: the teacher drew the caption."""
    dataset = open_dataset(coupled)
    places = [(0, 0), (0, 1)]
    for weights in ({"original": 1.0}, {"synthetic": 1.0}):
        batch = dataset.at(places, [5, 6], DrawSettings(9, weights, 0.0))
        first = dataset.at(places, [7, 8], DrawSettings(1, {"original": 0.5, "synthetic": 0.5}, 0.0))
        assert batch.captions == first.captions
        assert torch.equal(batch.latent_BCHW, first.latent_BCHW)
        assert torch.equal(batch.noise_BCHW, first.noise_BCHW)
