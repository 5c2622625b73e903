"""The bundle: routers and unsafe experts in one folder that opens whole and verified, or not at all.

    safemoe.json         canonical JSON: base, experts in index order, both tensor tables, settings, evals
    routers.safetensors  the trained gate, float32
    experts.sealed       the experts, encrypted in chunks under a key that depends on the two files above
    signature.json       optional: Ed25519 over the SHA-256 of every other file in the folder

    ikm     = sha256(router file) | sha256(canonical base identity) | sha256(safemoe.json) | sha256(stretched secret)
    key     = HKDF-SHA256(ikm, salt, info, 32 bytes)
    chunk i = AES-256-GCM(key, nonce = prefix | u32be i | u8 (1 if last), aad = header | sha256(safemoe.json))

So the experts open only with their own gate, manifest and base, every byte of them intact. **Binding, not secrecy**:
whoever holds the bundle holds all that the key is made of, and can open it on purpose. A secret adds confidentiality,
a signature authenticity. The format is our own choice; the paper says nothing of how experts are kept.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt
from safetensors.torch import load as tensors_from_bytes
from safetensors.torch import save as tensors_to_bytes
from torch import Tensor

from tempering.core.quarantine import BUNDLE
from tempering.core.run import atomic_write, replace_folder
from tempering.methods.safemoe import manifest as manifests
from tempering.methods.safemoe.experts import Experts
from tempering.methods.safemoe.guards import require_mixture
from tempering.methods.safemoe.identity import identifying, require_base
from tempering.methods.safemoe.manifest import Manifest, TensorRow, canonical

MANIFEST, ROUTERS, EXPERTS, SIGNATURE = BUNDLE, "routers.safetensors", "experts.sealed", "signature.json"
FILES = (MANIFEST, ROUTERS, EXPERTS, SIGNATURE)
TEMPLATES = "additional_chat_templates"
"""The folder in which transformers saves what chat templates a tokenizer has beside its own."""

HEADER = struct.Struct("<8sI32s7s")  # magic, chunk size in bytes, salt, nonce prefix
MAGIC, PAYLOAD_MAGIC = b"TEMPERX1", b"SMXP1\0\0\0"
INFO = b"tempering/safemoe/experts/1"
CHUNK, LARGEST_CHUNK, TAG = 1 << 20, 1 << 26, 16
STRETCH = 1 << 17
"""Cost of scrypt (n): some tenths of a second and 128 MiB a guess."""
LARGEST_JSON = 1 << 24
"""Bytes that a manifest or a signature may have: one of 128 layers and 100 experts has under 1 MiB."""


class BundleError(ValueError):
    """A bundle that must not be used: `step` of the verification that failed, and the `reason`."""

    def __init__(self, step: str, reason: str) -> None:
        self.step, self.reason = step, reason
        super().__init__(f"the bundle is refused at step '{step}': {reason}; nothing of it was loaded")


class OpenBundle(NamedTuple):
    """A bundle whose every byte was verified."""

    experts: Experts
    routers: dict[str, Tensor]
    manifest: dict[str, Any]


def seal(
    folder: Path,
    experts: Experts,
    routers: dict[str, Tensor],
    manifest: dict[str, Any],
    *,
    secret: bytes | None = None,
    signing_key: bytes | None = None,
    chunk: int = CHUNK,
) -> None:
    """Write a bundle, verify it by opening it again, and only then put it in place; other files there stay.

    `manifest`: `settings`, `control`, `data`, `evals` and what else the method records. What this module records
    itself (`manifest.Manifest`) is replaced, so that the manifest of an open bundle can be sealed again.
    `secret`: 16 bytes or more, stretched by scrypt. `signing_key`: 32 bytes of an Ed25519 private key.

    Raises:
        ValueError: tensors that do not fit each other or are not finite, a manifest that is not JSON, a short secret.
    """
    if not 1 <= chunk <= LARGEST_CHUNK:
        raise ValueError(f"chunk must be 1 to {LARGEST_CHUNK} bytes, got {chunk}")
    router_file = tensors_to_bytes(
        {manifests.on_disk(name): v.detach().cpu().contiguous() for name, v in routers.items()}
    )
    content = manifests.describe(experts, routers, manifest, hashlib.sha256(router_file).hexdigest(), bool(secret))
    manifest_file = canonical(content)
    table = manifests.expert_table(experts)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        copy_others(folder, temporary)
        atomic_write(temporary / MANIFEST, manifest_file)
        atomic_write(temporary / ROUTERS, router_file)
        salt, prefix = os.urandom(32), os.urandom(7)
        header = HEADER.pack(MAGIC, chunk, salt, prefix)
        key = _key(router_file, experts.base, manifest_file, _stretched(secret, salt), salt)
        sealed = _encrypted(_payload(experts, table), chunk, key, header, manifest_file)
        atomic_write(temporary / EXPERTS, sealed)
        if signing_key is not None:
            sign(temporary, signing_key)
        public_key = None if signing_key is None else public_key_of(signing_key)
        _verified(temporary, experts.base, secret, public_key)
        temporary.chmod(0o755)
        replace_folder(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def open_bundle(
    folder: Path, base_identity: dict[str, Any], *, secret: bytes | None = None, public_key: bytes | None = None
) -> OpenBundle:
    """Verify a bundle from end to end and return what is in it.

    In this order: manifest, routers, base, signature (where `public_key` is given: 32 bytes), experts.

    Raises:
        BundleError: naming the step that failed.
        UnsafeExpertAccess: it is a control, or routes to one expert at a time, and the override is not there.
    """
    found = _verified(Path(folder), base_identity, secret, public_key)
    require_mixture(found.manifest)
    return found


def copy_others(folder: Path, other: Path) -> None:
    """Copy what is in a bundle's folder beside the bundle: tokenizer and card.

    Raises:
        ValueError: something there is no plain file; a link could bring in what was never meant to be given away.
    """
    for name in _files(folder) if folder.is_dir() else ():
        if name not in FILES:
            (other / name).parent.mkdir(parents=True, exist_ok=True)
            with _opened(folder, name) as file:
                (other / name).write_bytes(file.read())


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read a bundle's manifest alone, for cards and reports; nothing of it is verified but its form.

    Raises:
        BundleError: it is not there, or not a manifest.
    """
    with _step("manifest"):
        return manifests.parse(_read(Path(folder), MANIFEST, LARGEST_JSON))[1]


def is_bundle(folder: Path) -> bool:
    """Whether a folder is meant to be a bundle; one that was cut short is too."""
    return any((folder / name).exists() for name in FILES[:3])


# --- verification -------------------------------------------------------------------------------------


def _verified(folder: Path, base: dict[str, Any], secret: bytes | None, public_key: bytes | None) -> OpenBundle:
    with _step("manifest"):
        manifest_file = _read(folder, MANIFEST, LARGEST_JSON)
        known, content = manifests.parse(manifest_file)
    with _step("routers"):
        router_file = _read(folder, ROUTERS, manifests.router_bytes(known) + LARGEST_JSON)
        if hashlib.sha256(router_file).hexdigest() != known.routers.sha256:
            raise ValueError(f"{ROUTERS} is not the file that the manifest names: changed, or of another bundle")
        routers = {manifests.in_memory(name): tensor for name, tensor in tensors_from_bytes(router_file).items()}
        manifests.require_routers(routers, known)
    with _step("base"):
        require_base(known.base, base)
    if public_key is not None:
        with _step("signature"):
            _require_signature(folder, public_key)
    with _step("experts"):
        if known.secret != bool(secret):
            raise ValueError(
                "it was sealed with a secret, and none was given: name it in bundle.secret_env"
                if known.secret
                else "it was sealed without a secret, and one was given: leave out bundle.secret_env"
            )
        experts = _experts(folder, known, base, router_file, manifest_file, secret)
    return OpenBundle(experts, routers, content)


def _experts(
    folder: Path,
    known: Manifest,
    base: dict[str, Any],
    router_file: bytes,
    manifest_file: bytes,
    secret: bytes | None,
) -> Experts:
    """Decrypt the container into one buffer, of which the tensors are views."""
    lead = _lead(known.tensors)
    start, size = len(lead), len(lead) + manifests.end_of(known.tensors)
    with _opened(folder, EXPERTS) as file:
        header = file.read(HEADER.size)
        if len(header) != HEADER.size:
            raise ValueError(f"{EXPERTS} ends within its header")
        magic, chunk, salt, prefix = HEADER.unpack(header)
        if magic != MAGIC or not 1 <= chunk <= LARGEST_CHUNK:
            raise ValueError(f"{EXPERTS} does not begin like a container of this format")
        count = -(-size // chunk)
        # Before anything is allocated: what the manifest declares must be what is there.
        if os.fstat(file.fileno()).st_size != HEADER.size + size + count * TAG:
            raise ValueError(
                f"{EXPERTS} has not the size that the manifest's tensors need: cut short, or not its own"
            )
        cipher = AESGCM(_key(router_file, base, manifest_file, _stretched(secret, salt), salt))
        aad = header + hashlib.sha256(manifest_file).digest()
        buffer = np.empty(size + manifests.ALIGNMENT, np.uint8)
        shift = -(buffer.ctypes.data + start) % manifests.ALIGNMENT
        plain = buffer[shift : shift + size]
        for i in range(count):
            part = plain[i * chunk : (i + 1) * chunk]
            try:
                part[:] = np.frombuffer(
                    cipher.decrypt(_nonce(prefix, i, count), file.read(len(part) + TAG), aad), np.uint8
                )
            except InvalidTag:
                raise ValueError(
                    f"chunk {i + 1} of {count} does not verify: {EXPERTS} was changed, belongs to other routers, "
                    "another manifest or another base, or the secret is another one"
                ) from None
    if plain[:start].tobytes() != lead:
        raise ValueError("the sealed tensor table is not the manifest's")
    return manifests.experts_from(known, torch.from_numpy(plain[start:]))


@contextmanager
def _step(name: str) -> Iterator[None]:
    """Turn whatever goes wrong with a file that anyone may have written into one kind of error."""
    try:
        yield
    except BundleError:
        raise
    except Exception as error:  # JSON, pydantic, safetensors and the file system each raise their own
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise BundleError(name, first) from error


@contextmanager
def _opened(folder: Path, name: str) -> Iterator[BufferedReader]:
    """Open a plain file; a link could lead out of what was checked, and a pipe would wait for ever."""
    path = folder / name
    if path.is_symlink():
        raise ValueError(f"{name} is a symbolic link; copy the bundle with its links followed")
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
    except FileNotFoundError:
        raise ValueError(f"{name} is missing from {folder}; was the bundle copied whole?") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ValueError(f"{name} is not a plain file")
    with os.fdopen(descriptor, "rb") as file:
        yield file


def _read(folder: Path, name: str, limit: int) -> bytes:
    with _opened(folder, name) as file:
        if (size := os.fstat(file.fileno()).st_size) > limit:
            raise ValueError(f"{name} has {size:,} bytes, more than the {limit:,} that it can need")
        return file.read()


# --- sealing ------------------------------------------------------------------------------------------


def _key(router_file: bytes, base: dict[str, Any], manifest_file: bytes, secret: bytes, salt: bytes) -> bytes:
    parts = (router_file, canonical(identifying(base)), manifest_file, secret)
    ikm = b"".join(hashlib.sha256(part).digest() for part in parts)
    return HKDF(SHA256(), 32, salt, INFO).derive(ikm)


def _stretched(secret: bytes | None, salt: bytes) -> bytes:
    """Make guessing a passphrase dear; nothing stays nothing. A random key costs the same and loses nothing."""
    if not secret:
        return b""
    if len(secret) < 16:
        raise ValueError(f"a secret needs 16 bytes or more, got {len(secret)}; 32 random ones are best")
    return Scrypt(salt=salt, length=32, n=STRETCH, r=8, p=1).derive(secret)


def _nonce(prefix: bytes, index: int, count: int) -> bytes:
    return prefix + struct.pack(">IB", index, index == count - 1)


def _payload(experts: Experts, table: list[TensorRow]) -> tuple[int, Iterator[bytes]]:
    """Return the number of bytes that are sealed, and these in blocks."""
    lead = _lead(table)

    def blocks() -> Iterator[bytes]:
        yield lead
        end = 0
        for row, tensor in zip(table, manifests.expert_tensors(experts).values(), strict=True):
            yield bytes(row.offset - end)
            yield tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
            end = row.offset + row.nbytes

    return len(lead) + manifests.end_of(table), blocks()


def _lead(table: list[TensorRow]) -> bytes:
    """What stands before the tensors: the table again, in a form that no reader of safetensors takes for its own."""
    listed = canonical({"tensors": [row.model_dump() for row in table]})
    return PAYLOAD_MAGIC + struct.pack("<Q", len(listed)) + listed


def _encrypted(
    payload: tuple[int, Iterator[bytes]], chunk: int, key: bytes, header: bytes, manifest_file: bytes
) -> Iterator[bytes]:
    """Yield the container: header, then chunks of one size, of which the last may be shorter."""
    (size, blocks), prefix = payload, header[-7:]
    count = -(-size // chunk)
    cipher, aad = AESGCM(key), header + hashlib.sha256(manifest_file).digest()
    yield header
    held, index = bytearray(), 0
    for block in blocks:
        rest = memoryview(block)
        while rest:
            taken = rest[: chunk - len(held)]
            rest = rest[len(taken) :]
            held += taken
            if len(held) == chunk or (index == count - 1 and len(held) == size - index * chunk):
                yield cipher.encrypt(_nonce(prefix, index, count), bytes(held), aad)
                held.clear()
                index += 1


# --- signature ----------------------------------------------------------------------------------------


def sign(folder: Path, signing_key: bytes) -> None:
    """Sign every other file of a bundle, tokenizer and card included; a later change of any needs a new signature.

    Raises:
        ValueError: not an Ed25519 private key of 32 bytes, or something in the folder is not a plain file.
    """
    key = Ed25519PrivateKey.from_private_bytes(signing_key)
    row = {"algorithm": "ed25519", "public_key": public_key_of(signing_key).hex()}
    row["signature"] = key.sign(canonical(_digests(folder))).hex()
    atomic_write(folder / SIGNATURE, canonical(row))


def public_key_of(signing_key: bytes) -> bytes:
    """Return the 32 bytes by which others verify what this key signs."""
    return Ed25519PrivateKey.from_private_bytes(signing_key).public_key().public_bytes_raw()


def _require_signature(folder: Path, public_key: bytes) -> None:
    """Verify with the given key; the one that the file names is only told in the error."""
    row = manifests.strict_json(_read(folder, SIGNATURE, LARGEST_JSON))
    try:
        Ed25519PublicKey.from_public_bytes(public_key).verify(
            bytes.fromhex(row["signature"]), canonical(_digests(folder))
        )
    except InvalidSignature:
        raise ValueError(
            f"{SIGNATURE} does not verify with the configured key: a file was changed, added or taken away since, or "
            f"another key signed it (it names {str(row.get('public_key'))[:16]})"
        ) from None


def _digests(folder: Path) -> dict[str, str]:
    found = {}
    for name in _files(folder):
        if name != SIGNATURE:
            with _opened(folder, name) as file:
                found[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def _files(folder: Path) -> list[str]:
    """Name all that is in a folder, and below it in the one that a tokenizer keeps its further templates in."""
    names = []
    for path in sorted(folder.iterdir()):
        is_templates = path.name == TEMPLATES and path.is_dir() and not path.is_symlink()
        names += [f"{TEMPLATES}/{inner.name}" for inner in sorted(path.iterdir())] if is_templates else [path.name]
    return names
