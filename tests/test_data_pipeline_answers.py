"""Answers of chat servers: the caption without what is put around it; one odd answer costs one row at most."""

import http.server
import json
import threading
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from data_pipeline.captions.answers import NoCaption, join_parts, keep_sentences, read_answer, strip_thoughts, unwrap
from data_pipeline.captions.registry import open_captioner
from data_pipeline.captions.spec import CaptionerSpec
from data_pipeline.captions.stage import caption_images, judge_caption
from infra.errors import UserError


def answer(content: object, ending: str = "stop", **message: object) -> dict:
    return {"choices": [{"finish_reason": ending, "message": {"role": "assistant", "content": content, **message}}]}


words = st.text("abcdefgh ", min_size=1).map(str.strip).filter(bool)


@given(words, words, st.sampled_from(["think", "thinking", "reasoning", "Think"]))
def test_thoughts_never_become_captions(thought, caption, mark):
    once = f"<{mark}>{thought}</{mark}>"
    for before in (once, f"<{mark}>\n{thought}\n</{mark}>\n\n", f"{thought}</{mark}> ", once + once):
        text = before + caption
        assert read_answer(answer(text)) == caption
    assert strip_thoughts(f"<{mark}>{thought} {caption}") == ""


@given(st.lists(words, min_size=1, max_size=4))
def test_parts_are_joined_and_what_is_no_text_is_left_out(texts):
    parts = [{"type": "text", "text": text} for text in texts]
    noise = [{"type": "image_url", "image_url": {}}, {"type": "reasoning", "text": "I think"}, None, 3]
    assert join_parts(parts + noise) == " ".join(texts)
    assert read_answer(answer(parts)) == " ".join(texts)


@pytest.mark.parametrize(
    ("data", "status"),
    [
        ({"choices": []}, "no_answer"),
        ({"error": {"message": "overloaded"}}, "no_answer"),
        ([], "no_answer"),
        (None, "no_answer"),
        ({"choices": [{}]}, "no_answer"),
        ({"choices": ["x"]}, "no_answer"),
        (answer(None, refusal="I cannot"), "refusal"),
        (answer("", "content_filter"), "refusal"),
        (answer("a long", "length"), "cut"),
        (answer(None, "length", reasoning_content="hm"), "cut"),
    ],
)
def test_answers_without_a_caption_have_a_status(data, status):
    found = read_answer(data)
    assert isinstance(found, NoCaption)
    assert found.status == status
    assert judge_caption(found) == (status, "")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('"A picture."', "A picture."),
        ("\u201cA picture.\u201d", "A picture."),
        ("```\nA picture.\n```", "A picture."),
        ('"No" and "yes"', '"No" and "yes"'),
        ('A sign says "stop"', 'A sign says "stop"'),
        ('"', '"'),
    ],
)
def test_quotes_and_fences_around_the_whole_are_taken_off(text, expected):
    assert unwrap(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("\u25c1think\u25b7A cat?\u25c1/think\u25b7A cow.", "A cow."),
        ("[THINK]A cat?[/THINK]A goat.", "A goat."),
        ("<seed:think>A cat?</seed:think>A hen.", "A hen."),
        ("[THINK]A cat? It ends here", ""),
        ("<|begin_of_box|>A red car.<|end_of_box|>", "A red car."),
        ("<|channel|>analysis<|message|>hm<|end|><|channel|>final<|message|>A dog.<|return|>", "A dog."),
        ("A dog.<|im_end|>", "A dog."),
        ("A sign says [think] in red.", "A sign says [think] in red."),
    ],
)
def test_rarer_marks_and_tokens_of_templates_are_taken_off(text, expected):
    assert strip_thoughts(text) == expected


def test_of_a_cut_text_whole_sentences_stay():
    assert keep_sentences("A dog runs. It is brown. The sky") == "A dog runs. It is brown."
    assert keep_sentences("A dog that runs over") == ""
    assert keep_sentences("At 3.5 metres a dog") == ""


Reply = Callable[[int, dict], tuple[int, object]]


@pytest.fixture
def serve():
    """A real server; the function is asked with the number of the request and its body."""
    running: list[http.server.ThreadingHTTPServer] = []

    def start(reply: Reply) -> CaptionerSpec:
        lock, count = threading.Lock(), [0]

        class Handler(http.server.BaseHTTPRequestHandler):
            def log_message(self, *_: object) -> None: ...

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                with lock:
                    count[0] += 1
                    number = count[0]
                status, said = reply(number, body)
                data = said if isinstance(said, bytes) else json.dumps(said).encode()
                self.send_response(status)
                self.send_header("content-length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        running.append(server)
        url = f"http://127.0.0.1:{server.server_address[1]}/v1"
        return CaptionerSpec("server", "m", url=url, attempts=3, concurrency=1, max_new_tokens=20)

    yield start
    for server in running:
        server.shutdown()
        server.server_close()


def ask(spec: CaptionerSpec, count: int = 6) -> list:
    return caption_images(open_captioner(spec, "cpu"), [Image.new("RGB", (8, 8))] * count)


@pytest.mark.parametrize("odd", [{"choices": []}, {"error": {"code": 503}}, b"<html>gateway</html>", {"choices": [{}]}])
def test_one_odd_answer_is_asked_again(serve, odd):
    spec = serve(lambda number, body: (200, odd if number == 3 else answer(f"picture {number}")))
    assert ask(spec) == [f"picture {number}" for number in (1, 2, 4, 5, 6, 7)]


def test_a_picture_that_never_gets_a_caption_is_set_aside_alone(serve):
    spec = serve(lambda number, body: (200, {"choices": []} if 3 <= number <= 5 else answer("a picture")))
    found = ask(spec)
    assert [isinstance(text, str) for text in found] == [True, True, False, True, True, True]
    assert judge_caption(found[2])[0] == "no_answer"


@pytest.mark.parametrize("odd", [{"choices": []}, b"<html>gateway</html>"])
def test_where_no_picture_gets_one_the_run_stops(serve, odd):
    with pytest.raises(UserError, match="not one of 6 answers is of OpenAI's chat form"):
        ask(serve(lambda number, body: (200, odd)))


def test_a_cut_answer_is_asked_once_with_twice_the_tokens_and_then_ends_at_a_sentence(serve):
    limits = []

    def reply(number: int, body: dict) -> tuple[int, object]:
        limits.append(body["max_tokens"])
        texts = {1: "A dog that", 2: "A dog runs. It", 3: "A cat", 4: "A cat that", 5: "a bird"}
        return 200, answer(texts[number], "stop" if number == 5 else "length")

    found = ask(serve(reply), 3)
    assert limits == [20, 40, 20, 40, 20]
    assert found[0] == "A dog runs."
    assert judge_caption(found[1]) == ("cut", "")
    assert found[2] == "a bird"
