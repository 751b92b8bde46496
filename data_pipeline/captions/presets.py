"""Today's open vision models by name, for the captioner `server`: limit, sampling, switches of their chat template.

What the models' makers say is quoted by its place. None was run here: no such model fits this project's machines. Every
value can be overridden: --captioner.prompt, --captioner.max-new-tokens, --captioner.request.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from infra.errors import UserError, nearest


@dataclass(frozen=True)
class ServerPreset:
    """What is asked of a model. `request` is merged into the body of the chat request."""

    max_new_tokens: int
    source: str
    request: Mapping[str, Any] = field(default_factory=dict)
    prompt: str = ""
    """"" asks for the description that SD3's captions are like (`spec.DESCRIBE`)."""


# vLLM and SGLang hand these to the chat template; other templates ignore them
_NO_THOUGHTS = {"chat_template_kwargs": {"enable_thinking": False}}
# Of a sampling model the same picture gets the same caption again where the server takes a seed (vLLM does).
_SEED = {"seed": 0}

PRESETS: dict[str, ServerPreset] = {
    "qwen3-vl": ServerPreset(
        512, "model card, Generation Hyperparameters, VL: sampling, not greedy; vllm>=0.11",
        {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "presence_penalty": 1.5, **_SEED, **_NO_THOUGHTS},
    ),
    "qwen3-vl-thinking": ServerPreset(
        4096, "README, Generation Hyperparameters, Thinking models; its thoughts take most of the tokens",
        {"temperature": 0.6, "top_p": 0.95, "top_k": 20, **_SEED},
    ),
    "internvl3.5": ServerPreset(
        512, "model card: it thinks only where its thinking system prompt is given, which is not; greedy is ours",
        {"temperature": 0},
    ),
    "gemma-3": ServerPreset(
        512, "the Gemma team's settings as LM Studio's page gives them; reads 896 x 896 pixels (ai.google.dev, vision)",
        {"temperature": 1.0, "top_p": 0.95, "top_k": 64, **_SEED},
    ),
    "molmo": ServerPreset(
        200, "model card's example: 200 new tokens, `Describe this image.`", {"temperature": 0}, "Describe this image.",
    ),
    "cogvlm2": ServerPreset(
        512, "LMDeploy serves it (its page on CogVLM); limit and greedy are ours", {"temperature": 0},
    ),
}  # fmt: skip


def get_preset(name: str) -> ServerPreset:
    """The preset of that name; an unknown one is refused with the nearest known."""
    if name not in PRESETS:
        raise UserError(f"--captioner.preset {name!r}{nearest(name, PRESETS)}: one of {', '.join(PRESETS)}")
    return PRESETS[name]
