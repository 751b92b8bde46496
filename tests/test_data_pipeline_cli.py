"""The command line as people meet it: mistakes are one line and exit code 2; photographs of one's own go through."""

import io
import shutil
import socket
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from data_pipeline.__main__ import main
from data_pipeline.loading.loader import open_dataset
from data_pipeline.packing.synthetic import write_synthetic
from infra.errors import UnavailableError, UserError, run_cli


@pytest.fixture
def cli(monkeypatch, capsys):
    """Run `python -m data_pipeline ARGS`: (exit code, stdout, stderr)."""

    def call(*args: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["data_pipeline", *map(str, args)])
        with pytest.raises(SystemExit) as done:
            run_cli(main)
        captured = capsys.readouterr()
        return int(done.value.code or 0), captured.out, captured.err

    return call


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["run"], "needs a plan first: world, sd3, FILE.yaml"),
        (["rum"], "unknown command 'rum' (did you mean 'run'?)"),
        (["run", "wrld", "--out", "x"], "unknown plan 'wrld' (did you mean 'world'?)"),
        (["run", "world", "--out", "{tmp}/o", "--source", "folder:{tmp}/nowhere"], "nowhere: no such file or folder"),
        (["run", "world", "--out", "{tmp}/o", "--source", "folder:{tmp}"], "holds no images"),
        (["run", "world", "--out", "{tmp}/o", "--source", "zip:x"], "expected one of folder:URI"),
        (["run", "world", "--out", "{tmp}/o", "--workers", "-1"], "expected 0 (no Ray) or more"),
        (["run", "world", "--out", "{tmp}/o", "--images", "0", "--workers", "0"], "at least one image"),
        (["run", "world", "--out", "{tmp}/o", "--source", "folder:{tmp}", "--vae", "world:vaee"], "did you mean 'vae'"),
        (
            ["run", "world", "--out", "{tmp}/o", "--source", "folder:{tmp}", "--captioner.name", "transformer"],
            "unknown captioner 'transformer' (did you mean 'transformers'?)",
        ),
        (["run", "world", "--out", "{tmp}/o", "--source", "folder:{tmp}", "--resolution", "60"], "no multiple of 8"),
        (["run", "world", "--out", "{tmp}/o", "--val-fraction", "7"], "--val-fraction 7.0: expected a share of"),
        (["run", "world", "--out", "{tmp}/o", "--dedup-distance", "-1"], "--dedup-distance -1: expected 0 or more"),
        (["run", "world", "--out", "{tmp}/o", "--pack-rows", "0"], "--pack-rows 0: expected 1 or more"),
        (["run", "world", "--out", "{tmp}/o", "--batch", "0", "--until", "gate"], "--batch 0: expected 1 or more"),
        (["run", "world", "--out", "{tmp}/o", "--dedup-similarity", "nan"], "expected a cosine, from -1 to 1"),
        (["verify", "{tmp}/nowhere"], "no dataset.json there"),
        (["inspect", "{tmp}/nowhere"], "no dataset.json there"),
        (["run", "world", "--out", "gs://bucket/x", "--source", "folder:{tmp}"], "gs://"),
    ],
)
def test_mistakes_are_one_line(cli, tmp_path, args, message):
    code, _, err = cli(*(str(arg).replace("{tmp}", str(tmp_path)) for arg in args))
    assert code == 2
    assert message in err
    assert "Traceback" not in err
    assert err.strip().splitlines()[-1].startswith("error: ")


@pytest.mark.parametrize("args", [["run", "world", "--out", "x", "--sorce", "y"], ["verify", "x", "--colums"]])
def test_unknown_options_are_refused_with_the_nearest(cli, args):
    code, out, err = cli(*args)
    assert code == 2
    assert "(did you mean --source?)" in err or "(did you mean --columns?)" in err
    assert err.startswith("error: unknown option --")
    assert err.count("\n") == 1
    assert out == ""


@pytest.mark.parametrize("args", [[], ["--help"], ["run", "--help"], ["run", "world", "--help"], ["verify", "--help"]])
def test_help_is_there(cli, args):
    code, out, _ = cli(*args)
    assert code == 0
    assert "usage: " in out
    assert "data_pipeline" in out


@pytest.mark.parametrize("name", ["server", "transformers"])
@pytest.mark.parametrize(
    "url",
    ["http://user:TOPSECRET@127.0.0.1:9/v1", "user:TOP/SECRET@127.0.0.1:9/v1", "http://127.0.0.1:9/v1?key=SECRET"],
)
def test_a_password_in_the_captioners_address_is_refused_unseen(cli, tmp_path, caplog, name, url):
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (64, 64)).save(tmp_path / "photos" / "a.png")
    named = ["--captioner.name", name, "--captioner.url", url]
    code, out, err = cli(
        "run", "world", "--out", tmp_path / "o", "--source", f"folder:{tmp_path}/photos", "--workers", "0", *named
    )
    assert code == 2
    assert "environment variable BEELINE_CAPTION_KEY" in err
    assert "127.0.0.1:9/v1" in err
    assert (err.count("\n"), "SECRET" in out + err + caplog.text) == (1, False)
    assert not (tmp_path / "o" / "plan.yaml").exists()


def test_an_endpoint_that_does_not_answer_is_one_line(cli, monkeypatch, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{taken.getsockname()[1]}")
        monkeypatch.setenv("BEELINE_S3_PROBE_TIMEOUT", "2")
        code, _, err = cli("verify", "s3://some-bucket/data")
    assert code == 69
    assert "does not answer" in err
    assert "testing-secret" not in err


@pytest.mark.parametrize("answered", [0, 3])
@pytest.mark.parametrize("args", [["verify"], ["inspect"], ["run", "world", "--workers", "0", "--source"], ["train"]])
def test_credentials_that_expire_are_one_line(cli, s3, free_calls, tmp_path, caplog, args, answered):
    """At once or after some requests, which is no finding about the data."""
    write_synthetic(s3, num_samples=64, val_samples=8, latent_shape=(4, 8, 8), buckets=("32x32",), shard_rows=4)
    free_calls(answered)
    if args == ["train"]:
        with pytest.raises(UnavailableError) as caught:
            take_all(s3)
        err = f"error: {caught.value}"
    elif args[0] == "run":
        code, _, err = cli(*args, f"wds:{s3}/train", "--out", f"{s3}/out")
        assert code == 69
    else:
        code, _, err = cli(*args, s3)
        assert code == 69
    said = err + caplog.text
    assert err.strip().splitlines()[-1].startswith("error: s3://")
    assert said.count("takes these AWS credentials no longer") == 1
    assert "Traceback" not in said
    assert "quarantined" not in said
    assert "testing-secret" not in said


@pytest.mark.parametrize("args", [["verify"], ["inspect"], ["run", "world", "--workers", "0", "--source"], ["train"]])
def test_a_bucket_that_may_not_be_read_is_one_line(cli, s3, s3_server, free_calls, monkeypatch, args):
    import boto3

    iam = boto3.client("iam", endpoint_url=s3_server)
    name = s3.rsplit("/", 1)[1]
    iam.create_user(UserName=name)
    key = iam.create_access_key(UserName=name)["AccessKey"]
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", key["AccessKeyId"])
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", key["SecretAccessKey"])
    free_calls(0)
    if args == ["train"]:
        with pytest.raises(UserError) as caught:
            take_all(s3)
        err = f"error: {caught.value}"
    else:
        code, _, err = cli(*args, *((f"folder:{s3}", "--out", f"{s3}/out") if args[0] == "run" else (s3,)))
        assert code == 2
    assert err.startswith(f"error: {s3}")
    assert "refused access (AccessDenied): check the AWS credentials and their rights" in err
    assert err.strip().count("\n") == 0
    assert key["SecretAccessKey"] not in err
    assert key["AccessKeyId"] not in err


def take_all(uri: str) -> None:
    stream = open_dataset(uri).batches(seed=0, global_batch=8)
    try:
        for _ in range(8):
            next(stream)
    finally:
        stream.close()


def photographs(folder: Path) -> Path:
    """Pictures that ship in well-known packages, with captions beside them, and some trouble."""
    import skimage
    import sklearn.datasets

    folder.mkdir()
    shipped = {
        "astronaut.png": "a woman in an orange space suit",
        "chelsea.png": "a tabby cat looks into the camera",
        "coffee.png": "a cup of coffee on a saucer with a spoon",
        "rocket.jpg": "a rocket lifts off at dusk",
        "motorcycle_left.png": "a red motorcycle in a garage",
        "horse.png": "the silhouette of a horse",
        "camera.png": "a photographer with a camera on a tripod",
    }
    for name, caption in shipped.items():
        shutil.copy(Path(skimage.__file__).parent / "data" / name, folder / name)
        (folder / name).with_suffix(".txt").write_text(caption)
    for name, caption in {"china.jpg": "a temple in China \u4e2d\u56fd", "flower.jpg": "a flower \U0001f338"}.items():
        shutil.copy(Path(sklearn.datasets.__file__).parent / "images" / name, folder / name)
        (folder / name).with_suffix(".txt").write_text(caption, encoding="utf-8")
    (folder / "broken.jpg").write_bytes((folder / "china.jpg").read_bytes()[:5000])
    (folder / "broken.txt").write_text("cut short")
    out = io.BytesIO()
    Image.new("1", (30_000, 30_000)).save(out, "PNG")  # 900 million pixels in 110 kB
    (folder / "huge.png").write_bytes(out.getvalue())
    (folder / "huge.txt").write_text("a great deal of black")
    shutil.copy(folder / "china.jpg", folder / "copy of china.jpg")
    (folder / "copy of china.txt").write_text("once more")
    return folder


def test_photographs_of_ones_own_go_through(cli, tmp_path):
    source, root = photographs(tmp_path / "photos"), tmp_path / "data"
    given = ["run", "world", "--out", root, "--source", f"folder:{source}", "--workers", "0"]
    code, out, err = cli(*given, "--bucket-aspect", "2", "--dedup-distance", "4", "--val-fraction", "0.2")
    assert code == 0, err
    assert all(f"1 {status}" in out for status in ("corrupt", "duplicate", "too_large"))
    train, val = open_dataset(str(root)), open_dataset(str(root), split="val")
    assert train.num_samples + val.num_samples == 9
    assert len(train.buckets) > 1
    captions = set()
    for dataset in (train, val):
        for samples in dataset.bucket_ranges.values():
            captions |= set(dataset.read(samples).captions)
    assert "a flower \U0001f338" in captions
    batch = next(train.batches(seed=0, global_batch=2))
    assert batch.latent_BCHW.shape[2] * batch.latent_BCHW.shape[3] in range(200, 300)
    code, out, _ = cli("verify", root)
    assert (code, "everything is as its manifests say" in out) == (0, True)
    for name in ("grid.png", "grid.html"):
        code, out, _ = cli("inspect", root, "--out", tmp_path / name, "--count", "6")
        assert code == 0
        assert "samples in" in out
    assert Image.open(tmp_path / "grid.png").width > 400
    assert (tmp_path / "grid.html").read_text(encoding="utf-8").count("<figure>") == 6
    code, _, err = cli("inspect", root, "--out", tmp_path / "grid.gif")
    assert (code, ".png or .html" in err) == (2, True)


def test_words_alone_need_no_autoencoder_and_a_root_with_val_alone_is_shown(cli, tmp_path):
    info = write_synthetic(str(tmp_path), num_samples=16, val_samples=4, autoencoder=str(tmp_path / "none"))
    assert cli("inspect", tmp_path)[0] == 0
    alone = replace(info, splits={"val": info.splits["val"]})
    (tmp_path / "dataset.json").write_bytes(alone.to_bytes())
    code, out, err = cli("inspect", tmp_path)
    assert (code, "4 samples in" in out) == (0, True), err
    assert cli("inspect", tmp_path, "--out", tmp_path / "grid.png")[0] == 2  # its autoencoder is not there


def test_verify_exits_with_2_when_something_is_wrong(cli, tmp_path):
    from data_pipeline.packing.synthetic import write_synthetic

    write_synthetic(str(tmp_path), num_samples=16, val_samples=4)
    assert cli("verify", tmp_path)[0] == 0
    shard = next((tmp_path / "train").rglob("*.tar"))
    shard.write_bytes(shard.read_bytes()[:-2000])
    code, out, err = cli("verify", tmp_path)
    assert (code, str(shard) in out, "delete the objects named above" in err) == (2, True, True)
