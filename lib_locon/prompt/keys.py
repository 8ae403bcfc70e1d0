"""The keys of a tag, for the parser, the page's completion and the documentation."""

from __future__ import annotations

KEYS: dict[str, str] = {
    "te": "strength for the text encoders; sets unet too where unet is not given",
    "te1": "strength for the first text encoder alone",
    "te2": "strength for the second text encoder alone (SDXL, SD3)",
    "unet": "strength for the UNet or transformer",
    "in": "strength for the UNet's input blocks, in the place of unet",
    "mid": "strength for the UNet's middle block, in the place of unet",
    "out": "strength for the UNet's output blocks, in the place of unet",
    "hr": "strength in the hires pass",
    "hrte": "strength for the text encoders in the hires pass",
    "hrunet": "strength for the UNet in the hires pass",
    "x": "the number that X stands for in block weights; 1 where it is not given",
    "lbw": "block weights: a preset, a block, or 12, 17, 20, 26 or 61 values",
    "lbwe": "a preset of rules for single layers, which win over lbw",
    "start": "the first step at which the adapter acts",
    "stop": "the first step at which the adapter no longer acts",
    "step": "a range such as 5-20: start=5 and stop=20",
    "dyn": "how many ranks to keep (LoRA and LoCon only)",
}
"""Key → what it does, in a line."""
CURVES = ("te", "te1", "te2", "unet", "in", "mid", "out", "hr", "hrte", "hrunet", "x")
"""The keys whose value is a number or a curve."""
SYNONYMS = {"w": "lbw"}
PLACES = ("te", "unet", "dyn")
"""What values without a key mean, one after the other."""
