"""Captions from any server that speaks OpenAI's chat protocol with images: LMDeploy, vLLM, a hosted model.

One async client per worker: a bounded number of requests in flight, retries with growing waits.
The key comes from the environment and is never shown.
"""

import asyncio
import base64
import io
import os
import random
from collections.abc import Sequence
from typing import Any

from PIL import Image

from data_pipeline.captions.answers import NoCaption, keep_sentences, read_answer
from data_pipeline.captions.spec import DESCRIBE, CaptionerSpec
from infra.errors import UnavailableError, UserError
from infra.log import get_logger

log = get_logger("caption")

_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.5, 30.0
_MANY = 4  # pictures without one caption: the address is wrong rather than the pictures
_WORTH_ANOTHER_TRY = (408, 409, 425, 429, 500, 502, 503, 504)


class ServerCaptioner:
    """`checkpoint` is the model's name on the server. A picture that the server rejects or has no caption for is set
    aside alone; a server that is down, or gives a caption for not one of several pictures, stops the run."""

    name, version = "server", 3  # 1 took thoughts and lists of parts for captions, 2 thoughts in rarer marks

    def __init__(self, spec: CaptionerSpec, device: str) -> None:
        self._spec, self._request = spec, spec.make_request()
        self._address = spec.check_address() + "/chat/completions"

    @staticmethod
    def identify_weights(spec: CaptionerSpec) -> str:
        """The weights lie on the server: the model's name stands for them (`spec.revision` enters on its own)."""
        spec.check_address()
        return f"served:{spec.checkpoint}"

    def caption(self, images: Sequence[Image.Image]) -> list[str | NoCaption]:
        answers = asyncio.run(self._caption_all(images))
        silent = [answer for answer in answers if isinstance(answer, NoCaption) and answer.status == "no_answer"]
        if len(silent) == len(answers) >= _MANY:
            raise UserError(
                f"caption server {self._spec.url}: not one of {len(answers)} answers is of OpenAI's chat form "
                f"({silent[0].reason}): check the address, which ends in /v1"
            )
        return answers

    async def _caption_all(self, images: Sequence[Image.Image]) -> list[str | NoCaption]:
        import httpx

        key = os.environ.get("BEELINE_CAPTION_KEY", "")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        places = asyncio.Semaphore(self._spec.concurrency)
        limits = httpx.Limits(max_connections=self._spec.concurrency)
        async with httpx.AsyncClient(headers=headers, limits=limits, timeout=self._spec.timeout_s) as client:

            async def one(image: Image.Image) -> str | NoCaption:
                async with places:
                    return await self._caption_one(client, image)

            tasks = [asyncio.create_task(one(image)) for image in images]
            try:
                return list(await asyncio.gather(*tasks))
            finally:
                for task in tasks:  # after the first failure nothing more is asked for
                    task.cancel()

    async def _caption_one(self, client: Any, image: Image.Image) -> str | NoCaption:
        import httpx

        body, problem = self._make_body(image), ""
        caption: str | NoCaption = NoCaption("no_answer", "")
        for attempt in range(self._spec.attempts):
            wait = min(_LONGEST_WAIT_S, _FIRST_WAIT_S * 2**attempt) * (0.5 + random.random() / 2)
            try:
                answer = await client.post(self._address, json=body)
            except (httpx.TransportError, httpx.TimeoutException) as error:
                problem = type(error).__name__
            else:
                if answer.status_code == 200:
                    caption, problem = self._read(answer), ""
                    if isinstance(caption, str) or caption.final:
                        return caption
                    if caption.status == "cut":
                        if body["max_tokens"] > self._spec.max_new_tokens:  # once with twice as many is enough
                            kept = keep_sentences(caption.reason)
                            return kept or NoCaption("cut", f"no whole sentence in {body['max_tokens']} tokens")
                        body["max_tokens"] *= 2
                        continue
                else:
                    problem = f"status {answer.status_code}"
                    if answer.status_code in (401, 403, 404):
                        raise UserError(
                            f"caption server {self._spec.url}: {problem}: check the address, the model's name "
                            f"({self._spec.checkpoint}) and BEELINE_CAPTION_KEY"
                        )
                    if answer.status_code not in _WORTH_ANOTHER_TRY:
                        log.warning("caption server: a picture was rejected with %s", problem)
                        return ""
                    wait = max(wait, _parse_retry_after(answer))
            await asyncio.sleep(min(wait, _LONGEST_WAIT_S))
        if not problem:  # it answers, but never with a caption: this picture alone is set aside
            return caption
        raise UnavailableError(
            f"caption server {self._spec.url}: {problem} after {self._spec.attempts} tries: "
            "start it again and run the same command; captions made so far are kept"
        )

    def _make_body(self, image: Image.Image) -> dict[str, Any]:
        out = io.BytesIO()
        image.save(out, "PNG")
        picture = "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()
        content = [
            {"type": "image_url", "image_url": {"url": picture}},
            {"type": "text", "text": self._spec.prompt or DESCRIBE},
        ]
        return {
            "model": self._spec.checkpoint,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": self._spec.max_new_tokens,
            "temperature": 0,
            **self._request,
        }

    @staticmethod
    def _read(answer: Any) -> str | NoCaption:
        try:
            return read_answer(answer.json())
        except ValueError:
            return NoCaption("no_answer", f"no JSON: {answer.text[:60]!r}", final=False)


def _parse_retry_after(answer: Any) -> float:
    try:
        return float(answer.headers.get("retry-after", 0))
    except ValueError:  # it may also be a date
        return 0.0
