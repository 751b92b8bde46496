"""The user's own copies of what official protocols need: checkpoints, prompt files, reference pictures."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from eval.networks.inception import Convention
from infra.device import resolve_device
from infra.errors import UserError

PositionRules = Literal["official", "repaired"]


@dataclass(frozen=True)
class OfficialPaths:
    """Local checkpoints and files of the official protocols; each is needed only by the metrics that use it."""

    detector: str | None = None
    """transformers folder, e.g. of facebook/mask2former-swin-small-coco-instance"""
    clip: str | None = None
    """OpenCLIP folder, or ViT-L-14=FILE (a bare file is taken for OpenAI's, with QuickGELU)"""
    vqa: str | None = None
    """transformers folder of BLIP-VQA (capfilt large)"""
    spacy: str = "en_core_web_sm"
    """spaCy model by name or path"""
    compbench: str | None = None
    """the user's copy of T2I-CompBench's examples/dataset"""
    compbench_detector: str | None = None
    """transformers folder of OWLv2, which stands in for UniDet (no maintained port exists)"""
    compbench_threshold: float = 0.5
    """score above which its boxes count: UniDet's value; OWLv2's scores run lower"""
    compbench_clip: str | None = None
    """OpenCLIP folder, or ViT-B-32=FILE (T2I-CompBench's CLIP; default: --official.clip)"""
    compbench_rules: PositionRules = "official"
    """official keeps the benchmark's slips of position (README); repaired mends them"""
    depth: str | None = None
    """transformers folder of DPT (3D-spatial; Intel/dpt-hybrid-midas on the hub)"""
    captions: str | None = None
    """caption prompts for CLIP score and FID: .txt, .jsonl, PartiPrompts.tsv or COCO's captions_val2014.json"""
    references: str | None = None
    """folder of real images (FID); COCO's captions choose theirs"""
    typography: str | None = None
    """prompts that quote the words to be written (default: our own 80)"""
    inception: str | None = None
    """Inception-v3 weights of pytorch-fid (fid_inception): pt_inception-2015-12-05-6726825d.pth"""
    inception_convention: Convention = "clean-fid"
    """how pictures are brought to 299 pixels: clean-fid or torch-fidelity"""
    lpips: str | None = None
    """ImageNet weights of LPIPS' AlexNet (diversity): torchvision's alexnet-owt-7be5be79.pth"""
    device: Annotated[str, tyro.conf.Suppress] = "auto"
    """where the judges compute: --device of the command says it"""

    def resolve_device(self) -> str:
        """The device of the judges, resolved on the machine of the process that loads them."""
        return resolve_device(self.device)

    def need(self, field: str) -> str:
        """The path; UserError naming its option where it was not given."""
        value: str | None = getattr(self, field)
        if value is None:
            raise UserError(f"judges `official` need {_name_option(field)} PATH for this metric")
        return value

    def refuse_missing(self, fields: Sequence[str], metric: str) -> None:
        """UserError that names every option which the metric needs and the user has not given."""
        missing = [f"{_name_option(field)} PATH" for field in fields if getattr(self, field) is None]
        if missing:
            raise UserError(f"{metric} by judges `official` needs {' and '.join(missing)}")


def _name_option(field: str) -> str:
    return f"--official.{field.replace('_', '-')}"
