"""What the kubelet makes of a container's command and of its environment (third_party/forked/golang/expansion)."""

from collections.abc import Mapping


def expand(text: str, values: Mapping[str, str]) -> str:
    """`$(NAME)` becomes its value where there is one, `$$` becomes `$`, everything else stays."""
    out, at = "", 0
    while at < len(text):
        end = text.find(")", at)
        if text.startswith("$$", at):
            out, at = out + "$", at + 2
        elif text.startswith("$(", at) and end >= 0:
            out, at = out + values.get(text[at + 2 : end], text[at : end + 1]), end + 1
        else:
            out, at = out + text[at], at + 1
    return out
