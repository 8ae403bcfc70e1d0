"""Families of adapters: the factors of one module → ΔW. Pure torch; knows no files, models or hosts.

To add one: a file here, its class in `FAMILIES`, its independent reference in `tests/oracles`, a row in
docs/formulas.md.
"""

from __future__ import annotations

from lib_locon.families.base import Family
from lib_locon.families.boft import BOFT, PeftBOFT
from lib_locon.families.full import Full, FullBias, LoRABias, NormBias, NormWeight, SetBias, SetWeight
from lib_locon.families.glora import GLoRA, OldGLoRA
from lib_locon.families.ia3 import IA3, PeftIA3
from lib_locon.families.loha import LoHa, TuckerLoHa
from lib_locon.families.lokr import LoKr, TuckerLoKr
from lib_locon.families.lora import EmbeddingLoRA, LoRA, SparseLoRA, TuckerLoRA
from lib_locon.families.oft import DiagOFT, KohyaOFT, OldDiagOFT, SplitOFT
from lib_locon.families.oftv2 import OneTrainerOFT, PeftOFT
from lib_locon.families.started import OLoRA, PiSSA
from lib_locon.families.tlora import TLoRA

FAMILIES: tuple[type[Family], ...] = (
    *(TuckerLoRA, SparseLoRA, PiSSA, OLoRA, LoRA, EmbeddingLoRA),
    *(TuckerLoHa, LoHa, TuckerLoKr, LoKr),
    *(IA3, PeftIA3, GLoRA, OldGLoRA),
    *(DiagOFT, BOFT, KohyaOFT, SplitOFT, OldDiagOFT, PeftOFT, OneTrainerOFT, PeftBOFT),
    *(TLoRA, SetWeight, SetBias, Full, FullBias, NormWeight, NormBias, LoRABias),
)
"""In the order of detection: where one family's suffixes hold another's, the larger stands first. Where two have the
same suffixes, the shapes decide."""

ALPHA = "alpha"
SCALE = "scale"
RESHAPE = "reshape_weight"
MAGNITUDES: dict[str, bool | None] = {
    "dora_scale": None,
    "lora_magnitude_vector": True,
    "magnitude": True,
}
"""DoRA's magnitude by suffix, and whether it is of the output rows; None: its shape tells."""
SUFFIXES: frozenset[str] = frozenset(
    {ALPHA, SCALE, RESHAPE, *MAGNITUDES}.union(*(kind.suffixes() for kind in FAMILIES))
)
"""Every suffix that may follow a module's name, in this package's own spelling (dialects rename to it)."""

UNSUPPORTED: dict[str, str] = {
    "bm.weight": "GLoRA with a Tucker core",
    "oft_r": "the OFT of PEFT before 0.16",
    "vera_lambda_b": "VeRA",
    "vera_lambda_d": "VeRA",
    "hra_u": "HRA",
    "fourierft_spectrum": "FourierFT",
    "lora_E": "AdaLoRA",
    "ranknum": "AdaLoRA",
    "trainable_tokens_delta": "PEFT's trainable tokens",
    "c3a_kernel": "C3A",
    "miss_block": "MiSS",
    "bone_block": "Bone",
    "randlora_lambda": "RandLoRA",
    "randlora_gamma": "RandLoRA",
    "vblora_logits_A": "VB-LoRA",
    "vblora_logits_B": "VB-LoRA",
    "waveft_spectrum": "WaveFT",
    "road_theta": "RoAd",
    "road_alpha": "RoAd",
    "shira_weight": "SHiRA",
    "delora_lambda": "DeLoRA",
    "gralora_A": "GraLoRA",
    "gralora_B": "GraLoRA",
    "hira_A": "HiRA",
    "hira_B": "HiRA",
    "psoft_R": "PSOFT",
    "pvera_lambda_b": "PVeRA",
    "pvera_lambda_d": "PVeRA",
    "tinylora_v": "TinyLoRA",
    "unilora_theta_d": "UniLoRA",
}
"""Suffixes of families that are known by name and cannot be applied, so that a report can say which it is."""
