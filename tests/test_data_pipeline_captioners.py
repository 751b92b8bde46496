"""Captioners of every kind behind one interface: CogVLM's contract with real remote code, a real server, statuses."""

import importlib.util
import json
import multiprocessing
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from data_pipeline.captions.cogvlm import hash_code, pad_left
from data_pipeline.captions.registry import identify_weights, open_captioner
from data_pipeline.captions.spec import CaptionerSpec
from data_pipeline.captions.stage import CaptionStage, caption_images, judge_caption
from data_pipeline.flow.pipeline import Pipeline
from data_pipeline.loading.loader import open_dataset
from data_pipeline.plans import build_columns, world
from data_pipeline.sources.registry import open_source
from data_pipeline.world.scenes import make_scene
from data_pipeline.world.write import write_world
from infra.errors import UserError
from infra.runner import WorkerPool

HERE = Path(__file__).parent
WORLD = CaptionerSpec("transformers", "world:captioner")
KEY = "secret-of-the-tests"


def scenes(count: int) -> list[Image.Image]:
    return [Image.fromarray(make_scene(3, n, split="captioners").image) for n in range(count)]


# --- CogVLM


@pytest.fixture(scope="module")
def cogvlm(tmp_path_factory) -> CaptionerSpec:
    """A random tiny checkpoint in the hub's layout: config with auto_map, the model's code, a tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    sys.path.insert(0, str(HERE))
    from data_cogvlm_code import TinyCogVLMConfig, TinyCogVLMForCausalLM

    sys.path.remove(str(HERE))
    folder = tmp_path_factory.mktemp("cogvlm") / "tiny"
    words = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{n}" for n in range(60))]
    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = TinyCogVLMConfig(
        vocab_size=len(words), initializer_range=0.6, bos_token_id=1, eos_token_id=2, pad_token_id=0, **sizes
    )
    TinyCogVLMForCausalLM(config).save_pretrained(folder)
    shutil.copy(HERE / "data_cogvlm_code.py", folder / "modeling_cogvlm.py")
    stated = json.loads((folder / "config.json").read_text())
    code = {"AutoConfig": "TinyCogVLMConfig", "AutoModelForCausalLM": "TinyCogVLMForCausalLM"}
    stated["auto_map"] = {auto: f"modeling_cogvlm.{name}" for auto, name in code.items()}
    (folder / "config.json").write_text(json.dumps(stated))
    pinned = hash_code(folder)
    return CaptionerSpec("cogvlm", str(folder), max_new_tokens=6, trust_remote_code=True, revision=pinned)


def test_cogvlm_captions_depend_on_pixels_and_not_on_the_batch(cogvlm):
    captioner = open_captioner(cogvlm, "cpu")
    images = scenes(5)
    together = captioner.caption(images)
    assert together == [text for image in images for text in captioner.caption([image])]
    assert len(set(together)) > 1
    assert all(0 < len(text.split()) <= 6 and "</s>" not in text for text in together)
    base = open_captioner(replace(cogvlm, template="base"), "cpu")
    assert base.caption(images) != together


def test_the_remote_code_runs_only_when_told_so_and_pinned(cogvlm, tmp_path):
    with pytest.raises(UserError, match=rf"--captioner.trust-remote-code --captioner.revision {cogvlm.revision}"):
        open_captioner(replace(cogvlm, trust_remote_code=False), "cpu")
    copy = Path(shutil.copytree(cogvlm.checkpoint, tmp_path / "copy"))
    (copy / "modeling_cogvlm.py").write_text("raise SystemExit('this must never run')")
    with pytest.raises(UserError, match=f"the plan pins revision {cogvlm.revision}: read what changed"):
        open_captioner(replace(cogvlm, checkpoint=str(copy)), "cpu")
    with pytest.raises(UserError, match="no CogVLM checkpoint"):
        open_captioner(replace(cogvlm, checkpoint=str(tmp_path)), "cpu")


def test_conversations_of_other_lengths_are_padded_on_the_left():
    def row(length: int) -> dict[str, torch.Tensor]:
        ones = torch.ones(length, dtype=torch.long)
        return {"input_ids": 7 * ones, "token_type_ids": ones, "attention_mask": ones}

    padded = pad_left([row(2), row(4)], pad=9)
    assert padded["input_ids"].tolist() == [[9, 9, 7, 7], [7, 7, 7, 7]]
    assert padded["token_type_ids"][0].tolist() == padded["attention_mask"][0].tolist() == [0, 0, 1, 1]


def test_what_decides_captions_is_in_the_fingerprint_and_nothing_else(cogvlm, tmp_path):
    def made_by(spec: CaptionerSpec) -> str:
        return build_columns(replace(world(), captioner=spec), "").fingerprints["caption"]

    first = made_by(cogvlm)
    moved = str(shutil.copytree(cogvlm.checkpoint, tmp_path / "moved"))
    assert made_by(replace(cogvlm, checkpoint=moved, concurrency=3, timeout_s=1)) == first
    server = CaptionerSpec("server", "model-a", url="http://a/v1")
    others = [
        replace(cogvlm, prompt="What is this?"),
        replace(cogvlm, max_new_tokens=7),
        replace(cogvlm, num_beams=2),
        replace(cogvlm, template="base"),
        replace(cogvlm, revision="0" * 16),
        replace(cogvlm, pip=("transformers==4.41.2",)),
        server,
        replace(server, checkpoint="model-b"),
        replace(server, revision="2"),
    ]
    assert len({first, *map(made_by, others)}) == len(others) + 1
    assert made_by(replace(server, url="http://b/v1", attempts=2)) == made_by(server)


def test_an_environment_of_its_own_must_be_pinned(cogvlm):
    assert cogvlm.runtime_env() is None
    pinned = replace(cogvlm, pip=("transformers==4.41.2", "einops==0.8.0")).runtime_env()
    assert pinned == {"pip": {"packages": ["transformers==4.41.2", "einops==0.8.0"], "pip_check": False}}
    with pytest.raises(UserError, match="exact version"):
        replace(cogvlm, pip=("transformers<4.42",)).runtime_env()


def wheel(folder: Path, name: str) -> Path:
    """A package that holds one number, as pip installs it from a folder."""
    folder.mkdir()
    info = f"{name}-1.0.dist-info"
    files = {
        f"{name}.py": "ANSWER = 42\n",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    files[f"{info}/RECORD"] = "".join(f"{path},,\n" for path in [*files, f"{info}/RECORD"])
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as archive:
        for path, text in files.items():
            archive.writestr(path, text)
    return folder


@pytest.mark.slow
@pytest.mark.dist
def test_the_captioners_workers_get_an_environment_of_their_own(cogvlm, tmp_path, ray_folder):
    """Its code imports what this environment lacks. Ray copies a virtual environment for it: minutes and gigabytes."""
    folder = Path(shutil.copytree(cogvlm.checkpoint, tmp_path / "wants_more"))
    code = folder / "modeling_cogvlm.py"
    code.write_text(code.read_text().replace("import torch\n", "import beeline_probe\nimport torch\n", 1))
    given = {"name": "cogvlm", "checkpoint": folder, "revision": hash_code(folder), "max-new-tokens": 6}
    words = [word for key, value in given.items() for word in (f"--captioner.{key}", str(value))]
    out = tmp_path / "data"
    command = [sys.executable, "-m", "data_pipeline", "run", "world", "--out", str(out), "--images", "6"]
    command += ["--val-images", "2", "--workers", "1", "--captioner.trust-remote-code", *words]
    found = subprocess.run(command, capture_output=True, text=True)
    assert (found.returncode, "beeline_probe" in found.stderr) == (2, True), found.stderr[-2000:]
    pip = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(wheel(tmp_path / "wheels", "beeline_probe"))}
    command += ["--captioner.pip", "beeline-probe==1.0"]
    found = subprocess.run(command, env=os.environ | pip, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr[-2000:]
    assert importlib.util.find_spec("beeline_probe") is None
    assert open_dataset(str(out)).info.counts == {"ok": 8}


# --- a server


class Server:
    """The caption server as tests see it."""

    def __init__(self, port: int) -> None:
        self.spec = CaptionerSpec("server", "world", url=f"http://127.0.0.1:{port}/v1", concurrency=3, attempts=4)
        self._address = f"http://127.0.0.1:{port}/"

    def faults(self, *faults: str) -> None:
        request = urllib.request.Request(self._address, json.dumps(faults).encode(), method="PUT")
        urllib.request.urlopen(request, timeout=60).close()

    def seen(self) -> dict[str, int]:
        with urllib.request.urlopen(self._address, timeout=60) as answer:
            return json.loads(answer.read())


@pytest.fixture(scope="module")
def running(free_port) -> Iterator[Server]:
    from data_caption_server import serve

    port = free_port()
    # a process of its own, forked: what it needs is imported here already
    process = multiprocessing.get_context("fork").Process(target=serve, args=(port, KEY), daemon=True)
    process.start()
    try:
        until = time.monotonic() + 300
        while socket.socket().connect_ex(("127.0.0.1", port)):
            assert process.is_alive()
            assert time.monotonic() < until
            time.sleep(0.2)
        yield Server(port)
    finally:
        process.kill()
        process.join()


@pytest.fixture
def server(running, monkeypatch) -> Server:
    monkeypatch.setenv("BEELINE_CAPTION_KEY", KEY)
    running.faults()
    return running


def test_a_server_gives_the_captions_of_the_model_behind_it(server):
    server.faults("503", "cut", "429", "refuse")
    images = scenes(8)
    texts = open_captioner(server.spec, "cpu").caption(images)
    statuses = [judge_caption(text) for text in texts]
    assert sorted(status for status, _ in statuses) == ["ok"] * 7 + ["refusal"]
    expected = open_captioner(WORLD, "cpu").caption(images)
    assert all(found == ("ok", wanted) or found[0] == "refusal" for found, wanted in zip(statuses, expected))
    assert server.seen()["requests"] == 8 + 3
    assert server.seen()["most"] <= 3


def test_a_run_is_captioned_by_a_server(server, tmp_path):
    write_world(str(tmp_path / "raw"), images=6, val_images=2, seed=2)
    plan = replace(world(), ingest_rows=2, captioner=server.spec)
    made = Pipeline(plan, str(tmp_path / "data"), open_source(f"wds:{tmp_path}/raw"), workers=WorkerPool(0)).run()
    assert made.info.counts == {"ok": 8}


def test_any_model_of_the_auto_classes_captions_with_and_without_a_prompt(tmp_path):
    """BLIP in the hub's layout, tiny and random: one processor for pictures and words."""
    from transformers import (
        BertTokenizerFast,
        BlipConfig,
        BlipForConditionalGeneration,
        BlipImageProcessor,
        BlipProcessor,
    )

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "photo", "of", *(f"w{n}" for n in range(56))]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    tokenizer = BertTokenizerFast(str(tmp_path / "vocab.txt"), bos_token="[CLS]", eos_token="[SEP]")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    text = {"vocab_size": 64, "encoder_hidden_size": 32, "bos_token_id": 2, "sep_token_id": 3, "eos_token_id": 3}
    config = BlipConfig(
        text_config=sizes | text | {"pad_token_id": 0, "projection_dim": 32, "initializer_range": 0.5},
        vision_config=sizes | {"image_size": 32, "patch_size": 8, "projection_dim": 32, "initializer_range": 0.5},
        projection_dim=32,
    )
    torch.manual_seed(0)
    BlipForConditionalGeneration(config).save_pretrained(tmp_path / "blip")
    BlipProcessor(BlipImageProcessor(size={"height": 32, "width": 32}), tokenizer).save_pretrained(tmp_path / "blip")
    images = scenes(4)
    found = {}
    for prompt in ("", "a photo of"):
        spec = CaptionerSpec("transformers", str(tmp_path / "blip"), prompt=prompt, max_new_tokens=6)
        captioner = open_captioner(spec, "cpu")
        found[prompt] = captioner.caption(images)
        assert found[prompt] == [text for image in images for text in captioner.caption([image])]
        assert all(text and len(text.split()) <= 8 and "[" not in text for text in found[prompt])
        assert not any(text.startswith("a photo of") for text in found[prompt])
    assert found[""] != found["a photo of"]
    assert identify_weights(spec) == identify_weights(replace(spec, prompt=""))


def test_a_server_that_is_gone_stops_the_run_and_makes_no_empty_captions(free_port):
    spec = CaptionerSpec("server", "world", url=f"http://127.0.0.1:{free_port()}/v1", attempts=2)
    with pytest.raises(UserError, match=r"ConnectError after 2 tries.*captions made so far are kept"):
        caption_images(open_captioner(spec, "cpu"), scenes(2))


def test_a_wrong_key_is_said_without_being_shown(server, monkeypatch):
    monkeypatch.setenv("BEELINE_CAPTION_KEY", "wrong-and-private")
    with pytest.raises(UserError, match="BEELINE_CAPTION_KEY") as caught:
        open_captioner(server.spec, "cpu").caption(scenes(1))
    assert "private" not in str(caught.value)
    assert "private" not in repr(caught.value.__cause__)
    with pytest.raises(UserError, match="expected the server's address"):
        open_captioner(replace(server.spec, url="127.0.0.1:80"), "cpu")


def test_pictures_that_a_server_rejects_are_empty_captions(server):
    server.faults("400")
    assert open_captioner(server.spec, "cpu").caption(scenes(2)) == ["", ""]
    assert server.seen()["requests"] == 2


# --- statuses


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The image depicts a red apple.", ("ok", "a red apple.")),
        ("Sure! Here is a description: a boat", ("ok", "a boat")),
        ("In this picture, two dogs run", ("ok", "two dogs run")),
        ("this photo of a cat", ("ok", "this photo of a cat")),
        ("This image showcases I'm sorry", ("ok", "I'm sorry")),
        ("This image showcases", ("empty", "")),
        ("This image showcases a red apple", ("ok", "a red apple")),
        ("a red apple", ("ok", "a red apple")),
        ("   ", ("empty", "")),
        ("I'm sorry, I cannot see", ("refusal", "")),
        ("dog " * 30, ("runaway", "")),
        ("...", ("empty", "")),
        ("Sorry, I can't help with that", ("refusal", "")),
        ("As an AI language model I see nothing", ("refusal", "")),
        ("I am unable to view images", ("refusal", "")),
        ("a sorry looking dog", ("ok", "a sorry looking dog")),
        ("x" * 3000, ("runaway", "")),
    ],
)
def test_openings_are_trimmed_and_bad_captions_named(text, expected):
    assert judge_caption(text) == expected


def test_the_caption_stage_names_its_captioner(cogvlm):
    stage = CaptionStage(cogvlm, identify_weights(cogvlm))
    assert stage.identity()["revision"] == cogvlm.revision
    assert "url" not in stage.identity()
    assert os.path.sep not in json.dumps(stage.identity())
