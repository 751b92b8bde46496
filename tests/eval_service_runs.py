"""A running service on a small ladder, for tests: stores with galleries, and a real server in a thread."""

import io
import json
import threading
import time
from contextlib import contextmanager
from dataclasses import asdict

from eval_runs import write_ladder
from PIL import Image

from eval.service.access import choose_access
from eval.service.app import build_app
from eval.service.gallery import GallerySheet, GalleryTile, locate_description, locate_sheet
from eval.service.index import Index
from eval.service.watcher import Watcher
from infra import storage

PROMPTS = ("a photo of a red apple", 'a sign that says "bees"', "a photo of two dogs", "<b>bold</b> & 'quoted'")
SAMPLING = {"steps": 25, "guidance": 4.0, "seed": 0}


def write_gallery(run_uri, step, *, shade, prompts=PROMPTS, sampling=SAMPLING):
    """Four 64-pixel tiles of one grey per run, so that a test can tell whose picture it got."""
    image = Image.new("RGB", (128, 128), (shade, shade, shade))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    uri = locate_sheet(run_uri, step)
    storage.write_bytes(uri, buffer.getvalue())
    tiles = tuple(GalleryTile(prompt, 0, 0) for prompt in prompts)
    sheet = GallerySheet(tiles, 2, 64, 64, step * 64, dict(sampling))
    storage.write_bytes(locate_description(uri), json.dumps(asdict(sheet)).encode())
    return sheet


def small_ladder(root, depths=(2, 3), **options):
    write_ladder(root, depths, **options)
    for depth in depths:
        for step in (100, 200):
            write_gallery(storage.join(root, f"world-d{depth}"), step, shade=20 * depth)


def app_on(root, *, host="127.0.0.1", token_file=None):
    """The application on a store that was read once."""
    index = Index(root)
    index.refresh()
    return build_app(index, Watcher(index, None), choose_access(host, token_file))


@contextmanager
def serving(app):
    """A real uvicorn on a free port of loopback; yields its address."""
    import uvicorn

    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", access_log=False))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    end = time.monotonic() + 60
    while not server.started:
        assert time.monotonic() < end
        assert thread.is_alive()
        time.sleep(0.05)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(20)
