"""Images by URL within bounds, and published data sets in their own layouts."""

import http.server
import io
import json
import pickle
import socketserver
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data_pipeline.flow.pipeline import Pipeline
from data_pipeline.plans import world
from data_pipeline.sources.cc12m import Cc12mSource
from data_pipeline.sources.fetch import FetchError, FetchLimits, _is_public, fetch
from data_pipeline.sources.ingest import Ingest
from data_pipeline.sources.registry import open_source
from data_pipeline.sources.source import Source, SourceOptions, fetch_rows
from data_pipeline.stages.columns import Column, read_part
from infra.errors import UserError
from infra.runner import WorkerPool


def png(color: str = "red", size: int = 40) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (size, size), color).save(out, "PNG")
    return out.getvalue()


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        path, _, number = self.path.partition("?")[0].lstrip("/").partition("/")
        if path == "image":
            self.reply(200, png())
        elif path == "caf%C3%A9":
            self.reply(200, png("blue"))
        elif path == "hop":
            left = int(number)
            self.reply(302, b"", {"location": f"/hop/{left - 1}" if left else "/image"})
        elif path == "inside":
            self.reply(302, b"", {"location": f"http://127.0.0.2:{self.server.server_address[1]}/image"})
        elif path == "file":
            self.reply(302, b"", {"location": "file:///etc/passwd"})
        elif path == "big":
            self.reply(200, bytes(5000))
        elif path == "endless":
            self.send_response(200)
            self.end_headers()
            for _ in range(1000):
                self.wfile.write(bytes(1000))
        elif path == "slow":
            self.send_response(200)
            self.send_header("content-length", "1000")
            self.end_headers()
            for _ in range(40):
                self.wfile.write(b"x")
                self.wfile.flush()
                time.sleep(0.1)
        elif path == "drip-header":
            self.drip("x")
        elif path == "drip-chunk":
            self.send_response(200)
            self.send_header("transfer-encoding", "chunked")
            self.end_headers()
            self.drip("0")
        elif path == "cut":
            self.send_response(200)
            self.send_header("content-length", "1000")
            self.end_headers()
            self.wfile.write(b"half")
        else:
            self.reply(404, b"nothing here")

    def drip(self, what):
        for _ in range(40):
            self.wfile.write(what.encode())
            self.wfile.flush()
            time.sleep(0.1)

    def reply(self, status, body, headers=()):
        self.send_response(status)
        for name, value in {"content-length": str(len(body)), **dict(headers)}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


class Quiet(socketserver.ThreadingMixIn, http.server.HTTPServer):
    daemon_threads = True

    def handle_error(self, request, client_address):
        pass  # clients that hang up are the point of these tests


@pytest.fixture(scope="module")
def site() -> Iterator[str]:
    server = Quiet(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()


BOUNDS = FetchLimits(max_bytes=4000, timeout_s=60, redirects=2, allow_private=("127.0.0.1",))


@pytest.mark.parametrize("path", ["image", "hop/0", "hop/1", "caf\u00e9", "image?q=caf\u00e9 au lait"])
def test_images_come_also_over_a_few_redirects(site, path):
    assert fetch(f"{site}/{path}", BOUNDS)[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("path", "status", "reason"),
    [
        ("hop/2", "fetch_refused", "more than 2 redirects"),
        ("inside", "fetch_refused", "127.0.0.2 lies in a private network"),
        ("file", "fetch_refused", "only http and https"),
        ("big", "too_large", "5,000 bytes, at most 4,000"),
        ("endless", "too_large", "more than 4,000"),
        ("cut", "fetch_failed", "cut short|IncompleteRead"),
        ("gone", "fetch_failed", "status 404"),
    ],
)
def test_bounds_hold(site, path, status, reason):
    with pytest.raises(FetchError, match=reason) as caught:
        fetch(f"{site}/{path}", BOUNDS)
    assert caught.value.status == status


@pytest.mark.parametrize("path", ["slow", "drip-header", "drip-chunk"])
def test_the_clock_runs_over_the_whole_download(site, path):
    """The server would drip for four seconds: that it took too long is known before it ends by itself."""
    with pytest.raises(FetchError, match="took too long"):
        fetch(f"{site}/{path}", replace(BOUNDS, timeout_s=1))


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:9/x",
        "http://localhost:9/x",
        "http://[::1]:9/x",
        "http://[::ffff:10.0.0.1]/x",
        "http://2130706433:9/x",
        "http://0.0.0.0:9/x",
        "http://169.254.169.254/latest/meta-data",
        "http://10.1.2.3/x",
        "http://192.168.0.1/x",
        "ftp://example.org/x",
        "http:///x",
        "http://a:b/x",
        "not an address",
        "",
    ],
)
def test_private_and_odd_addresses_are_refused(url):
    with pytest.raises(FetchError) as caught:
        fetch(url, FetchLimits(timeout_s=5))
    assert caught.value.status == "fetch_refused", caught.value.reason


def test_addresses_are_judged_by_what_they_embed():
    public = {"93.184.216.34": True, "2606:2800:220:1::": True, "fd00::1": False, "100.64.0.1": False}
    hidden = {"64:ff9b::a00:1": False, "2002:0a00:0001::": False, "224.0.0.1": False, "fe80::1%eth0": False}
    assert {address: _is_public(address) for address in public | hidden} == public | hidden


def rows_of(source: Source, root: Path) -> list[dict]:
    """All rows of a source, as a worker sees it, through real objects and manifests."""
    source = pickle.loads(pickle.dumps(source))
    column = Column(str(root), "ingest", "f" * 16)
    rows = []
    for unit in source.list_units():
        manifest, _ = Ingest().run(source, unit, column)
        for part in manifest.parts:
            rows += [row | {"split": unit.split} for row in read_part(column.root, part).to_pylist()]
    return rows


def test_cc12m_and_url_parquet_give_a_row_per_line(site, tmp_path):
    lines = [f"{site}/image\ta red square", f"{site}/gone\tlost", "http://127.0.0.2/x\tinside", "no tab here"]
    (tmp_path / "cc12m.tsv").write_text("\n".join(lines) + "\n")
    source = replace(open_source(f"cc12m:{tmp_path}/cc12m.tsv", SourceOptions(fetch=BOUNDS)), rows_per_unit=3)
    assert isinstance(source, Cc12mSource)
    assert len(source.list_units()) == 2
    rows = rows_of(source, tmp_path / "a")
    assert [row["status"] for row in rows] == ["ok", "fetch_failed", "fetch_refused", "no_image"]
    assert (rows[0]["image"], rows[0]["caption"]) == (png(), "a red square")
    assert json.loads(rows[0]["info"]) == {"url": f"{site}/image"}
    table = pa.table({"URL": [f"{site}/image", None], "TEXT": ["a", "b"]})
    (tmp_path / "laion").mkdir()
    pq.write_table(table, tmp_path / "laion" / "0.parquet")
    with pytest.raises(UserError, match="--fetch-urls"):
        open_source(f"parquet:{tmp_path}/laion").list_units()
    source = open_source(f"parquet:{tmp_path}/laion", SourceOptions(fetch_urls=True, fetch=BOUNDS))
    rows = rows_of(source, tmp_path / "b")
    assert [row["status"] for row in rows] == ["ok", "fetch_refused"]


def test_a_network_that_is_down_is_tried_again_and_dead_letters_nothing(free_port):
    url = f"http://127.0.0.1:{free_port()}/x"
    few, many = ([(str(n), url, "c") for n in range(count)] for count in (3, 12))
    assert [row.status for row in fetch_rows(few, BOUNDS, "a.tsv")] == ["fetch_failed"] * 3
    with pytest.raises(UserError, match="not one of 12 URLs answered"):
        list(fetch_rows(many, BOUNDS, "a.tsv"))


def test_imagenet_folders_get_a_name_of_their_class(tmp_path):
    root = tmp_path / "imagenet"
    words = {"n01440764": "tench, Tinca tinca", "n02085620": "Chihuahua"}
    (root / "train" / "n01440764").mkdir(parents=True)
    (root / "val").mkdir()
    for n in range(12):
        (root / "train" / "n01440764" / f"n01440764_{n}.JPEG").write_bytes(png())
    for n in (1, 2):
        (root / "val" / f"ILSVRC2012_val_0000000{n}.JPEG").write_bytes(png())
    with pytest.raises(UserError, match=r"no LOC_synset_mapping.txt"):
        open_source(f"imagenet:{root}").list_units()
    (root / "LOC_synset_mapping.txt").write_text("".join(f"{k} {v}\n" for k, v in words.items()))
    (root / "LOC_val_solution.csv").write_text(
        "ImageId,PredictionString\nILSVRC2012_val_00000001,n02085620 85 1 499 272\n"
    )
    rows = rows_of(open_source(f"imagenet:{root}"), tmp_path / "out")
    train = {row["caption"] for row in rows if row["split"] == "train"}
    assert train == {"a photo of a tench", "a photo of a Tinca tinca"}
    val = {row["source"]: row["caption"] for row in rows if row["split"] == "val"}
    assert sorted(val.values()) == ["", "a photo of a Chihuahua"]
    again = rows_of(open_source(f"imagenet:{root}"), tmp_path / "again")
    assert [row["caption"] for row in again] == [row["caption"] for row in rows]


@pytest.fixture
def coco(tmp_path) -> Path:
    root = tmp_path / "coco"
    for split, count in (("train", 3), ("val", 2)):
        (root / f"{split}2014").mkdir(parents=True)
        images, said = [], []
        for n in range(count):
            name = f"COCO_{split}2014_{n:012d}.png"
            (root / f"{split}2014" / name).write_bytes(png(["red", "blue", "green"][n], 64))
            images.append({"id": n, "file_name": name, "height": 64, "width": 64})
            said += [{"id": 10 * n + k, "image_id": n, "caption": f"{split} {n}\n wording {k}"} for k in range(5)]
        (root / "annotations").mkdir(exist_ok=True)
        written = json.dumps({"images": images, "annotations": said})
        (root / f"annotations/captions_{split}2014.json").write_text(written)
    return root


def test_coco_has_one_caption_drawn_per_image_and_its_own_splits(coco, tmp_path):
    rows = rows_of(open_source(f"coco:{coco}"), tmp_path / "out")
    assert [row["split"] for row in rows] == ["train"] * 3 + ["val"] * 2
    assert len({row["caption"] for row in rows}) == 5
    assert all(row["caption"].startswith(row["split"]) and "wording" in row["caption"] for row in rows)
    (coco / "annotations/captions_val2014.json").write_text('{"images": [{}]}')
    with pytest.raises(UserError, match="not COCO's captions"):
        open_source(f"coco:{coco}").list_units()
    with pytest.raises(UserError, match="expected COCO-2014's layout"):
        open_source(f"coco:{tmp_path}/nowhere").list_units()


def test_only_the_split_asked_for_is_taken(coco, tmp_path):
    plan = replace(world(), ingest_rows=8)

    def run(split: str | None, source: str):
        given = {"workers": WorkerPool(0), "only_split": split}
        return Pipeline(plan, str(tmp_path / f"data-{split}"), open_source(source), **given).run().info

    info = run("val", f"coco:{coco}")
    assert {name: split.num_samples for name, split in info.splits.items()} == {"val": 2}
    with pytest.raises(UserError, match="no split 'val'"):
        run("val", f"folder:{coco}/train2014")


def save_to_disk(folder: Path, columns: dict, features: dict) -> None:
    """What `datasets` writes: an Arrow stream and the features as JSON."""
    folder.mkdir(parents=True)
    table = pa.table(columns)
    with pa.OSFile(str(folder / "data-00000-of-00001.arrow"), "wb") as out, pa.ipc.new_stream(out, table.schema) as to:
        to.write_table(table, max_chunksize=2)
    (folder / "dataset_info.json").write_text(json.dumps({"features": features}))
    (folder / "state.json").write_text("{}")


IMAGE, TEXT = {"_type": "Image"}, {"dtype": "string", "_type": "Value"}


def test_a_data_set_saved_to_disk_is_read_by_its_features(tmp_path):
    root = tmp_path / "pokemon"
    images = [{"bytes": png(), "path": None}, {"bytes": None, "path": "x.png"}, {"bytes": None, "path": None}]
    save_to_disk(root / "train", {"img": images, "text": ["a", "b", "c"]}, {"img": IMAGE, "text": TEXT})
    (root / "train" / "x.png").write_bytes(png("blue"))
    label = {"names": ["cat", "dog"], "_type": "ClassLabel"}
    save_to_disk(root / "validation", {"image": images[:1], "label": [1]}, {"image": IMAGE, "label": label})
    rows = rows_of(open_source(f"hf:{root}"), tmp_path / "out")
    assert [(row["split"], row["status"], row["caption"]) for row in rows] == [
        ("train", "ok", "a"),
        ("train", "ok", "b"),
        ("train", "no_image", "c"),
        ("val", "ok", "a photo of a dog"),
    ]
    assert [row["image"] for row in rows[:2]] == [png(), png("blue")]
    with pytest.raises(UserError, match=r"no caption column tekst; it has img, text.*did you mean 'text'"):
        open_source(f"hf:{root}/train", SourceOptions(caption_column="tekst")).list_units()
    file = root / "train" / "data-00000-of-00001.arrow"
    file.write_bytes(file.read_bytes()[:-300])
    statuses = [row["status"] for row in rows_of(open_source(f"hf:{root}/train"), tmp_path / "cut")]
    assert statuses[-1] == "truncated_arrow"
    (root / "train" / "dataset_info.json").unlink()
    with pytest.raises(UserError, match="save_to_disk"):
        open_source(f"hf:{root}/train").list_units()
