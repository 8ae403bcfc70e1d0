"""Stand-ins for the parts of the Stable Diffusion WebUI that `lib_locon` meets; no adapter logic in here."""
