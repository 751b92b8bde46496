"""A server of OpenAI's chat form around the world's captioner, with faults on demand.

PUT a list of faults: each is used up by one request (503, 429, cut, refuse), 400 stays. GET tells what was seen since.
"""

import base64
import io
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from PIL import Image

from data_pipeline.captions.registry import open_captioner
from data_pipeline.captions.spec import CaptionerSpec


def serve(port: int, key: str) -> None:
    """Answers until the process ends."""
    faults: list[str] = []
    lock = threading.Lock()
    seen = {"requests": 0, "now": 0, "most": 0}
    captioner = open_captioner(CaptionerSpec("transformers", "world:captioner"), "cpu")

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.answer(200, seen)

        def do_PUT(self):
            faults[:] = json.loads(self.rfile.read(int(self.headers["content-length"])))
            seen.update(requests=0, most=0)
            self.answer(200, seen)

        def do_POST(self):
            with lock:
                seen["requests"] += 1
                seen["now"] += 1
                seen["most"] = max(seen["most"], seen["now"])
                fault = faults[0] if faults == ["400"] else faults.pop(0) if faults else ""
            reply = self.reply(json.loads(self.rfile.read(int(self.headers["content-length"]))), fault)
            with lock:
                seen["now"] -= 1  # before the answer: the next request may come at once
            if reply is None:
                self.connection.close()
            else:
                self.answer(*reply)

        def reply(self, body, fault):
            if self.headers.get("authorization") != f"Bearer {key}":
                fault = "401"
            if fault == "cut":
                return None
            if fault.isdigit():
                return int(fault), {"error": "no"}, {"retry-after": "0.1"} if fault == "429" else {}
            picture, text = body["messages"][0]["content"]
            assert text["text"]
            assert body["temperature"] == 0
            data = base64.b64decode(picture["image_url"]["url"].partition(",")[2])
            image = Image.open(io.BytesIO(data)).convert("RGB")
            with lock:
                said = f"This image showcases {captioner.caption([image])[0]}"
            if fault == "refuse":
                said = "I'm sorry, I cannot help with that."
            message = {"role": "assistant", "content": said}
            return 200, {"choices": [{"message": message}], "usage": {"total_tokens": 100}}

        def answer(self, status, body, headers=()):
            data = json.dumps(body).encode()
            self.send_response(status)
            for name, value in {"content-length": str(len(data)), **dict(headers)}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args):
            pass

    ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
