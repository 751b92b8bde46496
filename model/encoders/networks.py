"""The text encoders by their real classes, loaded from local folders in the hub's layout.

Conventions: `sd3-ref` pools CLIP-L before its projection and CLIP-G after it; `diffusers` after it for both. States
are CLIP's last but one layer without final norm, T5's final states. T5 runs in bf16 or fp32, never fp16 (it overflows).
"""
# Shapes: B captions, L tokens, W width, P pooled width.

from __future__ import annotations

import bisect
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from infra.errors import UserError, list_some
from model.encoders.text import EncodedText, EncoderSpec, TextCond, TextSpec, assemble

log = logging.getLogger("beeline.text")


class TextEncoder(Protocol):
    """Captions to states and a pooled vector."""

    def __call__(self, captions: Sequence[str]) -> EncodedText: ...


@dataclass(frozen=True)
class TextEncoders:
    """All encoders of a TextSpec, by seat."""

    spec: TextSpec
    by_seat: dict[str, TextEncoder]

    @torch.no_grad()
    def encode(self, captions: Sequence[str], *, batch: int = 256) -> dict[str, EncodedText]:
        """Every caption by every encoder; states of static length under `padded`, lengths stated under both layouts."""
        if isinstance(captions, str) or not all(isinstance(c, str) for c in captions):
            raise UserError("encode takes a list of captions, each a string")
        # Unpaired surrogates, which JSON can smuggle in, make tokenizers raise TypeError.
        captions = [c.encode("utf-16", "surrogatepass").decode("utf-16", "replace") for c in captions]
        out = {}
        for seat, encoder in self.by_seat.items():
            parts = [encoder(captions[i : i + batch]) for i in range(0, len(captions), batch)]
            out[seat] = EncodedText(
                *(torch.cat([getattr(p, f) for p in parts]) for f in ("hidden_BLW", "pooled_BP", "length_B"))
            )
        return out

    def condition(self, captions: Sequence[str]) -> TextCond:
        """Captions straight to what a backbone reads, nothing dropped."""
        return assemble(self.spec, self.encode(captions))

    def encode_empty_prompt(self, batch: int) -> TextCond:
        """The unconditional input `empty_prompt`, as released inference uses it."""
        return self.condition([""] * batch)


def load_text_encoders(
    spec: TextSpec,
    resolve: Callable[[str], Path],
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> TextEncoders:
    """Load every encoder of the spec; `resolve` brings a checkpoint's name to a local folder."""
    loaded: dict[str, TextEncoder] = {}
    for encoder in spec.encoders:
        path = Path(resolve(encoder.checkpoint))
        if not path.is_dir():
            raise UserError(f"text encoder {encoder.checkpoint!r}: no folder at {path}; expected the hub's layout")
        loaded[encoder.seat] = LOADERS[encoder.kind](path, encoder, spec, device, dtype)
    return TextEncoders(spec, loaded)


def _is_projected(encoder: EncoderSpec, spec: TextSpec) -> bool:
    """Is the pooled vector taken after CLIP's projection?"""
    return spec.convention == "diffusers" or encoder.seat == "clip_g"


def _check_states(encoder: EncoderSpec, hidden_BLW: Tensor, pooled_BP: Tensor, length_B: Tensor) -> EncodedText:
    """Move to the CPU in float32 and compare with what the spec states."""
    if hidden_BLW.shape[-1] != encoder.width or pooled_BP.shape[-1] != encoder.pooled:
        raise UserError(
            f"{encoder.seat} ({encoder.checkpoint}): states of width {hidden_BLW.shape[-1]} and pooled "
            f"{pooled_BP.shape[-1]}, the TextSpec states {encoder.width} and {encoder.pooled}; correct it"
        )
    return EncodedText(hidden_BLW.float().cpu(), pooled_BP.float().cpu(), length_B.cpu())


def load_tokenizer(path: Path) -> Any:
    """The tokenizer of a text encoder, from the encoder's folder, or from the folder beside it in a diffusers pipeline
    (text_encoder_2 -> tokenizer_2)."""
    from transformers import AutoTokenizer

    if (path / "tokenizer_config.json").is_file() or (path / "vocab.json").is_file():
        return AutoTokenizer.from_pretrained(str(path), local_files_only=True)
    sibling = path.with_name(path.name.replace("text_encoder", "tokenizer"))
    if sibling == path or not sibling.is_dir():
        raise UserError(f"no tokenizer in {path}; expected tokenizer files there or in a tokenizer folder beside it")
    return AutoTokenizer.from_pretrained(str(sibling), local_files_only=True)


def _from_pretrained(
    architecture: Any, path: Path, dtype: torch.dtype, device: torch.device | str, *, unused: str | None = None
) -> Any:
    """Weights that the folder lacks would be random: refused by name, but for those under `unused`, never read."""
    from safetensors import SafetensorError
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # a bar per encoder would bury the caller's own
    try:
        model, found = architecture.from_pretrained(
            str(path), local_files_only=True, dtype=dtype, output_loading_info=True
        )
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise UserError(f"cannot load {architecture.__name__} from {path}: {str(error).splitlines()[0]}") from None
    missing = sorted(name for name in found["missing_keys"] if unused is None or not name.startswith(unused))
    if missing:
        raise UserError(
            f"cannot load {architecture.__name__} from {path}: it lacks {list_some(missing)}; "
            "expected a folder of that class"
        )
    return model.to(device).eval().requires_grad_(False)


class _Tokenizer:
    """A transformers tokenizer at the full length of a seat; a first caption that is cut is told with what is lost."""

    def __init__(self, tokenizer: Any, encoder: EncoderSpec) -> None:
        self._tokenizer, self._encoder, self._warned = tokenizer, encoder, False

    def __call__(self, captions: Sequence[str], device: torch.device | str) -> tuple[Tensor, Tensor]:
        """(ids_BL, mask_BL); longer captions are cut, the end token kept."""
        limit = self._encoder.tokens
        out = self._tokenizer(
            list(captions), padding="max_length", max_length=limit, truncation=True, return_tensors="pt"
        )
        if not self._warned:
            full = [text for text, mask in zip(captions, out.attention_mask) if mask.sum() == limit]
            count = lambda text: len(self._tokenizer(text, verbose=False).input_ids)  # noqa: E731
            self._warned = tell_cut(self._encoder, full, count)
        return out.input_ids.to(device), out.attention_mask.to(device)


def tell_cut(encoder: EncoderSpec, captions: Sequence[str], count: Callable[[str], int]) -> bool:
    """Log the first caption with more tokens than the encoder reads, and what of it is lost. Was there one?"""
    for caption in captions:
        if count(caption) <= encoder.tokens:
            continue
        words = caption.split(" ")
        kept = bisect.bisect_right(range(1, len(words)), encoder.tokens, key=lambda n: count(" ".join(words[:n])))
        lost = " ".join(words[kept:])
        log.warning(
            "%s reads %d tokens: of a caption of %d it does not see %r; further ones are cut without a word",
            encoder.seat, encoder.tokens, count(caption), lost if len(lost) <= 200 else f"{lost[:200]}...",
        )  # fmt: skip
        return True
    return False


def _restore_pad_word(tokenizer: Any) -> Any:
    """CLIP-G's tokenizer in SD3's layout pads with "!", and transformers then takes every "!" of a caption for padding.

    sd3-ref (sd3_impls.py, other_impls.py) tokenises "!" as the word it is and writes 0 behind the end token alone.
    """
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    pad, ends = tokenizer.pad_token, (tokenizer.bos_token, tokenizer.eos_token)
    if pad is None or pad in ends:
        return tokenizer
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    parts["added_tokens"] = [token for token in parts["added_tokens"] if token["content"] != pad]
    parts["padding"] = parts["truncation"] = None
    plain = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(parts)), bos_token=ends[0], eos_token=ends[1], pad_token=ends[1]
    )

    def tokenize(captions: Any, **options: Any) -> Any:
        out = plain(captions, **options)
        if "padding" in options:
            out["input_ids"] = out.input_ids.masked_fill(out.attention_mask == 0, tokenizer.pad_token_id)
        return out

    return tokenize


def _open_clip(
    path: Path, encoder: EncoderSpec, spec: TextSpec, device: torch.device | str, dtype: torch.dtype
) -> TextEncoder:
    import open_clip
    from safetensors import SafetensorError

    if not (path / "open_clip_config.json").is_file():
        raise UserError(f"no open_clip_config.json in {path}; expected an OpenCLIP folder")
    try:
        model = open_clip.create_model(f"local-dir:{path}", device=device, require_pretrained=True)
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise UserError(f"cannot load OpenCLIP weights from {path}: {' '.join(str(error).split())[:300]}") from None
    model = model.to(dtype).eval().requires_grad_(False)
    tokenizer = open_clip.get_tokenizer(f"local-dir:{path}", context_length=encoder.tokens)
    tower: Any = getattr(model, "text", model)
    limit = tower.positional_embedding.shape[0]
    if encoder.tokens > limit:
        raise UserError(f"{encoder.checkpoint} reads {limit} tokens, the TextSpec states {encoder.tokens}")
    projected = _is_projected(encoder, spec)
    # OpenCLIP's own tokenizer pads with 0, as SD3 does for CLIP-G; CLIP-L is padded with the end token (a folder that
    # brings another tokenizer says itself how it pads). Causal attention: only states past the end notice.
    pads_with_end = encoder.seat == "clip_l" and isinstance(tokenizer, open_clip.SimpleTokenizer)
    warned = False

    def encode(captions: Sequence[str]) -> EncodedText:
        nonlocal warned
        ids_BL = tokenizer(list(captions)).to(device)
        length = ids_BL.shape[1]
        # The end token has the highest id in every CLIP vocabulary; the first one counts where it also pads.
        end_B = ids_BL.argmax(dim=1)
        if not warned:
            full = [caption for caption, end in zip(captions, end_B.tolist()) if end == length - 1]
            warned = tell_cut(encoder, full, lambda text: _count_open_clip(tokenizer, text))
        if pads_with_end:
            past_BL = torch.arange(length, device=ids_BL.device) > end_B[:, None]
            ids_BL = ids_BL.masked_fill(past_BL, tokenizer.eot_token_id)
        x = tower.token_embedding(ids_BL) + tower.positional_embedding[:length]
        x, layers = tower.transformer.forward_intermediates(x, attn_mask=tower.attn_mask[:length, :length])
        pooled = tower.ln_final(x)[torch.arange(len(x), device=x.device), end_B]
        if projected and tower.text_projection is not None:
            weight = tower.text_projection
            pooled = weight(pooled) if isinstance(weight, torch.nn.Linear) else pooled @ weight
        return _check_states(encoder, layers[-2], pooled, end_B + 1)

    return encode


def _count_open_clip(tokenizer: Any, text: str) -> int:
    """Tokens of a caption with both ends, uncut."""
    return int(tokenizer([text], context_length=8 + 8 * len(text.encode())).argmax()) + 1


def _clip_hf(
    path: Path, encoder: EncoderSpec, spec: TextSpec, device: torch.device | str, dtype: torch.dtype
) -> TextEncoder:
    from transformers import CLIPTextModelWithProjection

    projected = _is_projected(encoder, spec)
    model = _from_pretrained(
        CLIPTextModelWithProjection, path, dtype, device, unused=None if projected else "text_projection."
    )
    own = load_tokenizer(path)
    tokenize = _Tokenizer(_restore_pad_word(own) if spec.convention == "sd3-ref" else own, encoder)

    def encode(captions: Sequence[str]) -> EncodedText:
        ids_BL, _ = tokenize(captions, device)
        out = model(ids_BL, output_hidden_states=True)
        end_B = ids_BL.argmax(dim=1)
        unprojected = out.last_hidden_state[torch.arange(len(ids_BL), device=ids_BL.device), end_B]
        return _check_states(encoder, out.hidden_states[-2], out.text_embeds if projected else unprojected, end_B + 1)

    return encode


def _t5_hf(
    path: Path, encoder: EncoderSpec, spec: TextSpec, device: torch.device | str, dtype: torch.dtype
) -> TextEncoder:
    from transformers import T5EncoderModel

    if dtype == torch.float16:
        raise UserError("T5 overflows in float16; load it in bfloat16 or float32")
    model = _from_pretrained(T5EncoderModel, path, dtype, device)
    return _masked_encoder(model, load_tokenizer(path), encoder, device, use_mask=spec.layout == "trimmed")


def _bert_hf(
    path: Path, encoder: EncoderSpec, spec: TextSpec, device: torch.device | str, dtype: torch.dtype
) -> TextEncoder:
    from transformers import AutoModel

    model = _from_pretrained(AutoModel, path, dtype, device, unused="pooler.")
    return _masked_encoder(model, load_tokenizer(path), encoder, device, use_mask=True)


def _masked_encoder(
    model: Any, tokenizer: Any, encoder: EncoderSpec, device: torch.device | str, *, use_mask: bool
) -> TextEncoder:
    """Final states of a bidirectional encoder; SD3 runs T5 without a mask, so padding states are part of the input."""
    tokenize = _Tokenizer(tokenizer, encoder)

    def encode(captions: Sequence[str]) -> EncodedText:
        ids_BL, mask_BL = tokenize(captions, device)
        hidden = model(ids_BL, attention_mask=mask_BL if use_mask else torch.ones_like(mask_BL)).last_hidden_state
        return _check_states(encoder, hidden, hidden.new_zeros(len(hidden), 0), mask_BL.sum(1))

    return encode


LOADERS: dict[str, Callable[[Path, EncoderSpec, TextSpec, torch.device | str, torch.dtype], TextEncoder]] = {
    "open_clip": _open_clip,
    "clip_hf": _clip_hf,
    "t5_hf": _t5_hf,
    "bert_hf": _bert_hf,
}
