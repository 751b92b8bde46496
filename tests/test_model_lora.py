"""Adapters: nothing changes at zero, merging equals running, only they train, files go round through peft too."""

import json

import pytest
import torch
from torch import nn

from infra.codec import to_json
from infra.errors import UserError
from model.backbone import BACKBONES
from model.backbones.mmdit import MMDiTConfig
from model.encoders.text import TextCond
from model.files.adapters import CONFIG_FILE
from model.files.names import adapter_to_diffusers, make_diffusers_config, to_diffusers, to_sd3_name
from model.files.weights import load_weights, save_weights
from model.lora import (
    WEIGHTS_FILE,
    add_adapters,
    count_adapter_parameters,
    is_adapter,
    make_peft_config,
    merge_adapter,
    merge_files,
    name_adapter,
    switch_off_adapters,
    to_peft_name,
)  # fmt: skip

RANK, ALPHA = 4, 6.0
CONFIG = MMDiTConfig(depth=2, in_channels=4, context_width=48, pooled_width=32)


def build(config=CONFIG) -> nn.Module:
    """Nothing at zero, so that every layer has a say."""
    model = config.build()
    with torch.no_grad():
        for param in model.parameters():
            param += 0.03 * torch.randn(param.shape, generator=torch.Generator().manual_seed(param.numel()))
    return model


def adapted(config=CONFIG, *, trained: bool) -> nn.Module:
    model = build(config)
    add_adapters(model, rank=RANK, alpha=ALPHA, seed=1)
    if trained:
        with torch.no_grad():
            for name, param in model.named_parameters():
                if is_adapter(name):
                    param.copy_(0.1 * torch.randn(param.shape, generator=torch.Generator().manual_seed(param.numel())))
    return model


def inputs():
    g = torch.Generator().manual_seed(1)
    text = TextCond(torch.randn(3, 16, 48, generator=g), torch.randn(3, 32, generator=g))
    return torch.randn(3, 4, 8, 8, generator=g), torch.rand(3, generator=g), text


@pytest.mark.parametrize("name", BACKBONES)
def test_new_adapters_change_nothing_bit_for_bit(name):
    more = {"clip_tokens": 8} if name == "mmdit3" else {}
    config = BACKBONES[name](depth=2, in_channels=4, context_width=48, pooled_width=32, **more)
    plain, model = build(config), adapted(config, trained=False)
    assert torch.equal(plain(*inputs()), model(*inputs()))
    linears = [m for m in plain.modules() if isinstance(m, nn.Linear)]
    assert count_adapter_parameters(config, RANK) == sum(RANK * (m.in_features + m.out_features) for m in linears)
    # Every one of them is called as a module, or its adapter would never be heard.
    heard = []
    for module in model.modules():
        if hasattr(module, "lora"):
            module.lora.register_forward_hook(lambda m, i, o: heard.append(m))
    model(*inputs())
    assert len({id(m) for m in heard}) == len(linears)


def test_switched_off_it_is_the_reference_bit_for_bit():
    plain, model = build(), adapted(trained=True)
    with switch_off_adapters(model):
        assert torch.equal(plain(*inputs()), model(*inputs()))
    assert not torch.allclose(plain(*inputs()), model(*inputs()), atol=1e-2)


def test_merged_weights_compute_what_the_adapters_do():
    model = adapted(trained=True)
    state = dict(model.named_parameters())
    plain = build()
    for name, param in plain.named_parameters():
        a, b = name_adapter(name)
        if a in state:
            param.data = merge_adapter(state[name], state[a], state[b], scale=ALPHA / RANK)
    torch.testing.assert_close(plain(*inputs()), model(*inputs()), atol=1e-6, rtol=1e-5)


def test_only_adapters_get_gradients():
    model = adapted(trained=True)
    model(*inputs()).square().mean().backward()
    for name, param in model.named_parameters():
        assert param.requires_grad is is_adapter(name), name
        assert (param.grad is not None) is is_adapter(name), name
    dead = [n for n, p in model.named_parameters() if is_adapter(n) and not p.grad.any()]
    assert not dead


def write(folder, model) -> None:
    """What the trainer's export writes, by safetensors' own writer."""
    from safetensors.torch import save_file

    adapters = {name: param.detach() for name, param in model.named_parameters() if is_adapter(name)}
    folder.mkdir()
    save_file({to_peft_name(n): x.contiguous() for n, x in adapters.items()}, folder / WEIGHTS_FILE)
    (folder / CONFIG_FILE).write_text(json.dumps(to_json(make_peft_config(adapters, rank=RANK, alpha=ALPHA))))


@pytest.fixture
def base(tmp_path):
    meta = {"kind": "ema", "backbone": "mmdit", "config": CONFIG.to_json()}
    return save_weights(tmp_path / "base.safetensors", build().state_dict(), meta)


def test_files_merge_to_ordinary_weights(tmp_path, base):
    model = adapted(trained=True)
    write(tmp_path / "adapter", model)
    state, _ = load_weights(merge_files(base, tmp_path / "adapter", tmp_path / "merged.safetensors"))
    plain = build()
    plain.load_state_dict(state)
    torch.testing.assert_close(plain(*inputs()), model(*inputs()), atol=1e-6, rtol=1e-5)


def test_peft_reads_the_adapter(tmp_path):
    peft = pytest.importorskip("peft")  # an extra of its own: pip install beeline[dpo]
    model = adapted(trained=True)
    write(tmp_path / "adapter", model)
    theirs = peft.PeftModel.from_pretrained(build(), str(tmp_path / "adapter"))
    torch.testing.assert_close(theirs(*inputs()), model(*inputs()), atol=1e-6, rtol=1e-5)


def test_diffusers_reads_the_adapter(tmp_path, base):
    """Its transformer with our weights and the adapter against ours: qkv is split there, two modulations swapped."""
    pytest.importorskip("peft")
    from diffusers import SD3Transformer2DModel
    from safetensors.torch import save_file

    model = adapted(trained=True)
    state = {name: param.detach() for name, param in model.named_parameters()}
    adapters = [(n, *(state[part] for part in name_adapter(n))) for n in state if name_adapter(n)[0] in state]
    found = dict(adapter_to_diffusers(CONFIG, adapters, scale=ALPHA / RANK))
    save_file({name: tensor.clone() for name, tensor in found.items()}, tmp_path / "pytorch_lora_weights.safetensors")
    theirs = SD3Transformer2DModel(**make_diffusers_config(CONFIG)).eval()
    theirs.load_state_dict(dict(to_diffusers(CONFIG, build().state_dict())))
    x, t, text = inputs()

    def predict():
        with torch.no_grad():
            return theirs(x, text.context_BLD, text.pooled_BP, 1000 * t).sample

    torch.testing.assert_close(predict(), build()(*inputs()).detach(), atol=1e-5, rtol=1e-4)
    theirs.load_lora_adapter(str(tmp_path), weight_name="pytorch_lora_weights.safetensors", prefix="transformer")
    torch.testing.assert_close(predict(), model(*inputs()).detach(), atol=1e-5, rtol=1e-4)


def test_what_does_not_fit_is_refused_in_one_line(tmp_path, base):
    with pytest.raises(UserError, match="no adapter there"):
        merge_files(base, tmp_path / "nowhere", tmp_path / "out.safetensors")
    other = MMDiTConfig(depth=3, in_channels=4, context_width=48, pooled_width=32)
    write(tmp_path / "deeper", adapted(other, trained=False))
    with pytest.raises(UserError, match=r"belong to no layer|the adapter of"):
        merge_files(base, tmp_path / "deeper", tmp_path / "out.safetensors")
    write(tmp_path / "cut", adapted(trained=False))
    content = (tmp_path / "cut" / WEIGHTS_FILE).read_bytes()
    (tmp_path / "cut" / WEIGHTS_FILE).write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="no adapter there"):
        merge_files(base, tmp_path / "cut", tmp_path / "out.safetensors")


def foreign(dialect: str, model) -> dict[str, torch.Tensor]:
    """The adapter under the names of diffusers (two writings) or of kohya's tools, with alpha where they have one."""
    state = {name: param.detach() for name, param in model.named_parameters()}
    adapters = [(n, *(state[part] for part in name_adapter(n))) for n in state if name_adapter(n)[0] in state]
    if dialect == "kohya":
        found = {}
        for name, a_RI, b_OR in adapters:
            module = "lora_unet_" + to_sd3_name(name).removesuffix(".weight").replace(".", "_")
            found |= {f"{module}.lora_down.weight": a_RI.clone(), f"{module}.lora_up.weight": b_OR.clone(),
                      f"{module}.alpha": torch.tensor(float(ALPHA))}  # fmt: skip
        return found
    found = {n: x.clone() for n, x in adapter_to_diffusers(CONFIG, adapters, scale=ALPHA / RANK)}
    if dialect == "kohya of diffusers":
        renamed = {}
        for name, tensor in found.items():
            module, role = name.removeprefix("transformer.").rsplit(".lora_", 1)
            suffix = {"A.weight": "lora_down.weight", "B.weight": "lora_up.weight"}[role]
            renamed[f"lora_transformer_{module.replace('.', '_')}.{suffix}"] = tensor
        return renamed
    return found


@pytest.mark.parametrize("dialect", ["diffusers", "kohya", "kohya of diffusers"])
@pytest.mark.parametrize("as_folder", [False, True])
def test_adapters_from_elsewhere_merge_to_what_our_own_does(tmp_path, base, dialect, as_folder):
    from safetensors.torch import save_file

    model = adapted(trained=True)
    (tmp_path / "foreign").mkdir()
    file = tmp_path / "foreign" / "lora.safetensors"
    save_file(foreign(dialect, model), file)
    out = merge_files(base, file.parent if as_folder else file, tmp_path / "merged.safetensors")
    plain = build()
    plain.load_state_dict(load_weights(out)[0])
    torch.testing.assert_close(plain(*inputs()), model(*inputs()), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("where", ["metadata", "beside", "folder"])
@pytest.mark.parametrize("rooted", [False, True])
def test_alpha_that_no_tensor_holds_is_read_from_pefts_settings(tmp_path, base, where, rooted):
    """diffusers keeps them in the file's metadata, peft in a file beside; both scale by them."""
    from safetensors.torch import save_file

    model = adapted(trained=True)
    state = {name: param.detach() for name, param in model.named_parameters()}
    adapters = [(n, *(state[part] for part in name_adapter(n))) for n in state if name_adapter(n)[0] in state]
    found = {n: x.clone() for n, x in adapter_to_diffusers(CONFIG, adapters, scale=1.0)}
    alpha = ALPHA / RANK * (RANK**0.5 if rooted else RANK)
    settings = {"peft_type": "LORA", "r": RANK, "lora_alpha": alpha, "use_rslora": rooted}
    told = {"lora_adapter_metadata": json.dumps({f"transformer.{key}": value for key, value in settings.items()})}
    if where != "metadata":
        (tmp_path / CONFIG_FILE).write_text(json.dumps(settings))
        found = {n.replace("transformer.", "base_model.model.", 1): x for n, x in found.items()}
    save_file(found, tmp_path / WEIGHTS_FILE, metadata=told if where == "metadata" else None)
    given = tmp_path if where == "folder" else tmp_path / WEIGHTS_FILE
    merged = merge_files(base, given, tmp_path / "o" / "m.safetensors")
    plain = build()
    plain.load_state_dict(load_weights(merged)[0])
    torch.testing.assert_close(plain(*inputs()), model(*inputs()), atol=1e-6, rtol=1e-5)


def test_settings_of_another_method_and_ranks_that_differ_are_one_line(tmp_path, base):
    from safetensors.torch import save_file

    found = foreign("kohya", adapted(trained=True))
    told = {"lora_adapter_metadata": json.dumps({"transformer.lora_alpha": 4, "transformer.use_dora": True})}
    save_file(found, tmp_path / "dora.safetensors", metadata=told)
    with pytest.raises(UserError, match="use_dora is True: merge this adapter with peft"):
        merge_files(base, tmp_path / "dora.safetensors", tmp_path / "out.safetensors")
    short = {n: x[:2].clone() if n.endswith("down.weight") else x for n, x in found.items()}
    save_file(short, tmp_path / "short.safetensors")
    with pytest.raises(UserError, match=f"has rank 2 on one side and {RANK} on the other"):
        merge_files(base, tmp_path / "short.safetensors", tmp_path / "out.safetensors")


def test_an_adapter_of_some_parts_of_qkv_changes_these_alone(tmp_path, base):
    from safetensors.torch import save_file

    tensors = {n: x for n, x in foreign("diffusers", adapted(trained=True)).items() if "blocks.0.attn.to_k." in n}
    assert len(tensors) == 2
    save_file(tensors, tmp_path / "k.safetensors")
    merged_state, _ = load_weights(merge_files(base, tmp_path / "k.safetensors", tmp_path / "out.safetensors"))
    before = build().state_dict()
    changed = [name for name in before if not torch.equal(before[name], merged_state[name])]
    assert changed == ["blocks.0.image.qkv.linear.weight"]
    third = len(before[changed[0]]) // 3
    same = [torch.equal(before[changed[0]][n * third : (n + 1) * third],
                        merged_state[changed[0]][n * third : (n + 1) * third]) for n in range(3)]  # fmt: skip
    assert same == [True, False, True]


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ({"lora_unet_double_blocks_0_img_attn_qkv": 2}, "belong to no layer of an mmdit of depth"),
        ({"blocks.0.weight": 0}, "no LoRA: expected names that end in"),
        ({"transformer.transformer_blocks.0.attn.to_q": 1}, "belong to no layer|no LoRA"),
    ],
)
def test_adapters_of_other_models_are_refused_in_one_line(tmp_path, base, tensors, says):
    from safetensors.torch import save_file

    found = {}
    for name, count in tensors.items():
        for suffix in (".lora_down.weight", ".lora_up.weight")[:count]:
            found[name + suffix] = torch.ones(4, 4)
        if not count:
            found[name] = torch.ones(4)
    save_file(found, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=says):
        merge_files(base, tmp_path / "x.safetensors", tmp_path / "out.safetensors")
