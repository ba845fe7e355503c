"""The targets people name: their repositories, the short names they go by, their licences, and their presets.

Only data. A target that is not here works the same; it just has no alias and its licence is unknown.
"""

import dataclasses

RESEARCH_ONLY = "NVIDIA Internal Scientific Research and Development Model License (research only)"
NVIDIA_OPEN = "NVIDIA Open Model License"
NEMOTRON_OPEN = "NVIDIA Nemotron Open Model License"
OPEN_MDW = "OpenMDW-1.1"


@dataclasses.dataclass(frozen=True)
class KnownTarget:
    repository: str
    licence: str | None = None  # None: not looked up; the model card says
    aliases: tuple[str, ...] = ()
    preset: str | None = None  # file in configs/


KNOWN = (
    KnownTarget("nvidia/Nemotron-H-4B-Base-8K", RESEARCH_ONLY, ("nvidia/Nemotron-H-4B",)),
    KnownTarget("nvidia/Nemotron-H-8B-Base-8K", RESEARCH_ONLY, ("nvidia/Nemotron-H-8B",), "nemotron_h_8b.yaml"),
    KnownTarget("nvidia/Nemotron-H-8B-Reasoning-128K", RESEARCH_ONLY, preset="nemotron_h_8b.yaml"),
    KnownTarget("nvidia/Nemotron-H-47B-Base-8K", RESEARCH_ONLY, ("nvidia/Nemotron-H-47B",)),
    KnownTarget("nvidia/Nemotron-H-47B-Reasoning-128K", RESEARCH_ONLY),
    KnownTarget("nvidia/Nemotron-H-56B-Base-8K", RESEARCH_ONLY, ("nvidia/Nemotron-H-56B",)),
    KnownTarget(
        "nvidia/NVIDIA-Nemotron-Nano-9B-v2", NVIDIA_OPEN, ("nvidia/Nemotron-Nano-9B-v2",), "nemotron_nano_9b_v2.yaml"
    ),
    KnownTarget("nvidia/NVIDIA-Nemotron-Nano-9B-v2-Base", NVIDIA_OPEN, preset="nemotron_nano_9b_v2.yaml"),
    KnownTarget("nvidia/NVIDIA-Nemotron-Nano-12B-v2", NVIDIA_OPEN, ("nvidia/Nemotron-Nano-12B-v2",)),
    KnownTarget("nvidia/NVIDIA-Nemotron-3-Nano-4B-BF16", NEMOTRON_OPEN, ("nvidia/Nemotron-3-Nano-4B",)),
    KnownTarget(
        "nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16",
        NEMOTRON_OPEN,
        ("nvidia/Nemotron-3-Nano-30B-A3B",),
        "nemotron_3_nano_30b.yaml",
    ),
    KnownTarget("nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-Base-BF16", NEMOTRON_OPEN, preset="nemotron_3_nano_30b.yaml"),
    KnownTarget("nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-FP8", NEMOTRON_OPEN, preset="nemotron_3_nano_30b.yaml"),
    KnownTarget("nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-NVFP4", NEMOTRON_OPEN, preset="nemotron_3_nano_30b.yaml"),
    KnownTarget("nvidia/NVIDIA-Nemotron-3-Super-120B-A12B-FP8", NEMOTRON_OPEN),
    KnownTarget("nvidia/NVIDIA-Nemotron-3-Super-120B-A12B-NVFP4", NEMOTRON_OPEN),
    KnownTarget("nvidia/NVIDIA-Nemotron-3-Ultra-550B-A55B-BF16", OPEN_MDW),
    KnownTarget("nvidia/NVIDIA-Nemotron-3.5-Lightning-30B-A3B-NVFP4", OPEN_MDW),
    KnownTarget("nvidia/Llama-3.1-Nemotron-Nano-8B-v1"),
    KnownTarget("nvidia/Llama-3_3-Nemotron-Super-49B-v1"),
    KnownTarget("nvidia/Nemotron-Mini-4B-Instruct"),
)

ALIASES = {alias: known.repository for known in KNOWN for alias in known.aliases}


def known_target(name: str) -> KnownTarget | None:
    """The entry for a repository, an alias, or a folder named like a repository's last part; None without one."""
    repository = ALIASES.get(name, name)
    last = repository.rstrip("/").rsplit("/", 1)[-1]
    return next((known for known in KNOWN if known.repository.rsplit("/", 1)[-1] == last), None)
