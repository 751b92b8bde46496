"""What a chat server answered: the caption in it, without thoughts, quotes and parts that servers put around it."""

import re
from typing import Any, NamedTuple

# Models that reason write their thoughts between such marks; some templates put the opening mark into the prompt.
_THOUGHTS = re.compile(r"<(think|thinking|thought|reasoning|reflection)>.*?</\1>", re.DOTALL | re.IGNORECASE)
_END_OF_THOUGHTS = re.compile(r".*</(?:think|thinking|thought|reasoning|reflection)>", re.DOTALL | re.IGNORECASE)
_OPEN_THOUGHTS = re.compile(r"<(?:think|thinking|thought|reasoning|reflection)>.*", re.DOTALL | re.IGNORECASE)
# Kimi's, Magistral's and Seed's spelling of the same marks.
_OTHER_MARKS = re.compile(r"\u25c1(/?)think\u25b7|\[(/?)THINK\]|<(/?)seed:think>")
_CONTROL = re.compile(r"<\|[a-z_]+\|>")  # tokens that a server's template leaves: <|im_end|>, <|begin_of_box|>
_FINAL = re.compile(r".*<\|channel\|>final<\|message\|>", re.DOTALL)  # gpt-oss' harmony format
_FENCE = re.compile(r"\A```[a-z]*\n(.*?)\n?```\Z", re.DOTALL)
_QUOTES = {'"': '"', "\u201c": "\u201d", "\u00ab": "\u00bb"}
_SENTENCE = re.compile(r"(.*[.!?\u3002])(?:[\"'\u201d)]*)\s", re.DOTALL)


class NoCaption(NamedTuple):
    """An answer without a caption: its status and reason. `final` is False if it may help to ask again."""

    status: str
    reason: str
    final: bool = True


def read_answer(data: Any) -> str | NoCaption:
    """The caption in the JSON of an answer with status 200; of an answer cut at the token limit a `cut` NoCaption."""
    choices = data.get("choices") if isinstance(data, dict) else None
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        error = data.get("error") if isinstance(data, dict) else None
        reason = f" ({str(error)[:120]})" if error else ""
        return NoCaption("no_answer", f"no choices in the answer{reason}", final=False)
    message, ending = choices[0].get("message"), choices[0].get("finish_reason")
    if not isinstance(message, dict):
        return NoCaption("no_answer", "a choice without a message", final=False)
    if message.get("refusal") or ending == "content_filter":
        return NoCaption("refusal", str(message.get("refusal") or "the server's filter")[:120])
    text = strip_thoughts(join_parts(message.get("content")))
    if ending in ("length", "max_tokens"):
        return NoCaption("cut", text, final=False)
    return unwrap(text)


def join_parts(content: Any) -> str:
    """A text, or the texts of a list of parts; what is no text (images, thoughts, tool calls) is left out."""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        texts = [part if isinstance(part, str) else _part_text(part) for part in content]
        return " ".join(text.strip() for text in texts if text.strip())
    return ""


def _part_text(part: Any) -> str:
    if not isinstance(part, dict) or part.get("type", "text") not in ("text", "output_text"):
        return ""
    text = part.get("text")
    return text if isinstance(text, str) else ""


def strip_thoughts(text: str) -> str:
    """The text behind its thoughts; "" where the answer ended within them."""
    text = _OTHER_MARKS.sub(lambda mark: f"<{mark[1] or mark[2] or mark[3] or ''}think>", _FINAL.sub("", text))
    text = _THOUGHTS.sub("", text)
    text = _END_OF_THOUGHTS.sub("", text)
    return _CONTROL.sub("", _OPEN_THOUGHTS.sub("", text)).strip()


def unwrap(text: str) -> str:
    """The text without quotes or a code fence around the whole of it."""
    text = text.strip()
    fenced = _FENCE.match(text)
    text = fenced[1].strip() if fenced else text
    closing = _QUOTES.get(text[:1])
    within = text[1:-1]
    if closing and len(text) > 1 and text.endswith(closing) and not {text[0], closing} & set(within):
        return within.strip()
    return text


def keep_sentences(text: str) -> str:
    """The whole sentences of a text that was cut; "" where not one is whole."""
    found = _SENTENCE.match(text + " ")
    return unwrap(found[1]) if found else ""
