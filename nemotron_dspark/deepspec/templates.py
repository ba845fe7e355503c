"""DeepSpec's first extension point: our chat formats in its template registry."""

from nemotron_dspark.chat.format import bundled_formats
from nemotron_dspark.deepspec.checkout import deepspec_module


def register_templates() -> tuple[str, ...]:
    """Register every bundled format that DeepSpec's parser can handle; returns their names.

    A name that is there already is left alone, so this may be called any number of times, in any process.
    """
    parser = deepspec_module("deepspec.data.parser")
    usable = {name: found for name, found in bundled_formats().items() if found.deepspec is not None}
    for name, found in usable.items():
        try:
            parser.TEMPLATE_REGISTRY.get(name)
        except KeyError:
            parser.TEMPLATE_REGISTRY.register(name, parser.ChatTemplate(**found.deepspec))
    return tuple(usable)
