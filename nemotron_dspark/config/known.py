"""The targets people name: repositories, the short names they go by, and what their own files may not say.

Only data, and each figure is checked by a test against the model it describes. A target that is not here works the
same; it just has no alias, and its licence, and without tokenizer files its chats and mask token, are unknown.
"""

import dataclasses
import functools
import re

RESEARCH_ONLY = "NVIDIA Internal Scientific Research and Development Model License (research only)"
NVIDIA_OPEN = "NVIDIA Open Model License"
NEMOTRON_OPEN = "NVIDIA Nemotron Open Model License"
OPEN_MDW = "OpenMDW-1.1"


@dataclasses.dataclass(frozen=True)
class KnownTarget:
    repository: str
    layers: int
    billions: float  # parameters as the model is built, so without layers for multi-token prediction
    licence: str | None = None  # None: not looked up; the model card says
    chat_format: str | None = None  # file in templates/; None: not known
    mask_token: int | None = None  # documented for its tokenizer; None: chosen when the tokenizer is at hand
    aliases: tuple[str, ...] = ()
    preset: str | None = None  # file in configs/
    weights: str = "BF16"  # type of the weights in the repository
    stop_ids: tuple[int, ...] = ()  # of its generation_config.json, where that is known to differ from config.json

    @property
    def full_precision(self) -> str | None:
        """The BF16 repository of a quantised one, if it is known; None for one that is BF16 itself."""
        if self.weights == "BF16":
            return None
        stem = self.repository.removesuffix(self.weights).removesuffix("-")
        return next((other.repository for other in KNOWN if other.repository in (stem, f"{stem}-BF16")), None)


# <SPECIAL_990>, reserved in every Nemotron tokenizer of 131072 ids, is what NVIDIA's own drafts use.
_Nemotron = functools.partial(KnownTarget, mask_token=990)
_H = functools.partial(_Nemotron, licence=RESEARCH_ONLY, chat_format="plain")
_H_REASONING = functools.partial(_Nemotron, licence=RESEARCH_ONLY, chat_format="nemotron_h_reasoning")
_9B_V2 = functools.partial(_Nemotron, layers=56, billions=8.888, licence=NVIDIA_OPEN, preset="nemotron_nano_9b_v2.yaml")
_12B_V2 = functools.partial(
    _Nemotron, layers=62, billions=12.310, licence=NVIDIA_OPEN, preset="nemotron_nano_12b_v2.yaml"
)
_3_4B = functools.partial(
    _Nemotron,
    layers=42,
    billions=3.974,
    licence=NEMOTRON_OPEN,
    chat_format="nemotron_3",
    preset="nemotron_3_nano_4b.yaml",
)
_3_30B = functools.partial(
    _Nemotron, layers=52, billions=31.578, licence=NEMOTRON_OPEN, preset="nemotron_3_nano_30b.yaml"
)
_3_SUPER = functools.partial(
    _Nemotron, layers=88, billions=120.669, licence=NEMOTRON_OPEN, preset="nemotron_3_super.yaml"
)
_3_ULTRA = functools.partial(_Nemotron, layers=108, billions=549.309, licence=OPEN_MDW, chat_format="nemotron_3_ultra")
_LIGHTNING = functools.partial(
    _Nemotron,
    layers=52,
    billions=31.578,
    licence=OPEN_MDW,
    chat_format="nemotron_3",
    preset="nemotron_3_5_lightning.yaml",
    stop_ids=(2, 11),
)

KNOWN = (
    _H("nvidia/Nemotron-H-4B-Base-8K", 52, 4.489, aliases=("nvidia/Nemotron-H-4B",)),
    _H(
        "nvidia/Nemotron-H-8B-Base-8K",
        52,
        8.101,
        aliases=("nvidia/Nemotron-H-8B", "nvidia/Nemotron-H-8B-Base"),
        preset="nemotron_h_8b.yaml",
    ),
    _H_REASONING(
        "nvidia/Nemotron-H-8B-Reasoning-128K",
        52,
        8.101,
        aliases=("nvidia/Nemotron-H-8B-Reasoning",),
        preset="nemotron_h_8b_reasoning.yaml",
    ),
    _H("nvidia/Nemotron-H-47B-Base-8K", 98, 46.792, aliases=("nvidia/Nemotron-H-47B",)),
    _H_REASONING("nvidia/Nemotron-H-47B-Reasoning-128K", 98, 46.792, aliases=("nvidia/Nemotron-H-47B-Reasoning",)),
    _H("nvidia/Nemotron-H-56B-Base-8K", 118, 56.324, aliases=("nvidia/Nemotron-H-56B",)),
    _9B_V2(
        "nvidia/NVIDIA-Nemotron-Nano-9B-v2", chat_format="nemotron_nano_v2", aliases=("nvidia/Nemotron-Nano-9B-v2",)
    ),
    _9B_V2("nvidia/NVIDIA-Nemotron-Nano-9B-v2-Base"),
    _9B_V2("nvidia/NVIDIA-Nemotron-Nano-9B-v2-FP8", chat_format="nemotron_nano_v2", weights="FP8"),
    _9B_V2("nvidia/NVIDIA-Nemotron-Nano-9B-v2-NVFP4", chat_format="nemotron_nano_v2", weights="NVFP4"),
    _12B_V2(
        "nvidia/NVIDIA-Nemotron-Nano-12B-v2", chat_format="nemotron_nano_v2", aliases=("nvidia/Nemotron-Nano-12B-v2",)
    ),
    _12B_V2("nvidia/NVIDIA-Nemotron-Nano-12B-v2-Base"),
    _3_4B(
        "nvidia/NVIDIA-Nemotron-3-Nano-4B-BF16",
        aliases=("nvidia/Nemotron-3-Nano-4B", "nvidia/NVIDIA-Nemotron-3-Nano-4B"),
    ),
    _3_4B("nvidia/NVIDIA-Nemotron-3-Nano-4B-FP8", weights="FP8"),
    _3_30B(
        "nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16",
        chat_format="nemotron_3",
        aliases=("nvidia/Nemotron-3-Nano-30B-A3B", "nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B"),
        stop_ids=(2, 11),
    ),
    _3_30B("nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-Base-BF16"),
    _3_30B("nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-FP8", chat_format="nemotron_3", weights="FP8", stop_ids=(2, 11)),
    _3_30B("nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-NVFP4", chat_format="nemotron_3", weights="NVFP4", stop_ids=(2, 11)),
    _3_SUPER(
        "nvidia/NVIDIA-Nemotron-3-Super-120B-A12B-BF16",
        chat_format="nemotron_3_super",
        aliases=("nvidia/Nemotron-3-Super-120B-A12B", "nvidia/NVIDIA-Nemotron-3-Super-120B-A12B"),
    ),
    _3_SUPER("nvidia/NVIDIA-Nemotron-3-Super-120B-A12B-Base-BF16"),
    _3_SUPER("nvidia/NVIDIA-Nemotron-3-Super-120B-A12B-FP8", chat_format="nemotron_3_super", weights="FP8"),
    _3_SUPER("nvidia/NVIDIA-Nemotron-3-Super-120B-A12B-NVFP4", chat_format="nemotron_3_super", weights="NVFP4"),
    _3_ULTRA(
        "nvidia/NVIDIA-Nemotron-3-Ultra-550B-A55B-BF16",
        aliases=("nvidia/Nemotron-3-Ultra-550B-A55B", "nvidia/NVIDIA-Nemotron-3-Ultra-550B-A55B"),
    ),
    _3_ULTRA("nvidia/NVIDIA-Nemotron-3-Ultra-550B-A55B-NVFP4", weights="NVFP4"),
    _LIGHTNING(
        "nvidia/NVIDIA-Nemotron-3.5-Lightning-30B-A3B-BF16",
        aliases=("nvidia/Nemotron-3.5-Lightning-30B-A3B", "nvidia/NVIDIA-Nemotron-3.5-Lightning-30B-A3B"),
    ),
    _LIGHTNING("nvidia/NVIDIA-Nemotron-3.5-Lightning-30B-A3B-NVFP4", weights="NVFP4"),
    KnownTarget("nvidia/Llama-3.1-Nemotron-Nano-8B-v1", 32, 8.030, chat_format="llama_nemotron"),
    KnownTarget("nvidia/Llama-3_3-Nemotron-Super-49B-v1", 80, 49.867, chat_format="llama_nemotron"),
    KnownTarget("nvidia/Nemotron-Mini-4B-Instruct", 32, 4.191, chat_format="nemotron_mini"),
)

ALIASES = {alias: known.repository for known in KNOWN for alias in known.aliases}

_SNAPSHOT = re.compile(r"models--[^/]+--([^/]+)/snapshots/[^/]+$")  # a folder of the hub's local cache


def known_target(name: str) -> KnownTarget | None:
    """The entry for a repository, an alias, or a folder named like one of them; None without one.

    Folders may be called owner--repository, or be a snapshot in the hub's cache. Capitals do not matter.
    """
    path = name.replace("\\", "/").rstrip("/")
    snapshot = _SNAPSHOT.search(path)
    last = snapshot.group(1) if snapshot else path.rsplit("/", 1)[-1].rsplit("--", 1)[-1]
    return _by_last_part().get(last.lower())


@functools.cache
def _by_last_part() -> dict[str, KnownTarget]:
    found = {alias.rsplit("/", 1)[-1].lower(): known for known in KNOWN for alias in known.aliases}
    return found | {known.repository.rsplit("/", 1)[-1].lower(): known for known in KNOWN}
