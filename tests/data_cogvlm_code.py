"""Remote code of a tiny checkpoint that keeps CogVLM's contract: copied into the checkpoint's folder by the tests.

As the real one: [BOS], (image_size // patch_size)**2 + 2 vision places, then the prompt; one image per conversation.
"""

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM


class TinyCogVLMConfig(LlamaConfig):
    model_type = "tiny_cogvlm"

    def __init__(self, vision_config=None, **given):
        self.vision_config = vision_config or {"image_size": 16, "patch_size": 8}
        super().__init__(**given)


class TinyCogVLMForCausalLM(LlamaForCausalLM):
    config_class = TinyCogVLMConfig

    def __init__(self, config):
        super().__init__(config)
        patch = config.vision_config["patch_size"]
        self.patches = nn.Conv2d(3, config.hidden_size, patch, patch)
        self.ends = nn.Parameter(torch.randn(2, config.hidden_size))
        self.post_init()

    def build_conversation_input_ids(self, tokenizer, *, query, history=None, images=None, template_version=None):
        from torchvision.transforms.functional import pil_to_tensor

        size, patch = (self.config.vision_config[name] for name in ("image_size", "patch_size"))
        image = pil_to_tensor(images[0].convert("RGB").resize((size, size), 3)).float() / 127.5 - 1
        vision = (size // patch) ** 2 + 2
        text = query if template_version == "base" else f"Question: {query} Answer:"
        prompt = tokenizer.encode(text, add_special_tokens=False)
        ids = [tokenizer.bos_token_id] + [tokenizer.pad_token_id] * vision + prompt
        kinds = [0] + [1] * vision + [0] * len(prompt)
        return {
            "input_ids": torch.tensor(ids),
            "token_type_ids": torch.tensor(kinds),
            "attention_mask": torch.ones(len(ids), dtype=torch.long),
            "images": [image],
        }

    def forward(self, input_ids=None, images=None, token_type_ids=None, attention_mask=None, **kwargs):
        kwargs.pop("inputs_embeds", None)
        embeds = self.model.embed_tokens(input_ids)
        if images is not None and token_type_ids is not None and token_type_ids.shape[1] == input_ids.shape[1]:
            pixels = torch.stack([row[0] for row in images]).to(embeds.dtype)
            found = self.patches(pixels).flatten(2).transpose(1, 2)
            first, last = (self.ends[n].expand(len(found), 1, -1) for n in (0, 1))
            embeds = embeds.clone()
            embeds[token_type_ids == 1] = torch.cat([first, found, last], 1).flatten(0, 1)
        return super().forward(inputs_embeds=embeds, attention_mask=attention_mask, **kwargs)

    def prepare_inputs_for_generation(self, input_ids, images=None, token_type_ids=None, **kwargs):
        prepared = super().prepare_inputs_for_generation(input_ids, **kwargs)
        prompt = prepared["input_ids"].shape[1] == token_type_ids.shape[1]
        return prepared | ({"images": images, "token_type_ids": token_type_ids} if prompt else {})

    def _update_model_kwargs_for_generation(self, outputs, model_kwargs, **given):
        kinds = model_kwargs.pop("token_type_ids")
        updated = super()._update_model_kwargs_for_generation(outputs, model_kwargs, **given)
        return updated | {"token_type_ids": kinds}
