"""A target's config.json as transformers reads it: the config class of its type fills in what the file leaves out."""

import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from nemotron_dspark.errors import InputError
from nemotron_dspark.targets.spec import MLP, LayerKind, TargetSpec, weight_names

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_NOT_FOR_THE_CLASS = ("model_type", "transformers_version")


class ConfigFile:
    """One target's config: ``config[key]`` is the file's value or the default of the type's config class.

    Which keys the file itself has is asked of ``states`` and ``require``. Values that shape a draft are read with
    ``size`` and ``rope_theta``: a default taken for one of them becomes a sentence in ``assumed``.
    """

    def __init__(self, stated: Mapping[str, Any], name: str):
        self.stated = stated  # the file's own keys
        self.name = name  # of the target, for messages
        self.assumed: list[str] = []

    @functools.cached_property
    def built(self) -> "PreTrainedConfig":
        """The config object that transformers builds a model with; `InputError` where it refuses the file."""
        from transformers import AutoConfig

        values = {key: _decoded(value) for key, value in self.stated.items() if key not in _NOT_FOR_THE_CLASS}
        try:
            return AutoConfig.for_model(self.stated["model_type"], **values)
        except Exception as error:  # whatever the library's validation raises
            raise InputError(
                f"transformers refuses the config of {self.name}: {' '.join(str(error).split())}.",
                "Restore config.json from the checkpoint's repository.",
            ) from None

    @functools.cached_property
    def _values(self) -> dict[str, Any]:
        return self.built.to_dict()

    def __getitem__(self, key: str) -> Any:
        return self._values[key]

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def get(self, key: str, default: Any = None) -> Any:
        return self._values.get(key, default)

    def text_config(self) -> "ConfigFile":
        """The config of the language model inside a model of several modalities; what it assumes is assumed here."""
        inner = ConfigFile(self.require("text_config"), self.name)
        inner.assumed = self.assumed
        return inner

    def states(self, *keys: str) -> bool:
        """True when the file has one of ``keys``, and not as null."""
        return any(self.stated.get(key) is not None for key in keys)

    def require(self, *keys: str) -> Any:
        """The first of ``keys`` that the file has; `InputError` when it has none: a default would be another model."""
        for key in keys:
            if self.states(key):
                return self.stated[key]
        raise InputError(
            f"The target's config.json has no {' or '.join(keys)}.",
            "Restore the file from the checkpoint's repository.",
        )

    def size(self, key: str) -> int:
        """The whole number ``key``."""
        value = int(self[key])
        if not self.states(key):
            self._took_default(f"{key} {value}")
        return value

    def rope_theta(self) -> float:
        """The base of the rotary embedding; of several, that of the layers that see everything."""
        rope = self["rope_parameters"]
        theta = float(rope.get("full_attention", rope)["rope_theta"])
        if not self.stated.get("rope_parameters") and not self.states("rope_theta"):
            self._took_default(f"rope theta {theta:g}")
        return theta

    def positions(self) -> int:
        """How many positions the model is made for."""
        if "max_position_embeddings" in self:
            return self.size("max_position_embeddings")
        self.assumed.append("max_position_embeddings 32768: the target has no limit, and that is Qwen3's default.")
        return 32768

    def _took_default(self, value: str) -> None:
        self.assumed.append(f"{value}: the config gives none and that is the transformers default.")


def _decoded(value: Any) -> Any:
    """``value`` without the spelling that transformers has for what JSON cannot say: ``{"__float__": "Infinity"}``."""
    if isinstance(value, list):
        return [_decoded(item) for item in value]
    if isinstance(value, dict):
        if "__float__" in value:
            return float(value["__float__"])
        return {key: _decoded(item) for key, item in value.items()}
    return value


def fill_spec(config: ConfigFile, *, layers: Sequence[LayerKind], mlp: MLP = "gated", **special: Any) -> TargetSpec:
    """A spec with the fields that most configs spell alike; ``special`` are those that a family reads otherwise."""
    if "intermediate_size" not in special:
        special["intermediate_size"] = config.size("intermediate_size") if mlp in ("gated", "plain") else None
    if "rope_theta" not in special:
        special["rope_theta"] = config.rope_theta()
    hidden = int(config.require("hidden_size"))
    heads = config.size("num_attention_heads") if "num_attention_heads" in config else 0
    common: dict[str, Any] = {
        "vocab_size": config.size("vocab_size"),
        "num_attention_heads": heads,
        "num_key_value_heads": int(config.get("num_key_value_heads") or heads),
        "head_dim": int(config.get("head_dim") or hidden // max(heads, 1)),
        "norm_eps": float(config.get("rms_norm_eps") or config.get("norm_eps") or config["layer_norm_epsilon"]),
        "max_position_embeddings": config.positions(),
        "tie_word_embeddings": bool(config["tie_word_embeddings"]),
        "names": weight_names(),
    }
    model_type = config.stated["model_type"]
    return TargetSpec(config.name, model_type, tuple(layers), hidden, mlp=mlp, **(common | special))


def listed_layers(
    listed: Sequence[str], kinds: Mapping[str, LayerKind], config: ConfigFile | None = None
) -> tuple[LayerKind, ...]:
    """The layers whose names are ``listed``.

    Raises:
        InputError: a name that is not in ``kinds``, or another number of layers than ``config`` states.
    """
    unknown = sorted({str(kind) for kind in listed} - set(kinds))
    if unknown:
        raise InputError(
            f"The target's config.json names an unknown layer kind {unknown[0]!r}.", f"Known kinds: {', '.join(kinds)}."
        )
    stated = config.stated.get("num_hidden_layers") if config is not None else None
    if stated is not None and int(stated) != len(listed):
        raise InputError(
            f"The target's config.json lists {len(listed)} layers, but num_hidden_layers says {stated}.",
            "Restore the file from the checkpoint's repository.",
        )
    return tuple(kinds[kind] for kind in listed)
